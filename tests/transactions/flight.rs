//! Of the requests of one process that ask for the same, one opens a transaction.

use std::time::{Duration, Instant};

use axum::http::StatusCode;
use tower_idempotency::{Duplicates, IdempotencyLayer, Policy, Scope};

use crate::bank::{Banking, Layer, Sinks, paid, pay};
use crate::crowd::{Crowd, storm};
use crate::flaky::{Fault, Flaky};
use crate::site::{PATIENCE, Runs, Site, policy};

on_both_stores!(
    c4_a_thousand_duplicates_cost_one_transaction,
    c4_a_thousand_waiting_duplicates_cost_one_transaction,
    c4_a_thousand_retries_of_a_completed_request_cost_one_lookup,
    c2_waiting_duplicates_run_one_after_the_other_when_it_is_rolled_back,
    f4_a_mismatch_is_not_answered_before_the_transaction_is_open,
    f4b_a_mismatch_that_asks_first_keeps_nobody_from_its_replay,
    x8_a_store_that_never_answers_costs_duplicates_no_chain_of_timeouts,
    x8_a_transaction_that_never_begins_costs_duplicates_no_chain_of_timeouts,
    x11_when_the_first_is_dropped_while_it_asks_another_asks,
    x11_when_the_first_is_dropped_while_it_runs_another_runs,
);

const THOUSAND: usize = 1000;

fn patient() -> Policy {
    policy().with_duplicates(Duplicates::Wait(PATIENCE))
}

fn flaky<B: Banking>(bank: &B, policy: Policy) -> (Flaky<B::Store>, Layer<Flaky<B::Store>>) {
    let store = Flaky::new(bank.store());
    let layer = IdempotencyLayer::new(store.clone(), Scope::header("x-tenant").unwrap())
        .with_policy(policy.with_execution_limit(PATIENCE))
        .unwrap()
        .with_store_timeout(PATIENCE)
        .unwrap();
    (store, layer.transactional())
}

async fn open<B: Banking>(bank: &B, runs: &Runs, layer: Layer<Flaky<B::Store>>) -> Site {
    let routes = bank.routes(runs).route_layer(layer);
    Site::start(routes.with_state(Sinks::default())).await
}

async fn c4_a_thousand_duplicates_cost_one_transaction(bank: impl Banking) {
    let (store, layer) = flaky(&bank, policy());
    let (crowd, layer) = Crowd::of(layer);
    let runs = Runs::gated();
    let site = open(&bank, &runs, layer).await;
    store.beginnings(Fault::Wait);
    let test = async {
        store.beginning_waits().await;
        let duplicates = storm(&site, THOUSAND - 1, pay("a", "201"));
        let (duplicates, ()) = tokio::join!(duplicates, async {
            crowd.waits(u32::try_from(THOUSAND).unwrap()).await;
            store.let_beginning_go();
        });
        for duplicate in &duplicates {
            duplicate.assert_problem(409, "request-in-progress");
        }
        runs.let_go();
    };
    let (first, ()) = tokio::join!(paid(&site, "a", "201"), test);
    first.assert_run(1);
    assert_eq!(store.looked_up_begun_and_committed(), (1, 1, 1));
    assert_eq!(bank.ledger().await, 1);
}

async fn c4_a_thousand_waiting_duplicates_cost_one_transaction(bank: impl Banking) {
    let (store, layer) = flaky(&bank, patient());
    let (crowd, layer) = Crowd::of(layer);
    let runs = Runs::gated();
    let site = open(&bank, &runs, layer).await;
    let test = async {
        crowd.waits(u32::try_from(THOUSAND).unwrap()).await;
        runs.let_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, THOUSAND, pay("a", "201")), test);
    let replays = answers.iter().filter(|answer| answer.is_replay());
    assert_eq!(replays.count(), THOUSAND - 1);
    for answer in &answers {
        let first = &answers[0].body;
        assert_eq!((answer.status, &answer.body), (StatusCode::CREATED, first));
    }
    assert_eq!(store.looked_up_begun_and_committed(), (1, 1, 1));
    assert_eq!(bank.ledger().await, 1);
}

async fn c4_a_thousand_retries_of_a_completed_request_cost_one_lookup(bank: impl Banking) {
    let runs = Runs::free();
    let first = paid(&bank.open(&runs, policy()).await, "a", "201").await;
    let (store, layer) = flaky(&bank, policy());
    let (crowd, layer) = Crowd::of(layer);
    let site = open(&bank, &runs, layer).await;
    store.lookups(Fault::Wait);
    let test = async {
        crowd.waits(u32::try_from(THOUSAND).unwrap()).await;
        store.let_lookup_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, THOUSAND, pay("a", "201")), test);
    for answer in &answers {
        answer.assert_replay_of(&first);
    }
    assert_eq!(store.looked_up_begun_and_committed(), (1, 0, 0));
}

