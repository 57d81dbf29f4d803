//! Many requests under one key.

use std::time::Duration;

use axum::http::StatusCode;
use tower_idempotency::{Duplicates, IdempotencyLayer, Scope};

use crate::bank::{Banking, paid, pay};
use crate::site::{PATIENCE, Runs, Site, eventually, policy};

on_both_stores!(
    c1_a_duplicate_in_flight_is_refused_with_retry_after,
    c1_a_duplicate_in_flight_on_another_node_is_refused,
    c2_a_waiting_duplicate_gets_the_same_answer,
    c4_100_parallel_duplicates_run_once,
    c4_100_parallel_duplicates_on_four_nodes_run_once,
    c6_a_client_that_hangs_up_in_the_handler_does_not_stop_it,
    f1_another_payload_is_refused_and_the_original_still_replays,
    f4_a_mismatch_in_flight_is_key_reused_within_the_process,
    f4_a_mismatch_in_flight_on_another_node_is_in_progress_then_key_reused,
    f4b_a_mismatch_beside_a_retry_of_the_completed_request,
    f9_two_principals_run_twice_under_one_key,
    m5_a_leased_layer_around_a_transactional_one_is_refused,
    a_lost_leased_attempt_of_the_operation_is_answered_as_its_policy_said,
    a_lost_leased_attempt_that_may_rerun_runs_in_a_transaction,
);

