use std::fmt;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::AMQPUri;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Error, ErrorKind,
};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::publisher::{Outgoing, PublishError, Publisher};
use crate::error::ConfigError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// AMQP 0-9-1: to be kept on disk by durable queues.
const PERSISTENT: u8 = 2;

/// Publishes to an exchange of RabbitMQ: the routing key is the topic, and a message is done when
/// the broker has confirmed it.
///
/// Messages are persistent and mandatory: one that no queue is bound for is not done, and tried
/// again. The id of the message is its `message-id`. Where a confirmation is lost, the message comes
/// again under the same id; RabbitMQ does not tell them apart, so let receivers ask the
/// [inbox](crate::inbox).
///
/// It connects when first used, and again after a failure. `amqps` needs a `rustls` feature of `lapin`.
///
/// ```
/// use tower_idempotency::outbox::RabbitPublisher;
///
/// let publisher = RabbitPublisher::new("amqp://guest:guest@localhost:5672/%2f", "events")?;
/// assert!(!format!("{publisher:?}").contains("guest"));
/// assert!(RabbitPublisher::new("http://localhost", "events").is_err());
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
pub struct RabbitPublisher {
    uri: AMQPUri,
    exchange: String,
    open: Mutex<Option<(Connection, Channel)>>,
}

impl RabbitPublisher {
    /// A publisher to `exchange`, which has to be there, on the broker at `uri`.
    ///
    /// # Errors
    ///
    /// A `uri` that is not one of AMQP, an `exchange` of more than 255 bytes.
    pub fn new(uri: &str, exchange: &str) -> Result<Self, ConfigError> {
        if exchange.len() > 255 {
            return Err(ConfigError::new("exchange", "must be at most 255 bytes"));
        }
        Ok(Self {
            uri: uri
                .parse()
                .map_err(|error: String| ConfigError::new("uri", error))?,
            exchange: exchange.to_owned(),
            open: Mutex::default(),
        })
    }

    /// The open channel, or a new one.
    async fn channel(&self) -> Result<Channel, PublishError> {
        let mut open = self.open.lock().await;
        if let Some((connection, channel)) = &*open
            && connection.status().connected()
            && channel.status().connected()
        {
            return Ok(channel.clone());
        }
        *open = None;
        let (connection, channel) = timeout(CONNECT_TIMEOUT, connect(self.uri.clone()))
            .await
            .map_err(PublishError::unavailable)?
            .map_err(PublishError::unavailable)?;
        *open = Some((connection, channel.clone()));
        Ok(channel)
    }

    async fn send(&self, channel: &Channel, message: &Outgoing) -> Result<Confirmation, Error> {
        let options = BasicPublishOptions {
            mandatory: true,
            ..BasicPublishOptions::default()
        };
        let mut headers = FieldTable::default();
        for (name, value) in message.headers() {
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        let properties = BasicProperties::default()
            .with_message_id(message.id().to_string().into())
            .with_type(message.topic().into())
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_headers(headers);
        channel
            .basic_publish(
                self.exchange.as_str().into(),
                message.topic().into(),
                options,
                message.payload().as_bytes(),
                properties,
            )
            .await?
            .await
    }
}

async fn connect(uri: AMQPUri) -> Result<(Connection, Channel), Error> {
    let connection = Connection::connect_uri(uri, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel
        .confirm_select(ConfirmSelectOptions::default())
        .await?;
    Ok((connection, channel))
}

impl Publisher for RabbitPublisher {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        let channel = self.channel().await?;
        match self.send(&channel, message).await {
            Ok(Confirmation::Ack(None)) => Ok(()),
            Ok(Confirmation::Ack(Some(_))) => {
                Err(PublishError::retryable("no queue is bound for the topic"))
            }
            Ok(_) => Err(PublishError::retryable("not confirmed by the broker")),
            // It may be the message that the broker has closed the channel for.
            Err(error) if matches!(error.kind(), ErrorKind::ProtocolError(_)) => {
                Err(PublishError::retryable(error))
            }
            Err(error) => Err(PublishError::unavailable(error)),
        }
    }
}

impl fmt::Debug for RabbitPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitPublisher")
            .field("exchange", &self.exchange)
            .finish_non_exhaustive()
    }
}
