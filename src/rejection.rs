use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use axum_core::body::Body;
use http::header::{CONTENT_TYPE, HeaderValue, LOCATION, RETRY_AFTER};
use http::{Response, StatusCode};
use serde_json::{Map, Value, json};

use crate::envelope::Envelope;
use crate::extract::References;

/// Why the layer answered in place of the handler.
///
/// [`as_str`](Self::as_str) is stable: clients may depend on it. Every code is explained in
/// [`problems`](crate::problems).
///
/// ```
/// use tower_idempotency::Code;
///
/// assert_eq!(Code::KeyReused.as_str(), "key-reused");
/// assert_eq!(Code::KeyReused.status(), 409);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// The route requires a key, and none was sent.
    KeyMissing,
    /// The key is malformed.
    KeyInvalid,
    /// It could not be told who is asking.
    ScopeMissing,
    /// The request's body is over the limit of the route.
    BodyTooLarge,
    /// The request's body did not arrive in time.
    BodyTimeout,
    /// The request's body broke off.
    BodyUnreadable,
    /// The key was used with another request before.
    KeyReused,
    /// The same request is running.
    RequestInProgress,
    /// An attempt was made and it is not known what came of it; a person resolves it.
    OutcomeUnknown,
    /// The handler ran, and its answer could not be recorded yet.
    AnswerNotRecorded,
    /// The request was answered, and its answer was not kept.
    ResponseNotRetained,
    /// The store could not be asked, so the handler was not run.
    StoreUnavailable,
    /// Too many requests are running.
    Overloaded,
    /// The service is shutting down.
    ShuttingDown,
    /// Two layers of different policies cover one route.
    NestedLayers,
    /// The record exists and cannot be read.
    RecordUnreadable,
    /// The handler panicked.
    HandlerPanicked,
    /// The handler took longer than the route allows.
    ExecutionLimit,
    /// The handler's answer broke off before it was complete.
    ResponseFailed,
    /// An earlier attempt was lost, and the route does not allow another.
    AttemptLost,
}

impl Code {
    /// Every code there is, in the order of the documentation.
    pub const ALL: [Self; 20] = [
        Self::KeyMissing,
        Self::KeyInvalid,
        Self::ScopeMissing,
        Self::BodyTooLarge,
        Self::BodyTimeout,
        Self::BodyUnreadable,
        Self::KeyReused,
        Self::RequestInProgress,
        Self::OutcomeUnknown,
        Self::AnswerNotRecorded,
        Self::ResponseNotRetained,
        Self::StoreUnavailable,
        Self::Overloaded,
        Self::ShuttingDown,
        Self::NestedLayers,
        Self::RecordUnreadable,
        Self::HandlerPanicked,
        Self::ExecutionLimit,
        Self::ResponseFailed,
        Self::AttemptLost,
    ];

