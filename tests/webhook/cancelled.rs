//! B08: a delivery that is dropped at each point at which it waits, on a transactional route.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use axum::routing::post;
use sqlx::PgPool;
use tower::ServiceExt as _;
use tower_idempotency::inbox::{self, Once};
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::webhook::{WebhookEvent, WebhookLayer};
use tower_idempotency::{Detached, IdempotencyLayer, PgStore, Transactional};

use crate::backend::{Backend as _, Postgres};
use crate::common::cut::Cut;
use crate::once::once;
use crate::sender::Provider;
use crate::site::eventually;

/// How often it waits depends on how fast the server is: it has to be through this often in a row.
const DONE: usize = 10;

type Layer = IdempotencyLayer<PgStore, Transactional>;

async fn take_in(event: WebhookEvent, mut tx: Tx) -> Result<StatusCode, TxError> {
    let seen = inbox::once(&mut tx, "bank/effects", event.id()).await?;
    assert_eq!(seen, Once::First, "the layer has let it through before");
    sqlx::query("insert into effect (event) values ($1)")
        .bind(event.id())
        .execute(&mut *tx)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

fn router(layer: Layer) -> Router {
    let webhook = WebhookLayer::new(Provider::Standard.keyed()).unwrap();
    Router::new().route("/hooks", post(take_in).layer((webhook, layer)))
}

fn delivery(event: &str) -> Request<Body> {
    let delivery = Provider::Standard.delivery().id(event);
    Request::post("/hooks")
        .header("webhook-id", event)
        .header("webhook-timestamp", delivery.time)
        .header("webhook-signature", delivery.signature())
        .body(Body::from(delivery.body))
        .unwrap()
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

/// Delivers again until there is something else to say than that it runs.
async fn settled(layer: &Layer, event: &str) -> Response<Body> {
    let mut settled = None;
    eventually("the cut one is over", async || {
        let sent = router(layer.clone()).oneshot(delivery(event));
        let answer = sent.await.unwrap();
        settled = Some(answer).filter(|answer| answer.status() != StatusCode::CONFLICT);
        settled.is_some()
    })
    .await;
    settled.unwrap()
}

/// After each cut: the effect is there once, with its record and its mark in the inbox, and what comes
/// again is a replay.
async fn holds_after_each_cut(
    backend: &Postgres,
    send: impl AsyncFn(Layer, usize, Request<Body>) -> bool,
) {
    let pool = &backend.pool;
    sqlx::query("create table effect (event text not null)")
        .execute(pool)
        .await
        .unwrap();
    let layer = once(backend).with_breaker(1000).unwrap().transactional();
    let (mut cuts, mut done_in_a_row) = (0, 0);
    for polls in 1..200 {
        let event = format!("evt_{polls}");
        let is_cut = send(layer.clone(), polls, delivery(&event)).await;
        let answer = settled(&layer, &event).await;
        assert_eq!(answer.status(), StatusCode::NO_CONTENT, "{polls} polls");
        let answer = settled(&layer, &event).await;
        assert!(answer.headers().contains_key("idempotent-replayed"));
        let all = i64::try_from(polls).unwrap();
        for table in [
            "select count(*) from effect",
            "select count(distinct event) from effect",
            "select count(*) from idempotency.inbox",
            "select count(*) from idempotency.record where state = 'completed'",
        ] {
            assert_eq!(number(pool, table).await, all, "{table}: {polls} polls");
        }
        cuts += usize::from(is_cut);
        done_in_a_row = if is_cut { 0 } else { done_in_a_row + 1 };
        if done_in_a_row == DONE {
            break;
        }
    }
    println!("cut {cuts} times");
    assert!(cuts > 0, "nothing was cut");
    assert_eq!(done_in_a_row, DONE, "it never finishes");
    eventually("no transaction is open", async || {
        let open = "select count(*) from pg_stat_activity
            where datname = current_database() and state like 'idle in transaction%'";
        number(pool, open).await == 0
    })
    .await;
}

#[tokio::test]
async fn b08_a_delivery_whose_sender_goes_away_at_any_point_takes_effect_once() {
    for late in [false, true] {
        let backend = Postgres::start().await;
        let send = async |layer: Layer, polls, delivery| {
            let sent = Box::pin(router(layer).oneshot(delivery));
            Cut::new(sent, polls, late).await.is_none()
        };
        holds_after_each_cut(&backend, send).await;
    }
}

/// As at the end of a runtime: nobody goes on with it.
#[tokio::test]
async fn b08_a_delivery_whose_task_ends_at_any_point_takes_effect_once() {
    for late in [false, true] {
        let backend = Postgres::start().await;
        let send = async |layer: Layer, polls, delivery| {
            let is_cut = Arc::new(AtomicBool::new(false));
            let seen = is_cut.clone();
            let layer = layer.with_spawn_hook(move |task| {
                let seen = seen.clone();
                Detached::new(async move {
                    let cut = Cut::new(task, polls, late).await.is_none();
                    seen.store(cut, Ordering::SeqCst);
                })
            });
            router(layer).oneshot(delivery).await.unwrap();
            is_cut.load(Ordering::SeqCst)
        };
        holds_after_each_cut(&backend, send).await;
    }
}
