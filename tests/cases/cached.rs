//! Answers that are replayed from memory.

use std::io::Error;
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::AppendHeaders;
use tower_idempotency::{
    Boundary, Fingerprint, IdempotencyLayer, Identity, Policy, Ran, StoreDown,
};

use crate::backend::Backend;
use crate::crowd::Crowd;
use crate::flaky::{Fault, Flaky};
use crate::site::{Answer, Runs, Sent, Site, eventually, policy};

on_every_store!(
    r1_a_replay_from_memory_is_that_of_the_store,
    r1_an_answer_is_replayed_without_the_store,
    r1_an_answer_that_was_looked_up_is_replayed_without_the_store,
    r2_a_replay_from_memory_takes_neither_a_task_nor_a_place,
    r2_replays_from_memory_are_counted,
    r2_a_route_without_it_asks_the_store,
    r7_a_tombstone_is_answered_from_memory,
    f1_another_payload_is_refused_without_the_store,
    f1_another_payload_is_refused_also_where_the_answer_was_looked_up,
    f3_another_operation_is_independent,
    f9_scopes_never_meet_in_memory,
    x3_what_frees_its_key_is_not_kept,
    x6_an_answer_that_is_not_recorded_is_not_kept,
    x7_a_store_that_is_down_keeps_nobody_from_a_replay,
    l1_what_is_in_memory_ends_with_its_retention,
    l1_a_claim_by_another_policy_ends_what_is_in_memory,
    a_policy_that_is_replaced_ends_it_at_once,
    a_layer_that_is_shut_down_replays_nothing,
    a_job_is_replayed_from_memory,
);

fn cached() -> Policy {
    policy().with_replay_cache(true)
}

fn layer<B: Backend>(
    backend: &B,
    policy: Policy,
) -> (Flaky<B::Store>, IdempotencyLayer<Flaky<B::Store>>) {
    let (store, layer) = backend.flaky(policy);
    let layer = layer.with_store_timeout(Duration::from_secs(10)).unwrap();
    (store, layer)
}

async fn open<B: Backend>(backend: &B, policy: Policy, runs: &Runs) -> (Flaky<B::Store>, Site) {
    let (store, layer) = layer(backend, policy);
    (store, Site::orders(&layer, runs.handler()).await)
}

async fn r1_a_replay_from_memory_is_that_of_the_store(backend: impl Backend) {
    let runs = Runs::free();
    let handler = || {
        runs.answering(|_| {
            let headers = [
                ("x-a", "1"),
                ("etag", "\"7\""),
                ("x-a", "2"),
                ("set-cookie", "no"),
            ];
            (
                StatusCode::ACCEPTED,
                AppendHeaders(headers),
                b"\x00\xffmade".to_vec(),
            )
        })
    };
    let shown = |answer: Answer| {
        let mut headers = answer.headers;
        headers.remove("date");
        let in_order: Vec<_> = headers
            .iter()
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        (answer.status, in_order, answer.body)
    };
    let policy = cached().with_expiry_header(true);
    let (store, layer) = layer(&backend, policy.clone());
    let site = Site::orders(&layer, handler()).await;
    site.order("a").await;
    let calls = store.calls();
    let own = shown(site.order("a").await);
    assert_eq!(store.calls(), calls);

    let (store, layer) = self::layer(&backend, policy);
    let site = Site::orders(&layer, handler()).await;
    let asked = shown(site.order("a").await);
    let calls = store.calls();
    let looked_up = shown(site.order("a").await);
    assert_eq!(store.calls(), calls);
    assert_eq!(own, asked);
    assert_eq!(looked_up, asked);
}

async fn r1_an_answer_is_replayed_without_the_store(backend: impl Backend) {
    let (store, site) = open(&backend, cached(), &Runs::free()).await;
    let first = site.order("a").await;
    first.assert_run(1);
    let calls = store.calls();
    for _ in 0..3 {
        site.order("a").await.assert_replay_of(&first);
    }
    assert_eq!(store.calls(), calls);
}

async fn r1_an_answer_that_was_looked_up_is_replayed_without_the_store(backend: impl Backend) {
    let runs = Runs::free();
    let first = Site::orders(&backend.layer(), runs.handler()).await;
    let first = first.order("a").await;
    let (store, site) = open(&backend, cached(), &runs).await;
    site.order("a").await.assert_replay_of(&first);
    let calls = store.calls();
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(store.calls(), calls);
}

