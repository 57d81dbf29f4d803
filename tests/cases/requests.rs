use axum::Router;
use axum::http::Method;
use tower_idempotency::{IdempotencyLayer, Policy, Scope};

use crate::backend::Backend;
use crate::flaky::Flaky;
use crate::site::{Runs, Sent, Site, policy};

on_every_store!(
    m1_safe_methods_pass_through_and_store_nothing,
    m2_post_and_patch_are_covered_by_default,
    m2_put_and_delete_are_covered_when_the_policy_says_so,
    m3_a_route_without_the_layer_never_touches_the_store,
    m3_a_route_taken_out_of_the_table_never_touches_the_store,
    m5_nested_layers_with_different_policies_are_refused_and_the_key_stays_free,
    m5_nested_layers_with_equal_policies_are_one,
);

fn watched<B: Backend>(backend: &B) -> (Flaky<B::Store>, IdempotencyLayer<Flaky<B::Store>>) {
    let store = Flaky::new(backend.store());
    let layer = IdempotencyLayer::new(store.clone(), Scope::header("x-tenant").unwrap());
    (store, layer)
}

async fn m1_safe_methods_pass_through_and_store_nothing(backend: impl Backend) {
    let (store, layer) = watched(&backend);
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    for method in [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE] {
        for _ in 0..2 {
            let sent = Sent::new(method.clone(), "/orders").key("a").body("");
            let answer = site.send(sent).await;
            assert!(!answer.is_replay(), "{method}");
        }
    }
    assert_eq!((runs.count(), store.calls()), (8, 0));

    // No router of axum's routes QUERY by itself: a service of its own shows that it passes through.
    let runs_of_query = Runs::free();
    let handler = runs_of_query.clone();
    let service = axum::routing::any_service(tower::service_fn(move |_| {
        let runs = handler.clone();
        async move {
            let run = runs.run().await;
            Ok::<_, std::convert::Infallible>(axum::response::Response::new(run.to_string()))
        }
    }));
    let site = Site::orders(&layer, service).await;
    let query = Method::from_bytes(b"QUERY").unwrap();
    for _ in 0..2 {
        let answer = site
            .send(Sent::new(query.clone(), "/orders").key("a"))
            .await;
        assert!(!answer.is_replay());
    }
    assert_eq!((runs_of_query.count(), store.calls()), (2, 0));
}

async fn m2_post_and_patch_are_covered_by_default(backend: impl Backend) {
    let (store, layer) = watched(&backend);
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    for (run, method) in [Method::POST, Method::PATCH].into_iter().enumerate() {
        let sent = Sent::new(method, "/orders").key("a");
        let first = site.send(sent.clone()).await;
        first.assert_run(run + 1);
        site.send(sent).await.assert_replay_of(&first);
    }
    let calls = store.calls();
    for (run, method) in [Method::PUT, Method::DELETE].into_iter().enumerate() {
        let sent = Sent::new(method, "/orders").key("a");
        site.send(sent).await.assert_run(run + 3);
    }
    assert_eq!(store.calls(), calls);
}

async fn m2_put_and_delete_are_covered_when_the_policy_says_so(backend: impl Backend) {
    let runs = Runs::free();
    let policy = policy().with_methods([Method::PUT, Method::DELETE]);
    let layer = backend.layer().with_policy(policy).unwrap();
    let site = Site::orders(&layer, runs.handler()).await;
    for (run, method) in [Method::PUT, Method::DELETE].into_iter().enumerate() {
        let sent = Sent::new(method, "/orders").key("a");
        let first = site.send(sent.clone()).await;
        first.assert_run(run + 1);
        site.send(sent).await.assert_replay_of(&first);
    }
    site.order("a").await.assert_run(3);
    site.order("a").await.assert_run(4);
}

async fn m3_a_route_without_the_layer_never_touches_the_store(backend: impl Backend) {
    let (store, layer) = watched(&backend);
    let (covered, open) = (Runs::free(), Runs::free());
    let router = Router::new()
        .route("/orders", covered.handler())
        .route_layer(layer)
        .route("/open", open.handler());
    let site = Site::start(router).await;
    for run in 1..=2 {
        site.send(Sent::post("/open").key("a"))
            .await
            .assert_run(run);
    }
    assert_eq!(store.calls(), 0);
    site.order("a").await.assert_run(1);
    assert!(store.calls() > 0);
}

async fn m3_a_route_taken_out_of_the_table_never_touches_the_store(backend: impl Backend) {
    let (store, layer) = watched(&backend);
    let layer = layer
        .with_route("POST /login/{name}", Policy::low().with_methods([]))
        .unwrap();
    let runs = Runs::free();
    let router = Router::new()
        .route("/login/{user}", runs.handler())
        .route("/orders", runs.handler())
        .layer(layer);
    let site = Site::start(router).await;
    for run in 1..=2 {
        site.send(Sent::post("/login/ada").key("a"))
            .await
            .assert_run(run);
    }
    assert_eq!(store.calls(), 0);
    let first = site.order("a").await;
    first.assert_run(3);
    site.order("a").await.assert_replay_of(&first);
}

async fn m5_nested_layers_with_different_policies_are_refused_and_the_key_stays_free(
    backend: impl Backend,
) {
    let runs = Runs::free();
    let outer = backend.layer();
    let inner = outer.clone().with_policy(Policy::medium()).unwrap();
    let nested = Router::new()
        .route("/orders", runs.handler().layer(inner))
        .layer(outer.clone());
    let site = Site::start(nested).await;
    site.order("a").await.assert_problem(500, "nested-layers");
    site.order("a").await.assert_problem(500, "nested-layers");
    assert_eq!(runs.count(), 0);

    let mended = Site::orders(&outer, runs.handler()).await;
    mended.order("a").await.assert_run(1);
}

async fn m5_nested_layers_with_equal_policies_are_one(backend: impl Backend) {
    let runs = Runs::free();
    let layer = backend.layer();
    let nested = Router::new()
        .route("/orders", runs.handler().layer(layer.clone()))
        .layer(layer);
    let site = Site::start(nested).await;
    let first = site.order("a").await;
    first.assert_run(1);
    site.order("a").await.assert_replay_of(&first);
}
