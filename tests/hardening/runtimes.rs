//! One layer in several runtimes, as in a server with one for each core.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::help::{Slow, app, ms, order, send};
use axum::body::Body;
use axum::http::Response;
use tokio::runtime::{Builder, Runtime};
use tower_idempotency::{Detached, Duplicates, IdempotencyLayer, MemoryStore, Policy, Scope};

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

#[test]
fn a_runtime_that_ends_keeps_nobody_of_another_waiting() {
    let slow = Slow::new(MemoryStore::new());
    let policy = Policy::medium().with_duplicates(Duplicates::Wait(ms(20_000)));
    let layer = IdempotencyLayer::new(slow.clone(), Scope::global());
    let layer = layer.with_policy(policy).unwrap();
    let layer = layer.with_store_timeout(ms(20_000)).unwrap();
    let begun = Arc::new(AtomicUsize::new(0));
    let count = begun.clone();
    let layer = layer.with_spawn_hook(move |task| {
        let count = count.clone();
        Detached::new(async move {
            let mut task = std::pin::pin!(task);
            std::future::poll_fn(|context| {
                let polled = task.as_mut().poll(context);
                count.fetch_add(1, Ordering::SeqCst);
                polled
            })
            .await;
        })
    });
    let app = app(&layer, |_| async { Response::new(Body::from("tea")) });
    let never = (ms(60_000), ms(0));
    slow.delays.claim.lock().unwrap().push_back(never);
    let (first, second) = (runtime(), runtime());
    first.spawn(send(app.clone(), order("a", "tea")));
    while begun.load(Ordering::SeqCst) < 1 {
        std::thread::yield_now();
    }
    let duplicate = second.spawn(send(app, order("a", "tea")));
    while begun.load(Ordering::SeqCst) < 2 {
        std::thread::yield_now();
    }
    first.shutdown_background();
    let answer = second.block_on(async { tokio::time::timeout(ms(10_000), duplicate).await });
    assert_eq!(answer.unwrap().unwrap().text(), "tea");
}
