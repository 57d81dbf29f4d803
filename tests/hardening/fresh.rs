//! L3: no handler starts on a lease that is over, also when the renewal was slow as well.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::help::{App, Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tower_idempotency::{Duplicates, IdempotencyLayer, MemoryStore, Policy, Scope};

/// A service whose way to the store is slow. The moment its handler starts, a duplicate arrives in another
/// process, whose way is fast.
struct Site {
    first: App,
    slow: Slow<MemoryStore>,
    runs: Arc<AtomicUsize>,
}

impl Site {
    fn new(policy: &Policy) -> Self {
        let store = MemoryStore::new();
        let slow = Slow::new(store.clone());
        let other = IdempotencyLayer::new(store, Scope::global());
        let other = other.with_policy(policy.clone().with_duplicates(Duplicates::Reject));
        let runs = Arc::new(AtomicUsize::new(0));
        let count = runs.clone();
        let second = app(&other.unwrap(), move |_| {
            let count = count.clone();
            async move {
                count.fetch_add(1, Ordering::SeqCst);
                Response::new(Body::from("second"))
            }
        });
        let count = runs.clone();
        let layer = IdempotencyLayer::new(slow.clone(), Scope::global());
        let layer = layer.with_policy(policy.clone()).unwrap();
        let first = app(&layer, move |_| {
            let (count, second) = (count.clone(), second.clone());
            async move {
                count.fetch_add(1, Ordering::SeqCst);
                let duplicate = send(second, order("a", "tea")).await;
                Response::new(Body::from(format!("duplicate: {}", duplicate.text())))
            }
        });
        Self { first, slow, runs }
    }

    async fn assert_runs_once(self) {
        let answer = send(self.first, order("a", "tea")).await;
        let runs = self.runs.load(Ordering::SeqCst);
        assert_eq!(runs, 1, "ran twice at once: {}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_handler_starts_on_a_lease_that_ran_out_while_its_renewal_was_slow() {
    let site = Site::new(&Policy::medium().with_lease(ms(1000)));
    let delays = &site.slow.delays;
    // The claim is acknowledged after more than half of its lease, its renewal after all of it.
    let claim = (ms(0), ms(600));
    delays.claim.lock().unwrap().push_back(claim);
    let renewal = (ms(0), ms(1200));
    delays.extend.lock().unwrap().push_back(renewal);
    site.assert_runs_once().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_handler_starts_on_a_lease_that_ran_out_while_its_request_waited() {
    let policy = Policy::medium().with_lease(ms(1000));
    let site = Site::new(&policy.with_duplicates(Duplicates::Wait(ms(10_000))));
    let delays = &site.slow.delays;
    // The claim is under way when its sender hears that it failed, and lands while the next one, which
    // met another attempt, is being answered. The third meets what is left of the first.
    *delays.claim_late.lock().unwrap() = Some(ms(50));
    let refusal = (ms(0), ms(1500));
    delays.claim.lock().unwrap().push_back(refusal);
    site.assert_runs_once().await;
}
