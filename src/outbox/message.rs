use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use uuid::Uuid;

use super::error::{Limit, OutboxError};

/// The id of a message: a UUIDv7, the same each time the message is published.
///
/// ```
/// use tower_idempotency::outbox::MessageId;
///
/// let id: MessageId = "019c0a3e-5a80-7cc3-98c4-dc0c0c07398f".parse()?;
/// assert_eq!(id.to_string(), "019c0a3e-5a80-7cc3-98c4-dc0c0c07398f");
/// # Ok::<(), tower_idempotency::outbox::InvalidMessageId>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId([u8; 16]);

impl MessageId {
    /// The time in front keeps neighbours in time together in the index.
    pub(super) fn new() -> Result<Self, OutboxError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let millis = since.map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
        let mut random = [0; 10];
        getrandom::fill(&mut random).map_err(OutboxError::database)?;
        let id = uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid();
        Ok(Self(id.into_bytes()))
    }

    /// The id with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes of the UUID.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MessageId {
    type Err = InvalidMessageId;

    fn from_str(text: &str) -> Result<Self, InvalidMessageId> {
        let id = Uuid::try_parse(text).map_err(|_| InvalidMessageId)?;
        Ok(Self(id.into_bytes()))
    }
}

/// The text is no UUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidMessageId;

impl fmt::Display for InvalidMessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("message id is not a UUID")
    }
}

impl std::error::Error for InvalidMessageId {}

/// A message to be published once the transaction that writes it has committed.
///
/// What is wrong with it is said by [`enqueue`](super::enqueue), before anything is sent to the
/// database. Limits, in bytes: topic, aggregate type, id, header name: 255; partition key: 512;
/// header value: 1,024; 32 headers; payload: 256 KiB unless
/// [set otherwise](Self::with_max_payload).
///
/// ```
/// use tower_idempotency::outbox::Message;
///
/// let message = Message::new("charge.created", &("ch_1", 1200))
///     .with_aggregate("charge", "ch_1")
///     .with_partition_key("account-7")
///     .with_header("schema-version", "1");
/// // A payload is never shown.
/// assert!(!format!("{message:?}").contains("1200"));
/// ```
#[must_use]
pub struct Message {
    pub(super) topic: String,
    pub(super) payload: Result<String, serde_json::Error>,
    pub(super) aggregate: Option<(String, String)>,
    pub(super) partition_key: Option<String>,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) notify: bool,
    max_payload: usize,
}

/// Names that the relay, a protocol or a broker gives a meaning of its own.
const RESERVED: [&str; 9] = [
    super::OPERATION_HEADER,
    "connection",
    "content-length",
    "content-type",
    "host",
    "idempotency-key",
    "message-topic",
    "transfer-encoding",
    "webhook-id",
];

impl Message {
    /// A message with `payload` as JSON.
    ///
    /// `topic` says what happened (`charge.created`), in visible ASCII: it is the NATS subject and
    /// the RabbitMQ routing key.
    pub fn new<T: Serialize + ?Sized>(topic: impl Into<String>, payload: &T) -> Self {
        Self {
            topic: topic.into(),
            payload: serde_json::to_string(payload),
            aggregate: None,
            partition_key: None,
            headers: BTreeMap::new(),
            notify: false,
            max_payload: 256 * 1024,
        }
    }

    /// What the message is about. Messages about one aggregate are one partition, unless another is
    /// [chosen](Self::with_partition_key). Default: about nothing else than itself, in no order.
    pub fn with_aggregate(mut self, kind: impl Into<String>, id: impl Into<String>) -> Self {
        self.aggregate = Some((kind.into(), id.into()));
        self
    }

    /// The partition, within which messages are published in the order of their commits. Default:
    /// that of the [aggregate](Self::with_aggregate).
    pub fn with_partition_key(mut self, key: impl Into<String>) -> Self {
        self.partition_key = Some(key.into());
        self
    }

    /// A header; one of the same name is replaced. Names are tokens of RFC 9110, section 5.6.2, in
    /// lower case; values are visible ASCII and spaces. The names of HTTP's framing, those this
    /// crate uses itself, and those that begin with `nats-` are reserved.
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// The largest payload, in bytes of JSON. Default: 256 KiB, a quarter of what a NATS server
    /// takes unless configured otherwise.
    pub fn with_max_payload(mut self, bytes: usize) -> Self {
        self.max_payload = bytes;
        self
    }

    /// Whether the commit wakes relays that [listen](super::Relay::with_listen). Default: `false`:
    /// a transaction that notifies takes a lock of the whole database at its commit.
    pub fn with_notify(mut self, notify: bool) -> Self {
        self.notify = notify;
        self
    }

    pub(super) fn check(&self) -> Result<(), OutboxError> {
        text("topic", &self.topic, 255, |byte| byte.is_ascii_graphic())?;
        if let Some((kind, id)) = &self.aggregate {
            text("aggregate type", kind, 255, is_printable)?;
            text("aggregate id", id, 255, is_printable)?;
        }
        if let Some(key) = &self.partition_key {
            text("partition key", key, 512, is_printable)?;
        }
        self.check_headers()?;
        let len = self.payload.as_ref().map_or(0, String::len);
        if len > self.max_payload {
            let limit = Limit::Length(self.max_payload);
            return Err(OutboxError::invalid("payload", limit, len));
        }
        Ok(())
    }

    fn check_headers(&self) -> Result<(), OutboxError> {
        let count = self.headers.len();
        if count > 32 {
            return Err(OutboxError::invalid("headers", Limit::Count(32), count));
        }
        for (name, value) in &self.headers {
            text("header name", name, 255, is_lower_token)?;
            if RESERVED.contains(&name.as_str()) || name.starts_with("nats-") {
                let limit = Limit::Reserved;
                return Err(OutboxError::invalid("header name", limit, name.len()));
            }
            let visible = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
            if !value.is_empty() {
                text("header value", value, 1024, visible)?;
            }
        }
        Ok(())
    }

    /// The partition, and whether anybody else can be in it.
    pub(super) fn partition(&self) -> Option<String> {
        let of_aggregate = || {
            let (kind, id) = self.aggregate.as_ref()?;
            Some(format!("{kind}/{id}"))
        };
        self.partition_key.clone().or_else(of_aggregate)
    }
}

fn text(
    field: &'static str,
    value: &str,
    max: usize,
    allowed: impl Fn(u8) -> bool,
) -> Result<(), OutboxError> {
    if !(1..=max).contains(&value.len()) {
        return Err(OutboxError::invalid(field, Limit::Length(max), value.len()));
    }
    if !value.bytes().all(allowed) {
        return Err(OutboxError::invalid(field, Limit::Characters, value.len()));
    }
    Ok(())
}

fn is_printable(byte: u8) -> bool {
    !byte.is_ascii_control()
}

fn is_lower_token(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("topic", &self.topic)
            .field("payload", &self.payload.as_ref().map(String::len))
            .finish_non_exhaustive()
    }
}
