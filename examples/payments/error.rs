//! What goes wrong, as answers, and what each answer means for its key.

use std::error::Error;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::{StatusCode, header::RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tower_idempotency::inbox::InboxError;
use tower_idempotency::outbox::OutboxError;
use tower_idempotency::{Outcome, postgres};

pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

pub(crate) enum ApiError {
    Unauthorized,
    Payload(JsonRejection),
    NotFound,
    Refused { code: &'static str, detail: String },
    NotYet(String),
    Database(BoxError),
    Receiver(BoxError),
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self::Payload(rejection)
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.into())
    }
}

impl From<OutboxError> for ApiError {
    fn from(error: OutboxError) -> Self {
        Self::Database(error.into())
    }
}

impl From<InboxError> for ApiError {
    fn from(error: InboxError) -> Self {
        Self::Database(error.into())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match self {
            Self::Unauthorized => {
                let detail = "send `Authorization: Bearer ..` with a known token";
                answer(StatusCode::UNAUTHORIZED, "unauthorized", detail)
            }
            // Nothing was done, and this very request can never do anything: the client may correct it
            // and keep its key.
            Self::Payload(rejection) => {
                let (status, detail) = (rejection.status(), rejection.body_text());
                (Outcome::Release, answer(status, "payload", &detail)).into_response()
            }
            // Nothing was done. A capture has no key but the charge: it must not be refused for ever.
            Self::NotFound => {
                let refusal = answer(StatusCode::NOT_FOUND, "not-found", "no such charge");
                (Outcome::Release, refusal).into_response()
            }
            // Stored, as every 409: this is the answer to this key, also if the state changes later. A
            // client that was refused must not find its refund made by a retry that was on its way. To
            // ask again is a new intent, with a new key.
            Self::Refused { code, detail } => answer(StatusCode::CONFLICT, code, &detail),
            // Nothing was done. What this event comes after is still on its way.
            Self::NotYet(status) => {
                let detail = format!("the charge is only {status}: deliver it again");
                (
                    Outcome::Release,
                    answer(StatusCode::CONFLICT, "not-yet", &detail),
                )
                    .into_response()
            }
            // Rolled back, and run again: as often as the policy says, the client notices nothing.
            Self::Database(cause) if postgres::is_conflict(&*cause) => {
                (StatusCode::SERVICE_UNAVAILABLE, Outcome::Conflict).into_response()
            }
            // Rolled back.
            Self::Database(cause) => {
                tracing::error!(%cause, source = cause.source(), "database");
                retry_later(StatusCode::SERVICE_UNAVAILABLE, "database")
            }
            // It may have arrived or not. The receiver knows the key, so that a retry does no harm.
            Self::Receiver(cause) => {
                tracing::warn!(%cause, "receiver");
                retry_later(StatusCode::BAD_GATEWAY, "receiver")
            }
        }
    }
}

/// A failure that frees its key: running the handler again is safe.
fn retry_later(status: StatusCode, code: &str) -> Response {
    let failure = answer(status, code, "try again with the same key");
    (Outcome::Release, [(RETRY_AFTER, "1")], failure).into_response()
}

fn answer(status: StatusCode, code: &str, detail: &str) -> Response {
    (status, Json(json!({ "code": code, "detail": detail }))).into_response()
}
