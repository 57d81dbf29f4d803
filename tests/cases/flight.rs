//! Of the requests of one process that ask for the same, one asks the store.

use std::io::Error;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use tower_idempotency::{
    Boundary, Duplicates, Fingerprint, IdempotencyLayer, Identity, Policy, Ran,
};

use crate::backend::Backend;
use crate::crowd::{Crowd, storm};
use crate::flaky::{Fault, Flaky};
use crate::site::{PATIENCE, Runs, Sent, Site, critical, eventually, policy};

on_every_store!(
    c4_a_thousand_duplicates_cost_one_claim,
    c4_a_thousand_waiting_duplicates_cost_one_claim_and_one_completion,
    c4_a_thousand_retries_of_a_completed_request_cost_one_claim,
    c4_a_hundred_jobs_cost_one_claim,
    c2_duplicates_that_wait_for_another_process_ask_as_one,
    c2_who_comes_while_another_waits_for_another_process_is_answered_at_once,
    c2_a_waiting_duplicate_gets_what_the_store_would_give,
    c2_waiting_duplicates_run_one_after_the_other_when_keys_are_freed,
    c3_a_duplicate_is_refused_at_its_limit_also_while_the_first_asks,
    r10_waiting_duplicates_of_a_stream_get_its_tombstone,
    l7_waiting_duplicates_of_a_held_request_are_told_so,
    f4_a_mismatch_is_not_answered_before_the_claim_is_decided,
    f4b_a_mismatch_that_asks_first_keeps_nobody_from_its_replay,
    f4b_a_request_beside_a_mismatch_whose_claim_fails_runs,
    x7_a_claim_that_fails_makes_nobody_wait_for_another,
    x7_an_open_route_runs_once_although_many_ask,
    x8_a_store_that_never_answers_costs_duplicates_no_chain_of_timeouts,
    x8_many_other_payloads_make_no_chain_of_a_slow_store,
    x11_when_the_first_is_dropped_while_it_asks_another_asks,
    x11_when_the_first_is_dropped_while_it_runs_nobody_waits_for_it,
);

const THOUSAND: usize = 1000;

fn patient() -> Policy {
    policy().with_duplicates(Duplicates::Wait(PATIENCE))
}

type Watched<S> = (Flaky<S>, Crowd, IdempotencyLayer<Flaky<S>>);

/// A layer with a store that fails on demand, and is given all the time it takes.
fn watched<B: Backend>(backend: &B, policy: Policy) -> Watched<B::Store> {
    let (store, layer) = backend.flaky(policy);
    let (crowd, layer) = Crowd::of(layer.with_store_timeout(PATIENCE).unwrap());
    (store, crowd, layer)
}

async fn c4_a_thousand_duplicates_cost_one_claim(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, policy());
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Wait);
    let first = site.order("a");
    let test = async {
        store.claim_waits().await;
        let duplicates = storm(&site, THOUSAND - 1, Sent::order("a"));
        let (duplicates, ()) = tokio::join!(duplicates, async {
            crowd.waits(u32::try_from(THOUSAND).unwrap()).await;
            store.let_claim_go();
        });
        for duplicate in &duplicates {
            duplicate.assert_problem(409, "request-in-progress");
        }
        runs.let_go();
    };
    let (first, ()) = tokio::join!(first, test);
    first.assert_run(1);
    assert_eq!(store.claimed_and_completed(), (1, 1));
}

async fn c4_a_thousand_waiting_duplicates_cost_one_claim_and_one_completion(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, patient());
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    let test = async {
        crowd.waits(u32::try_from(THOUSAND).unwrap()).await;
        runs.let_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, THOUSAND, Sent::order("a")), test);
    let replays = answers.iter().filter(|answer| answer.is_replay());
    assert_eq!(replays.count(), THOUSAND - 1);
    for answer in &answers {
        assert_eq!(
            (answer.status, &answer.body),
            (StatusCode::CREATED, &answers[0].body)
        );
    }
    assert_eq!((store.claimed_and_completed(), runs.count()), ((1, 1), 1));
}

async fn c4_a_thousand_retries_of_a_completed_request_cost_one_claim(backend: impl Backend) {
    let runs = Runs::free();
    let first = Site::orders(&backend.layer(), runs.handler()).await;
    let first = first.order("a").await;
    let (store, crowd, layer) = watched(&backend, policy());
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Wait);
    let test = async {
        crowd.waits(u32::try_from(THOUSAND).unwrap()).await;
        store.let_claim_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, THOUSAND, Sent::order("a")), test);
    for answer in &answers {
        answer.assert_replay_of(&first);
    }
    assert_eq!(store.claimed_and_completed(), (1, 0));
}

