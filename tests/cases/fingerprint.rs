use axum::Router;
use axum::http::Method;
use axum::routing::MethodRouter;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tower_idempotency::Scope;

use crate::backend::Backend;
use crate::flaky::Flaky;
use crate::site::{Runs, Sent, Site, eventually, policy};

on_every_store!(
    f1_another_body_is_refused_and_the_original_still_replays,
    f2_another_query_or_concrete_path_is_refused,
    f3_the_same_key_on_another_operation_is_independent,
    f4_a_mismatch_while_the_first_runs_is_key_reused,
    f4b_a_mismatch_beside_a_legitimate_retry_does_not_disturb_it,
    f5_nested_routers_with_equal_inner_paths_never_share_a_record,
    f5_the_prefix_a_nested_router_strips_still_counts,
    f9_two_principals_with_one_key_both_run,
    f10_a_request_without_a_scope_is_refused,
    f11_a_body_over_the_limit_is_refused_before_the_claim,
    f11_a_body_of_exactly_the_limit_runs,
    f11_a_body_that_breaks_off_claims_nothing,
);

async fn f1_another_body_is_refused_and_the_original_still_replays(backend: impl Backend) {
    let runs = Runs::free();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let first = site.order("a").await;
    let other = site
        .send(Sent::order("a").body(r#"{"item":"coffee"}"#))
        .await;
    other.assert_problem(409, "key-reused");
    assert!(!other.headers.contains_key("retry-after"));
    assert!(!String::from_utf8_lossy(&other.body).contains("tea"));
    site.order("a").await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn f2_another_query_or_concrete_path_is_refused(backend: impl Backend) {
    let runs = Runs::free();
    let route = runs.handler().layer(backend.layer());
    let site = Site::start(Router::new().route("/orders/{id}", route)).await;
    let post = |path: &str| Sent::post(path).key("a");
    let first = site.send(post("/orders/1?x=1")).await;
    first.assert_run(1);
    for other in ["/orders/1?x=2", "/orders/1", "/orders/1?", "/orders/2?x=1"] {
        site.send(post(other))
            .await
            .assert_problem(409, "key-reused");
    }
    site.send(post("/orders/1?x=1"))
        .await
        .assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn f3_the_same_key_on_another_operation_is_independent(backend: impl Backend) {
    let runs = Runs::free();
    let router = Router::new()
        .route("/orders", runs.handler())
        .route("/refunds", runs.handler())
        .layer(backend.layer());
    let site = Site::start(router).await;
    site.order("a").await.assert_run(1);
    site.send(Sent::post("/refunds").key("a"))
        .await
        .assert_run(2);
    let patch = Sent::new(Method::PATCH, "/orders").key("a");
    site.send(patch).await.assert_run(3);
}

async fn f4_a_mismatch_while_the_first_runs_is_key_reused(backend: impl Backend) {
    let runs = Runs::gated();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let test = async {
        runs.entered().await;
        let other = Sent::order("a").body("{}");
        site.send(other).await.assert_problem(409, "key-reused");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(site.order("a"), test);
    first.assert_run(1);
    assert_eq!(runs.count(), 1);
}

async fn f4b_a_mismatch_beside_a_legitimate_retry_does_not_disturb_it(backend: impl Backend) {
    let runs = Runs::free();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let first = site.order("a").await;
    for _ in 0..20 {
        let wrong = site.send(Sent::order("a").body("{}"));
        let (wrong, right) = tokio::join!(wrong, site.order("a"));
        wrong.assert_problem(409, "key-reused");
        right.assert_replay_of(&first);
    }
    assert_eq!(runs.count(), 1);
}

async fn f5_nested_routers_with_equal_inner_paths_never_share_a_record(backend: impl Backend) {
    let runs = Runs::free();
    let layer = backend.layer();
    let inner =
        |handler: MethodRouter| Router::new().route("/p/{id}", handler).layer(layer.clone());
    let router = Router::new()
        .nest("/v1/x", inner(runs.handler()))
        .nest("/v1/y", inner(runs.handler()))
        .nest_service("/v2/x", inner(runs.handler()))
        .nest_service("/v2/y", inner(runs.handler()));
    let site = Site::start(router).await;
    for (run, path) in ["/v1/x/p/1", "/v1/y/p/1", "/v2/x/p/1", "/v2/y/p/1"]
        .into_iter()
        .enumerate()
    {
        let first = site.send(Sent::post(path).key("a")).await;
        first.assert_run(run + 1);
        site.send(Sent::post(path).key("a"))
            .await
            .assert_replay_of(&first);
    }
}

/// One template, `/shops/{}/p/{}`, and inside of it one path, `/p/1`: only what was stripped differs.
async fn f5_the_prefix_a_nested_router_strips_still_counts(backend: impl Backend) {
    let runs = Runs::free();
    let inner = Router::new()
        .route("/p/{id}", runs.handler())
        .layer(backend.layer());
    let site = Site::start(Router::new().nest("/shops/{shop}", inner)).await;
    let first = site.send(Sent::post("/shops/x/p/1").key("a")).await;
    first.assert_run(1);
    let other = site.send(Sent::post("/shops/y/p/1").key("a")).await;
    other.assert_problem(409, "key-reused");
    site.send(Sent::post("/shops/x/p/1").key("a"))
        .await
        .assert_replay_of(&first);
}

async fn f9_two_principals_with_one_key_both_run(backend: impl Backend) {
    let runs = Runs::free();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let acme = site.order("a").await;
    acme.assert_run(1);
    let zen = site.send(Sent::order("a").tenant("zen")).await;
    zen.assert_run(2);
    site.send(Sent::order("a").tenant("zen"))
        .await
        .assert_replay_of(&zen);
    site.order("a").await.assert_replay_of(&acme);
}

async fn f10_a_request_without_a_scope_is_refused(backend: impl Backend) {
    let runs = Runs::free();
    let store = Flaky::new(backend.store());
    let scope = Scope::header("x-tenant").unwrap();
    let layer = tower_idempotency::IdempotencyLayer::new(store.clone(), scope);
    let site = Site::orders(&layer, runs.handler()).await;
    let sent = || Sent::order("a").without("x-tenant");
    site.send(sent()).await.assert_problem(403, "scope-missing");
    let empty = sent().header("x-tenant", "");
    site.send(empty).await.assert_problem(403, "scope-missing");
    let two = sent().header("x-tenant", "a").header("x-tenant", "b");
    site.send(two).await.assert_problem(403, "scope-missing");
    assert_eq!((store.calls(), runs.count()), (0, 0));
}

fn limited<B: Backend>(
    backend: &B,
) -> (
    Flaky<B::Store>,
    tower_idempotency::IdempotencyLayer<Flaky<B::Store>>,
) {
    let store = Flaky::new(backend.store());
    let scope = Scope::header("x-tenant").unwrap();
    let layer = tower_idempotency::IdempotencyLayer::new(store.clone(), scope)
        .with_policy(policy().with_request_limit(100))
        .unwrap();
    (store, layer)
}

/// A handler that shows the size of the body it saw.
fn sizes() -> MethodRouter {
    crate::site::every_method(|body: bytes::Bytes| async move {
        axum::Json(json!({ "size": body.len() }))
    })
}

async fn f11_a_body_over_the_limit_is_refused_before_the_claim(backend: impl Backend) {
    let (store, layer) = limited(&backend);
    let site = Site::orders(&layer, sizes()).await;
    let sent = Sent::order("a").body("x".repeat(101));
    site.send(sent).await.assert_problem(413, "body-too-large");
    let chunked = format!(
        "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
         transfer-encoding: chunked\r\n\r\n33\r\n{0}\r\n33\r\n{0}\r\n0\r\n\r\n",
        "x".repeat(51)
    );
    let answer = site.raw(chunked.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(answer.contains("body-too-large"), "{answer}");
    assert_eq!(store.calls(), 0);
}

async fn f11_a_body_of_exactly_the_limit_runs(backend: impl Backend) {
    let (_, layer) = limited(&backend);
    let site = Site::orders(&layer, sizes()).await;
    for size in [0, 1, 99, 100] {
        let sent = || Sent::order(&format!("size-{size}")).body("x".repeat(size));
        let first = site.send(sent()).await;
        assert_eq!(first.json()["size"], size);
        site.send(sent()).await.assert_replay_of(&first);
    }
    let chunked = format!(
        "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: chunked\r\n\
         transfer-encoding: chunked\r\n\r\n32\r\n{0}\r\n32\r\n{0}\r\n0\r\n\r\n",
        "x".repeat(50)
    );
    let first = site.raw(chunked.as_bytes()).await;
    assert!(first.contains(r#"{"size":100}"#), "{first}");
    let again = site.raw(chunked.as_bytes()).await;
    assert!(again.contains("idempotent-replayed: true"), "{again}");
}

async fn f11_a_body_that_breaks_off_claims_nothing(backend: impl Backend) {
    let (store, layer) = limited(&backend);
    let site = Site::orders(&layer, sizes()).await;
    let mut stream = site.connect().await;
    let head = "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
                content-length: 50\r\n\r\nhalf";
    stream.write_all(head.as_bytes()).await.unwrap();
    drop(stream);
    // The next connection is accepted after the broken one; its request runs with the same key.
    eventually("the key is free", async || {
        let sent = Sent::order("a").body("x".repeat(50));
        let answer = site.send(sent).await;
        answer.status == 200 && answer.json()["size"] == 50
    })
    .await;
    assert!(store.calls() > 0);
}
