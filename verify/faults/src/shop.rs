//! A shop on PostgreSQL: `POST /pay` is an order in three phases, with a gateway between the first and
//! the second; a completer and a relay may run beside it.
//!
//! What it does stands in the tables of [`SCHEMA`]. The gateway charges once for each key, and counts
//! how often it was called.

use std::error::Error;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use bytes::Bytes;
use http::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgConnection, PgPool};
use tokio::net::TcpListener;
use tower_idempotency::outbox::{Outgoing, PublishError, Publisher, Relay};
use tower_idempotency::postgres::{PhaseError, Phases, TxError};
use tower_idempotency::{
    Completer, Envelope, IdempotencyContext, IdempotencyLayer, Lost, Operation, PgStore, Policy,
    Scope,
};

use crate::random::fresh_key;
use crate::subject::end_with_parent;

/// What a shop writes. Nothing in it keeps anything from being written twice.
pub const SCHEMA: &str = "
create table step (key text not null, name text not null, n bigint generated always as identity);
create table charge (key text primary key, calls integer not null default 1);
create table delivery (
    pid integer not null, message text not null, payload text not null,
    n bigint generated always as identity
)";

/// The phases of an order.
pub const PHASES: [&str; 3] = ["ordered", "charged", "mailed"];

/// Settings of a shop. Times are milliseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// Where everything is.
    pub store: String,
    /// Of claims and of the relay.
    pub lease: u64,
    /// Interval of the completer; without one, there is none.
    pub completes: Option<u64>,
    /// How long the relay takes for each message; without it, there is none.
    pub relays: Option<u64>,
}

/// Serves until it is killed.
///
/// # Errors
///
/// When the settings cannot work, or the database cannot be reached.
pub async fn run(settings: Settings) -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::DEBUG)
        .init();
    end_with_parent();
    let ms = Duration::from_millis;
    let lease = ms(settings.lease);
    let pool = PgPoolOptions::new().connect(&settings.store).await?;
    let store = PgStore::new(pool.clone());
    store.migrate().await?;
    if let Some(takes) = settings.relays {
        let publisher = Delivery {
            pool: pool.clone(),
            takes: ms(takes),
        };
        // A machine that stalls lets publishing fail now and then.
        let relay = Relay::new(store.clone(), publisher)
            .with_lease(lease)?
            .with_backoff(lease / 10, lease)?;
        tokio::spawn(relay.with_poll_interval(ms(20))?.run());
    }
    if let Some(interval) = settings.completes {
        let completer = completer(store.clone(), pool.clone());
        tokio::spawn(completer.with_interval(ms(interval))?.run());
    }
    let policy = Policy::high().with_lost(Lost::Rerun).with_lease(lease);
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant")?).with_policy(policy)?;
    let app = Router::new().route("/pay", post(order).layer(layer));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("port {}", listener.local_addr()?.port());
    axum::serve(listener, app.with_state(pool)).await?;
    Ok(())
}

async fn order(
    State(pool): State<PgPool>,
    context: IdempotencyContext,
    phases: Phases,
) -> Result<(StatusCode, String), PhaseError<TxError>> {
    let order = fulfil(&pool, context.identity().key(), &phases).await?;
    Ok((StatusCode::CREATED, order))
}

fn completer(store: PgStore, pool: PgPool) -> Completer<PgStore> {
    Completer::new(store).register("POST /pay", move |operation: Operation<PgStore>| {
        let pool = pool.clone();
        async move {
            let order = fulfil(&pool, operation.identity().key(), operation.phases()).await?;
            let answer = Response::builder().status(201).body(Bytes::from(order))?;
            Ok(Envelope::new(answer))
        }
    })
}

async fn fulfil(pool: &PgPool, key: &str, phases: &Phases) -> Result<String, PhaseError<TxError>> {
    let [ordered, charged, mailed] = PHASES;
    let order: String = phases
        .run(ordered, async |db| {
            step(db, key, ordered).await?;
            Ok(fresh_key())
        })
        .await?;
    let charge = charge(pool, &phases.downstream_key("charge")).await;
    charge.map_err(|error| PhaseError::Work(error.into()))?;
    for name in [charged, mailed] {
        let work = async |db: &mut PgConnection| step(db, key, name).await;
        phases.run(name, work).await?;
    }
    Ok(order)
}

/// Takes a moment, in which it can be killed.
async fn step(db: &mut PgConnection, key: &str, name: &str) -> Result<(), TxError> {
    let step = sqlx::query("insert into step (key, name) values ($1, $2)");
    step.bind(key).bind(name).execute(&mut *db).await?;
    sqlx::query("select pg_sleep(0.01)").execute(db).await?;
    Ok(())
}

async fn charge(pool: &PgPool, key: &str) -> Result<(), sqlx::Error> {
    let charge = sqlx::query(
        "insert into charge (key) values ($1)
        on conflict (key) do update set calls = charge.calls + 1",
    );
    charge.bind(key).execute(pool).await?;
    sqlx::query("select pg_sleep(0.01)").execute(pool).await?;
    Ok(())
}

/// Notes each message before it says that it was sent.
struct Delivery {
    pool: PgPool,
    takes: Duration,
}

impl Publisher for Delivery {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        let note = sqlx::query("insert into delivery (pid, message, payload) values ($1, $2, $3)");
        note.bind(i32::try_from(std::process::id()).unwrap_or(i32::MAX))
            .bind(message.id().to_string())
            .bind(message.payload())
            .execute(&self.pool)
            .await
            .map_err(PublishError::retryable)?;
        // The server answers whether or not this process is stopped.
        sqlx::query("select pg_sleep($1)")
            .bind(self.takes.as_secs_f64())
            .execute(&self.pool)
            .await
            .map_err(PublishError::retryable)?;
        Ok(())
    }
}
