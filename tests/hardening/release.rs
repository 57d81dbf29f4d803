//! Keys that are freed.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::help::{Slow, app, order, send};
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use tower::ServiceExt;
use tower_idempotency::store::{ClaimRequest, Token};
use tower_idempotency::{
    Fingerprint, IdempotencyContext, IdempotencyLayer, Lost, MemoryStore, Policy, Scope,
};

/// An inner layer says that nothing was done; what was done in front of it is done again.
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

/// The acknowledgement is lost, and somebody else has the key by the time it is freed once more.
#[tokio::test]
async fn a_client_whose_key_was_freed_gets_its_own_answer_whoever_has_the_key_now() {
    let slow = Slow::new(MemoryStore::new());
    let layer = IdempotencyLayer::new(slow.clone(), Scope::global());
    let delays = slow.delays.clone();
    let app = app(&layer, move |request: Request<Body>| {
        let context = request.extensions().get::<IdempotencyContext>().unwrap();
        *delays.release_then.lock().unwrap() = Some(ClaimRequest {
            identity: context.identity().clone(),
            fingerprint: Fingerprint::of_bytes(b"another request"),
            token: Token::random().unwrap(),
            lost: Lost::Rerun,
            lease: Duration::from_secs(30),
            ttl: Duration::from_secs(3600),
        });
        async {
            let mut answer = Response::new(Body::from("who are you?"));
            *answer.status_mut() = StatusCode::UNAUTHORIZED;
            answer
        }
    });
    let answer = send(app, order("a", "tea")).await;
    assert_eq!(answer.status, 401, "{}", answer.text());
    assert_eq!(answer.text(), "who are you?");
}
