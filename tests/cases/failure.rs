use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::http::{HeaderValue, StatusCode};
use axum::response::IntoResponse;
use axum::routing::MethodRouter;
use bytes::Bytes;
use tower_idempotency::{Envelope, IdempotencyLayer, Outcome, Policy, Risk};

use crate::backend::{Backend, Corruptible};
use crate::common::fired::fired;
use crate::flaky::Fault;
use crate::site::{Runs, Sent, Site, critical, eventually, every_method, policy};

on_every_store!(
    x3_answers_that_say_nothing_was_done_are_never_stored,
    x4_server_errors_are_stored_or_free_the_key_by_risk_class,
    x4_a_408_is_stored_held_or_frees_the_key_by_risk_class,
    x4_a_panic_is_answered_and_stored_held_or_frees_the_key_by_risk_class,
    x4_an_error_of_the_inner_service_reaches_its_client_and_follows_the_risk_class,
    x5_the_handlers_word_is_obeyed_and_never_reaches_the_client,
    x6_an_answer_that_cannot_be_recorded_is_held_back_and_recorded_later,
    x6_a_losable_answer_goes_out_and_is_recorded_later,
    x6_a_process_that_cannot_record_its_answer_never_runs_the_request_again,
    x6b_a_claim_whose_acknowledgement_is_lost_runs_once,
    x6b_a_completion_whose_acknowledgement_is_lost_is_a_success,
    x7_a_store_that_is_down_refuses_closed_routes,
    x7_a_store_that_is_down_lets_open_routes_run_marked,
    x7_an_open_route_refuses_what_this_process_runs_already,
    x8_a_store_that_never_answers_is_given_up_in_time,
    x8_after_failures_in_a_row_nobody_waits_and_a_probe_recovers,
    x8_what_was_never_sent_is_not_withdrawn,
    x11_a_handler_that_never_returns_is_ended_by_risk_class,
    x11_shutdown_returns_and_reports_what_it_left,
    x11_shutdown_waits_for_handlers_whose_clients_are_gone,
);

on_every_database!(
    x9_a_record_that_cannot_be_read_is_neither_replayed_nor_run,
    f12_a_stored_header_that_would_write_another_is_never_replayed,
);

fn layer<B: Backend>(backend: &B, policy: Policy) -> IdempotencyLayer<B::Store> {
    backend
        .layer()
        .with_policy(policy.with_volatile_store(true))
        .unwrap()
}

async fn x3_answers_that_say_nothing_was_done_are_never_stored(backend: impl Backend) {
    for risk in [Risk::Critical, Risk::High, Risk::Medium, Risk::Low] {
        for status in [401, 403, 425, 429] {
            let runs = Runs::free();
            let handler = runs.answering(move |_| StatusCode::from_u16(status).unwrap());
            let site = Site::orders(&layer(&backend, Policy::of(risk)), handler).await;
            for _ in 0..2 {
                let answer = site.order(&format!("{risk:?}-{status}")).await;
                assert_eq!(answer.status, status);
                assert!(!answer.is_replay());
            }
            assert_eq!(runs.count(), 2);
        }
    }
}

/// What the retry after one kind of ending gets, by class.
async fn assert_by_class<B: Backend>(
    backend: &B,
    handler: impl Fn(&Runs) -> MethodRouter,
    status: u16,
    expected: [(Risk, Retry); 3],
) {
    for (risk, retry) in expected {
        let runs = Runs::free();
        let policy = Policy::of(risk).with_execution_limit(Duration::from_millis(200));
        let site = Site::orders(&layer(backend, policy), handler(&runs)).await;
        let key = format!("{risk:?}");
        let first = site.order(&key).await;
        assert_eq!(first.status, status, "{risk:?}");
        assert!(!first.is_replay());
        let again = site.order(&key).await;
        match retry {
            Retry::Replays => again.assert_replay_of(&first),
            Retry::IsHeld => again.assert_problem(409, "outcome-unknown"),
            Retry::Runs => assert!(!again.is_replay() && again.status == status, "{risk:?}"),
        }
        let expected_runs = if matches!(retry, Retry::Runs) { 2 } else { 1 };
        assert_eq!(runs.count(), expected_runs, "{risk:?}");
    }
}

#[derive(Clone, Copy)]
enum Retry {
    Replays,
    IsHeld,
    Runs,
}

const UNKNOWN: [(Risk, Retry); 3] = [
    (Risk::Critical, Retry::IsHeld),
    (Risk::High, Retry::Replays),
    (Risk::Medium, Retry::Runs),
];

async fn x4_server_errors_are_stored_or_free_the_key_by_risk_class(backend: impl Backend) {
    let handler = |runs: &Runs| runs.answering(|run| (StatusCode::BAD_GATEWAY, run.to_string()));
    let expected = [
        (Risk::Critical, Retry::Replays),
        (Risk::High, Retry::Replays),
        (Risk::Medium, Retry::Runs),
    ];
    assert_by_class(&backend, handler, 502, expected).await;
}