async fn r2_a_replay_from_memory_takes_neither_a_task_nor_a_place(backend: impl Backend) {
    let (_store, layer) = layer(&backend, cached());
    let (crowd, layer) = Crowd::of(layer.with_max_running(2).unwrap());
    let runs = Runs::gated();
    let site = Site::orders(&layer, runs.handler()).await;
    runs.let_go();
    let first = site.order("a").await;
    let test = async {
        runs.entered().await;
        runs.entered().await;
        for _ in 0..3 {
            site.order("a").await.assert_replay_of(&first);
        }
        runs.let_go();
    };
    tokio::join!(site.order("b"), test);
    assert_eq!(crowd.len(), 2);
}

async fn r2_replays_from_memory_are_counted(backend: impl Backend) {
    let (_store, layer) = layer(&backend, cached());
    let site = Site::orders(&layer, Runs::free().handler()).await;
    for _ in 0..3 {
        site.order("a").await;
    }
    site.send(Sent::order("a").body("other")).await;
    let stats = layer.stats();
    assert_eq!(
        (stats.executed, stats.replayed, stats.mismatched),
        (1, 2, 1)
    );
}

async fn r2_a_route_without_it_asks_the_store(backend: impl Backend) {
    let (store, layer) = layer(&backend, cached());
    let layer = layer.with_route("POST /orders", policy()).unwrap();
    let site = Site::orders(&layer, Runs::free().handler()).await;
    let first = site.order("a").await;
    let calls = store.calls();
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(store.calls(), calls + 1);
}

async fn r7_a_tombstone_is_answered_from_memory(backend: impl Backend) {
    let (store, layer) = layer(&backend, cached().with_response_limit(10));
    let runs = Runs::free();
    let handler = runs.answering(|_| {
        let location = [("location", "/orders/1")];
        (StatusCode::CREATED, location, "more than ten bytes")
    });
    let site = Site::orders(&layer, handler).await;
    assert_eq!(site.order("a").await.status, 201);
    let calls = store.calls();
    let answer = site.order("a").await;
    answer.assert_problem(410, "response-not-retained");
    assert_eq!(answer.headers["location"], "/orders/1");
    assert_eq!((store.calls(), runs.count()), (calls, 1));
}

async fn f1_another_payload_is_refused_without_the_store(backend: impl Backend) {
    let (store, site) = open(&backend, cached(), &Runs::free()).await;
    let first = site.order("a").await;
    let calls = store.calls();
    let other = site.send(Sent::order("a").body("other")).await;
    other.assert_problem(409, "key-reused");
    assert!(!other.headers.contains_key("retry-after"));
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(store.calls(), calls);
}

async fn f1_another_payload_is_refused_also_where_the_answer_was_looked_up(backend: impl Backend) {
    let runs = Runs::free();
    let first = Site::orders(&backend.layer(), runs.handler()).await;
    let first = first.order("a").await;
    let (_store, site) = open(&backend, cached(), &runs).await;
    for _ in 0..2 {
        site.order("a").await.assert_replay_of(&first);
        let other = site.send(Sent::order("a").body("other")).await;
        other.assert_problem(409, "key-reused");
    }
}

async fn f3_another_operation_is_independent(backend: impl Backend) {
    let (_store, layer) = layer(&backend, cached());
    let runs = Runs::free();
    let routes = ["/orders", "/refunds"]
        .map(|path| axum::Router::new().route(path, runs.handler().layer(layer.clone())));
    let [orders, refunds] = routes;
    let site = Site::start(orders.merge(refunds)).await;
    site.send(Sent::post("/orders").key("a"))
        .await
        .assert_run(1);
    site.send(Sent::post("/refunds").key("a"))
        .await
        .assert_run(2);
}

async fn f9_scopes_never_meet_in_memory(backend: impl Backend) {
    let (_store, site) = open(&backend, cached(), &Runs::free()).await;
    for (run, tenant) in [(1, "acme"), (2, "umbrella")] {
        site.send(Sent::order("a").tenant(tenant))
            .await
            .assert_run(run);
        let again = site.send(Sent::order("a").tenant(tenant)).await;
        assert!(again.is_replay());
        assert_eq!(again.json()["run"], run);
    }
}

async fn x3_what_frees_its_key_is_not_kept(backend: impl Backend) {
    let (_store, layer) = layer(&backend, cached());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.answering(|_| StatusCode::TOO_MANY_REQUESTS)).await;
    for run in 1..=2 {
        assert!(!site.order("a").await.is_replay());
        assert_eq!(runs.count(), run);
    }
}

