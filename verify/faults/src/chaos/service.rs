//! The subject of a chaos run: an axum server with one layer on four routes of different promises, and
//! on one more whose answers are kept for a short time only.
//!
//! How a handler behaves is said by the header `x-behave`: `delay=20 status=500 panic hang size=100`.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::{
    Duplicates, IdempotencyContext, IdempotencyLayer, PgStore, Policy, Scope, Stats, Sweeper,
};

use crate::random::fresh_key;

/// Of a claim.
pub const LEASE: Duration = Duration::from_millis(1000);
/// Of a handler.
pub const EXECUTION_LIMIT: Duration = Duration::from_millis(800);
/// How long answers of `/brief` are kept.
pub const BRIEF: Duration = Duration::from_secs(3);
/// Connections of the store, of its writers, of who listens, of its transactions and of the handlers.
pub const CONNECTIONS: u32 = 8 + 4 + 1 + TRANSACTIONS + EFFECT_CONNECTIONS;
/// Handlers with a transaction at once.
pub const TRANSACTIONS: u32 = 10;
const EFFECT_CONNECTIONS: u32 = 6;
/// How long a shutdown waits.
const GRACE: Duration = Duration::from_millis(1000);

/// What the handlers did: the oracle, written past the layer, but for the transactional route.
pub const TABLE: &str = "
create table effect (
    execution text primary key,
    send bigint not null,
    operation bigint not null,
    amount bigint not null,
    route text not null,
    scope text not null,
    key text not null,
    attempt integer not null,
    behave text not null,
    finished boolean not null,
    xid text
)";

const WRITE: &str = "
insert into effect (execution, send, operation, amount, route, scope, key, attempt, behave, finished, xid)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, case when $10 then pg_current_xact_id()::text end)";

const FINISH: &str = "update effect set finished = true where execution = $1";

/// What a subject is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// `postgres://..` for the records.
    pub store: String,
    /// The same for effects of leased routes.
    pub effects: String,
    /// Whether an effect is sometimes written twice.
    pub doubles_effects: bool,
}

#[derive(Debug, Clone)]
struct App {
    effects: PgPool,
    doubles_effects: bool,
    arrived: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
}

/// Serves until SIGTERM.
///
/// # Errors
///
/// When the settings cannot work.
pub async fn run(settings: Settings) -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::INFO)
        .init();
    crate::subject::end_with_parent();
    let store = PgStore::builder(PgPoolOptions::new().connect_lazy(&settings.store)?)
        .with_statement_timeout(Duration::from_secs(2))?
        .with_max_transactions(TRANSACTIONS)?
        .build();
    let sweeper = Sweeper::new(store.clone()).with_interval(Duration::from_millis(700))?;
    tokio::spawn(sweeper.run());
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant")?)
        .with_store_timeout(Duration::from_millis(700))?
        .with_breaker(20)?;
    let effects = PgPoolOptions::new()
        .max_connections(EFFECT_CONNECTIONS)
        .acquire_timeout(Duration::from_millis(500));
    let app = App {
        effects: effects.connect_lazy(&settings.effects)?,
        doubles_effects: settings.doubles_effects,
        arrived: Arc::default(),
        answered: Arc::default(),
    };
    let router = router(&app, &layer)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("port {}", listener.local_addr()?.port());

    let mut terminate = signal(SignalKind::terminate())?;
    let (stopping, mut begun) = tokio::sync::watch::channel(false);
    let stopped = async move {
        terminate.recv().await;
        stopping.send_replace(true);
    };
    let server = axum::serve(listener, router).with_graceful_shutdown(stopped);
    let server = tokio::spawn(server.into_future());
    begun.wait_for(|begun| *begun).await?;
    let deadline = Instant::now() + GRACE;
    let served = tokio::time::timeout(GRACE, server).await;
    let left = deadline.saturating_duration_since(Instant::now());
    let report = layer.shutdown(left).await;
    println!("{}", accounts(&app, &layer.stats()));
    if served.is_err() || !report.unfinished.is_empty() {
        std::process::exit(crate::subject::UNFINISHED);
    }
    Ok(())
}

fn router(app: &App, layer: &IdempotencyLayer<PgStore>) -> Result<Router, Box<dyn Error>> {
    let with = |policy: Policy| {
        let policy = policy
            .with_lease(LEASE)
            .with_execution_limit(EXECUTION_LIMIT)
            .with_settle_timeout(Duration::from_millis(1000));
        layer.clone().with_policy(policy)
    };
    let wait = Duplicates::Wait(Duration::from_millis(300));
    let (accounts_of, counted) = (app.clone(), layer.clone());
    let routes = Router::new()
        .route("/critical", post(pay).layer(with(Policy::critical())?))
        .route(
            "/high",
            post(pay).layer(with(Policy::high().with_duplicates(wait))?),
        )
        .route("/medium", post(pay).layer(with(Policy::medium())?))
        .route(
            "/transactional",
            post(pay_in_transaction)
                .layer(with(Policy::high().with_duplicates(wait))?.transactional()),
        )
        .route(
            "/brief",
            post(brief).layer(with(Policy::medium().with_ttl(BRIEF))?),
        )
        .route_layer(middleware::from_fn_with_state(app.clone(), count))
        .route(
            "/accounts",
            get(move || async move { accounts(&accounts_of, &counted.stats()) }),
        )
        .with_state(app.clone());
    Ok(routes)
}

