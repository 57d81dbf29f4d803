use std::fmt;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use super::publisher::{Outgoing, PublishError, Publisher};
use crate::error::ConfigError;
use crate::retry_after;

/// Reading the rest of a short answer is what lets its connection be used again.
const MAX_ANSWER: usize = 64 * 1024;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Publishes by `POST`, with the payload as body and `application/json` as its type.
///
/// The id of the message is the `Idempotency-Key` and the `Webhook-Id`, so that a receiver with
/// this crate's layer, or with an inbox, takes it in once; the topic is `Message-Topic`. Any 2xx
/// means that the receiver has the message. 400, 413, 415 and 422 say that it can never take it. A
/// connection that is refused, 429 and 503 say that the receiver takes nothing at present: the relay
/// pauses, and no attempt is counted. Everything else, a receiver that is too slow as well, counts as
/// an attempt; so answer 500, not 503, to what only this message may cause. Where the receiver says when
/// to come again ([`Retry-After`](crate::retry_after)), the relay waits for it.
///
/// The relay hangs up after half its lease (15 s), and a server may drop a handler whose client has
/// hung up: take messages in, in a task of its own, as `examples/payments/consumer.rs` does. The
/// message's own [headers](super::Message::with_header) are sent as they are.
///
/// Without TLS: for a receiver beside this process, in the same network, or behind a proxy that
/// speaks TLS. For `https`, implement [`Publisher`] with the client you use anyway.
///
/// ```
/// use tower_idempotency::outbox::HttpPublisher;
///
/// let publisher = HttpPublisher::new("http://events.internal/intake")?;
/// assert!(HttpPublisher::new("https://events.internal/intake").is_err());
///
/// let publisher = HttpPublisher::new("http://events.internal/intake?token=4711")?;
/// assert!(!format!("{publisher:?}").contains("4711"));
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct HttpPublisher {
    client: Client<HttpConnector, Full<Bytes>>,
    uri: Uri,
}

impl HttpPublisher {
    /// A publisher to `uri`. Connects when first used, and keeps connections open.
    ///
    /// # Errors
    ///
    /// What is not an absolute URI of the scheme `http`.
    pub fn new(uri: &str) -> Result<Self, ConfigError> {
        let parsed: Uri = uri
            .parse()
            .map_err(|error: http::uri::InvalidUri| ConfigError::new("uri", error.to_string()))?;
        if parsed.scheme() != Some(&http::uri::Scheme::HTTP) {
            return Err(ConfigError::new("uri", "must begin with http://"));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        Ok(Self {
            client: Client::builder(TokioExecutor::new()).build(connector),
            uri: parsed,
        })
    }

    fn request(&self, message: &Outgoing) -> Result<Request<Full<Bytes>>, http::Error> {
        let id = message.id().to_string();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header(header::CONTENT_TYPE, "application/json")
            .header("idempotency-key", &id)
            .header("webhook-id", &id)
            .header("message-topic", message.topic())
            .body(Full::from(message.payload().to_owned()))?;
        for (name, value) in message.headers() {
            let name = HeaderName::try_from(name)?;
            request
                .headers_mut()
                .insert(name, HeaderValue::try_from(value)?);
        }
        Ok(request)
    }
}

impl Publisher for HttpPublisher {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        let request = self.request(message).map_err(PublishError::permanent)?;
        let answer = match self.client.request(request).await {
            Ok(answer) => answer,
            Err(error) if error.is_connect() => return Err(PublishError::unavailable(error)),
            Err(error) => return Err(PublishError::retryable(error)),
        };
        let (parts, body) = answer.into_parts();
        // What it says beyond its status changes nothing, nor whether that comes to an end.
        let rest = Limited::new(body, MAX_ANSWER).collect();
        drop(tokio::time::timeout(ANSWER_TIMEOUT, rest).await);
        let status = parts.status;
        let failed = match status {
            _ if status.is_success() => return Ok(()),
            StatusCode::BAD_REQUEST
            | StatusCode::PAYLOAD_TOO_LARGE
            | StatusCode::UNSUPPORTED_MEDIA_TYPE
            | StatusCode::UNPROCESSABLE_ENTITY => PublishError::permanent,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                PublishError::unavailable
            }
            _ => PublishError::retryable,
        };
        let error = failed(format!("answered {status}"));
        Err(match retry_after(&parts.headers, SystemTime::now()) {
            Some(pause) => error.with_retry_after(pause),
            None => error,
        })
    }
}

/// The host alone: the rest may hold a secret.
impl fmt::Debug for HttpPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpPublisher")
            .field("host", &self.uri.host())
            .finish_non_exhaustive()
    }
}