async fn c4_a_hundred_jobs_cost_one_claim(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, policy());
    let boundary = Boundary::from(layer);
    let run = |_: usize| {
        let identity = Identity::new("acme", "import", "2026-11-22");
        let file = Fingerprint::of_bytes(b"orders.csv");
        boundary.run(identity, file, patient(), |_context| async {
            Ok::<u32, Error>(3)
        })
    };
    store.claims(Fault::Wait);
    let test = async {
        crowd.waits(100).await;
        store.let_claim_go();
    };
    let (ran, ()) = tokio::join!(futures_util::future::join_all((0..100).map(run)), test);
    let ran: Vec<_> = ran.into_iter().map(Result::unwrap).collect();
    let fresh = ran.iter().filter(|ran| **ran == Ran::Fresh(3));
    assert_eq!(fresh.count(), 1);
    let replayed = ran.iter().filter(|ran| **ran == Ran::Replayed(3));
    assert_eq!(replayed.count(), 99);
    assert_eq!(store.claimed_and_completed(), (1, 1));
}

async fn c2_duplicates_that_wait_for_another_process_ask_as_one(backend: impl Backend) {
    let runs = Runs::gated();
    let elsewhere = Site::orders(&backend.layer(), runs.handler()).await;
    let (store, crowd, layer) = watched(&backend, patient());
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Wait);
    let test = async {
        runs.entered().await;
        let test = async {
            crowd.waits(100).await;
            store.claims(Fault::None);
            store.let_claim_go();
            eventually("it was asked again", async || {
                store.claimed_and_completed().0 > 2
            })
            .await;
            runs.let_go();
        };
        tokio::join!(storm(&site, 100, Sent::order("a")), test).0
    };
    let (first, duplicates) = tokio::join!(elsewhere.order("a"), test);
    for duplicate in &duplicates {
        duplicate.assert_replay_of(&first);
    }
    let (claims, _) = store.claimed_and_completed();
    assert!(claims < 50, "{claims} claims");
}

/// The one that waits has not asked for a while, and what it heard is old.
async fn c2_who_comes_while_another_waits_for_another_process_is_answered_at_once(
    backend: impl Backend,
) {
    let runs = Runs::gated();
    let elsewhere = Site::orders(&backend.layer(), runs.handler()).await;
    let (store, crowd, layer) = watched(&backend, patient());
    // Of another policy, under which nobody waits.
    let impatient = layer.clone().with_policy(policy()).unwrap();
    let impatient = Site::orders(&impatient, runs.handler()).await;
    let site = Site::orders(&layer, runs.handler()).await;
    let test = async {
        runs.entered().await;
        let test = async {
            crowd.waits(1).await;
            eventually("it was asked", async || store.claimed_and_completed().0 > 0).await;
            impatient
                .order("a")
                .await
                .assert_problem(409, "request-in-progress");
            runs.let_go();
        };
        tokio::join!(site.order("a"), test).0
    };
    let first = async {
        let first = elsewhere.order("a").await;
        impatient.order("a").await.assert_replay_of(&first);
        first
    };
    let (first, waited) = tokio::join!(first, test);
    waited.assert_replay_of(&first);
}

async fn c2_a_waiting_duplicate_gets_what_the_store_would_give(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, patient().with_expiry_header(true));
    let runs = Runs::gated();
    let handler = runs.answering(|_| {
        let headers = [
            ("x-a", "1"),
            ("x-a", "2"),
            ("set-cookie", "no"),
            ("etag", "\"7\""),
        ];
        (
            StatusCode::ACCEPTED,
            axum::response::AppendHeaders(headers),
            "made",
        )
    });
    let site = Site::orders(&layer, handler).await;
    let test = async {
        crowd.waits(2).await;
        runs.let_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, 2, Sent::order("a")), test);
    let waited = answers.iter().find(|answer| answer.is_replay()).unwrap();
    assert_eq!(store.claimed_and_completed(), (1, 1));
    let asked = site.order("a").await;
    assert_eq!(store.claimed_and_completed(), (2, 1));
    let shown = |answer: &crate::site::Answer| {
        let mut headers = answer.headers.clone();
        // Of the server, and of the second in which it was sent.
        headers.remove("date");
        (answer.status, headers, answer.body.clone())
    };
    assert_eq!(shown(waited), shown(&asked));
    assert!(asked.headers.contains_key("idempotency-expires"));
}