async fn x6_an_answer_that_is_not_recorded_is_not_kept(backend: impl Backend) {
    let losable = cached().with_losable_answers(true);
    let (store, layer) = layer(
        &backend,
        losable.with_settle_timeout(Duration::from_millis(100)),
    );
    let site = Site::orders(&layer, Runs::free().handler()).await;
    store.completions(Fault::Down);
    let first = site.order("a").await;
    first.assert_run(1);
    site.order("a")
        .await
        .assert_problem(409, "request-in-progress");
    store.completions(Fault::None);
    eventually("it is recorded", async || site.order("a").await.is_replay()).await;
    let calls = store.calls();
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(store.calls(), calls);
}

async fn x7_a_store_that_is_down_keeps_nobody_from_a_replay(backend: impl Backend) {
    for store_down in [StoreDown::Refuse, StoreDown::RunUnprotected] {
        let (store, layer) = backend.flaky(cached().with_store_down(store_down));
        let runs = Runs::free();
        let site = Site::orders(&layer, runs.handler()).await;
        let key = format!("{store_down:?}");
        let first = site.order(&key).await;
        first.assert_run(1);
        store.claims(Fault::Down);
        site.order(&key).await.assert_replay_of(&first);
        let other = site.send(Sent::order(&key).body("other")).await;
        other.assert_problem(409, "key-reused");
        assert_eq!(runs.count(), 1);
    }
}

/// Nothing but time ends it: the clock of the store cannot be set without its records.
async fn l1_what_is_in_memory_ends_with_its_retention(backend: impl Backend) {
    let short = cached()
        .with_lease(Duration::from_millis(500))
        .with_execution_limit(Duration::from_millis(500))
        .with_ttl(Duration::from_millis(1500));
    let (store, site) = open(&backend, short, &Runs::free()).await;
    let first = site.order("a").await;
    first.assert_run(1);
    let calls = store.calls();
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(store.calls(), calls);
    eventually("it runs again", async || {
        let answer = site.order("a").await;
        if answer.is_replay() {
            answer.assert_replay_of(&first);
            return false;
        }
        answer.assert_run(2);
        true
    })
    .await;
    let again = site.order("a").await;
    assert_eq!((again.is_replay(), &again.json()["run"]), (true, &2.into()));
}

/// The store says that the record is over before this process's clock does.
async fn l1_a_claim_by_another_policy_ends_what_is_in_memory(backend: impl Backend) {
    let (_store, layer) = layer(&backend, cached());
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    let asking = layer.with_policy(policy()).unwrap();
    let asking = Site::orders(&asking, runs.handler()).await;
    site.order("a").await.assert_run(1);
    backend.age(Duration::from_secs(73 * 3600)).await;
    asking.order("a").await.assert_run(2);
    let again = site.order("a").await;
    assert!(again.is_replay());
    assert_eq!(again.json()["run"], 2);
}

async fn a_policy_that_is_replaced_ends_it_at_once(backend: impl Backend) {
    let (store, layer) = layer(&backend, cached());
    let site = Site::orders(&layer, Runs::free().handler()).await;
    let first = site.order("a").await;
    let calls = store.calls();
    site.order("a").await.assert_replay_of(&first);
    layer.policies().replace_default(policy()).unwrap();
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(store.calls(), calls + 1);
}

async fn a_layer_that_is_shut_down_replays_nothing(backend: impl Backend) {
    let (_store, layer) = layer(&backend, cached());
    let site = Site::orders(&layer, Runs::free().handler()).await;
    site.order("a").await.assert_run(1);
    let report = layer.shutdown(Duration::from_secs(10)).await;
    assert!(report.unfinished.is_empty());
    site.order("a").await.assert_problem(503, "shutting-down");
}

async fn a_job_is_replayed_from_memory(backend: impl Backend) {
    let (store, layer) = layer(&backend, policy());
    let boundary = Boundary::from(layer);
    let run = || {
        let identity = Identity::new("acme", "import", "2026-11-22");
        let file = Fingerprint::of_bytes(b"orders.csv");
        boundary.run(identity, file, cached(), |_context| async {
            Ok::<u32, Error>(3)
        })
    };
    assert_eq!(run().await.unwrap(), Ran::Fresh(3));
    let calls = store.calls();
    assert_eq!(run().await.unwrap(), Ran::Replayed(3));
    assert_eq!(store.calls(), calls);
}
