//! What a request costs that no policy covers. A binary of its own, since it counts allocations.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "tests fail by panicking"
)]

use std::convert::Infallible;
use std::fmt::Debug;

use allocation_counter::measure;
use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, Response};
use axum::routing::get;
use futures_util::FutureExt;
use tower::layer::layer_fn;
use tower::{Layer, Service, service_fn};
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

fn layer() -> IdempotencyLayer<MemoryStore> {
    IdempotencyLayer::new(MemoryStore::new(), Scope::global())
        .with_route("POST /tea", Policy::high())
        .unwrap()
}

/// Allocations of one request that is answered at once; the first one fills what a thread keeps.
fn allocations<S>(service: &mut S, method: &Method) -> u64
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: Debug,
{
    let mut count = 0;
    for _ in 0..2 {
        let request = Request::builder().method(method).uri("/tea");
        let request = request.header("idempotency-key", "tea");
        let request = request.body(Body::from("leaves")).unwrap();
        let mut response = None;
        let counted = measure(|| response = service.call(request).now_or_never());
        let response = response.expect("it is answered at once").unwrap();
        assert_eq!(response.status(), 200);
        count = counted.count_total;
    }
    count
}

fn kettle()
-> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send>
+ Clone
+ Send
+ 'static {
    service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(Body::from("tea"))))
}

#[test]
fn a_request_that_is_not_covered_allocates_nothing_in_the_layer() {
    let mut layered = layer().layer(kettle());
    for method in [Method::GET, Method::HEAD, Method::DELETE] {
        let without = allocations(&mut kettle(), &method);
        assert_eq!(allocations(&mut layered, &method), without, "{method}");
    }
}

/// axum puts every layer in a box, so that one which does nothing is the measure. Without its state,
/// which a server gives it, a router would make its services anew for each request.
#[test]
fn nor_does_it_in_a_router() {
    let route = || Router::new().route("/tea", get("tea"));
    let mut without = route().layer(layer_fn(|service| service)).with_state(());
    let mut layered = route().layer(layer()).with_state(());
    let without = allocations(&mut without, &Method::GET);
    assert_eq!(allocations(&mut layered, &Method::GET), without);
}

#[tokio::test]
async fn a_request_that_is_covered_is_counted() {
    let request = Request::post("/tea").header("idempotency-key", "tea");
    let request = request.body(Body::empty()).unwrap();
    let mut layered = layer().layer(kettle());
    let without = allocations(&mut kettle(), &Method::GET);
    let counted = measure(|| drop(layered.call(request)));
    assert!(counted.count_total > without);
}
