//! The layer in the stacks it is used in: routers, method routers, service builders, plain hyper.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test may panic, and has no users"
)]

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Extension;
use axum::http::{HeaderMap, Method, Request, Response, StatusCode};
use axum::routing::{get, post};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_idempotency::{
    Code, Detached, Duplicates, IdempotencyContext, IdempotencyLayer, MemoryStore, Policy, Scope,
};

mod common;

#[path = "cases/site.rs"]
mod site;
use site::{Runs, Sent, Site};

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new(), Scope::header("x-tenant").unwrap())
}

async fn assert_replays(site: &Site, path: &str) {
    let first = site.send(Sent::post(path).key("a")).await;
    assert_eq!(first.status, StatusCode::CREATED);
    let again = site.send(Sent::post(path).key("a")).await;
    again.assert_replay_of(&first);
}

#[tokio::test]
async fn it_layers_a_router_a_route_layer_a_method_router_and_a_nested_router() {
    let runs = Runs::free();
    let orders = || Router::new().route("/orders", runs.handler());
    let nested = Router::new().nest("/shop", orders().layer(layer()));
    for router in [
        orders().layer(layer()),
        orders().route_layer(layer()),
        Router::new().route("/orders", runs.handler().layer(layer())),
        Router::new().merge(orders().layer(layer())),
    ] {
        assert_replays(&Site::start(router).await, "/orders").await;
    }
    assert_replays(&Site::start(nested).await, "/shop/orders").await;
    assert_eq!(runs.count(), 5);
}

#[tokio::test]
async fn it_stands_in_a_service_builder_between_other_layers() {
    let runs = Runs::free();
    let stack = ServiceBuilder::new()
        .map_response(|response: Response<Body>| response)
        .layer(layer())
        .layer(axum::error_handling::HandleErrorLayer::new(
            |_: tower::BoxError| async { StatusCode::GATEWAY_TIMEOUT },
        ))
        .timeout(Duration::from_secs(60));
    let router = Router::new().route("/orders", runs.handler()).layer(stack);
    assert_replays(&Site::start(router).await, "/orders").await;
    assert_eq!(runs.count(), 1);
}

/// A router is matched inside of the layer here: the operation is the concrete path.
#[tokio::test]
async fn it_stands_around_a_whole_router() {
    let runs = Runs::free();
    let router = Router::new().route("/orders/{id}", runs.handler());
    let around = layer().layer(router);
    let outer = Router::new().fallback_service(around);
    let site = Site::start(outer).await;
    assert_replays(&site, "/orders/1").await;
    assert_replays(&site, "/orders/2").await;
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn it_serves_plain_hyper_without_a_router() {
    let runs = Runs::free();
    let counted = runs.clone();
    let service = layer().layer(tower::service_fn(move |request: Request<_>| {
        let runs = counted.clone();
        async move {
            let body: axum::body::Body = request.into_body();
            let seen = body.collect().await.unwrap().to_bytes();
            let run = runs.run().await;
            let answer = format!("{run}:{}", seen.len());
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(answer))))
        }
    }));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service.clone();
            let service =
                hyper::service::service_fn(move |request| service.clone().oneshot(request));
            let server = hyper::server::conn::http1::Builder::new();
            tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
        }
    });
    let sent = || Sent::post("/anything").key("a").send_to(address);
    let first = sent().await;
    assert_eq!(first.body, "1:14");
    sent().await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_table_of_routes_gives_each_route_its_policy_whatever_parameters_are_called() {
    let table = layer()
        .with_route("POST /orders/{id}/cancel", Policy::medium())
        .unwrap();
    let runs = Runs::free();
    let router = Router::new()
        .route("/orders/{order}/cancel", runs.handler())
        .route("/orders", runs.handler())
        .layer(table);
    let site = Site::start(router).await;
    let optional = site.send(Sent::post("/orders/1/cancel")).await;
    assert_eq!(optional.status, StatusCode::CREATED);
    site.send(Sent::post("/orders"))
        .await
        .assert_problem(400, "key-missing");
}

