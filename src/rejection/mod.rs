mod code;
mod profile;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use axum_core::body::Body;
use http::header::{HeaderValue, LOCATION};
use http::{Response, StatusCode};

use crate::envelope::Envelope;
use crate::extract::References;

pub use code::Code;
pub use profile::Profile;

/// What the layer has to say to a client, before it becomes a response.
///
/// The [profile](Profile) of the route's policy makes an answer of it
/// ([`to_response`](Self::to_response)), unless the layer has a
/// [renderer](crate::IdempotencyLayer::with_renderer).
///
/// ```
/// use axum::{Router, body::Body, http::{Request, Response, header}, routing::post};
/// use tower::ServiceExt;
/// use tower_idempotency::{IdempotencyLayer, MemoryStore, Rejection, Scope};
///
/// fn plain(rejection: &Rejection) -> Response<Body> {
///     let mut response = Response::new(Body::from(rejection.code().title()));
///     *response.status_mut() = rejection.status();
///     if let Some(wait) = rejection.retry_after() {
///         response.headers_mut().insert(header::RETRY_AFTER, wait.as_secs().into());
///     }
///     response
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global()).with_renderer(plain);
/// let app = Router::new().route("/orders", post(|| async {}).layer(layer));
/// let answer = app.oneshot(Request::post("/orders").body(Body::empty())?).await?;
/// let body = axum::body::to_bytes(answer.into_body(), 1024).await?;
/// assert_eq!(body, "This route requires an idempotency key.");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Rejection {
    code: Code,
    profile: Profile,
    detail: Option<String>,
    retry_after: Option<Duration>,
    original: Option<Box<Original>>,
}

/// What is still known of an answer that was not kept.
#[derive(Debug, Clone)]
struct Original {
    status: StatusCode,
    location: Option<HeaderValue>,
    references: References,
}

impl Rejection {
    pub(crate) fn new(code: Code) -> Self {
        let retry_after = matches!(
            code,
            Code::BodyTimeout
                | Code::BodyUnreadable
                | Code::RequestInProgress
                | Code::AnswerNotRecorded
                | Code::StoreUnavailable
                | Code::Overloaded
                | Code::ShuttingDown
                | Code::TransactionConflict
        );
        Self {
            code,
            profile: Profile::Default,
            detail: None,
            retry_after: retry_after.then_some(Duration::from_secs(1)),
            original: None,
        }
    }

    pub(crate) fn with_profile(mut self, profile: &Profile) -> Self {
        self.profile = profile.clone();
        self
    }

    pub(crate) fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub(crate) fn with_retry(mut self) -> Self {
        self.retry_after = Some(Duration::from_secs(1));
        self
    }

    pub(crate) fn not_retained(tombstone: &Envelope, references: References) -> Self {
        let original = Original {
            status: tombstone.status(),
            location: tombstone.header(&LOCATION).cloned(),
            references,
        };
        Self {
            original: Some(Box::new(original)),
            ..Self::new(Code::ResponseNotRetained)
        }
    }

    /// Why.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// What exactly, where there is more to say than [`Code::title`]. Never a word of the stored
    /// request or of the key.
    #[must_use]
    pub fn detail(&self) -> Option<&str> {
        self.detail.as_deref()
    }

    /// When a retry can help, in whole seconds and never at once; `None` when it cannot.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The status of an answer that was given but not kept, with
    /// [`ResponseNotRetained`](Code::ResponseNotRetained).
    #[must_use]
    pub fn original_status(&self) -> Option<StatusCode> {
        self.original.as_ref().map(|original| original.status)
    }

    /// The references that the handler left, with [`ResponseNotRetained`](Code::ResponseNotRetained).
    #[must_use]
    pub fn references(&self) -> &[(String, String)] {
        let references = self.original.as_ref().map(|original| &original.references);
        references.map_or(&[], |references| references.as_slice())
    }

    /// The status that the route's profile gives it.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.profile.status(self.code)
    }
}

/// Turns a [`Rejection`] into an answer.
#[derive(Clone)]
pub(crate) struct Renderer(Arc<Render>);

type Render = dyn Fn(&Rejection) -> Response<Body> + Send + Sync;

impl Renderer {
    pub(crate) fn new(
        render: impl Fn(&Rejection) -> Response<Body> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(render))
    }

    pub(crate) fn render(&self, rejection: &Rejection) -> Response<Body> {
        // Between the handler and its record nothing may panic.
        let rendered = catch_unwind(AssertUnwindSafe(|| (self.0)(rejection)));
        let mut response = rendered.unwrap_or_else(|_panic| {
            tracing::error!(code = rejection.code().as_str(), "renderer panicked");
            rejection.to_response()
        });
        response.extensions_mut().insert(rejection.code());
        response
    }
}

impl Default for Renderer {
    fn default() -> Self {
        Self::new(Rejection::to_response)
    }
}

impl fmt::Debug for Renderer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Renderer")
    }
}
