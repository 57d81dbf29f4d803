//! F4b: an unprotected run is compared with, although the store is back and knows better.
use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use http_body_util::BodyExt;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unprotected_run_of_another_request_does_not_hide_the_recorded_answer() {
    let slow = Slow::new(MemoryStore::new());
    let layer = IdempotencyLayer::new(slow.clone(), Scope::global())
        .with_policy(Policy::low())
        .unwrap()
        .with_store_timeout(ms(50))
        .unwrap();
    let app = app(&layer, |request| async {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        if body == "slow" {
            tokio::time::sleep(ms(2000)).await;
        }
        Response::new(Body::from(body))
    });
    assert_eq!(send(app.clone(), order("a", "tea")).await.text(), "tea");
    *slow.delays.claim_down.lock().unwrap() = true;
    let other = tokio::spawn(send(app.clone(), order("a", "slow")));
    tokio::time::sleep(ms(500)).await;
    *slow.delays.claim_down.lock().unwrap() = false;
    let retry = send(app, order("a", "tea")).await;
    assert!(retry.is_replay(), "{}", retry.text());
    other.await.unwrap();
}
