use std::time::Duration;

use axum::http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower_idempotency::store::Existing;
use tower_idempotency::{Duplicates, IdempotencyLayer, Store};

use crate::backend::Backend;
use crate::site::{Answer, PATIENCE, Runs, Sent, Site, eventually, policy};

on_every_store!(
    c1_a_duplicate_in_flight_is_refused_with_retry_after,
    c2_a_waiting_duplicate_gets_the_same_answer,
    c2_a_waiting_duplicate_runs_when_the_first_frees_the_key,
    c3_a_waiting_duplicate_is_refused_at_its_limit,
    c4_100_parallel_duplicates_run_once,
    c4_100_parallel_waiting_duplicates_get_equal_bodies,
    c6_a_client_that_hangs_up_in_the_handler_does_not_stop_it,
    c6_a_client_that_resets_or_half_closes_does_not_stop_it,
    c6_a_client_that_hangs_up_in_the_answer_gets_all_of_it_later,
    c6_a_place_is_free_when_its_client_is_answered,
    c6_more_than_the_most_that_may_run_are_refused_before_the_claim,
);

fn waiting<B: Backend>(backend: &B, limit: Duration) -> IdempotencyLayer<B::Store> {
    let policy = policy().with_duplicates(Duplicates::Wait(limit));
    backend.layer().with_policy(policy).unwrap()
}

