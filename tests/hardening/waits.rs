//! How long a shutdown waits, and what for.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::{Response, StatusCode};
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

fn hurried(slow: &Slow<MemoryStore>) -> IdempotencyLayer<Slow<MemoryStore>> {
    IdempotencyLayer::new(slow.clone(), Scope::global())
        .with_store_timeout(ms(300))
        .unwrap()
}

async fn ordered(layer: &IdempotencyLayer<Slow<MemoryStore>>) -> StatusCode {
    let app = app(layer, |_| async { Response::new(Body::from("tea")) });
    send(app, order("a", "tea")).await.status
}

/// The first round of taking it back finds nothing yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_takes_back_a_claim_that_takes_effect_meanwhile() {
    let slow = Slow::new(MemoryStore::new());
    let layer = hurried(&slow);
    *slow.delays.claim_late.lock().unwrap() = Some(ms(600));
    assert_eq!(ordered(&layer).await, StatusCode::CONFLICT);
    assert!(slow.delays.claim_undecided.load(Ordering::SeqCst));
    drop(layer.shutdown(Duration::from_secs(10)).await);
    assert!(!slow.delays.claim_undecided.load(Ordering::SeqCst));
    // On another node, at once.
    assert_eq!(ordered(&hurried(&slow)).await, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_takes_back_a_claim_once_the_store_has_come_back() {
    let slow = Slow::new(MemoryStore::new());
    let layer = hurried(&slow);
    *slow.delays.release_down.lock().unwrap() = true;
    *slow.delays.claim_late.lock().unwrap() = Some(ms(100));
    assert_eq!(ordered(&layer).await, StatusCode::CONFLICT);
    let back = async {
        tokio::time::sleep(ms(500)).await;
        *slow.delays.release_down.lock().unwrap() = false;
    };
    let (_, ()) = tokio::join!(layer.shutdown(Duration::from_secs(10)), back);
    assert!(slow.delays.releases_failed.load(Ordering::SeqCst) > 0);
    assert_eq!(ordered(&hurried(&slow)).await, StatusCode::OK);
}