async fn c1_a_duplicate_in_flight_is_refused_with_retry_after(bank: impl Banking) {
    let runs = Runs::gated();
    let site = bank.open(&runs, policy()).await;
    let test = async {
        runs.entered().await;
        let duplicate = paid(&site, "a", "201").await;
        duplicate.assert_problem(409, "request-in-progress");
        assert_eq!(duplicate.headers["retry-after"], "1");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(paid(&site, "a", "201"), test);
    first.assert_run(1);
    paid(&site, "a", "201").await.assert_replay_of(&first);
}

/// Layers made apart share nothing but the database.
async fn c1_a_duplicate_in_flight_on_another_node_is_refused(bank: impl Banking) {
    let runs = Runs::gated();
    let site = bank.open(&runs, policy()).await;
    let other = bank.open(&runs, policy()).await;
    let test = async {
        runs.entered().await;
        let duplicate = paid(&other, "a", "201").await;
        // SQLite's one writer is taken: nobody can tell what for.
        assert!(
            [409, 503].contains(&duplicate.status.as_u16()),
            "{duplicate:?}"
        );
        assert_eq!(duplicate.headers["retry-after"], "1");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(paid(&site, "a", "201"), test);
    first.assert_run(1);
    paid(&other, "a", "201").await.assert_replay_of(&first);
}

async fn c2_a_waiting_duplicate_gets_the_same_answer(bank: impl Banking) {
    let runs = Runs::gated();
    let site = bank.open(&runs, policy().with_duplicates(Duplicates::Wait(PATIENCE)));
    let site = site.await;
    let second = async {
        runs.entered().await;
        let (answer, ()) = tokio::join!(paid(&site, "a", "201"), async {
            tokio::task::yield_now().await;
            runs.let_go();
        });
        answer
    };
    let (first, second) = tokio::join!(paid(&site, "a", "201"), second);
    first.assert_run(1);
    second.assert_replay_of(&first);
}

async fn parallel_duplicates(bank: impl Banking, nodes: usize) {
    let runs = Runs::free();
    let mut sites = Vec::new();
    for _ in 0..nodes {
        // Connecting takes its time where the machine is busy, and is not what is tested.
        let layer = bank.layer().with_store_timeout(PATIENCE / 2).unwrap();
        sites.push(bank.open_with(&runs, layer).await);
    }
    let answers = (0..100).map(|number| paid(&sites[number % nodes], "a", "201"));
    let answers = futures_util::future::join_all(answers).await;
    let first = paid(&sites[0], "a", "201").await;
    for answer in &answers {
        match answer.status {
            StatusCode::CREATED => assert_eq!(answer.body, first.body),
            StatusCode::CONFLICT => answer.assert_problem(409, "request-in-progress"),
            _ => answer.assert_problem(503, "store-unavailable"),
        }
    }
    let fresh = answers
        .iter()
        .filter(|answer| answer.status == 201 && !answer.is_replay());
    assert_eq!(fresh.count(), 1);
    assert_eq!((bank.ledger().await, runs.count()), (1, 1));
}

async fn c4_100_parallel_duplicates_run_once(bank: impl Banking) {
    parallel_duplicates(bank, 1).await;
}

async fn c4_100_parallel_duplicates_on_four_nodes_run_once(bank: impl Banking) {
    parallel_duplicates(bank, 4).await;
}

async fn c6_a_client_that_hangs_up_in_the_handler_does_not_stop_it(bank: impl Banking) {
    let runs = Runs::gated();
    let site = bank.open(&runs, policy()).await;
    let mut stream = site.connect().await;
    let request = "POST /pay HTTP/1.1\r\nhost: bank\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
         content-type: application/json\r\ncontent-length: 14\r\n\r\n{\"item\":\"tea\"}";
    let write = tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes());
    write.await.unwrap();
    runs.entered().await;
    drop(stream);
    runs.let_go();
    eventually("it is recorded", async || bank.records().await == 1).await;
    let retry = paid(&site, "a", "201").await;
    assert!(retry.is_replay());
    assert_eq!((bank.ledger().await, runs.count()), (1, 1));
}

async fn f1_another_payload_is_refused_and_the_original_still_replays(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    let first = paid(&site, "a", "201").await;
    let other = site.send(pay("a", "201").body("other")).await;
    other.assert_problem(409, "key-reused");
    assert!(!other.headers.contains_key("retry-after"));
    paid(&site, "a", "201").await.assert_replay_of(&first);
}

async fn f4_a_mismatch_in_flight_is_key_reused_within_the_process(bank: impl Banking) {
    let runs = Runs::gated();
    let site = bank.open(&runs, policy()).await;
    let test = async {
        runs.entered().await;
        let other = site.send(pay("a", "201").body("other")).await;
        other.assert_problem(409, "key-reused");
        runs.let_go();
    };
    tokio::join!(paid(&site, "a", "201"), test);
    assert_eq!(runs.count(), 1);
}

async fn f4_a_mismatch_in_flight_on_another_node_is_in_progress_then_key_reused(
    bank: impl Banking,
) {
    let runs = Runs::gated();
    let site = bank.open(&runs, policy()).await;
    let other = bank.open(&runs, policy()).await;
    let test = async {
        runs.entered().await;
        let answer = other.send(pay("a", "201").body("other")).await;
        assert!([409, 503].contains(&answer.status.as_u16()), "{answer:?}");
        runs.let_go();
    };
    tokio::join!(paid(&site, "a", "201"), test);
    let answer = other.send(pay("a", "201").body("other")).await;
    answer.assert_problem(409, "key-reused");
    assert_eq!(runs.count(), 1);
}

async fn f4b_a_mismatch_beside_a_retry_of_the_completed_request(bank: impl Banking) {
    let runs = Runs::free();
    let first = paid(&bank.open(&runs, policy()).await, "a", "201").await;
    for _ in 0..20 {
        let site = bank.open(&runs, policy()).await;
        let mismatch = site.send(pay("a", "201").body("other"));
        let (mismatch, retry) = tokio::join!(mismatch, paid(&site, "a", "201"));
        mismatch.assert_problem(409, "key-reused");
        retry.assert_replay_of(&first);
    }
    assert_eq!(runs.count(), 1);
}

async fn f9_two_principals_run_twice_under_one_key(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    for tenant in ["acme", "umbrella"] {
        let answer = site.send(pay("a", "201").tenant(tenant)).await;
        assert!(!answer.is_replay());
    }
    assert_eq!((bank.ledger().await, runs.count()), (2, 2));
}

async fn m5_a_leased_layer_around_a_transactional_one_is_refused(bank: impl Banking) {
    let runs = Runs::free();
    let leased = IdempotencyLayer::new(bank.store(), Scope::header("x-tenant").unwrap());
    let inner = leased.clone().transactional();
    let routes = bank.routes(&runs).route_layer(inner).route_layer(leased);
    let site = Site::start(routes.with_state(crate::bank::Sinks::default())).await;
    let answer = paid(&site, "a", "201").await;
    answer.assert_problem(500, "nested-layers");
    assert_eq!((bank.records().await, runs.count()), (0, 0));
}

/// A leased layer on `/pay` that is dropped with its handler running.
async fn leave_leased(bank: &impl Banking, policy: tower_idempotency::Policy) {
    let runs = Runs::gated();
    let leased = IdempotencyLayer::new(bank.store(), Scope::header("x-tenant").unwrap())
        .with_policy(policy.with_operation("pay"))
        .unwrap()
        .with_spawn_hook(|task| task);
    let site =
        Site::start(axum::Router::new().route("/pay", runs.handler().layer(leased.clone()))).await;
    let request = pay("a", "201");
    let sent = tokio::spawn(async move { site.send(request).await });
    runs.entered().await;
    sent.abort();
    std::mem::forget(runs);
}

async fn a_lost_leased_attempt_of_the_operation_is_answered_as_its_policy_said(bank: impl Banking) {
    leave_leased(&bank, policy()).await;
    bank.age(Duration::from_secs(3600)).await;
    let runs = Runs::free();
    let site = bank.open(&runs, policy().with_operation("pay")).await;
    let answer = paid(&site, "a", "201").await;
    answer.assert_problem(500, "attempt-lost");
    assert_eq!(runs.count(), 0);
    paid(&site, "a", "201").await.assert_replay_of(&answer);
}

async fn a_lost_leased_attempt_that_may_rerun_runs_in_a_transaction(bank: impl Banking) {
    let rerun = policy().with_lost(tower_idempotency::Lost::Rerun);
    leave_leased(&bank, rerun.clone()).await;
    bank.age(Duration::from_secs(3600)).await;
    let runs = Runs::free();
    let site = bank.open(&runs, rerun.with_operation("pay")).await;
    let answer = paid(&site, "a", "201").await;
    answer.assert_run(1);
    paid(&site, "a", "201").await.assert_replay_of(&answer);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}