async fn c1_a_duplicate_in_flight_is_refused_with_retry_after(backend: impl Backend) {
    let runs = Runs::gated();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let test = async {
        runs.entered().await;
        let duplicate = site.order("a").await;
        duplicate.assert_problem(409, "request-in-progress");
        assert_eq!(duplicate.headers["retry-after"], "1");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
    site.order("a").await.assert_replay_of(&first);
}

/// Lets the first go once duplicates can be known to wait: the store has answered one of them.
async fn c2_a_waiting_duplicate_gets_the_same_answer(backend: impl Backend) {
    let runs = Runs::gated();
    let site = Site::orders(&waiting(&backend, PATIENCE), runs.handler()).await;
    let first = async {
        let first = site.order("a").await;
        first.assert_run(1);
        first
    };
    let second = async {
        runs.entered().await;
        let waits = site.order("a");
        let (answer, ()) = tokio::join!(waits, async {
            tokio::task::yield_now().await;
            runs.let_go();
        });
        answer
    };
    let (first, second) = tokio::join!(first, second);
    second.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn c2_a_waiting_duplicate_runs_when_the_first_frees_the_key(backend: impl Backend) {
    let runs = Runs::gated();
    let handler = runs.answering(|run| match run {
        1 => (StatusCode::TOO_MANY_REQUESTS, "slow down".to_owned()),
        _ => (StatusCode::CREATED, format!("{{\"run\":{run}}}")),
    });
    let site = Site::orders(&waiting(&backend, PATIENCE), handler).await;
    let second = async {
        runs.entered().await;
        let (answer, ()) = tokio::join!(site.order("a"), async {
            runs.let_go();
            runs.entered().await;
            runs.let_go();
        });
        answer
    };
    let (first, second) = tokio::join!(site.order("a"), second);
    assert_eq!(first.status, StatusCode::TOO_MANY_REQUESTS);
    second.assert_run(2);
}

async fn c3_a_waiting_duplicate_is_refused_at_its_limit(backend: impl Backend) {
    let runs = Runs::gated();
    let layer = waiting(&backend, Duration::from_millis(150));
    let site = Site::orders(&layer, runs.handler()).await;
    let test = async {
        runs.entered().await;
        site.order("a")
            .await
            .assert_problem(409, "request-in-progress");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
    assert_eq!(runs.count(), 1);
}

async fn storm(site: &Site, count: usize) -> Vec<Answer> {
    let requests = (0..count).map(|_| site.order("a"));
    futures_util::future::join_all(requests).await
}

async fn c4_100_parallel_duplicates_run_once(backend: impl Backend) {
    let runs = Runs::free();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let answers = storm(&site, 100).await;
    assert_eq!(runs.count(), 1);
    let first = site.order("a").await;
    for answer in answers {
        if answer.status == StatusCode::CREATED {
            assert_eq!(answer.body, first.body);
        } else {
            answer.assert_problem(409, "request-in-progress");
        }
    }
}

async fn c4_100_parallel_waiting_duplicates_get_equal_bodies(backend: impl Backend) {
    let runs = Runs::free();
    let site = Site::orders(&waiting(&backend, PATIENCE), runs.handler()).await;
    let answers = storm(&site, 100).await;
    assert_eq!(runs.count(), 1);
    assert_eq!(
        answers.iter().filter(|answer| !answer.is_replay()).count(),
        1
    );
    for answer in &answers {
        assert_eq!(
            (answer.status, &answer.body),
            (StatusCode::CREATED, &answers[0].body)
        );
    }
}

const REQUEST: &str = "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
                       content-type: application/json\r\ncontent-length: 14\r\n\r\n{\"item\":\"tea\"}";

/// The handler is let go after its client is gone, ends, and a retry gets its answer.
async fn assert_survives<B: Backend>(backend: B, hang_up: impl AsyncFnOnce(tokio::net::TcpStream)) {
    let runs = Runs::gated();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let mut stream = site.connect().await;
    stream.write_all(REQUEST.as_bytes()).await.unwrap();
    runs.entered().await;
    hang_up(stream).await;
    runs.let_go();
    eventually("the record is completed", async || {
        site.order("a").await.is_replay()
    })
    .await;
    let again = site.order("a").await;
    assert_eq!(again.json()["run"], 1);
    assert_eq!(runs.count(), 1);
}

async fn c6_a_client_that_hangs_up_in_the_handler_does_not_stop_it(backend: impl Backend) {
    assert_survives(backend, async |stream| drop(stream)).await;
}

async fn c6_a_client_that_resets_or_half_closes_does_not_stop_it<B: Backend>(backend: B) {
    let reset = async |stream: tokio::net::TcpStream| {
        stream.set_zero_linger().unwrap();
        drop(stream);
    };
    assert_survives(backend, reset).await;
    let half_close = async |mut stream: tokio::net::TcpStream| {
        stream.shutdown().await.unwrap();
    };
    assert_survives(B::start().await, half_close).await;
}

async fn c6_a_client_that_hangs_up_in_the_answer_gets_all_of_it_later(backend: impl Backend) {
    let runs = Runs::free();
    let handler = runs.answering(|_| "x".repeat(900_000));
    let site = Site::orders(&backend.layer(), handler).await;
    let mut stream = site.connect().await;
    stream.write_all(REQUEST.as_bytes()).await.unwrap();
    let mut some = [0; 1000];
    stream.read_exact(&mut some).await.unwrap();
    drop(stream);
    let again = site.order("a").await;
    assert!(again.is_replay());
    assert_eq!(again.body.len(), 900_000);
    assert_eq!(runs.count(), 1);
}

async fn c6_a_place_is_free_when_its_client_is_answered(backend: impl Backend) {
    let layer = backend.layer().with_max_running(1).unwrap();
    let site = Site::orders(&layer, Runs::free().handler()).await;
    for run in 1..=200 {
        site.order(&format!("key-{run}")).await.assert_run(run);
    }
}

async fn c6_more_than_the_most_that_may_run_are_refused_before_the_claim(backend: impl Backend) {
    let runs = Runs::gated();
    let layer = backend.layer().with_max_running(1).unwrap();
    let site = Site::orders(&layer, runs.handler()).await;
    let test = async {
        runs.entered().await;
        let refused = site.order("b").await;
        refused.assert_problem(503, "overloaded");
        assert_eq!(refused.headers["retry-after"], "1");
        let identity = tower_idempotency::Identity::new("acme", "POST /orders", "b");
        let any = tower_idempotency::Fingerprint::of_bytes(b"");
        let seen: Option<Existing> = backend.store().lookup(&identity, &any).await.unwrap();
        assert!(seen.is_none());
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.send(Sent::order("a")), test);
    first.assert_run(1);
}
