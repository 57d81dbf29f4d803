//! Messages of transactional routes: they commit with the handler's writes and its answer.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use axum::routing::post;
use sqlx::Row as _;
use tower::ServiceExt as _;
use tower_idempotency::outbox::{self, Message, OPERATION_HEADER};
use tower_idempotency::postgres::Tx;
use tower_idempotency::{IdempotencyLayer, Scope};

use super::{Fixture, Recorder};

const GRACE: Duration = Duration::from_secs(20);

/// Enqueues a message, and answers what the request asks for.
async fn charge(mut tx: Tx, status: String) -> StatusCode {
    let message = Message::new("charge.created", &status).with_aggregate("charge", "ch_1");
    outbox::enqueue(&mut tx, message).await.unwrap();
    StatusCode::from_bytes(status.as_bytes()).unwrap()
}

fn app(fixture: &Fixture) -> Router {
    let layer = IdempotencyLayer::new(fixture.store.clone(), Scope::global());
    let layer = layer.transactional();
    Router::new().route("/charges", post(charge).route_layer(layer))
}

async fn send(app: &Router, key: &str, status: &'static str) -> StatusCode {
    let request = Request::post("/charges").header("idempotency-key", key);
    let request = request.body(Body::from(status)).unwrap();
    app.clone().oneshot(request).await.unwrap().status()
}

#[tokio::test]
async fn t7_a_handler_that_fails_after_enqueueing_publishes_nothing() {
    let fixture = Fixture::new().await;
    let app = app(&fixture);
    // Nothing is stored; and stored with the writes undone.
    assert_eq!(send(&app, "a", "500").await, 500);
    assert_eq!(send(&app, "b", "409").await, 409);
    assert_eq!(send(&app, "c", "201").await, 201);
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.payloads(), [r#""201""#]);
}

#[tokio::test]
async fn t8_a_replay_publishes_no_second_message() {
    let fixture = Fixture::new().await;
    let app = app(&fixture);
    for _ in 0..3 {
        assert_eq!(send(&app, "a", "201").await, 201);
    }
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.ids().len(), 1);
}

#[tokio::test]
async fn a_message_names_the_record_of_the_request_that_wrote_it() {
    let fixture = Fixture::new().await;
    send(&app(&fixture), "a", "201").await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let record = sqlx::query("select id::text from idempotency.record");
    let record = record.fetch_one(&fixture.pool).await.unwrap();
    let id: String = record.try_get(0).unwrap();
    let published = &recorder.published()[0];
    let headers: Vec<_> = published.headers().collect();
    assert_eq!(headers, [(OPERATION_HEADER, id.as_str())]);
}

/// Commits behind the layer's back, and goes on as if nothing had been.
async fn commit_and_enqueue(mut tx: Tx) -> StatusCode {
    sqlx::query("commit").execute(&mut *tx).await.unwrap();
    match outbox::enqueue(&mut tx, Message::new("charge.created", "ch_1")).await {
        Ok(_) => StatusCode::CREATED,
        Err(_) => StatusCode::IM_A_TEAPOT,
    }
}

#[tokio::test]
async fn what_a_handler_enqueues_after_a_commit_of_its_own_is_refused() {
    let fixture = Fixture::new().await;
    let layer = IdempotencyLayer::new(fixture.store.clone(), Scope::global());
    let route = post(commit_and_enqueue).route_layer(layer.transactional());
    let app = Router::new().route("/charges", route);
    // `transaction-ended`, since the handler's answer cannot be recorded either.
    assert_eq!(send(&app, "a", "").await, StatusCode::INTERNAL_SERVER_ERROR);
    let messages = fixture.number("select count(*) from idempotency.outbox");
    assert_eq!(messages.await, 0);
}