#[tokio::test]
async fn a_route_whose_policy_does_not_cover_its_method_is_refused() {
    let refused = |route: &str| layer().with_route(route, Policy::high()).unwrap_err();
    for route in ["PUT /orders", "DELETE /orders", "GET /orders"] {
        assert_eq!(refused(route).field(), "route");
    }
    let covers = Policy::high().with_methods([Method::PUT]);
    assert!(layer().with_route("PUT /orders", covers).is_ok());
    let out = Policy::high().with_methods([]);
    assert!(layer().with_route("PUT /orders", out).is_ok());
}

#[tokio::test]
async fn a_policy_replaced_at_run_time_is_read_by_the_next_request() {
    let layer = layer();
    let site = Site::orders(&layer, Runs::free().handler()).await;
    site.send(Sent::post("/orders"))
        .await
        .assert_problem(400, "key-missing");
    layer.policies().replace_default(Policy::medium()).unwrap();
    assert_eq!(
        site.send(Sent::post("/orders")).await.status,
        StatusCode::CREATED
    );
    let wrong = Policy::medium().with_ttl(Duration::ZERO);
    assert_eq!(
        layer.policies().replace_default(wrong).unwrap_err().field(),
        "ttl"
    );
    assert_eq!(
        site.send(Sent::post("/orders")).await.status,
        StatusCode::CREATED
    );
}

#[tokio::test]
async fn a_policy_of_one_route_leaves_the_layer_it_was_made_from_alone() {
    let strict = layer();
    let lenient = strict.clone().with_policy(Policy::medium()).unwrap();
    let router = Router::new()
        .route("/strict", Runs::free().handler().layer(strict))
        .route("/lenient", Runs::free().handler().layer(lenient));
    let site = Site::start(router).await;
    site.send(Sent::post("/strict"))
        .await
        .assert_problem(400, "key-missing");
    assert_eq!(
        site.send(Sent::post("/lenient")).await.status,
        StatusCode::CREATED
    );
}