async fn c2_waiting_duplicates_run_one_after_the_other_when_keys_are_freed(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, patient());
    let runs = Runs::gated();
    let handler = runs.answering(|run| match run {
        1 | 2 => (StatusCode::TOO_MANY_REQUESTS, "slow down".to_owned()),
        _ => (StatusCode::CREATED, format!("{{\"run\":{run}}}")),
    });
    let site = Site::orders(&layer, handler).await;
    let test = async {
        crowd.waits(50).await;
        for _ in 0..3 {
            runs.entered().await;
            runs.let_go();
        }
    };
    let (answers, ()) = tokio::join!(storm(&site, 50, Sent::order("a")), test);
    let refused = answers.iter().filter(|answer| answer.status == 429);
    assert_eq!(refused.count(), 2);
    let replays = answers.iter().filter(|answer| answer.is_replay());
    assert_eq!(replays.count(), 47);
    assert_eq!((store.claimed_and_completed().1, runs.count()), (1, 3));
}

async fn c3_a_duplicate_is_refused_at_its_limit_also_while_the_first_asks(backend: impl Backend) {
    let limit = Duration::from_millis(50);
    let (store, _crowd, layer) =
        watched(&backend, policy().with_duplicates(Duplicates::Wait(limit)));
    let site = Site::orders(&layer, Runs::free().handler()).await;
    store.claims(Fault::Wait);
    let test = async {
        store.claim_waits().await;
        site.order("a")
            .await
            .assert_problem(409, "request-in-progress");
        store.let_claim_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
    assert_eq!(store.claimed_and_completed(), (1, 1));
}

async fn r10_waiting_duplicates_of_a_stream_get_its_tombstone(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, patient());
    let runs = Runs::gated();
    let handler = runs.answering(|_| {
        (
            StatusCode::CREATED,
            [
                ("content-type", "text/event-stream"),
                ("location", "/orders/1"),
            ],
            "data: 1\n\n",
        )
    });
    let site = Site::orders(&layer, handler).await;
    let test = async {
        crowd.waits(10).await;
        runs.let_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, 10, Sent::order("a")), test);
    let (first, others): (Vec<_>, Vec<_>) = answers.iter().partition(|a| a.status == 201);
    assert_eq!((first.len(), others.len()), (1, 9));
    for other in others {
        other.assert_problem(410, "response-not-retained");
        assert_eq!(other.headers["location"], "/orders/1");
    }
    assert_eq!(store.claimed_and_completed(), (1, 1));
}

async fn l7_waiting_duplicates_of_a_held_request_are_told_so(backend: impl Backend) {
    let held = critical().with_duplicates(Duplicates::Wait(PATIENCE));
    let (_store, crowd, layer) = watched(&backend, held);
    let runs = Runs::gated();
    let handler = runs.answering(|_| -> StatusCode { panic!("as asked") });
    let site = Site::orders(&layer, handler).await;
    let test = async {
        crowd.waits(10).await;
        runs.let_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, 10, Sent::order("a")), test);
    let told = answers.iter().filter(|answer| answer.status == 409);
    assert_eq!(
        told.inspect(|told| told.assert_problem(409, "outcome-unknown"))
            .count(),
        9
    );
    assert_eq!(runs.count(), 1);
}

fn other() -> Sent {
    Sent::order("a").body("coffee")
}

async fn f4_a_mismatch_is_not_answered_before_the_claim_is_decided(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, policy());
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Wait);
    let test = async {
        store.claim_waits().await;
        let mut mismatch = std::pin::pin!(site.send(other()));
        let early = tokio::select! {
            _ = &mut mismatch => true,
            () = crowd.waits(2) => false,
        };
        assert!(!early, "answered against a fingerprint that no record has");
        store.let_claim_go();
        mismatch.await.assert_problem(409, "key-reused");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
    assert_eq!(store.claimed_and_completed(), (1, 1));
}

async fn f4b_a_mismatch_that_asks_first_keeps_nobody_from_its_replay(backend: impl Backend) {
    let runs = Runs::free();
    let first = Site::orders(&backend.layer(), runs.handler()).await;
    let first = first.order("a").await;
    let (store, crowd, layer) = watched(&backend, policy());
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Wait);
    let mismatches = storm(&site, 2, other());
    let test = async {
        store.claim_waits().await;
        let retries = storm(&site, 2, Sent::order("a"));
        tokio::join!(retries, async {
            crowd.waits(4).await;
            store.claims(Fault::None);
            store.let_claim_go();
        })
        .0
    };
    let (mismatches, retries) = tokio::join!(mismatches, test);
    for mismatch in mismatches {
        mismatch.assert_problem(409, "key-reused");
    }
    for retry in retries {
        retry.assert_replay_of(&first);
    }
}

