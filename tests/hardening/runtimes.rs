//! One layer in several runtimes, as in a server with one for each core.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::help::{app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tokio::runtime::{Builder, Runtime};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

fn runtime() -> Runtime {
    let builder = &mut Builder::new_multi_thread();
    builder.worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_runtime_that_ends_does_not_end_the_leases_of_another() {
    let store = MemoryStore::new();
    let layer = || {
        let policy = Policy::medium().with_lease(ms(900));
        let layer = IdempotencyLayer::new(store.clone(), Scope::global());
        layer.with_policy(policy).unwrap()
    };
    let runs = Arc::new(AtomicUsize::new(0));
    let count = runs.clone();
    let handler = move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        async {
            tokio::time::sleep(ms(3000)).await;
            Response::new(Body::from("tea"))
        }
    };
    let here = app(&layer(), handler.clone());
    let (first, second) = (runtime(), runtime());
    for (n, runtime) in [&first, &second].into_iter().enumerate() {
        let key = ["first", "second"][n];
        runtime.spawn(send(here.clone(), order(key, "tea")));
        while runs.load(Ordering::SeqCst) == n {
            std::thread::yield_now();
        }
    }
    drop(first);
    second.block_on(async {
        // Until the lease would be over.
        tokio::time::sleep(ms(1500)).await;
        let duplicate = send(app(&layer(), handler), order("second", "tea")).await;
        assert_eq!(duplicate.status, 409, "{}", duplicate.text());
    });
}
