//! An inner layer says that nothing was done; what was done in front of it is done again.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::help::{app, order, send};
use axum::body::Body;
use axum::http::{Request, Response};
use tower::ServiceExt;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test]
async fn a_critical_handler_that_passes_on_a_refusal_runs_once() {
    let store = MemoryStore::new();
    let critical = Policy::critical().with_volatile_store(true);
    let outer = IdempotencyLayer::new(store.clone(), Scope::global())
        .with_policy(critical)
        .unwrap();
    // Another service in the same process, called by the handler without a key.
    let ledger = IdempotencyLayer::new(store, Scope::fixed("ledger"));
    let ledger = app(&ledger, |_| async { Response::new(Body::from("booked")) });
    let charges = Arc::new(AtomicUsize::new(0));
    let count = charges.clone();
    let shop = app(&outer, move |_| {
        let (count, ledger) = (count.clone(), ledger.clone());
        async move {
            count.fetch_add(1, Ordering::SeqCst);
            let entry = Request::post("/entries").body(Body::from("1")).unwrap();
            ledger.oneshot(entry).await.unwrap()
        }
    });
    let first = send(shop.clone(), order("a", "tea")).await;
    assert_eq!(first.status, 400, "{}", first.text());
    let again = send(shop, order("a", "tea")).await;
    assert_eq!(
        charges.load(Ordering::SeqCst),
        1,
        "charged twice: {}",
        again.text()
    );
}
