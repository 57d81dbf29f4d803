use std::fmt;
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::AMQPUri;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Error, ErrorKind,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

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
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    channel: Option<(Connection, Channel)>,
    /// When it was last tried in vain.
    failed: Option<Instant>,
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
        let asked = Instant::now();
        let mut open = self.open.lock().await;
        if let Some((connection, channel)) = &open.channel
            && connection.status().connected()
            && channel.status().connected()
        {
            return Ok(channel.clone());
        }
        open.channel = None;
        // One try is for all who have waited for it. One after the other they would be given up by the
        // relay, which counts as an attempt.
        if open.failed.is_some_and(|failed| failed >= asked) {
            return Err(PublishError::unavailable("cannot connect to RabbitMQ"));
        }
        let connected = timeout(CONNECT_TIMEOUT, connect(self.uri.clone()));
        let connected = connected.await.map_err(PublishError::unavailable);
        match connected.and_then(|connected| connected.map_err(PublishError::unavailable)) {
            Ok((connection, channel)) => {
                open.channel = Some((connection, channel.clone()));
                Ok(channel)
            }
            Err(error) => {
                open.failed = Some(Instant::now());
                Err(error)
            }
        }
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use futures_util::future::join_all;
    use tokio::net::TcpListener;

    use super::*;
    use crate::outbox::PublishErrorKind;

    #[tokio::test]
    async fn g08_a_broker_that_is_silent_is_unavailable_to_all_who_wait_for_it_together() {
        // Connections are made by the kernel, and nobody says a word.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("amqp://{}", listener.local_addr().unwrap());
        let publisher = RabbitPublisher::new(&uri, "events").unwrap();
        let asked = Instant::now();
        for channel in join_all((0..3).map(|_| publisher.channel())).await {
            let error = channel.map(drop).unwrap_err();
            assert_eq!(error.kind(), PublishErrorKind::Unavailable);
        }
        // A relay waits for half a lease, 15 s.
        assert!(asked.elapsed() < 2 * CONNECT_TIMEOUT);
    }
}
