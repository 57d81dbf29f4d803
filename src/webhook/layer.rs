use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum_core::body::Body;
use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::Body as HttpBody;
use tower_layer::Layer;

use crate::body::{self, Whole};
use crate::error::ConfigError;
use crate::layer::longer_than_zero;
use crate::rejection::{Rejection, Renderer};
use crate::webhook::{Scheme, Webhook, WebhookEvent};

/// More would be held in memory for anybody who asks.
const MAX_BODY: usize = 1 << 29;

/// Lets signed webhooks of one provider through to a route, and answers everything else itself.
///
/// It belongs outside of an [`IdempotencyLayer`](crate::IdempotencyLayer), where authentication is,
/// and inside of nothing that changes a body: see [the module](crate::webhook). Every method is
/// checked.
///
/// ```
/// use axum::{Router, routing::post};
/// use tower_idempotency::webhook::{Scheme, WebhookEvent, WebhookLayer};
///
/// # fn main() -> Result<(), tower_idempotency::ConfigError> {
/// let scheme = Scheme::stripe("stripe").with_secret("whsec_5WbX5kEWLlfzsGNjH64I8lOOqUB6e8FH")?;
/// let app: Router = Router::new().route(
///     "/hooks/stripe",
///     post(|event: WebhookEvent| async move { event.id().to_owned() })
///         .layer(WebhookLayer::new(scheme)?),
/// );
/// # let _ = app;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct WebhookLayer {
    receiver: Arc<Receiver>,
}

/// What every service of a layer reads.
#[derive(Debug, Clone)]
pub(crate) struct Receiver {
    scheme: Scheme,
    request_limit: usize,
    request_timeout: Duration,
    renderer: Renderer,
}

impl WebhookLayer {
    /// A layer for deliveries of one scheme.
    ///
    /// # Errors
    ///
    /// `secret` when the scheme has no secret and no public key, `source` when its name is empty,
    /// longer than 255 bytes, or has more than visible ASCII.
    ///
    /// ```
    /// use tower_idempotency::webhook::{Scheme, WebhookLayer};
    ///
    /// let error = WebhookLayer::new(Scheme::github("github")).unwrap_err();
    /// assert_eq!(error.field(), "secret");
    /// ```
    pub fn new(scheme: Scheme) -> Result<Self, ConfigError> {
        scheme.validate()?;
        Ok(Self {
            receiver: Arc::new(Receiver {
                scheme,
                request_limit: 2 << 20,
                request_timeout: Duration::from_secs(30),
                renderer: Renderer::default(),
            }),
        })
    }

    /// The largest body in bytes; a larger one is answered 413. Default: 2 MiB, as in
    /// [`Policy::with_request_limit`](crate::Policy::with_request_limit) and in axum's own
    /// extractors, which have to be raised together. The body is in memory before its sender is
    /// known, so it costs as much as connections are allowed.
    ///
    /// # Errors
    ///
    /// `request_limit` over 512 MiB.
    ///
    /// ```
    /// # use tower_idempotency::webhook::{Scheme, WebhookLayer};
    /// # let scheme = Scheme::github("github").with_secret("It's a Secret to Everybody")?;
    /// // GitHub sends up to 25 MB.
    /// let layer = WebhookLayer::new(scheme)?.with_request_limit(25_000_000)?;
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_request_limit(self, bytes: usize) -> Result<Self, ConfigError> {
        if bytes > MAX_BODY {
            let reason = format!("must be at most {MAX_BODY} bytes, not {bytes}");
            return Err(ConfigError::new("request_limit", reason));
        }
        Ok(self.with(|receiver| receiver.request_limit = bytes))
    }

    /// How long a body may take to arrive. Default: 30 s; providers give up before.
    ///
    /// # Errors
    ///
    /// `request_timeout` of zero, or over a day.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::webhook::{Scheme, WebhookLayer};
    /// # let scheme = Scheme::github("github").with_secret("It's a Secret to Everybody")?;
    /// let layer = WebhookLayer::new(scheme)?.with_request_timeout(Duration::from_secs(10))?;
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_request_timeout(self, timeout: Duration) -> Result<Self, ConfigError> {
        let timeout = longer_than_zero("request_timeout", timeout)?;
        Ok(self.with(|receiver| receiver.request_timeout = timeout))
    }

    /// Makes answers of the layer's own errors. Default: [`Rejection::to_response`]. Keep clear of
    /// 2xx, which says that the event was taken, and of 410, which makes senders turn the webhook off.
    ///
    /// ```
    /// # use tower_idempotency::webhook::{Scheme, WebhookLayer};
    /// # let scheme = Scheme::github("github").with_secret("It's a Secret to Everybody")?;
    /// let layer = WebhookLayer::new(scheme)?
    ///     .with_renderer(|rejection| rejection.to_problem("https://docs.example.com/errors/"));
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn with_renderer(
        self,
        render: impl Fn(&Rejection) -> Response<Body> + Send + Sync + 'static,
    ) -> Self {
        self.with(|receiver| receiver.renderer = Renderer::new(render))
    }

    fn with(self, change: impl FnOnce(&mut Receiver)) -> Self {
        let mut receiver = Receiver::clone(&self.receiver);
        change(&mut receiver);
        Self {
            receiver: Arc::new(receiver),
        }
    }
}

impl<I> Layer<I> for WebhookLayer {
    type Service = Webhook<I>;

    fn layer(&self, inner: I) -> Webhook<I> {
        Webhook::new(inner, self.receiver.clone())
    }
}

impl Receiver {
    /// What is wrong with the head is said before the body is read.
    pub(crate) async fn receive<B>(
        &self,
        headers: &HeaderMap,
        body: B,
    ) -> Result<(WebhookEvent, Whole), Rejection>
    where
        B: HttpBody<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let arrived = SystemTime::now();
        let delivery = self.scheme.read(headers)?;
        let body = body::read_request(body, self.request_limit, self.request_timeout).await?;
        let event = self.scheme.accept(delivery, &body.bytes, arrived)?;
        Ok((event, body))
    }

    pub(crate) fn refuse(&self, rejection: &Rejection) -> Response<Body> {
        let (source, code) = (self.scheme.source(), rejection.code().as_str());
        tracing::info!(source, code, detail = rejection.detail(), "webhook refused");
        self.renderer.render(rejection)
    }
}