    /// The `code` member of the problem document.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.facts().0
    }

    /// The status of the default profile.
    #[must_use]
    pub fn status(self) -> StatusCode {
        self.facts().1
    }

    /// What happened, in one sentence that names nothing of the request.
    #[must_use]
    pub fn title(self) -> &'static str {
        self.facts().2
    }

    fn facts(self) -> (&'static str, StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::KeyMissing => (
                "key-missing",
                S::BAD_REQUEST,
                "This route requires an idempotency key.",
            ),
            Self::KeyInvalid => (
                "key-invalid",
                S::BAD_REQUEST,
                "The idempotency key is malformed.",
            ),
            Self::ScopeMissing => (
                "scope-missing",
                S::FORBIDDEN,
                "It cannot be told whose idempotency key this is.",
            ),
            Self::BodyTooLarge => (
                "body-too-large",
                S::PAYLOAD_TOO_LARGE,
                "The request's body is over the limit.",
            ),
            Self::BodyTimeout => (
                "body-timeout",
                S::REQUEST_TIMEOUT,
                "The request's body did not arrive in time.",
            ),
            Self::BodyUnreadable => (
                "body-unreadable",
                S::BAD_REQUEST,
                "The request's body broke off.",
            ),
            Self::KeyReused => (
                "key-reused",
                S::CONFLICT,
                "This idempotency key was used with another request.",
            ),
            Self::RequestInProgress => (
                "request-in-progress",
                S::CONFLICT,
                "A request with this idempotency key is running.",
            ),
            Self::OutcomeUnknown => (
                "outcome-unknown",
                S::CONFLICT,
                "It is not known what came of this request; it has to be resolved by a person.",
            ),
            Self::AnswerNotRecorded => (
                "answer-not-recorded",
                S::SERVICE_UNAVAILABLE,
                "The request ran, and its answer is not recorded yet.",
            ),
            Self::ResponseNotRetained => (
                "response-not-retained",
                S::GONE,
                "The request was answered, and its answer was not kept.",
            ),
            Self::StoreUnavailable => (
                "store-unavailable",
                S::SERVICE_UNAVAILABLE,
                "Idempotency cannot be guaranteed now, so the request was not run.",
            ),
            Self::Overloaded => (
                "overloaded",
                S::SERVICE_UNAVAILABLE,
                "Too many requests are running; this one was not run.",
            ),
            Self::ShuttingDown => (
                "shutting-down",
                S::SERVICE_UNAVAILABLE,
                "The service is shutting down; the request was not run.",
            ),
            Self::NestedLayers => (
                "nested-layers",
                S::INTERNAL_SERVER_ERROR,
                "Two idempotency policies cover this route.",
            ),
            Self::RecordUnreadable => (
                "record-unreadable",
                S::INTERNAL_SERVER_ERROR,
                "The record of this request cannot be read; it was not run.",
            ),
            Self::HandlerPanicked => (
                "handler-panicked",
                S::INTERNAL_SERVER_ERROR,
                "The request failed.",
            ),
            Self::ExecutionLimit => (
                "execution-limit",
                S::INTERNAL_SERVER_ERROR,
                "The request took too long.",
            ),
            Self::ResponseFailed => (
                "response-failed",
                S::INTERNAL_SERVER_ERROR,
                "The answer broke off.",
            ),
            Self::AttemptLost => (
                "attempt-lost",
                S::INTERNAL_SERVER_ERROR,
                "An earlier attempt was lost, and it is not known how far it came.",
            ),
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the layer has to say to a client, before it becomes a response.
///
/// A renderer ([`IdempotencyLayer::with_renderer`](crate::IdempotencyLayer::with_renderer)) makes
/// an answer of it; [`to_problem`](Self::to_problem) is the default one.
///
/// ```
/// use axum::{Router, body::Body, http::{Request, Response, header}, routing::post};
/// use tower::ServiceExt;
/// use tower_idempotency::{IdempotencyLayer, MemoryStore, Rejection, Scope};
///
/// fn plain(rejection: &Rejection) -> Response<Body> {
///     let mut response = Response::new(Body::from(rejection.code().title()));
///     *response.status_mut() = rejection.code().status();
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
            Code::RequestInProgress
                | Code::AnswerNotRecorded
                | Code::StoreUnavailable
                | Code::Overloaded
                | Code::ShuttingDown
        );
        Self {
            code,
            detail: None,
            retry_after: retry_after.then_some(Duration::from_secs(1)),
            original: None,
        }
    }

    pub(crate) fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub(crate) fn with_retry(mut self) -> Self {
        self.retry_after = Some(Duration::from_secs(1));
        self
    }

    /// A wait longer than the lease left would tell the client to come too late.
    pub(crate) fn in_progress(lease_left: Duration) -> Self {
        let wait = lease_left.min(Duration::from_secs(1));
        Self {
            retry_after: Some(wait),
            ..Self::new(Code::RequestInProgress)
        }
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

    /// When a retry can help, and `None` when it cannot.
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

    /// The answer as `application/problem+json`
    /// ([RFC 9457](https://www.rfc-editor.org/rfc/rfc9457)), its `type` being `base` and the code.
    #[must_use]
    pub fn to_problem(&self, base: &str) -> Response<Body> {
        let mut response = Response::new(Body::from(self.document(base).to_string()));
        *response.status_mut() = self.code.status();
        let headers = response.headers_mut();
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(wait) = self.retry_after {
            headers.insert(RETRY_AFTER, wait.as_secs().into());
        }
        if let Some(location) = self.original.as_ref().and_then(|o| o.location.clone()) {
            headers.insert(LOCATION, location);
        }
        response
    }

    fn document(&self, base: &str) -> Value {
        let mut document = Map::new();
        document.insert("type".into(), format!("{base}{}", self.code).into());
        document.insert("title".into(), self.code.title().into());
        document.insert("status".into(), self.code.status().as_u16().into());
        document.insert("code".into(), self.code.as_str().into());
        if let Some(detail) = &self.detail {
            document.insert("detail".into(), detail.as_str().into());
        }
        if let Some(original) = &self.original {
            document.insert("original".into(), original.document());
        }
        Value::Object(document)
    }
}

impl Original {
    fn document(&self) -> Value {
        let references = self.references.as_slice().iter();
        json!({
            "status": self.status.as_u16(),
            "references": references
                .map(|(kind, id)| json!({"kind": kind, "id": id}))
                .collect::<Vec<_>>(),
        })
    }
}

/// Where the default renderer points a problem's `type`: the module [`problems`](crate::problems).
const PROBLEMS: &str =
    "https://docs.rs/tower-idempotency/latest/tower_idempotency/problems/index.html#";

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
        rendered.unwrap_or_else(|_panic| {
            tracing::error!(code = rejection.code().as_str(), "renderer panicked");
            rejection.to_problem(PROBLEMS)
        })
    }
}

impl Default for Renderer {
    fn default() -> Self {
        Self::new(|rejection| rejection.to_problem(PROBLEMS))
    }
}

impl fmt::Debug for Renderer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Renderer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_explained_with_its_status() {
        let problems = include_str!("problems.rs");
        for code in Code::ALL {
            let row = format!("`{code}`</span> | {} |", code.status().as_u16());
            assert!(problems.contains(&row), "{row}");
        }
    }
}
