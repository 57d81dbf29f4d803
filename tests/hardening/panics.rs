//! Hooks that panic once the handler has run.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{Code, Detached, IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_recorded_although_the_renderer_panics() {
    let slow = Slow::new(MemoryStore::new());
    let policy = Policy::high().with_settle_timeout(ms(100));
    let layer = IdempotencyLayer::new(slow.clone(), Scope::global())
        .with_renderer(|rejection| {
            assert_ne!(rejection.code(), Code::AnswerNotRecorded, "not written yet");
            rejection.to_problem("/")
        })
        .with_policy(policy)
        .unwrap();
    let runs = Arc::new(AtomicUsize::new(0));
    let count = runs.clone();
    let app = app(&layer, move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        async { Response::new(Body::from("tea")) }
    });
    *slow.delays.complete_down.lock().unwrap() = true;
    let first = send(app.clone(), order("a", "tea")).await;
    *slow.delays.complete_down.lock().unwrap() = false;
    tokio::time::sleep(ms(1500)).await;
    let again = send(app, order("a", "tea")).await;
    assert!(
        again.is_replay(),
        "lost: {}; the first client got {}",
        again.text(),
        first.text()
    );
}

/// The handler has run; `shutting-down` says that it has not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_dropped_after_its_handler_began_does_not_say_that_it_was_not_run() {
    let layer =
        IdempotencyLayer::new(MemoryStore::new(), Scope::global()).with_spawn_hook(|task| {
            Detached::new(async move {
                drop(tokio::time::timeout(ms(100), task).await);
            })
        });
    let runs = Arc::new(AtomicUsize::new(0));
    let count = runs.clone();
    let app = app(&layer, move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        async {
            tokio::time::sleep(ms(5000)).await;
            Response::new(Body::from("tea"))
        }
    });
    let first = send(app, order("a", "tea")).await;
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert!(!first.text().contains("not run"), "{}", first.text());
    let stats = layer.stats();
    assert_eq!(
        (stats.executed, stats.refused, stats.unavailable),
        (1, 0, 0)
    );
}

#[tokio::test]
async fn a_task_that_is_dropped_before_it_began_is_counted_once_and_not_as_refused() {
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
        .with_spawn_hook(|task| Detached::new(async { drop(task) }));
    let app = app(&layer, |_| async { Response::new(Body::from("tea")) });
    assert_eq!(send(app, order("a", "tea")).await.status, 503);
    let stats = layer.stats();
    assert_eq!(
        (stats.executed, stats.refused, stats.unavailable),
        (0, 0, 1)
    );
}