/// Keyed requests that came, those that were answered, and all outcomes of the layer.
fn accounts(app: &App, stats: &Stats) -> String {
    // Those that end meanwhile have arrived before.
    let answered = app.answered.load(Ordering::SeqCst);
    let outcomes = [
        stats.executed,
        stats.unprotected,
        stats.replayed,
        stats.mismatched,
        stats.in_progress,
        stats.held,
        stats.not_retained,
        stats.lost,
        stats.refused,
        stats.unavailable,
        stats.unreadable,
    ];
    let counted: u64 = outcomes.iter().sum();
    let arrived = app.arrived.load(Ordering::SeqCst);
    format!("accounts {arrived} {answered} {counted}")
}

async fn count(State(app): State<App>, request: Request, next: Next) -> Response {
    app.arrived.fetch_add(1, Ordering::SeqCst);
    let response = next.run(request).await;
    app.answered.fetch_add(1, Ordering::SeqCst);
    response
}

/// What the request asks of the handler.
#[derive(Debug, Default)]
struct Behaviour {
    text: String,
    delay: u64,
    status: u16,
    size: usize,
    panics: bool,
    hangs: bool,
}

impl Behaviour {
    fn read(headers: &HeaderMap) -> Self {
        let text = headers.get("x-behave").and_then(|v| v.to_str().ok());
        let mut behaviour = Self {
            text: text.unwrap_or_default().to_owned(),
            ..Self::default()
        };
        for word in text.unwrap_or_default().split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "delay" => behaviour.delay = value.parse().unwrap_or(0),
                "status" => behaviour.status = value.parse().unwrap_or(0),
                "size" => behaviour.size = value.parse().unwrap_or(0),
                "panic" => behaviour.panics = true,
                "hang" => behaviour.hangs = true,
                _ => {}
            }
        }
        behaviour
    }

    async fn act(&self) {
        if self.hangs {
            std::future::pending::<()>().await;
        }
        if self.delay > 0 {
            tokio::time::sleep(Duration::from_millis(self.delay)).await;
        }
        if self.panics {
            std::panic::resume_unwind(Box::new("asked to"));
        }
    }
}

#[derive(Debug, Deserialize)]
struct Payload {
    operation: i64,
    amount: i64,
}

/// One run of a handler.
struct Run {
    execution: String,
    send: i64,
    payload: Payload,
    context: IdempotencyContext,
    behaviour: Behaviour,
    doubles: bool,
}

impl Run {
    fn new(
        app: &App,
        context: IdempotencyContext,
        headers: &HeaderMap,
        body: &Bytes,
    ) -> Result<Self, StatusCode> {
        let send = headers.get("x-send").and_then(|v| v.to_str().ok());
        let send = send.and_then(|send| send.parse().ok());
        let send: i64 = send.ok_or(StatusCode::BAD_REQUEST)?;
        Ok(Self {
            execution: fresh_key(),
            send,
            payload: serde_json::from_slice(body).map_err(|_| StatusCode::BAD_REQUEST)?,
            context,
            behaviour: Behaviour::read(headers),
            doubles: app.doubles_effects && send % 100 == 0,
        })
    }

    fn attempt(&self) -> i32 {
        i32::try_from(self.context.attempt()).unwrap_or(i32::MAX)
    }

    async fn write(
        &self,
        connection: &mut PgConnection,
        execution: &str,
        finished: bool,
    ) -> Result<(), sqlx::Error> {
        let identity = self.context.identity();
        let query = sqlx::query(WRITE)
            .bind(execution)
            .bind(self.send)
            .bind(self.payload.operation)
            .bind(self.payload.amount)
            .bind(identity.operation())
            .bind(identity.scope())
            .bind(identity.key())
            .bind(self.attempt())
            .bind(self.behaviour.text.as_str())
            .bind(finished);
        query.execute(connection).await.map(drop)
    }

    /// Past any transaction.
    async fn write_apart(&self, app: &App, suffix: &str) -> Result<(), sqlx::Error> {
        let execution = format!("{}{suffix}", self.execution);
        let mut connection = app.effects.acquire().await?;
        self.write(&mut connection, &execution, false).await
    }

    fn answer(&self) -> Response {
        let status = StatusCode::from_u16(self.behaviour.status).unwrap_or(StatusCode::CREATED);
        let text = serde_json::json!({
            "execution": self.execution,
            "attempt": self.attempt(),
            "operation": self.payload.operation,
            "amount": self.payload.amount,
            "filling": "x".repeat(self.behaviour.size),
        });
        let location = format!("/effects/{}", self.execution);
        (status, [("location", location)], text.to_string()).into_response()
    }
}

async fn pay(
    State(app): State<App>,
    context: IdempotencyContext,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, StatusCode> {
    let run = Run::new(&app, context, &headers, &body)?;
    if run.behaviour.status == 429 {
        return Err(StatusCode::TOO_MANY_REQUESTS);
    }
    let failed = |_| StatusCode::INTERNAL_SERVER_ERROR;
    run.write_apart(&app, "").await.map_err(failed)?;
    if run.doubles {
        run.write_apart(&app, "-again").await.map_err(failed)?;
    }
    run.behaviour.act().await;
    let finish = sqlx::query(FINISH).bind(&run.execution);
    if let Err(error) = finish.execute(&app.effects).await {
        tracing::info!(%error, "cannot finish");
    }
    Ok(run.answer())
}

async fn pay_in_transaction(
    State(app): State<App>,
    context: IdempotencyContext,
    mut tx: Tx,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, TxError> {
    let run = match Run::new(&app, context, &headers, &body) {
        Ok(run) => run,
        Err(status) => return Ok(status.into_response()),
    };
    run.write(&mut tx, &run.execution, true).await?;
    if run.doubles {
        run.write_apart(&app, "-again").await?;
    }
    run.behaviour.act().await;
    Ok(run.answer())
}

async fn brief() -> &'static str {
    "brief"
}
