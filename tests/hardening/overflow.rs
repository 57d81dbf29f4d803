//! Times that overflow the clock pass the checks, and panic in every request.
use std::time::Duration;

use crate::help::{app, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{Duplicates, IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test]
async fn a_wait_without_end_is_refused_or_works() {
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    let policy = Policy::high().with_duplicates(Duplicates::Wait(Duration::MAX));
    let Ok(layer) = layer.with_policy(policy) else {
        return;
    };
    let app = app(&layer, |_| async { Response::new(Body::from("tea")) });
    let answer = send(app, order("a", "tea")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn a_store_timeout_without_end_is_refused_or_works() {
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    let Ok(layer) = layer.with_store_timeout(Duration::MAX) else {
        return;
    };
    let app = app(&layer, |_| async { Response::new(Body::from("tea")) });
    let answer = send(app, order("a", "tea")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}
