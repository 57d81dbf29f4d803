//! Transactional routes that replay from memory.

use tower_idempotency::{IdempotencyLayer, Scope};

use crate::bank::{Banking, Layer, Sinks, paid, pay};
use crate::flaky::Flaky;
use crate::site::{Runs, Site, policy};

on_both_stores!(
    a_committed_answer_is_replayed_without_the_store,
    another_payload_is_refused_without_the_store,
    what_is_rolled_back_is_not_kept,
);

async fn open<B: Banking>(bank: &B, runs: &Runs) -> (Flaky<B::Store>, Site) {
    let store = Flaky::new(bank.store());
    let scope = Scope::header("x-tenant").unwrap();
    let layer: Layer<_> = IdempotencyLayer::new(store.clone(), scope)
        .with_policy(policy().with_replay_cache(true))
        .unwrap()
        .transactional();
    let routes = bank.routes(runs).route_layer(layer);
    (
        store,
        Site::start(routes.with_state(Sinks::default())).await,
    )
}

async fn a_committed_answer_is_replayed_without_the_store(bank: impl Banking) {
    let (store, site) = open(&bank, &Runs::free()).await;
    let first = paid(&site, "a", "201").await;
    let calls = store.calls();
    for _ in 0..3 {
        paid(&site, "a", "201").await.assert_replay_of(&first);
    }
    assert_eq!(store.calls(), calls);
    // One that is answered and stored, although its writes were rolled back.
    let refused = paid(&site, "b", "402").await;
    let calls = store.calls();
    paid(&site, "b", "402").await.assert_replay_of(&refused);
    assert_eq!((store.calls(), bank.ledger().await), (calls, 1));
}

async fn another_payload_is_refused_without_the_store(bank: impl Banking) {
    let (store, site) = open(&bank, &Runs::free()).await;
    let first = paid(&site, "a", "201").await;
    let calls = store.calls();
    let other = site.send(pay("a", "201").body("other")).await;
    other.assert_problem(409, "key-reused");
    paid(&site, "a", "201").await.assert_replay_of(&first);
    assert_eq!(store.calls(), calls);
}

async fn what_is_rolled_back_is_not_kept(bank: impl Banking) {
    let runs = Runs::free();
    let (_store, site) = open(&bank, &runs).await;
    for run in 1..=2 {
        let answer = paid(&site, "a", "500").await;
        assert!(!answer.is_replay());
        assert_eq!((answer.status.as_u16(), runs.count()), (500, run));
    }
    let held = paid(&site, "b", "201 hold").await;
    assert_eq!(held.status, 201);
    paid(&site, "b", "201 hold")
        .await
        .assert_problem(409, "outcome-unknown");
}
