use std::time::Duration;

use axum::http::{Response, StatusCode};
use bytes::Bytes;
use tower_idempotency::store::{Existing, Resolution};
use tower_idempotency::{
    Envelope, Fingerprint, IdempotencyContext, IdempotencyLayer, Identity, Lost, Policy, Scope,
    Store, StoreErrorKind,
};

use crate::backend::Backend;
use crate::flaky::{Fault, Flaky};
use crate::site::{PATIENCE, Runs, Site, critical, eventually, policy};

on_every_store!(
    l1_a_record_past_its_ttl_runs_again_and_then_replays_the_new_answer,
    l2_a_lost_attempt_is_run_again_answered_or_held_by_policy,
    l2_the_policy_an_attempt_began_with_decides,
    l3_a_handler_slower_than_its_lease_keeps_it,
    l3_no_handler_starts_on_a_lease_that_is_over,
    l3_a_store_slower_than_the_lease_runs_nothing,
    l4_a_late_completion_after_a_takeover_is_refused,
    l4_a_late_completion_while_the_successor_runs_is_refused,
    l5_settings_that_cannot_work_are_refused_by_name,
    l6_the_sweep_deletes_expired_records_and_nothing_else,
    l7_a_held_record_is_listed_and_resolved_with_an_answer,
    l7_a_held_record_is_listed_and_resolved_with_a_release,
    l7_a_late_completion_wins_over_hold,
);

const LEASE: Duration = Duration::from_secs(30);

fn layer<B: Backend>(backend: &B, policy: Policy) -> IdempotencyLayer<B::Store> {
    backend.layer().with_policy(policy).unwrap()
}

async fn l1_a_record_past_its_ttl_runs_again_and_then_replays_the_new_answer(
    backend: impl Backend,
) {
    let ttl = Duration::from_secs(3600);
    let runs = Runs::free();
    let site = Site::orders(&layer(&backend, policy().with_ttl(ttl)), runs.handler()).await;
    let first = site.order("a").await;
    first.assert_run(1);
    backend.age(ttl - Duration::from_secs(60)).await;
    site.order("a").await.assert_replay_of(&first);
    backend.age(Duration::from_secs(61)).await;
    let second = site.order("a").await;
    second.assert_run(2);
    site.order("a").await.assert_replay_of(&second);
}

/// Two requests to two nodes, the second of which comes when the lease of the first is over.
async fn l2_a_lost_attempt_is_run_again_answered_or_held_by_policy(backend: impl Backend) {
    for lost in [Lost::Rerun, Lost::Answer, Lost::Hold] {
        let runs = Runs::gated();
        let policy = policy().with_lost(lost);
        let site = Site::orders(&layer(&backend, policy.clone()), runs.handler()).await;
        let other = Site::orders(&layer(&backend, policy), runs.handler()).await;
        let key = format!("{lost:?}");
        let test = async {
            runs.entered().await;
            backend.age(LEASE + Duration::from_secs(1)).await;
            if lost == Lost::Rerun {
                runs.let_go();
                runs.let_go();
            }
            let second = other.order(&key).await;
            match lost {
                Lost::Rerun => {}
                Lost::Answer => {
                    second.assert_problem(500, "attempt-lost");
                    let third = other.order(&key).await;
                    third.assert_replay_of(&second);
                    assert_eq!(runs.count(), 1);
                    runs.let_go();
                }
                _ => {
                    second.assert_problem(409, "outcome-unknown");
                    assert!(!second.headers.contains_key("retry-after"));
                    assert_eq!(runs.count(), 1);
                    runs.let_go();
                }
            }
        };
        tokio::join!(site.order(&key), test);
        assert!(site.order(&key).await.is_replay());
    }
}

