use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use super::message::MessageId;
use crate::identity::RecordId;

/// Hands messages to a broker, or to whoever else takes them.
///
/// # Contract
///
/// - `Ok` means that the receiver has the message for good: a broker's acknowledgement, not a write
///   to a socket. Until then the next of its partition waits.
/// - The same message may come again, under the same [`id`](Outgoing::id): after an error, after an
///   acknowledgement that was lost, from another relay. Pass the id on, so that receivers can tell.
/// - It need not give up by itself: the relay drops the future after half the lease.
///
/// ```
/// use tower_idempotency::outbox::{Outgoing, PublishError, Publisher};
///
/// struct Print;
///
/// impl Publisher for Print {
///     async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
///         println!("{} {}", message.id(), message.topic());
///         Ok(())
///     }
/// }
/// ```
pub trait Publisher: Send + Sync + 'static {
    /// Publishes one message.
    ///
    /// # Errors
    ///
    /// What becomes of the message is up to the [kind](PublishErrorKind) of the error.
    ///
    /// # Cancel safety
    ///
    /// Dropped when it takes too long, or when the relay ends; the message is published again.
    fn publish(&self, message: &Outgoing) -> impl Future<Output = Result<(), PublishError>> + Send;
}

impl<P: Publisher> Publisher for Arc<P> {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        P::publish(self, message).await
    }
}

/// A committed message on its way out. `Debug` shows neither payload nor headers.
#[derive(Clone)]
pub struct Outgoing {
    pub(super) id: MessageId,
    pub(super) topic: String,
    pub(super) aggregate: (String, String),
    pub(super) partition_key: String,
    pub(super) payload: String,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) operation: Option<RecordId>,
    pub(super) attempt: u32,
}

impl Outgoing {
    /// The same each time this message is published.
    #[must_use]
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// What happened.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// The type of what it is about; the topic, where nothing was said.
    #[must_use]
    pub fn aggregate_type(&self) -> &str {
        &self.aggregate.0
    }

    /// The id of what it is about; the message's own, where nothing was said.
    #[must_use]
    pub fn aggregate_id(&self) -> &str {
        &self.aggregate.1
    }

    /// Messages of one partition are published in the order of their commits.
    #[must_use]
    pub fn partition_key(&self) -> &str {
        &self.partition_key
    }

    /// The JSON, byte for byte as it was enqueued.
    #[must_use]
    pub fn payload(&self) -> &str {
        &self.payload
    }

    /// The message's headers and, for one that was written by a request under a key,
    /// [`OPERATION_HEADER`](super::OPERATION_HEADER); in the order of their names.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let pairs = self.headers.iter();
        pairs.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The record of the request that has written it.
    #[must_use]
    pub fn operation(&self) -> Option<RecordId> {
        self.operation
    }

    /// 1 for the first attempt to publish it.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing")
            .field("id", &self.id)
            .field("topic", &self.topic)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

/// Why a message was not published, or may not have been.
///
/// Its text and that of its sources is kept in the column `last_error`, and logged: leave the
/// payload out.
#[derive(Debug)]
pub struct PublishError {
    kind: PublishErrorKind,
    source: Box<dyn Error + Send + Sync>,
    retry_after: Option<Duration>,
}

/// What becomes of a message that was not published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PublishErrorKind {
    /// The receiver cannot be reached, whatever the message: it does not count as an attempt, and
    /// the relay pauses as a whole. Not for what one message may cause, which would never be given up.
    Unavailable,
    /// Trying again may help; counts as an attempt.
    Retryable,
    /// Trying again cannot help: dead at once.
    Permanent,
}

impl PublishError {
    /// [`PublishErrorKind::Unavailable`], because of `source`.
    pub fn unavailable(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(PublishErrorKind::Unavailable, source)
    }

    /// [`PublishErrorKind::Retryable`], because of `source`.
    pub fn retryable(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(PublishErrorKind::Retryable, source)
    }

    /// [`PublishErrorKind::Permanent`], because of `source`.
    pub fn permanent(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(PublishErrorKind::Permanent, source)
    }

    fn new(kind: PublishErrorKind, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self {
            kind,
            source: source.into(),
            retry_after: None,
        }
    }

    /// How long the receiver asks to be left alone, as [`retry_after`](crate::retry_after) reads it. The
    /// relay pauses for that long, if its own pause is shorter, but not for longer than its
    /// [longest](super::Relay::with_backoff).
    #[must_use]
    pub fn with_retry_after(mut self, pause: Duration) -> Self {
        self.retry_after = Some(pause);
        self
    }

    /// What becomes of the message.
    #[must_use]
    pub fn kind(&self) -> PublishErrorKind {
        self.kind
    }

    /// What the receiver asks for, or nothing.
    pub(super) fn retry_after(&self) -> Duration {
        self.retry_after.unwrap_or_default()
    }

    /// The causes in one line, no longer than a column of them should be.
    pub(super) fn chain(&self) -> String {
        let mut text = self.source.to_string();
        let mut next = self.source.source();
        while let Some(source) = next {
            text = format!("{text}: {source}");
            next = source.source();
        }
        text.chars().filter(|c| *c != '\0').take(1000).collect()
    }
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            PublishErrorKind::Unavailable => "receiver is unavailable",
            PublishErrorKind::Retryable => "message could not be published",
            PublishErrorKind::Permanent => "message cannot be published",
        })
    }
}

impl Error for PublishError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}
