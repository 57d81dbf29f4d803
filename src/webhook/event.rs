use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum_core::extract::{FromRequestParts, OptionalFromRequestParts};
use axum_core::response::{IntoResponse, Response};
use http::StatusCode;
use http::request::Parts;

use crate::derived::{DerivedKey, key_of};
use crate::error::ConfigError;
use crate::fingerprint::Fingerprinter;
use crate::identity::Identity;
use crate::scope::Scope;

/// A provider's event, whose signature was found to be right.
///
/// A [`WebhookLayer`](crate::webhook::WebhookLayer) leaves it in the request's extensions. As an
/// extractor it is refused with 500 where no such layer covers the route.
///
/// ```
/// use axum::http::StatusCode;
/// use tower_idempotency::webhook::WebhookEvent;
///
/// async fn handler(event: WebhookEvent, body: String) -> StatusCode {
///     println!("{} of {}: {body}", event.id(), event.source());
///     StatusCode::NO_CONTENT
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookEvent {
    source: Arc<str>,
    id: String,
    timestamp: Option<SystemTime>,
}

impl WebhookEvent {
    /// `timestamp` in seconds since 1970.
    pub(crate) fn new(source: Arc<str>, id: String, timestamp: Option<u64>) -> Self {
        let since = |seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
        Self {
            source,
            id,
            timestamp: timestamp.and_then(since),
        }
    }

    /// The sender, as the [`Scheme`](crate::webhook::Scheme) names it.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The provider's id of the event, the same on every try: 1 to 255 visible characters of ASCII.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// When this try was signed, to the second; `None` where the scheme signs no time.
    #[must_use]
    pub fn timestamp(&self) -> Option<SystemTime> {
        self.timestamp
    }

    /// The source of the event, as the scope of an [`IdempotencyLayer`](crate::IdempotencyLayer). A
    /// request without an event has none.
    #[must_use]
    pub fn scope() -> Scope {
        Scope::extension::<Self>(|event| event.source())
    }

    /// The id of the event, as the key of an [`IdempotencyLayer`](crate::IdempotencyLayer). A header
    /// with a key is not looked at: it is not signed.
    #[must_use]
    pub fn derived_key() -> DerivedKey {
        DerivedKey::from_fn(|parts, _| of(parts).map(|event| event.id.clone())).alone()
    }

    /// Which record the event `id` of `source` has at a route (`POST /hooks/stripe`), to
    /// [`inspect`](crate::Store::inspect) it. Its key is a digest of the id; noted with
    /// [`IdempotencyContext::reference`](crate::IdempotencyContext::reference), the id itself can be
    /// looked up, too.
    ///
    /// ```
    /// use tower_idempotency::webhook::WebhookEvent;
    ///
    /// let record = WebhookEvent::identity("stripe", "POST /hooks/stripe", "evt_1")?;
    /// assert_eq!(record.scope(), "stripe");
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `route` that is not a method and a template.
    pub fn identity(source: &str, route: &str, id: &str) -> Result<Identity, ConfigError> {
        Identity::of_route(source, route, key_of(id, ""))
    }

    /// Compares events by their ids alone: a provider may write an event in another way on another
    /// try (`pending_webhooks` of Stripe), and its id says that it is the same.
    #[must_use]
    pub fn fingerprint() -> Fingerprinter {
        Fingerprinter::from_fn("webhook event 1", |parts, _| {
            of(parts).map(|event| event.id.clone().into_bytes())
        })
    }
}

fn of(parts: &Parts) -> Option<&WebhookEvent> {
    parts.extensions.get()
}

impl<S: Send + Sync> FromRequestParts<S> for WebhookEvent {
    type Rejection = MissingEvent;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MissingEvent> {
        of(parts).cloned().ok_or(MissingEvent)
    }
}

impl<S: Send + Sync> OptionalFromRequestParts<S> for WebhookEvent {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
        Ok(of(parts).cloned())
    }
}

/// No [`WebhookLayer`](crate::webhook::WebhookLayer) covers the route.
///
/// ```
/// use axum::{Router, body::Body, http::Request, routing::post};
/// use tower::ServiceExt;
/// use tower_idempotency::webhook::WebhookEvent;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // The layer was forgotten.
/// let app: Router = Router::new().route("/hooks", post(|_: WebhookEvent| async {}));
/// let answer = app.oneshot(Request::post("/hooks").body(Body::empty())?).await?;
/// assert_eq!(answer.status(), 500);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingEvent;

impl fmt::Display for MissingEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no webhook event: put a webhook layer on this route")
    }
}

impl std::error::Error for MissingEvent {}

impl IntoResponse for MissingEvent {
    fn into_response(self) -> Response {
        tracing::error!("{self}");
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    }
}