async fn l2_the_policy_an_attempt_began_with_decides(backend: impl Backend) {
    let runs = Runs::gated();
    let site = Site::orders(&layer(&backend, critical()), runs.handler()).await;
    let other = Site::orders(&layer(&backend, Policy::medium()), runs.handler()).await;
    let test = async {
        runs.entered().await;
        backend.age(LEASE + Duration::from_secs(1)).await;
        other
            .order("a")
            .await
            .assert_problem(409, "outcome-unknown");
        assert_eq!(runs.count(), 1);
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
}

async fn l3_a_handler_slower_than_its_lease_keeps_it(backend: impl Backend) {
    let store = Flaky::new(backend.store());
    let rerun = policy()
        .with_lost(Lost::Rerun)
        .with_lease(Duration::from_millis(600));
    let layer = IdempotencyLayer::new(store.clone(), Scope::header("x-tenant").unwrap())
        .with_policy(rerun)
        .unwrap();
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    let test = async {
        runs.entered().await;
        // Three beats make a lease: after nine the first three leases are over.
        let calls = store.calls();
        eventually("the heart has beaten", async || store.calls() >= calls + 9).await;
        site.order("a")
            .await
            .assert_problem(409, "request-in-progress");
        assert_eq!(runs.count(), 1);
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
    site.order("a").await.assert_replay_of(&first);
}

/// A lease of 600 ms, of which the first acknowledgements take some.
async fn late<B: Backend>(backend: &B, runs: &Runs) -> (Flaky<B::Store>, Site) {
    let store = Flaky::new(backend.store());
    let short = critical().with_lease(Duration::from_millis(600));
    let layer = IdempotencyLayer::new(store.clone(), Scope::header("x-tenant").unwrap())
        .with_policy(short)
        .unwrap();
    let counted = runs.clone();
    let handler = crate::site::every_method(move |context: IdempotencyContext| {
        let runs = counted.clone();
        async move {
            runs.run().await;
            context.is_current().to_string()
        }
    });
    let site = Site::orders(&layer, handler).await;
    (store, site)
}

async fn l3_no_handler_starts_on_a_lease_that_is_over(backend: impl Backend) {
    let runs = Runs::free();
    let (store, site) = late(&backend, &runs).await;
    store.claims(Fault::AnswerLate(Duration::from_millis(900)));
    let first = site.order("a").await;
    assert_eq!((&first.body[..], store.fired()), (b"true".as_slice(), 1));
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn l3_a_store_slower_than_the_lease_runs_nothing(backend: impl Backend) {
    let runs = Runs::free();
    let (store, site) = late(&backend, &runs).await;
    store.extensions(Fault::AnswerLate(Duration::from_millis(900)));
    store.claims(Fault::AnswerLate(Duration::from_millis(900)));
    site.order("a")
        .await
        .assert_problem(503, "store-unavailable");
    assert_eq!(runs.count(), 0);
    assert!(store.fired() > 2);
    store.extensions(Fault::None);
    store.claims(Fault::None);
    eventually("the claim is withdrawn", async || {
        site.order("a").await.status == 200
    })
    .await;
    assert_eq!(runs.count(), 1);
}

async fn l4_a_late_completion_after_a_takeover_is_refused(backend: impl Backend) {
    // The first run waits at a gate of its own.
    let gate = Runs::gated();
    let gated = gate.clone();
    let slow = Runs::free();
    let counted = slow.clone();
    let handler = crate::site::every_method(move |_body: Bytes| {
        let (gate, runs) = (gated.clone(), counted.clone());
        async move {
            let run = runs.run().await;
            if run == 1 {
                gate.run().await;
            }
            (
                StatusCode::CREATED,
                axum::Json(serde_json::json!({ "run": run })),
            )
        }
    });
    let rerun = policy().with_lost(Lost::Rerun);
    let site = Site::orders(&layer(&backend, rerun.clone()), handler.clone()).await;
    let other = Site::orders(&layer(&backend, rerun), handler).await;
    let test = async {
        gate.entered().await;
        backend.age(LEASE + Duration::from_secs(1)).await;
        let second = other.order("a").await;
        second.assert_run(2);
        gate.let_go();
        second
    };
    let (zombie, second) = tokio::join!(site.order("a"), test);
    zombie.assert_replay_of(&second);
    site.order("a").await.assert_replay_of(&second);
    assert_eq!(slow.count(), 2);
}

async fn l4_a_late_completion_while_the_successor_runs_is_refused(backend: impl Backend) {
    // Each run waits at a gate of its own.
    let runs = Runs::free();
    let gates = [Runs::gated(), Runs::gated()];
    let (counted, gated) = (runs.clone(), gates.clone());
    let handler = crate::site::every_method(move |_body: Bytes| {
        let (runs, gates) = (counted.clone(), gated.clone());
        async move {
            let run = runs.run().await;
            gates[run - 1].run().await;
            let body = axum::Json(serde_json::json!({ "run": run }));
            (StatusCode::CREATED, body)
        }
    });
    let rerun = policy().with_lost(Lost::Rerun);
    let site = Site::orders(&layer(&backend, rerun.clone()), handler.clone()).await;
    let other = Site::orders(&layer(&backend, rerun), handler).await;
    let zombie = async {
        let zombie = site.order("a").await;
        zombie.assert_problem(409, "request-in-progress");
        gates[1].let_go();
    };
    let successor = async {
        gates[0].entered().await;
        backend.age(LEASE + Duration::from_secs(1)).await;
        let (successor, ()) = tokio::join!(other.order("a"), async {
            gates[1].entered().await;
            gates[0].let_go();
        });
        successor.assert_run(2);
        successor
    };
    let ((), successor) = tokio::join!(zombie, successor);
    site.order("a").await.assert_replay_of(&successor);
    assert_eq!(runs.count(), 2);
}

async fn l5_settings_that_cannot_work_are_refused_by_name(backend: impl Backend) {
    let refused = |policy: Policy| {
        let error = backend.layer().with_policy(policy).unwrap_err();
        (error.field(), error.to_string())
    };
    assert_eq!(refused(policy().with_ttl(Duration::ZERO)).0, "ttl");
    assert_eq!(refused(policy().with_lease(Duration::ZERO)).0, "lease");
    assert_eq!(
        refused(policy().with_execution_limit(Duration::ZERO)).0,
        "execution_limit"
    );
    let (field, message) = refused(policy().with_ttl(Duration::from_secs(329)));
    assert_eq!(field, "ttl");
    assert!(
        message.contains("329") && message.contains("330"),
        "{message}"
    );
    let exact = policy().with_ttl(Duration::from_secs(330));
    assert!(backend.layer().with_policy(exact).is_ok());

    let by_store = backend.layer().with_policy(Policy::critical());
    assert_eq!(by_store.is_ok(), backend.store().is_durable());
    assert!(by_store.is_ok() || by_store.unwrap_err().field() == "store");
    assert_eq!(
        backend.layer().with_max_running(0).unwrap_err().field(),
        "max_running"
    );
}

async fn l6_the_sweep_deletes_expired_records_and_nothing_else(backend: impl Backend) {
    let hour = Duration::from_secs(3600);
    let short = layer(&backend, policy().with_ttl(hour));
    let gone = Site::orders(&short, Runs::free().handler()).await;
    gone.order("expired").await.assert_run(1);
    let held = Runs::free().answering(|_| tower_idempotency::Outcome::Hold);
    let held = Site::orders(&layer(&backend, critical().with_ttl(hour)), held).await;
    held.order("held").await;
    backend.age(hour + Duration::from_secs(1)).await;

    let runs = Runs::gated();
    let kept = Site::orders(&layer(&backend, policy()), runs.handler()).await;
    let test = async {
        runs.entered().await;
        let swept = backend.store().delete_expired(100).await.unwrap();
        assert_eq!((swept.deleted, swept.held), (1, 0));
        held.order("held")
            .await
            .assert_problem(409, "outcome-unknown");
        kept.order("running")
            .await
            .assert_problem(409, "request-in-progress");
        runs.let_go();
    };
    let (running, ()) = tokio::join!(kept.order("running"), test);
    running.assert_run(1);
    assert_eq!(
        backend.store().delete_expired(100).await.unwrap().deleted,
        0
    );
    kept.order("running").await.assert_replay_of(&running);
}

/// An attempt whose lease is over, and that another node found so and held: its answer, and that node.
async fn held<B: Backend>(
    backend: &B,
    test: impl AsyncFnOnce(&Site, &Runs),
) -> (crate::site::Answer, Site, Runs) {
    let runs = Runs::gated();
    let site = Site::orders(&layer(backend, critical()), runs.handler()).await;
    let other = Site::orders(&layer(backend, critical()), runs.handler()).await;
    let retry = async {
        runs.entered().await;
        backend.age(LEASE + Duration::from_secs(1)).await;
        other
            .order("a")
            .await
            .assert_problem(409, "outcome-unknown");
        test(&other, &runs).await;
    };
    let (first, ()) = tokio::join!(site.order("a"), retry);
    (first, other, runs)
}

async fn l7_a_held_record_is_listed_and_resolved_with_an_answer(backend: impl Backend) {
    let store = backend.store();
    let answer = Response::builder()
        .status(201)
        .body(Bytes::from_static(b"by hand"));
    let answer = Envelope::new(answer.unwrap());
    let (late, site, runs) = held(&backend, async |site, runs| {
        let listed = store.list_held(None, 10).await.unwrap();
        assert_eq!(listed.len(), 1);
        let record = &listed[0];
        assert_eq!(record.identity, Identity::new("acme", "POST /orders", "a"));
        assert_eq!(record.attempt, 1);
        let resolution = Resolution::Answer(answer.clone());
        store
            .resolve(&record.identity, record.token, &resolution)
            .await
            .unwrap();
        let again = store
            .resolve(&record.identity, record.token, &resolution)
            .await;
        assert_eq!(again.unwrap_err().kind(), StoreErrorKind::ClaimLost);
        assert!(store.list_held(None, 10).await.unwrap().is_empty());
        let replay = site.order("a").await;
        assert!(replay.is_replay());
        assert_eq!(
            (replay.status, &replay.body[..]),
            (StatusCode::CREATED, b"by hand".as_slice())
        );
        runs.let_go();
    })
    .await;
    // What the attempt still brings is refused: its own client gets what was decided.
    assert!(late.is_replay());
    assert_eq!(late.body, "by hand");
    assert_eq!(site.order("a").await.body, "by hand");
    assert_eq!(runs.count(), 1);
}

async fn l7_a_held_record_is_listed_and_resolved_with_a_release(backend: impl Backend) {
    let store = backend.store();
    let (late, site, runs) = held(&backend, async |_, runs| {
        let listed = store.list_held(None, 10).await.unwrap();
        let record = &listed[0];
        let release = Resolution::Release;
        store
            .resolve(&record.identity, record.token, &release)
            .await
            .unwrap();
        runs.let_go();
    })
    .await;
    late.assert_problem(503, "answer-not-recorded");
    runs.let_go();
    let second = tokio::time::timeout(PATIENCE, site.order("a"))
        .await
        .unwrap();
    second.assert_run(2);
    site.order("a").await.assert_replay_of(&second);
}

async fn l7_a_late_completion_wins_over_hold(backend: impl Backend) {
    let store = backend.store();
    let (late, site, runs) = held(&backend, async |_, runs| runs.let_go()).await;
    late.assert_run(1);
    site.order("a").await.assert_replay_of(&late);
    assert!(store.list_held(None, 10).await.unwrap().is_empty());
    assert_eq!(runs.count(), 1);
    let identity = Identity::new("acme", "POST /orders", "a");
    let other = Fingerprint::of_bytes(b"another request");
    let seen = store.lookup(&identity, &other).await.unwrap();
    assert!(matches!(seen, Some(Existing::Mismatch)));
}