async fn c2_waiting_duplicates_run_one_after_the_other_when_it_is_rolled_back(bank: impl Banking) {
    let (store, layer) = flaky(&bank, patient());
    let (crowd, layer) = Crowd::of(layer);
    let runs = Runs::gated();
    let site = open(&bank, &runs, layer).await;
    let test = async {
        crowd.waits(20).await;
        for _ in 0..20 {
            runs.entered().await;
            runs.let_go();
        }
    };
    let (answers, ()) = tokio::join!(storm(&site, 20, pay("a", "500")), test);
    for answer in &answers {
        assert_eq!(answer.status, 500);
    }
    assert_eq!(store.looked_up_begun_and_committed(), (20, 20, 0));
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
}

async fn f4_a_mismatch_is_not_answered_before_the_transaction_is_open(bank: impl Banking) {
    let (store, layer) = flaky(&bank, policy());
    let (crowd, layer) = Crowd::of(layer);
    let runs = Runs::gated();
    let site = open(&bank, &runs, layer).await;
    store.beginnings(Fault::Wait);
    let test = async {
        store.beginning_waits().await;
        let mut mismatch = std::pin::pin!(site.send(pay("a", "201").body("other")));
        let early = tokio::select! {
            _ = &mut mismatch => true,
            () = crowd.waits(2) => false,
        };
        assert!(!early, "answered against a fingerprint that nothing shows");
        store.let_beginning_go();
        mismatch.await.assert_problem(409, "key-reused");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(paid(&site, "a", "201"), test);
    first.assert_run(1);
    assert_eq!(store.looked_up_begun_and_committed(), (1, 1, 1));
}

async fn f4b_a_mismatch_that_asks_first_keeps_nobody_from_its_replay(bank: impl Banking) {
    let runs = Runs::free();
    let first = paid(&bank.open(&runs, policy()).await, "a", "201").await;
    let (store, layer) = flaky(&bank, policy());
    let (crowd, layer) = Crowd::of(layer);
    let site = open(&bank, &runs, layer).await;
    store.lookups(Fault::Wait);
    let test = async {
        crowd.waits(1).await;
        let retries = storm(&site, 2, pay("a", "201"));
        tokio::join!(retries, async {
            crowd.waits(2).await;
            store.lookups(Fault::None);
            store.let_lookup_go();
        })
        .0
    };
    let mismatch = site.send(pay("a", "201").body("other"));
    let (mismatch, retries) = tokio::join!(mismatch, test);
    mismatch.assert_problem(409, "key-reused");
    for retry in retries {
        retry.assert_replay_of(&first);
    }
}

async fn assert_no_chain<B: Banking>(bank: B, plant: impl FnOnce(&Flaky<B::Store>)) {
    let timeout = Duration::from_millis(500);
    let (store, layer) = flaky(&bank, policy());
    let layer = layer.with_store_timeout(timeout).unwrap();
    let layer = layer.with_breaker(100_000).unwrap();
    let site = open(&bank, &Runs::free(), layer).await;
    plant(&store);
    let began = Instant::now();
    for answer in storm(&site, 50, pay("a", "201")).await {
        answer.assert_problem(503, "store-unavailable");
    }
    // One for the first, another for all the others at once; in a chain it were fifty.
    assert!(began.elapsed() < timeout * 10, "{:?}", began.elapsed());
}

async fn x8_a_store_that_never_answers_costs_duplicates_no_chain_of_timeouts(bank: impl Banking) {
    assert_no_chain(bank, |store| store.lookups(Fault::Hang)).await;
}

async fn x8_a_transaction_that_never_begins_costs_duplicates_no_chain_of_timeouts(
    bank: impl Banking,
) {
    assert_no_chain(bank, |store| store.beginnings(Fault::Hang)).await;
}

async fn x11_when_the_first_is_dropped_while_it_asks_another_asks(bank: impl Banking) {
    let (store, layer) = flaky(&bank, policy());
    let (crowd, layer) = Crowd::of(layer);
    let site = open(&bank, &Runs::free(), layer).await;
    store.beginnings(Fault::Wait);
    let test = async {
        store.beginning_waits().await;
        let (second, ()) = tokio::join!(paid(&site, "a", "201"), async {
            crowd.waits(2).await;
            store.beginnings(Fault::None);
            crowd.abort(0);
        });
        second
    };
    let (dropped, second) = tokio::join!(paid(&site, "a", "201"), test);
    dropped.assert_problem(503, "answer-not-recorded");
    second.assert_run(1);
    assert_eq!(store.looked_up_begun_and_committed(), (2, 2, 1));
}

async fn x11_when_the_first_is_dropped_while_it_runs_another_runs(bank: impl Banking) {
    let (_store, layer) = flaky(&bank, patient());
    let (crowd, layer) = Crowd::of(layer);
    let runs = Runs::gated();
    let site = open(&bank, &runs, layer).await;
    let test = async {
        runs.entered().await;
        let (second, ()) = tokio::join!(paid(&site, "a", "201"), async {
            crowd.waits(2).await;
            crowd.abort(0);
            runs.entered().await;
            runs.let_go();
        });
        second
    };
    let (dropped, second) = tokio::join!(paid(&site, "a", "201"), test);
    dropped.assert_problem(503, "answer-not-recorded");
    second.assert_run(2);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}
