//! M5: nested layers that differ in their scope.
use crate::help::send;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use axum::routing::post;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};

fn of(tenant: &str) -> Request<Body> {
    Request::post("/orders")
        .header("idempotency-key", "a")
        .header("x-tenant", tenant)
        .body(Body::from("tea"))
        .unwrap()
}

#[tokio::test]
async fn an_inner_layer_of_another_scope_is_refused_and_no_tenant_gets_the_answer_of_another() {
    let outer = IdempotencyLayer::new(MemoryStore::new(), Scope::fixed("shop"));
    let inner = outer.clone().with_scope(Scope::header("x-tenant").unwrap());
    let whoami = |request: Request<Body>| async move {
        Response::new(Body::from(format!("{:?}", request.headers()["x-tenant"])))
    };
    let app = Router::new()
        .route("/orders", post(whoami).layer(inner))
        .layer(outer);
    let acme = send(app.clone(), of("acme")).await;
    let evil = send(app, of("evil")).await;
    assert!(
        !evil.text().contains("acme"),
        "evil was told: {}",
        evil.text()
    );
    assert_eq!(
        acme.status,
        500,
        "two scopes cover one route: {}",
        acme.text()
    );
}
