//! L3: no handler starts on a lease that is over, also when the renewal was slow as well.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_handler_starts_on_a_lease_that_ran_out_while_its_renewal_was_slow() {
    let store = MemoryStore::new();
    let slow = Slow::new(store.clone());
    let policy = Policy::medium().with_lease(ms(1000));
    let layer = |store| {
        let layer = IdempotencyLayer::new(store, Scope::global());
        layer.with_policy(policy.clone())
    };
    // Another process, whose way to the store is fast.
    let other = IdempotencyLayer::new(store, Scope::global())
        .with_policy(policy.clone())
        .unwrap();
    let runs = Arc::new(AtomicUsize::new(0));
    let count = runs.clone();
    let second = app(&other, move |_| {
        let count = count.clone();
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            Response::new(Body::from("second"))
        }
    });
    let count = runs.clone();
    let first = app(&layer(slow.clone()).unwrap(), move |_| {
        let (count, second) = (count.clone(), second.clone());
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            // The moment the handler starts, a duplicate arrives elsewhere.
            let duplicate = send(second, order("a", "tea")).await;
            Response::new(Body::from(format!("duplicate: {}", duplicate.text())))
        }
    });
    // The claim is acknowledged after more than half of its lease, its renewal after all of it.
    slow.delays
        .claim
        .lock()
        .unwrap()
        .push_back((ms(0), ms(600)));
    slow.delays
        .extend
        .lock()
        .unwrap()
        .push_back((ms(0), ms(1200)));
    let answer = send(first, order("a", "tea")).await;
    assert_eq!(
        runs.load(Ordering::SeqCst),
        1,
        "ran twice at once: {}",
        answer.text()
    );
}
