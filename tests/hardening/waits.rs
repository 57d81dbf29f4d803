//! How long a shutdown waits.
use std::time::{Duration, Instant};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_does_not_wait_for_a_pause_after_the_last_withdrawal() {
    let slow = Slow::new(MemoryStore::new());
    let layer = IdempotencyLayer::new(slow.clone(), Scope::global())
        .with_store_timeout(ms(500))
        .unwrap();
    let app = app(&layer, |_| async { Response::new(Body::from("tea")) });
    *slow.delays.claim_down.lock().unwrap() = true;
    assert_eq!(send(app, order("a", "tea")).await.status, 503);
    *slow.delays.claim_down.lock().unwrap() = false;
    let begin = Instant::now();
    let report = layer.shutdown(Duration::from_secs(10)).await;
    assert!(report.unfinished.is_empty());
    // Two releases at most 50 ms after the start of their round, 1.5 s apart.
    assert!(begin.elapsed() < ms(2200), "{:?}", begin.elapsed());
}