#[tokio::test]
async fn the_scope_may_come_from_an_outer_layer_a_route_or_several_places() {
    #[derive(Clone)]
    struct Account(&'static str);
    let runs = Runs::free();
    let by_account = layer().with_scope(Scope::extension::<Account>(|account| account.0));
    let by_route = Policy::high().with_scope(Scope::all([
        Scope::fixed("shop"),
        Scope::header("x-tenant").unwrap(),
    ]));
    let seen = runs.clone();
    let handler = post(move |context: IdempotencyContext| {
        let runs = seen.clone();
        async move {
            runs.run().await;
            context.identity().scope().to_owned()
        }
    });
    let router = Router::new()
        .route("/account", handler.clone().layer(by_account.clone()))
        .route(
            "/both",
            handler.layer(by_account.with_policy(by_route).unwrap()),
        )
        .layer(Extension(Account("ada")));
    let site = Site::start(router).await;
    assert_eq!(site.send(Sent::post("/account").key("a")).await.body, "ada");
    assert_eq!(
        site.send(Sent::post("/both").key("a")).await.body,
        "4:shop 4:acme"
    );
}

#[tokio::test]
async fn a_named_operation_lets_two_routes_share_their_keys() {
    let named = layer()
        .with_policy(Policy::high().with_operation("orders.create"))
        .unwrap();
    let runs = Runs::free();
    let router = Router::new()
        .route("/v1/orders", runs.handler())
        .route("/v2/orders", runs.handler())
        .layer(named);
    let site = Site::start(router).await;
    site.send(Sent::post("/v1/orders").key("a"))
        .await
        .assert_run(1);
    // One operation, and another request: the path is part of the fingerprint.
    let other = site.send(Sent::post("/v2/orders").key("a")).await;
    other.assert_problem(409, "key-reused");
}

#[tokio::test]
async fn a_renderer_makes_the_answers_of_the_layers_own_errors() {
    let rendered = layer().with_renderer(|rejection| {
        let body = Body::from(format!("no: {} {:?}", rejection.code(), rejection.detail()));
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::IM_A_TEAPOT;
        response
    });
    let site = Site::orders(&rendered, Runs::free().handler()).await;
    let missing = site.send(Sent::post("/orders")).await;
    assert_eq!(
        (missing.status, &missing.body[..]),
        (StatusCode::IM_A_TEAPOT, b"no: key-missing None".as_slice())
    );
    let comma = site.order("a,b").await;
    assert!(String::from_utf8_lossy(&comma.body).starts_with("no: key-invalid Some("));
}

#[tokio::test]
async fn the_type_of_a_problem_is_the_base_and_the_code() {
    let based = layer()
        .with_renderer(|rejection| rejection.to_problem("https://errors.example/idempotency/"));
    let site = Site::orders(&based, Runs::free().handler()).await;
    let problem = site.send(Sent::post("/orders")).await.json();
    assert_eq!(
        problem["type"],
        "https://errors.example/idempotency/key-missing"
    );
    assert_eq!(problem["title"], Code::KeyMissing.title());
}

#[tokio::test]
async fn a_body_limit_of_an_outer_layer_is_413_too() {
    let runs = Runs::free();
    let limit = tower::util::MapRequestLayer::new(|request: Request<Body>| {
        request.map(|body| Body::new(http_body_util::Limited::new(body, 5)))
    });
    let router = Router::new()
        .route("/orders", runs.handler())
        .layer(layer())
        .layer(limit);
    let site = Site::start(router).await;
    site.order("a").await.assert_problem(413, "body-too-large");
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn a_body_that_does_not_arrive_in_time_is_408_and_claims_nothing() {
    let hasty = layer()
        .with_request_timeout(Duration::from_millis(100))
        .unwrap();
    let runs = Runs::free();
    let site = Site::orders(&hasty, runs.handler()).await;
    let head = "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
                content-length: 50\r\n\r\nhalf";
    let answer = site.raw(head.as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 408") && answer.contains("body-timeout"),
        "{answer}"
    );
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn trailers_of_a_request_reach_the_handler() {
    let seen = post(|body: Body| async move {
        let collected = body.collect().await.unwrap();
        let trailers = collected.trailers().cloned().unwrap_or_default();
        trailers
            .get("x-sum")
            .map_or("none".into(), |v| v.to_str().unwrap().to_owned())
    });
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "7".parse().unwrap());
    let body = Full::new(Bytes::from("data"))
        .with_trailers(async move { Some(Ok::<_, Infallible>(trailers)) });
    let request = Request::post("/")
        .header("x-tenant", "acme")
        .header("idempotency-key", "a")
        .body(body)
        .unwrap();
    let router: Router = Router::new().route("/", seen);
    let response = layer().layer(router).oneshot(request).await.unwrap();
    assert_eq!(
        response.into_body().collect().await.unwrap().to_bytes(),
        "7"
    );
}

tokio::task_local! { static LOCALE: &'static str; }

#[tokio::test]
async fn a_spawn_hook_carries_task_locals_into_the_handler() {
    let hooked = layer().with_spawn_hook(|task| match LOCALE.try_with(|locale| *locale) {
        Ok(locale) => Detached::new(LOCALE.scope(locale, task)),
        Err(_) => task,
    });
    let router: Router = Router::new().route(
        "/",
        post(|| async { LOCALE.try_with(|locale| *locale).unwrap_or("none") }),
    );
    let request = || {
        let builder = Request::post("/").header("x-tenant", "acme");
        builder
            .header("idempotency-key", "a")
            .body(Body::empty())
            .unwrap()
    };
    let service = hooked.layer(router);
    let answer = LOCALE.scope("de", service.clone().oneshot(request())).await;
    let body = answer
        .unwrap()
        .into_body()
        .collect()
        .await
        .unwrap()
        .to_bytes();
    assert_eq!(body, "de");
}

#[tokio::test]
async fn the_handler_runs_in_the_span_of_its_request() {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::INFO)
        .with_writer(std::io::sink)
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let router: Router = Router::new().route(
        "/",
        post(|| async {
            tracing::Span::current()
                .metadata()
                .map_or("none", |m| m.name())
        }),
    );
    let request = Request::post("/")
        .header("x-tenant", "acme")
        .header("idempotency-key", "a")
        .body(Body::empty())
        .unwrap();
    let span = tracing::info_span!("request");
    let call = layer().layer(router).oneshot(request);
    let answer = tracing::Instrument::instrument(call, span).await.unwrap();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, "request");
}

#[tokio::test]
async fn an_unkeyed_request_is_cancelled_with_its_client_as_without_the_layer() {
    struct Dropped(Arc<AtomicUsize>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let (entered, mut was_entered) = tokio::sync::mpsc::channel(1);
    let counter = dropped.clone();
    let handler = post(move || {
        let (guard, entered) = (Dropped(counter.clone()), entered.clone());
        async move {
            entered.send(()).await.unwrap();
            std::future::pending::<()>().await;
            drop(guard);
        }
    });
    let lenient = layer().with_policy(Policy::medium()).unwrap();
    let site = Site::orders(&lenient, handler).await;
    let client = tokio::spawn(Sent::post("/orders").send_to(site.address));
    was_entered.recv().await.unwrap();
    client.abort();
    site::eventually("the handler is dropped", async || {
        dropped.load(Ordering::SeqCst) == 1
    })
    .await;
}

#[tokio::test]
async fn the_context_tells_the_identity_and_is_optional_where_the_key_is() {
    let handler = post(|context: Option<IdempotencyContext>| async move {
        context.map_or("none".to_owned(), |context| {
            let identity = context.identity();
            let current = context.is_current();
            format!(
                "{} {} {} {current}",
                identity.operation(),
                identity.key(),
                context.attempt()
            )
        })
    });
    let lenient = layer().with_policy(Policy::medium()).unwrap();
    let site = Site::start(Router::new().route("/a/{id}", handler).layer(lenient)).await;
    assert_eq!(site.send(Sent::post("/a/1")).await.body, "none");
    assert_eq!(
        site.send(Sent::post("/a/1").key("k")).await.body,
        "POST /a/{} k 1 true"
    );
}

#[tokio::test]
async fn a_context_where_no_layer_is_is_500() {
    let router = Router::new().route("/", post(|_: IdempotencyContext| async { "never" }));
    let site = Site::start(router).await;
    let answer = site.send(Sent::post("/").key("a")).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
}

/// A service that must be polled ready before each call panics if a clone that was not is called.
#[tokio::test]
async fn the_service_that_was_polled_ready_is_the_one_that_is_called() {
    let limited = ServiceBuilder::new()
        .layer(layer())
        .concurrency_limit(1)
        .service(tower::service_fn(|_: Request<Body>| async {
            Ok::<_, Infallible>(Response::new(Body::from("ok")))
        }));
    for key in ["a", "b"] {
        let request = Request::post("/")
            .header("x-tenant", "acme")
            .header("idempotency-key", key)
            .body(Body::empty())
            .unwrap();
        let answer = limited.clone().oneshot(request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn a_get_passes_through_a_layer_that_waits_for_duplicates() {
    let waits = Policy::high().with_duplicates(Duplicates::Wait(Duration::from_secs(1)));
    let router = Router::new()
        .route("/orders", get(|| async { "list" }))
        .layer(layer().with_policy(waits).unwrap());
    let site = Site::start(router).await;
    let answer = site.send(Sent::new(Method::GET, "/orders").key("a")).await;
    assert_eq!(answer.body, "list");
}
