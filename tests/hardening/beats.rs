//! Leases of different lengths share one heartbeat.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

/// How many times the request ran, when its handler takes 2 s and a duplicate comes after 1.7 s.
async fn runs_of(
    slow: &Slow<MemoryStore>,
    here: &IdempotencyLayer<Slow<MemoryStore>>,
    lease: Duration,
) -> usize {
    let policy = Policy::medium().with_lease(lease);
    let runs = Arc::new(AtomicUsize::new(0));
    let handler = |runs: Arc<AtomicUsize>| {
        move |_| {
            let runs = runs.clone();
            async move {
                runs.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(ms(2000)).await;
                Response::new(Body::from("tea"))
            }
        }
    };
    let here = here.clone().with_policy(policy.clone()).unwrap();
    let there = IdempotencyLayer::new(slow.store.clone(), Scope::global())
        .with_policy(policy)
        .unwrap();
    let first = tokio::spawn(send(app(&here, handler(runs.clone())), order("a", "tea")));
    tokio::time::sleep(ms(1700)).await;
    send(app(&there, handler(runs.clone())), order("a", "tea")).await;
    first.await.unwrap();
    runs.load(Ordering::SeqCst)
}

/// A request with another lease that runs for 3 s.
fn neighbour(here: &IdempotencyLayer<Slow<MemoryStore>>, lease: Duration) {
    let policy = Policy::medium().with_lease(lease);
    let here = here.clone().with_policy(policy).unwrap();
    let app = app(&here, |_| async {
        tokio::time::sleep(ms(3000)).await;
        Response::new(Body::from("tea"))
    });
    tokio::spawn(send(app, order("neighbour", "tea")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_neighbour_a_lease_is_kept_by_a_store_that_takes_60_ms() {
    let slow = Slow::new(MemoryStore::new());
    *slow.delays.extend_always.lock().unwrap() = ms(60);
    let here = IdempotencyLayer::new(slow.clone(), Scope::global());
    assert_eq!(runs_of(&slow, &here, ms(1000)).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_too_short_for_the_store_does_not_end_longer_ones() {
    let slow = Slow::new(MemoryStore::new());
    *slow.delays.extend_always.lock().unwrap() = ms(60);
    let here = IdempotencyLayer::new(slow.clone(), Scope::global());
    neighbour(&here, ms(100));
    assert_eq!(runs_of(&slow, &here, ms(1000)).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_renewal_of_a_long_lease_that_hangs_does_not_end_shorter_ones() {
    let slow = Slow::new(MemoryStore::new());
    // The first renewal hangs, and no other.
    slow.delays
        .extend
        .lock()
        .unwrap()
        .push_back((ms(10_000), ms(0)));
    let here = IdempotencyLayer::new(slow.clone(), Scope::global());
    neighbour(&here, ms(6000));
    tokio::time::sleep(ms(2050)).await;
    neighbour_is_running(&here);
    assert_eq!(runs_of(&slow, &here, ms(300)).await, 1);
}

fn neighbour_is_running(here: &IdempotencyLayer<Slow<MemoryStore>>) {
    assert_eq!(here.stats().executed, 1);
}
