use std::convert::Infallible;

use axum_core::response::{IntoResponse, IntoResponseParts, Response, ResponseParts};

/// What a handler knows about its answer, put into the response's extensions.
///
/// It overrides what the policy would make of the status, and never reaches the client.
///
/// ```
/// use axum::http::StatusCode;
/// use axum::response::IntoResponse;
/// use tower_idempotency::Outcome;
///
/// // The downstream refused the connection: nothing happened, so the key stays free.
/// async fn charge() -> impl IntoResponse {
///     (StatusCode::BAD_GATEWAY, Outcome::Release, "bank unreachable")
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// This is the answer: keep it and replay it, whatever its status.
    Store,
    /// Nothing happened: free the key, so that a retry runs.
    Release,
    /// It is not known what happened: hold the key until a person resolves it.
    Hold,
    /// The body is a stream: keep that it was answered, not what.
    Stream,
    /// Another transaction was in the way, and everything is rolled back. A transactional route is
    /// run again as often as [its policy](crate::Policy::with_reruns) says, then answered 503
    /// `transaction-conflict`; elsewhere it is as `Release`.
    Conflict,
}

impl IntoResponseParts for Outcome {
    type Error = Infallible;

    fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Infallible> {
        parts.extensions_mut().insert(self);
        Ok(parts)
    }
}

/// An empty answer, so that `(status, outcome)` is one, too.
impl IntoResponse for Outcome {
    fn into_response(self) -> Response {
        (self, ()).into_response()
    }
}
