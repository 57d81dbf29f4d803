//! The service: charges on a transactional route, and the relay of what they enqueue.

use std::error::Error;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{PgConnection, Row as _};
use tokio::net::TcpListener;
use tower_idempotency::outbox::{
    self, HttpPublisher, Message, Outgoing, PublishError, Publisher, Relay,
};
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::{IdempotencyContext, IdempotencyLayer, PgStore, Scope};

use crate::options::Plant;

/// Asks the handler to fail when all is written, as handlers do.
pub(crate) const FAIL: &str = "x-fail";

/// How many milliseconds the handler takes between its writes.
pub(crate) const PAUSE: &str = "x-pause";

/// How long the database may be down when the server starts.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) database: String,
    pub(crate) port: u16,
    pub(crate) consumer: u16,
    pub(crate) plant: Option<Plant>,
}

#[derive(Debug, Clone)]
struct App {
    pool: PgPool,
    plant: Option<Plant>,
}

pub(crate) async fn run(settings: Settings) -> Result<(), Box<dyn Error>> {
    let pool = PgPoolOptions::new().max_connections(4);
    let pool = pool.connect_lazy(&settings.database)?;
    let store = PgStore::new(pool.clone());
    tokio::time::timeout(PATIENCE, migrate(&store)).await?;
    relay(&settings, &store)?;
    let layer = IdempotencyLayer::new(store, Scope::global()).transactional();
    let plant = settings.plant;
    let app = Router::new()
        .route("/charges", post(charge).layer(layer))
        .with_state(App { pool, plant });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, settings.port)).await?;
    println!("port {}", settings.port);
    axum::serve(listener, app).await?;
    Ok(())
}

async fn migrate(store: &PgStore) {
    while let Err(error) = store.migrate().await {
        tracing::warn!(%error, "cannot migrate");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// In a hurry, and never giving a message up: a receiver that was killed comes back.
fn relay(settings: &Settings, store: &PgStore) -> Result<(), Box<dyn Error>> {
    let publisher = Forgetful {
        publisher: HttpPublisher::new(&format!("http://127.0.0.1:{}/", settings.consumer))?,
        forgets: settings.plant == Some(Plant::LostMessage),
        published: AtomicU64::new(0),
    };
    let (first, max) = (Duration::from_millis(20), Duration::from_millis(500));
    let relay = Relay::new(store.clone(), publisher)
        .with_lease(Duration::from_secs(2))?
        .with_poll_interval(Duration::from_millis(50))?
        .with_backoff(first, max)?
        .with_max_attempts(1_000_000)?;
    tokio::spawn(relay.run());
    Ok(())
}

async fn charge(
    State(app): State<App>,
    context: IdempotencyContext,
    headers: HeaderMap,
    mut tx: Tx,
    amount: String,
) -> Result<Response, TxError> {
    let key = context.identity().key();
    let is_planted =
        app.plant == Some(Plant::DoubleEffect) && amount.ends_with(['5', '6', '7', '8', '9']);
    let charge = if is_planted {
        insert(&mut *app.pool.acquire().await?, key, &amount).await?
    } else {
        insert(&mut tx, key, &amount).await?
    };
    let pause = headers.get(PAUSE).and_then(|pause| pause.to_str().ok());
    let pause = pause.and_then(|pause| pause.parse().ok()).unwrap_or(0);
    tokio::time::sleep(Duration::from_millis(pause)).await;
    let message = Message::new("charge.created", &json!({ "charge": charge, "key": key }));
    if let Err(error) = outbox::enqueue(&mut tx, message).await {
        tracing::warn!(%error, "not enqueued");
        return Ok(StatusCode::INTERNAL_SERVER_ERROR.into_response());
    }
    if headers.contains_key(FAIL) {
        return Ok(StatusCode::BAD_GATEWAY.into_response());
    }
    let charge = json!({ "charge": charge, "amount": amount });
    Ok((StatusCode::CREATED, Json(charge)).into_response())
}

/// Another run would make another charge: nothing but the key says that they are the same.
async fn insert(
    connection: &mut PgConnection,
    key: &str,
    amount: &str,
) -> Result<String, sqlx::Error> {
    let insert = "insert into ledger (key, amount) values ($1, $2) returning charge::text";
    let query = sqlx::query(insert).bind(key).bind(amount);
    query.fetch_one(connection).await?.try_get(0)
}

/// Publishes, unless it was planted to say so and do nothing.
struct Forgetful {
    publisher: HttpPublisher,
    forgets: bool,
    published: AtomicU64,
}

impl Publisher for Forgetful {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        let count = self.published.fetch_add(1, Ordering::Relaxed);
        if self.forgets && count % 10 == 9 {
            return Ok(());
        }
        self.publisher.publish(message).await
    }
}
