use std::fmt;

use axum_core::response::{IntoResponse, Response};
use http::StatusCode;
use sqlx::Error;

use crate::outcome::Outcome;

/// Whether a statement failed because another transaction was in its way, by a serialization failure or
/// a deadlock, or because the server has no disk or memory left. The same statements may succeed in a new
/// transaction. The failure may be the source of the error, as it is in those of the outbox and the inbox.
///
/// An error type of your own says so by [`Outcome::Conflict`] in its response; [`TxError`] does.
#[must_use]
#[cfg_attr(
    not(feature = "postgres"),
    allow(unreachable_pub, reason = "exported with PostgreSQL")
)]
pub fn is_conflict(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    causes.any(|cause| {
        let database = cause.downcast_ref().and_then(Error::as_database_error);
        let code = database.and_then(|error| error.code());
        // Transaction rollback, and insufficient resources.
        let may_pass = |code: &str| code.starts_with("40") || code.starts_with("53");
        code.is_some_and(|code| code.len() == 5 && may_pass(&code))
    })
}

/// A failed statement, message or delivery as the answer of a handler: 500, or, for a
/// [conflict](is_conflict), 503 `transaction-conflict` or [another run](crate::Policy::with_reruns).
/// The source is logged, and never shown to a client.
#[derive(Debug)]
pub struct TxError(Box<dyn std::error::Error + Send + Sync>);

impl From<Error> for TxError {
    fn from(error: Error) -> Self {
        Self(error.into())
    }
}

#[cfg(feature = "postgres")]
impl From<crate::outbox::OutboxError> for TxError {
    fn from(error: crate::outbox::OutboxError) -> Self {
        Self(error.into())
    }
}

#[cfg(feature = "postgres")]
impl From<crate::inbox::InboxError> for TxError {
    fn from(error: crate::inbox::InboxError) -> Self {
        Self(error.into())
    }
}

impl fmt::Display for TxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a step of the handler failed")
    }
}

impl std::error::Error for TxError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.0)
    }
}

impl IntoResponse for TxError {
    fn into_response(self) -> Response {
        let cause: &dyn std::error::Error = &*self.0;
        tracing::error!(error = cause, source = cause.source(), "{self}");
        let mut response = StatusCode::INTERNAL_SERVER_ERROR.into_response();
        if is_conflict(&*self.0) {
            response.extensions_mut().insert(Outcome::Conflict);
        }
        response
    }
}
