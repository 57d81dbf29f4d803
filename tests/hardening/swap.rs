//! A policy that is swapped while a request is between two equal layers.
use std::time::Duration;

use crate::help::{order, send};
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::Response;
use axum::middleware::{Next, from_fn};
use axum::routing::post;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test]
async fn a_policy_that_is_replaced_meanwhile_is_no_reason_to_refuse() {
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    let policies = layer.policies();
    let app = Router::new()
        .route(
            "/orders",
            post(|| async { Response::new(Body::from("tea")) }).layer(layer.clone()),
        )
        .layer(from_fn(move |request: Request, next: Next| {
            // Somebody changes the retention at this moment.
            let week = Policy::high().with_ttl(Duration::from_secs(7 * 24 * 3600));
            policies.replace_default(week).unwrap();
            next.run(request)
        }))
        .layer(layer);
    let answer = send(app, order("a", "tea")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}