async fn x4_a_408_is_stored_held_or_frees_the_key_by_risk_class(backend: impl Backend) {
    let handler = |runs: &Runs| runs.answering(|_| StatusCode::REQUEST_TIMEOUT);
    assert_by_class(&backend, handler, 408, UNKNOWN).await;
}

async fn x4_a_panic_is_answered_and_stored_held_or_frees_the_key_by_risk_class(
    backend: impl Backend,
) {
    let handler = |runs: &Runs| runs.answering(|_| -> StatusCode { panic!("planted") });
    assert_by_class(&backend, handler, 500, UNKNOWN).await;
}

async fn x11_a_handler_that_never_returns_is_ended_by_risk_class(backend: impl Backend) {
    let handler = |runs: &Runs| {
        let runs = runs.clone();
        every_method(move |_body: Bytes| {
            let runs = runs.clone();
            async move {
                runs.run().await;
                std::future::pending::<StatusCode>().await
            }
        })
    };
    assert_by_class(&backend, handler, 500, UNKNOWN).await;
}

async fn x4_an_error_of_the_inner_service_reaches_its_client_and_follows_the_risk_class(
    backend: impl Backend,
) {
    use tower::{Layer, ServiceExt};
    let runs = Arc::new(AtomicUsize::new(0));
    let call = async |risk: Risk| {
        let runs = runs.clone();
        let inner = tower::service_fn(move |_: axum::http::Request<axum::body::Body>| {
            let runs = runs.clone();
            async move {
                runs.fetch_add(1, Ordering::SeqCst);
                crate::common::fired::fired("inner error");
                Err::<axum::response::Response, _>(std::io::Error::other("connection reset"))
            }
        });
        let service = layer(&backend, Policy::of(risk)).layer(inner);
        let request = axum::http::Request::post("/orders")
            .header("x-tenant", "acme")
            .header("idempotency-key", format!("{risk:?}"))
            .body(axum::body::Body::empty())
            .unwrap();
        service.oneshot(request).await
    };
    assert!(call(Risk::High).await.is_err());
    let stored = call(Risk::High).await.unwrap();
    assert_eq!(stored.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(stored.headers()["idempotent-replayed"], "true");
    assert!(call(Risk::Critical).await.is_err());
    assert_eq!(
        call(Risk::Critical).await.unwrap().status(),
        StatusCode::CONFLICT
    );
    assert!(call(Risk::Medium).await.is_err());
    assert!(call(Risk::Medium).await.is_err());
    assert_eq!(runs.load(Ordering::SeqCst), 4);
}

async fn x5_the_handlers_word_is_obeyed_and_never_reaches_the_client(backend: impl Backend) {
    for (outcome, status, runs_after, retry) in [
        (Outcome::Release, StatusCode::CREATED, 2, 201),
        (Outcome::Store, StatusCode::TOO_MANY_REQUESTS, 1, 429),
        (Outcome::Hold, StatusCode::BAD_GATEWAY, 1, 409),
    ] {
        let runs = Runs::free();
        let handler = runs.answering(move |_| (status, outcome, "word").into_response());
        let site = Site::orders(&backend.layer(), handler).await;
        let key = format!("{outcome:?}");
        let first = site.order(&key).await;
        assert_eq!(
            (first.status, &first.body[..]),
            (status, b"word".as_slice())
        );
        let shown = format!("{:?}", first.headers).to_ascii_lowercase();
        assert!(!shown.contains("outcome"), "{shown}");
        assert_eq!(site.order(&key).await.status, retry);
        assert_eq!(runs.count(), runs_after);
    }
}

async fn x6_an_answer_that_cannot_be_recorded_is_held_back_and_recorded_later(
    backend: impl Backend,
) {
    let settles = critical().with_settle_timeout(Duration::from_millis(200));
    let (store, layer) = backend.flaky(settles);
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.completions(Fault::Down);
    let first = site.order("a").await;
    first.assert_problem(503, "answer-not-recorded");
    assert_eq!(first.headers["retry-after"], "1");
    assert!(store.fired() > 0);
    site.order("a")
        .await
        .assert_problem(409, "request-in-progress");
    store.completions(Fault::None);
    eventually("the answer is recorded", async || {
        site.order("a").await.is_replay()
    })
    .await;
    assert_eq!(site.order("a").await.json()["run"], 1);
    assert_eq!(runs.count(), 1);
}

async fn x6_a_losable_answer_goes_out_and_is_recorded_later(backend: impl Backend) {
    let settles = Policy::medium().with_settle_timeout(Duration::from_millis(200));
    let (store, layer) = backend.flaky(settles);
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.completions(Fault::Down);
    let first = site.order("a").await;
    first.assert_run(1);
    assert!(store.fired() > 0);
    site.order("a")
        .await
        .assert_problem(409, "request-in-progress");
    store.completions(Fault::None);
    eventually("the answer is recorded", async || {
        site.order("a").await.is_replay()
    })
    .await;
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

/// The outage lasts longer than the lease, and ends for claims first.
async fn x6_a_process_that_cannot_record_its_answer_never_runs_the_request_again(
    backend: impl Backend,
) {
    let settles = Policy::medium().with_settle_timeout(Duration::from_millis(200));
    let (store, layer) = backend.flaky(settles);
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.completions(Fault::Down);
    let first = site.order("a").await;
    first.assert_run(1);
    backend.age(Duration::from_secs(31)).await;
    site.order("a")
        .await
        .assert_problem(409, "request-in-progress");
    let other = Sent::order("a").body("{}");
    site.send(other).await.assert_problem(409, "key-reused");
    assert!(store.fired() > 0);
    store.completions(Fault::None);
    eventually("the answer is recorded", async || {
        site.order("a").await.is_replay()
    })
    .await;
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn x6b_a_claim_whose_acknowledgement_is_lost_runs_once(backend: impl Backend) {
    let (store, layer) = backend.flaky(critical());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::LoseAcknowledgement);
    let first = site.order("a").await;
    assert_eq!(store.fired(), 1);
    first.assert_run(1);
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn x6b_a_completion_whose_acknowledgement_is_lost_is_a_success(backend: impl Backend) {
    let (store, layer) = backend.flaky(critical());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.completions(Fault::LoseAcknowledgement);
    let first = site.order("a").await;
    assert_eq!(store.fired(), 1);
    first.assert_run(1);
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn x7_a_store_that_is_down_refuses_closed_routes(backend: impl Backend) {
    for policy in [critical(), policy(), Policy::medium()] {
        let (store, layer) = backend.flaky(policy);
        let runs = Runs::free();
        let site = Site::orders(&layer, runs.handler()).await;
        store.claims(Fault::Down);
        let refused = site.order("a").await;
        refused.assert_problem(503, "store-unavailable");
        assert_eq!(refused.headers["retry-after"], "1");
        assert!(store.fired() > 0);
        assert_eq!(runs.count(), 0);
    }
}

async fn x7_a_store_that_is_down_lets_open_routes_run_marked(backend: impl Backend) {
    let (store, layer) = backend.flaky(Policy::low());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Down);
    let first = site.order("a").await;
    first.assert_run(1);
    assert_eq!(first.headers["idempotency-unprotected"], "true");
    assert!(store.fired() > 0);
    assert_eq!((layer.stats().unprotected, layer.stats().executed), (1, 0));
    store.claims(Fault::None);
    let protected = site.order("b").await;
    protected.assert_run(2);
    assert!(!protected.headers.contains_key("idempotency-unprotected"));
}

async fn x7_an_open_route_refuses_what_this_process_runs_already(backend: impl Backend) {
    let (store, layer) = backend.flaky(Policy::low());
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Down);
    let test = async {
        runs.entered().await;
        site.order("a")
            .await
            .assert_problem(409, "request-in-progress");
        let other = Sent::order("a").body("{}");
        site.send(other).await.assert_problem(409, "key-reused");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
    assert_eq!(runs.count(), 1);
}

async fn x8_a_store_that_never_answers_is_given_up_in_time(backend: impl Backend) {
    let (store, layer) = backend.flaky(policy());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Hang);
    let refused = site.order("a").await;
    refused.assert_problem(503, "store-unavailable");
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!((store.fired(), runs.count()), (1, 0));
}

async fn x8_after_failures_in_a_row_nobody_waits_and_a_probe_recovers(backend: impl Backend) {
    let (store, layer) = backend.flaky(policy());
    let layer = layer.with_breaker(2).unwrap();
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Hang);
    for key in ["a", "b"] {
        site.order(key)
            .await
            .assert_problem(503, "store-unavailable");
    }
    assert_eq!(store.fired(), 2);
    let started = Instant::now();
    site.order("c")
        .await
        .assert_problem(503, "store-unavailable");
    // Not asked at all, unless this took so long that it was the probe.
    assert!(store.fired() == 2 || started.elapsed() > Duration::from_millis(500));
    store.claims(Fault::None);
    eventually("a probe is admitted", async || {
        site.order("d").await.status == 201
    })
    .await;
    site.order("e").await.assert_run(2);
}

async fn x9_a_record_that_cannot_be_read_is_neither_replayed_nor_run(backend: impl Corruptible) {
    let runs = Runs::free();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    site.order("a").await.assert_run(1);
    for bytes in [vec![], vec![99], vec![1, 0, 0, 200], vec![255; 100]] {
        backend.set_answers(bytes).await;
        site.order("a")
            .await
            .assert_problem(500, "record-unreadable");
    }
    assert_eq!(runs.count(), 1);
}

/// An outage would else leave a task for each request that was refused meanwhile.
async fn x8_what_was_never_sent_is_not_withdrawn(backend: impl Backend) {
    let (store, layer) = backend.flaky(policy());
    let layer = layer.with_breaker(1).unwrap();
    let site = Site::orders(&layer, Runs::free().handler()).await;
    store.claims(Fault::Hang);
    for n in 0..50 {
        let refused = site.order(&format!("key-{n}")).await;
        refused.assert_problem(503, "store-unavailable");
    }
    let sent = store.fired();
    assert!(sent < 25, "the breaker lets {sent} of 50 through");
    eventually("what was sent is withdrawn", async || {
        store.calls() >= 2 * sent
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Each that was sent is withdrawn at once, and once more.
    assert!(store.calls() <= 3 * sent, "{} for {sent}", store.calls());
}

/// With a good checksum: somebody has written into the database. A handler cannot say such a thing, since
/// [`HeaderValue`] does not take it.
async fn f12_a_stored_header_that_would_write_another_is_never_replayed(backend: impl Corruptible) {
    let runs = Runs::free();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    site.order("a").await.assert_run(1);
    let mut answer = axum::http::Response::new(Bytes::from_static(b"forged"));
    let (name, value) = ("x-invoice-number", "0000000000000000000");
    let good = HeaderValue::from_static(value);
    answer.headers_mut().insert(name, good);
    let envelope = Envelope::new(answer).encode();
    let forged = |from: &str, to: &str| {
        let (mut bytes, _) = envelope.split_last_chunk::<4>().unwrap();
        let at = bytes.windows(from.len()).position(|b| b == from.as_bytes());
        let at = at.unwrap();
        let mut out = bytes[..at].to_vec();
        out.extend(to.as_bytes());
        bytes = &bytes[at + from.len()..];
        out.extend(bytes);
        out.extend(crc32fast::hash(&out).to_be_bytes());
        out
    };
    for hostile in [
        "1\r\nset-cookie: a=bc",
        "1\nset-cookie: a=bcd",
        "1\rset-cookie: a=bcd",
        "1\r\n\r\n<script></scri",
        "1\0set-cookie: a=bcd",
    ] {
        assert_eq!(hostile.len(), value.len(), "{hostile:?}");
        assert!(HeaderValue::from_str(hostile).is_err());
        backend.set_answers(forged(value, hostile)).await;
        fired("hostile header");
        let answer = site.order("a").await;
        answer.assert_problem(500, "record-unreadable");
        assert!(!answer.headers.contains_key("set-cookie"));
    }
    for hostile in [
        "x-invoice: 1\r\nx-",
        "x invoice number",
        "x-invoice-numbe\0",
    ] {
        assert_eq!(hostile.len(), name.len(), "{hostile:?}");
        backend.set_answers(forged(name, hostile)).await;
        fired("hostile header");
        site.order("a")
            .await
            .assert_problem(500, "record-unreadable");
    }
    // What was not tampered with is replayed: the forgery itself is well made.
    backend.set_answers(forged(value, value)).await;
    let answer = site.order("a").await;
    assert_eq!((answer.status.as_u16(), answer.is_replay()), (200, true));
    assert_eq!(answer.headers[name], value);
    assert_eq!(runs.count(), 1);
}

async fn x11_shutdown_returns_and_reports_what_it_left(backend: impl Backend) {
    let runs = Runs::gated();
    let layer = backend.layer();
    let site = Site::orders(&layer, runs.handler()).await;
    let test = async {
        runs.entered().await;
        let report = layer.shutdown(Duration::from_millis(50)).await;
        assert_eq!(report.unfinished.len(), 1);
        assert_eq!(report.unfinished[0].key(), "a");
        let refused = site.order("b").await;
        refused.assert_problem(503, "shutting-down");
        assert!(refused.headers.contains_key("retry-after"));
        runs.let_go();
        assert!(
            layer
                .shutdown(crate::site::PATIENCE)
                .await
                .unfinished
                .is_empty()
        );
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
}

async fn x11_shutdown_waits_for_handlers_whose_clients_are_gone(backend: impl Backend) {
    let runs = Runs::gated();
    let layer = backend.layer();
    let site = Site::orders(&layer, runs.handler()).await;
    let client = tokio::spawn(Sent::order("a").send_to(site.address));
    runs.entered().await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    let (report, ()) = tokio::join!(layer.shutdown(crate::site::PATIENCE), async {
        runs.let_go();
    });
    assert!(report.unfinished.is_empty());
    let fresh = Site::orders(&backend.layer(), runs.handler()).await;
    assert!(fresh.order("a").await.is_replay());
}
