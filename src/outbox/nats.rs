use async_nats::connection::State;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{self, Context};
use async_nats::{Client, HeaderMap};

use super::publisher::{Outgoing, PublishError, Publisher};

/// Publishes to NATS JetStream: the subject is the topic, and a message is done when a stream has
/// acknowledged it.
///
/// The id of the message is its `Nats-Msg-Id`: within its duplicate window (two minutes unless
/// configured otherwise), the stream keeps one of those that are published again. After that, the
/// [inbox](crate::inbox) does.
///
/// Make the stream beforehand: a message that no stream takes is tried again, and then dead.
///
/// ```no_run
/// use tower_idempotency::PgStore;
/// use tower_idempotency::outbox::{NatsPublisher, Relay};
///
/// # async fn example(store: PgStore) -> Result<(), Box<dyn std::error::Error>> {
/// let client = async_nats::connect("nats://localhost").await?;
/// let publisher = NatsPublisher::new(client).with_subject_prefix("shop.");
/// let relay = Relay::new(store, publisher).spawn();
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct NatsPublisher {
    client: Client,
    context: Context,
    prefix: String,
}

impl NatsPublisher {
    /// A publisher over `client`, which connects again by itself.
    pub fn new(client: Client) -> Self {
        Self {
            context: jetstream::new(client.clone()),
            client,
            prefix: String::new(),
        }
    }

    /// What comes before the topic in the subject. Default: nothing.
    pub fn with_subject_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }
}

impl Publisher for NatsPublisher {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        // The client would keep it, and the acknowledgement would only time out.
        if self.client.connection_state() != State::Connected {
            return Err(PublishError::unavailable("not connected to NATS"));
        }
        let mut headers = HeaderMap::new();
        for (name, value) in message.headers() {
            headers.insert(name, value);
        }
        let subject = format!("{}{}", self.prefix, message.topic());
        let publish = PublishMessage::build()
            .headers(headers)
            .message_id(message.id().to_string())
            .payload(message.payload().to_owned().into());
        let acknowledged = match self.context.send_publish(subject, publish).await {
            Ok(sent) => sent.await,
            Err(error) => Err(error),
        };
        acknowledged.map(drop).map_err(|error| match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => PublishError::permanent(error),
            PublishErrorKind::BrokenPipe | PublishErrorKind::MaxAckPending => {
                PublishError::unavailable(error)
            }
            _ => PublishError::retryable(error),
        })
    }
}
