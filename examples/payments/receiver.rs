//! The foreign system, for those who have none at hand. It counts, and it takes keys.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use axum::{Json, Router};

/// How often each key came.
type Calls = Arc<Mutex<BTreeMap<String, u32>>>;

pub(crate) fn routes() -> Router {
    Router::new()
        .route("/receiver", post(receive).get(count))
        .with_state(Calls::default())
}

async fn receive(State(calls): State<Calls>, headers: HeaderMap) -> StatusCode {
    let key = headers.get("idempotency-key").map(|key| key.to_str());
    let Some(Ok(key)) = key else {
        return StatusCode::BAD_REQUEST;
    };
    let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
    // A real receiver acts on the first call of a key alone.
    *calls.entry(key.to_owned()).or_default() += 1;
    StatusCode::NO_CONTENT
}

async fn count(State(calls): State<Calls>) -> Json<BTreeMap<String, u32>> {
    Json(calls.lock().unwrap_or_else(PoisonError::into_inner).clone())
}