async fn f4b_a_request_beside_a_mismatch_whose_claim_fails_runs(backend: impl Backend) {
    let (store, layer) = backend.flaky(policy());
    let (crowd, layer) = Crowd::of(layer.with_store_timeout(PATIENCE / 10).unwrap());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Hang);
    let test = async {
        crowd.waits(1).await;
        let (order, ()) = tokio::join!(site.order("a"), async {
            crowd.waits(1).await;
            store.claims(Fault::None);
        });
        order
    };
    let (mismatch, order) = tokio::join!(site.send(other()), test);
    mismatch.assert_problem(503, "store-unavailable");
    order.assert_run(1);
}

async fn x7_a_claim_that_fails_makes_nobody_wait_for_another(backend: impl Backend) {
    let (store, layer) = backend.flaky(policy());
    let layer = layer.with_breaker(100_000).unwrap();
    let (crowd, layer) = Crowd::of(layer);
    let site = Site::orders(&layer, Runs::free().handler()).await;
    store.claims(Fault::Down);
    let answers = storm(&site, 50, Sent::order("a")).await;
    assert_eq!(crowd.len(), 50);
    for answer in answers {
        answer.assert_problem(503, "store-unavailable");
    }
}

async fn x7_an_open_route_runs_once_although_many_ask(backend: impl Backend) {
    let (store, layer) = backend.flaky(Policy::low());
    let (crowd, layer) = Crowd::of(layer);
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Down);
    let test = async {
        crowd.waits(20).await;
        runs.entered().await;
        eventually("the others are answered", async || {
            layer.stats().in_progress == 19
        })
        .await;
        runs.let_go();
    };
    let (answers, ()) = tokio::join!(storm(&site, 20, Sent::order("a")), test);
    let ran = answers.iter().filter(|answer| answer.status == 201);
    assert_eq!((ran.count(), runs.count()), (1, 1));
}

async fn x8_a_store_that_never_answers_costs_duplicates_no_chain_of_timeouts(
    backend: impl Backend,
) {
    let timeout = Duration::from_millis(500);
    let (store, layer) = backend.flaky(policy());
    let layer = layer.with_store_timeout(timeout).unwrap();
    let layer = layer.with_breaker(100_000).unwrap();
    let site = Site::orders(&layer, Runs::free().handler()).await;
    store.claims(Fault::Hang);
    let began = Instant::now();
    for answer in storm(&site, 50, Sent::order("a")).await {
        answer.assert_problem(503, "store-unavailable");
    }
    // One for the first, another for all the others at once; in a chain it were fifty.
    assert!(began.elapsed() < timeout * 10, "{:?}", began.elapsed());
}

/// What one of them is told says nothing of the others.
async fn x8_many_other_payloads_make_no_chain_of_a_slow_store(backend: impl Backend) {
    let runs = Runs::free();
    let first = Site::orders(&backend.layer(), runs.handler()).await;
    first.order("a").await.assert_run(1);
    let (store, layer) = backend.flaky(policy());
    let layer = layer.with_store_timeout(Duration::from_secs(5)).unwrap();
    let site = Site::orders(&layer, runs.handler()).await;
    let late = Duration::from_millis(400);
    store.claims(Fault::AnswerLate(late));
    let began = Instant::now();
    let others = (0..30).map(|number| site.send(Sent::order("a").body(format!("{number}"))));
    for answer in futures_util::future::join_all(others).await {
        answer.assert_problem(409, "key-reused");
    }
    assert!(began.elapsed() < late * 15, "{:?}", began.elapsed());
}

async fn x11_when_the_first_is_dropped_while_it_asks_another_asks(backend: impl Backend) {
    let (store, crowd, layer) = watched(&backend, policy());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Hang);
    let test = async {
        crowd.waits(1).await;
        let (second, ()) = tokio::join!(site.order("a"), async {
            crowd.waits(1).await;
            store.claims(Fault::None);
            crowd.abort(0);
        });
        second
    };
    let (dropped, second) = tokio::join!(site.order("a"), test);
    dropped.assert_problem(503, "answer-not-recorded");
    second.assert_run(1);
    assert_eq!(store.claimed_and_completed(), (2, 1));
}

async fn x11_when_the_first_is_dropped_while_it_runs_nobody_waits_for_it(backend: impl Backend) {
    let lease = Duration::from_millis(600);
    let rerun = Policy::medium().with_lease(lease);
    let (_store, crowd, layer) =
        watched(&backend, rerun.with_duplicates(Duplicates::Wait(PATIENCE)));
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    let test = async {
        runs.entered().await;
        let (second, ()) = tokio::join!(site.order("a"), async {
            crowd.waits(2).await;
            crowd.abort(0);
            // Its lease runs out, and it is taken over.
            runs.entered().await;
            runs.let_go();
        });
        second
    };
    let (dropped, second) = tokio::join!(site.order("a"), test);
    dropped.assert_problem(503, "answer-not-recorded");
    second.assert_run(2);
}
