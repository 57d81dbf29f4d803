//! A claim that failed, and takes effect after the same claim, sent again, met a key in progress.
use std::time::{Duration, Instant};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_takes_effect_after_its_client_was_told_of_another_is_withdrawn() {
    let slow = Slow::new(MemoryStore::new());
    let layer = IdempotencyLayer::new(slow.clone(), Scope::global())
        .with_policy(Policy::critical().with_volatile_store(true))
        .unwrap()
        .with_store_timeout(ms(300))
        .unwrap();
    let app = app(&layer, |_| async { Response::new(Body::from("tea")) });
    *slow.delays.claim_late.lock().unwrap() = Some(ms(600));
    let first = send(app.clone(), order("a", "tea")).await;
    assert_eq!(first.status, 409, "{}", first.text());
    // Long before the lease of the unheard claim would be over.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10) {
        if send(app.clone(), order("a", "tea")).await.status == 200 {
            return;
        }
        tokio::time::sleep(ms(50)).await;
    }
    panic!("the key is in progress, and nobody is at it");
}
