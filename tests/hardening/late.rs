//! A claim that failed, and takes effect after the same claim, sent again, was answered.

use std::time::{Duration, Instant};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::{Response, StatusCode};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_takes_effect_after_its_key_was_freed_is_withdrawn() {
    let slow = Slow::new(MemoryStore::new());
    let layer = IdempotencyLayer::new(slow.clone(), Scope::global())
        .with_policy(Policy::critical().with_volatile_store(true))
        .unwrap()
        .with_store_timeout(ms(300))
        .unwrap();
    let app = app(&layer, |_| async {
        let mut busy = Response::new(Body::from("busy"));
        *busy.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        busy
    });
    *slow.delays.claim_twice.lock().unwrap() = Some(ms(400));
    let status = async || send(app.clone(), order("a", "tea")).await.status;
    assert_eq!(status().await, 429);
    let (begun, mut was_burnt) = (Instant::now(), false);
    // Long before the lease of the unheard claim would be over.
    while begun.elapsed() < Duration::from_secs(10) {
        match status().await.as_u16() {
            409 => was_burnt = true,
            _ if was_burnt => return,
            _ => {}
        }
        tokio::time::sleep(ms(20)).await;
    }
    panic!("the key is in progress, and nobody is at it: {was_burnt}");
}
