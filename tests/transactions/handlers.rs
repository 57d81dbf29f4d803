//! What handlers do with their `Tx`.

use crate::bank::{Banking, paid};
use crate::site::{Runs, Sent, eventually, policy};

on_both_stores!(
    t4_a_tx_that_outlives_its_handler_is_a_500_and_nothing_is_committed,
    t4_a_tx_is_refused_a_second_time_while_the_first_is_there,
    a_tx_may_be_taken_again_when_it_was_given_back,
    a_savepoint_of_the_handler_is_its_own,
    a_savepoint_left_open_is_never_an_answer_without_its_writes,
    a_tx_is_refused_on_a_route_that_is_not_transactional,
    connections_come_back_whatever_handlers_do,
);

async fn t4_a_tx_that_outlives_its_handler_is_a_500_and_nothing_is_committed(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    let answer = paid(&site, "a", "leak").await;
    answer.assert_problem(500, "transaction-held");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    // It is over when the task that keeps it is: the site goes with its tasks.
    drop(site);
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
}

async fn t4_a_tx_is_refused_a_second_time_while_the_first_is_there(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    let answer = site.send(Sent::post("/twice").key("a")).await;
    assert_eq!(answer.status, 500);
    assert_eq!(bank.records().await, 0);
}

async fn a_tx_may_be_taken_again_when_it_was_given_back(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    let answer = site.send(Sent::post("/again").key("a")).await;
    assert_eq!(answer.status, 201);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

async fn a_savepoint_of_the_handler_is_its_own(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    paid(&site, "a", "savepoint").await.assert_run(1);
    // The outer write, without the inner one.
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

async fn a_savepoint_left_open_is_never_an_answer_without_its_writes(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    let answer = paid(&site, "a", "forget").await;
    let committed = i64::from(answer.status == 201);
    assert_eq!(
        (bank.ledger().await, bank.records().await),
        (committed, committed)
    );
    let retry = paid(&site, "a", "201").await;
    assert_eq!(retry.status, 201);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

async fn a_tx_is_refused_on_a_route_that_is_not_transactional(bank: impl Banking) {
    let scope = tower_idempotency::Scope::header("x-tenant").unwrap();
    let leased = tower_idempotency::IdempotencyLayer::new(bank.store(), scope);
    let routes = bank.routes(&Runs::free()).route_layer(leased);
    let site = crate::site::Site::start(routes.with_state(crate::bank::Sinks::default())).await;
    assert_eq!(paid(&site, "a", "201").await.status, 500);
    assert_eq!(bank.ledger().await, 0);
}

/// More rounds than there are connections, so that one that is lost is missed.
async fn connections_come_back_whatever_handlers_do(bank: impl Banking) {
    let limit = std::time::Duration::from_millis(200);
    let site = bank
        .open(&Runs::free(), policy().with_execution_limit(limit))
        .await;
    let mut key = 0;
    for _ in 0..4 {
        for then in [
            "201",
            "500",
            "402",
            "panic",
            "hang",
            "fail",
            "commit",
            "rollback",
            "commit; begin",
            "forget",
            "savepoint",
            "give-up",
            "deferred",
            "break-off",
            "201 hold",
        ] {
            key += 1;
            paid(&site, &key.to_string(), then).await;
        }
    }
    eventually("the next one runs", async || {
        key += 1;
        paid(&site, &key.to_string(), "201").await.status == 201
    })
    .await;
    let before = bank.ledger().await;
    for _ in 0..12 {
        key += 1;
        assert_eq!(paid(&site, &key.to_string(), "201").await.status, 201);
    }
    assert_eq!(bank.ledger().await, before + 12);
}
