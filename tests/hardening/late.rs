//! A claim that failed, and takes effect after the same claim, sent again, was answered.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::{Response, StatusCode};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

fn layer(slow: &Slow<MemoryStore>) -> IdempotencyLayer<Slow<MemoryStore>> {
    IdempotencyLayer::new(slow.clone(), Scope::global())
        .with_policy(Policy::critical().with_volatile_store(true))
        .unwrap()
        .with_store_timeout(ms(300))
        .unwrap()
}

/// Long before the lease of the unheard claim would be over.
async fn soon(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(ms(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_takes_effect_after_its_client_was_told_of_another_is_withdrawn() {
    let slow = Slow::new(MemoryStore::new());
    let app = app(&layer(&slow), |_| async {
        Response::new(Body::from("tea"))
    });
    *slow.delays.claim_late.lock().unwrap() = Some(ms(600));
    let first = send(app.clone(), order("a", "tea")).await;
    assert_eq!(first.status, 409, "{}", first.text());
    soon("the key is in progress, and nobody is at it", async || {
        send(app.clone(), order("a", "tea")).await.status == 200
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_takes_effect_after_its_key_was_freed_is_withdrawn() {
    let slow = Slow::new(MemoryStore::new());
    let app = app(&layer(&slow), |_| async {
        let mut busy = Response::new(Body::from("busy"));
        *busy.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        busy
    });
    *slow.delays.claim_twice.lock().unwrap() = Some(ms(400));
    assert_eq!(send(app.clone(), order("a", "tea")).await.status, 429);
    soon("the claim was made once more", async || {
        slow.delays.claimed_twice.load(Ordering::SeqCst)
    })
    .await;
    soon("the key is in progress, and nobody is at it", async || {
        send(app.clone(), order("a", "tea")).await.status == 429
    })
    .await;
}
