//! An attempt is listed as running after its client was answered.
use crate::help::{app, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_right_after_the_answer_is_replayed() {
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    let app = app(&layer, |_| async { Response::new(Body::from("tea")) });
    let mut wrong = 0;
    let rounds = 40_000;
    for round in 0..rounds {
        let key = format!("k{round}");
        assert_eq!(send(app.clone(), order(&key, "tea")).await.status, 200);
        let again = send(app.clone(), order(&key, "tea")).await;
        wrong += usize::from(!again.is_replay());
    }
    assert_eq!(
        wrong, 0,
        "of {rounds} retries were told that the request is in progress"
    );
}
