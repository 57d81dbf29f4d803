//! An axum server with the layer on `POST /pay`: leased, or transactional.
//!
//! `GET /runs` counts the runs of the handler in this process, `GET /stats` is the layer's own
//! count, `GET /ledger/{scope}/{key}` shows the ledger, `POST /shutdown` does what SIGTERM does,
//! `POST /failpoints/{name}/{action}` arms a [failpoint](crate::failpoint), `GET /clock` tells the time.
//!
//! How the handler behaves is said by the header `x-behave`, which is no part of the fingerprint, so
//! that a retry may behave otherwise: `delay=200 gate=PATH block status=500 panic hang size=1000 chunks=10
//! gap=5 careful`; see `Behaviour`.

use std::error::Error;
use std::io::Read as _;
use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use axum::body::Body;
use axum::error_handling::HandleErrorLayer;
use axum::extract::{Path, State};
use axum::middleware::map_response_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use axum::{BoxError, Json, Router};
use bytes::Bytes;
use futures_util::StreamExt as _;
use http::{HeaderMap, StatusCode};
use serde_json::json;
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::SqlitePoolOptions;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tower::ServiceBuilder;
use tower_idempotency::postgres::TxError;
use tower_idempotency::store::Tx;
use tower_idempotency::{
    Duplicates, IdempotencyContext, IdempotencyLayer, PgStore, Policy, Scope, SqliteStore, Store,
    Sweeper, TransactionalStore,
};

use crate::failpoint::{Action, Failing, Failpoints};
use crate::fired::fired;
use crate::ledger::{Entry, Ledger, Write, sqlite_options};
use crate::random::fresh_key;
use crate::settings::Settings;

/// Exit status of a shutdown that left requests running.
pub const UNFINISHED: i32 = 3;

#[derive(Debug, Clone)]
struct App {
    ledger: Ledger,
    runs: Arc<AtomicU64>,
    shutdown: Arc<Notify>,
    failpoints: Failpoints,
}

/// Serves until SIGTERM or `POST /shutdown`.
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
    match settings.store.strip_prefix("sqlite:") {
        Some(path) => {
            let pool = SqlitePoolOptions::new().connect_lazy_with(sqlite_options(path));
            let store = SqliteStore::new(pool);
            if settings.migrate {
                store.migrate().await?;
            }
            serve(settings, store).await
        }
        None => {
            let pool = PgPoolOptions::new().connect_lazy(&settings.store)?;
            let mut store = PgStore::builder(pool)
                .with_pgbouncer(settings.pgbouncer)
                .with_shared_pool(settings.shared_pool)
                .with_group_commit(settings.group_commit);
            if let Some(most) = settings.max_transactions {
                store = store.with_max_transactions(most)?;
            }
            let store = store.build();
            if settings.migrate {
                store.migrate().await?;
            }
            serve(settings, store).await
        }
    }
}

/// Ends this process with its parent, which keeps the other end of stdin open for as long as it
/// lives, however it ends.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let mut stdin = std::io::stdin().lock();
        while stdin.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
        std::process::exit(1);
    });
}

async fn serve<S>(settings: Settings, store: S) -> Result<(), Box<dyn Error>>
where
    S: TransactionalStore + Clone,
    S::Transaction: DerefMut<Target: Write>,
{
    let ledger = Ledger::open(&settings.ledger).await?;
    ledger.create().await?;
    if let Some(interval) = settings.sweep {
        let sweeper = Sweeper::new(store.clone()).with_interval(Duration::from_millis(interval))?;
        tokio::spawn(sweeper.run());
    }
    let failpoints = Failpoints::default();
    let layer = layer(&settings, Failing::new(store, failpoints.clone()))?;
    let app = App {
        ledger,
        failpoints,
        runs: Arc::default(),
        shutdown: Arc::default(),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("port {}", listener.local_addr()?.port());

    let (stopping, begun) = tokio::sync::watch::channel(false);
    let asked = asked_to_stop(app.shutdown.clone())?;
    let stopped = async move {
        asked.await;
        stopping.send_replace(true);
    };
    let inside = |pay| within(settings.timeout_inside, pay);
    let pay = if settings.transactional {
        inside(post(pay_in_transaction::<S::Transaction>)).layer(layer.clone().transactional())
    } else {
        inside(post(pay)).layer(layer.clone())
    };
    let pay = within(settings.timeout_outside, pay);
    let router = router(app, pay, layer.clone());
    let server = tokio::spawn(
        axum::serve(listener, router)
            .with_graceful_shutdown(stopped)
            .into_future(),
    );
    shut_down(settings, layer, server, begun).await
}

/// Connections first, then what runs without one; both within the grace.
async fn shut_down<S: Store>(
    settings: Settings,
    layer: IdempotencyLayer<S>,
    server: tokio::task::JoinHandle<std::io::Result<()>>,
    mut begun: tokio::sync::watch::Receiver<bool>,
) -> Result<(), Box<dyn Error>> {
    begun.wait_for(|begun| *begun).await?;
    let grace = Duration::from_millis(settings.grace);
    let deadline = Instant::now() + grace;
    let served = tokio::time::timeout(grace, server).await;
    let left = deadline.saturating_duration_since(Instant::now());
    let asked = Instant::now();
    let report = layer.shutdown(left).await;
    println!(
        "unfinished {} after {} ms of {}",
        report.unfinished.len(),
        asked.elapsed().as_millis(),
        left.as_millis(),
    );
    if served.is_err() || !report.unfinished.is_empty() {
        std::process::exit(UNFINISHED);
    }
    Ok(())
}

fn asked_to_stop(
    shutdown: Arc<Notify>,
) -> Result<impl Future<Output = ()> + Send + 'static, std::io::Error> {
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            () = shutdown.notified() => {}
        }
    })
}

fn layer<S: Store>(settings: &Settings, store: S) -> Result<IdempotencyLayer<S>, Box<dyn Error>> {
    let ms = Duration::from_millis;
    let mut policy = match settings.risk.as_str() {
        "critical" => Policy::critical(),
        "high" => Policy::high(),
        "medium" => Policy::medium(),
        "low" => Policy::low(),
        other => return Err(format!("no risk class: {other}").into()),
    };
    if let Some(lease) = settings.lease {
        policy = policy.with_lease(ms(lease));
    }
    if let Some(ttl) = settings.ttl {
        policy = policy.with_ttl(ms(ttl));
    }
    if settings.shows_expiry {
        policy = policy.with_expiry_header(true);
    }
    if let Some(limit) = settings.execution_limit {
        policy = policy.with_execution_limit(ms(limit));
    }
    if let Some(timeout) = settings.settle_timeout {
        policy = policy.with_settle_timeout(ms(timeout));
    }
    if let Some(deadline) = settings.body_deadline {
        policy = policy.with_body_deadline(ms(deadline));
    }
    policy = policy.with_reruns(settings.reruns);
    policy = policy.with_replay_cache(settings.replay_cache);
    if let Some(wait) = settings.wait {
        policy = policy.with_duplicates(Duplicates::Wait(ms(wait)));
    }
    let mut layer = IdempotencyLayer::new(store, Scope::header("x-tenant")?).with_policy(policy)?;
    if let Some(timeout) = settings.store_timeout {
        layer = layer.with_store_timeout(ms(timeout))?;
    }
    Ok(layer)
}

/// With tower's `TimeoutLayer` around it, which answers 408.
fn within(limit: Option<u64>, route: MethodRouter<App>) -> MethodRouter<App> {
    let Some(limit) = limit else {
        return route;
    };
    let late = |_: BoxError| async {
        fired("timeout");
        StatusCode::REQUEST_TIMEOUT
    };
    route.layer(
        ServiceBuilder::new()
            .layer(HandleErrorLayer::new(late))
            .timeout(Duration::from_millis(limit)),
    )
}

fn router<S: Store>(app: App, pay: MethodRouter<App>, counted: IdempotencyLayer<S>) -> Router {
    Router::new()
        .route("/pay", pay)
        // Outside of the layer: on the way to the socket.
        .layer(map_response_with_state(app.clone(), in_pieces))
        .route("/failpoints/{name}/{action}", post(arm))
        .route("/runs", get(runs))
        .route("/clock", get(clock))
        .route("/ledger/{scope}/{key}", get(ledger))
        .route("/shutdown", post(shutdown))
        .route(
            "/stats",
            get(move || async move { format!("{:?}", counted.stats()) }),
        )
        .with_state(app)
}

async fn runs(State(app): State<App>) -> String {
    app.runs.load(Ordering::SeqCst).to_string()
}

/// Milliseconds since 1970, as this process sees them.
async fn clock() -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    now.as_millis().to_string()
}

async fn ledger(
    State(app): State<App>,
    Path((scope, key)): Path<(String, String)>,
) -> Result<Json<Vec<Entry>>, StatusCode> {
    let entries = app.ledger.entries(&scope, &key).await;
    entries
        .map(Json)
        .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

async fn arm(State(app): State<App>, Path((name, action)): Path<(String, Action)>) -> StatusCode {
    app.failpoints.arm(&name, action);
    StatusCode::NO_CONTENT
}

/// Sends an answer in two pieces, with the failpoint `body_chunk` between them.
async fn in_pieces(State(app): State<App>, response: Response) -> Response {
    if !app.failpoints.is_armed("body_chunk") {
        return response;
    }
    let (parts, body) = response.into_parts();
    let Ok(mut rest) = axum::body::to_bytes(body, usize::MAX).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let first = rest.split_to(rest.len() / 2);
    let first = futures_util::stream::iter([Ok::<_, std::io::Error>(first)]);
    let rest = futures_util::stream::once(async move {
        app.failpoints.reach("body_chunk").await;
        Ok(rest)
    });
    Response::from_parts(parts, Body::from_stream(first.chain(rest)))
}

async fn shutdown(State(app): State<App>) -> StatusCode {
    app.shutdown.notify_one();
    StatusCode::ACCEPTED
}

/// What the header `x-behave` asks of the handler.
#[derive(Debug, Default)]
struct Behaviour {
    /// Milliseconds between the beginning and the end of the run.
    delay: u64,
    /// A file without which the run does not end: a [`Gate`](crate::wait::Gate).
    gate: Option<String>,
    /// Waits for it without giving its thread back.
    block: bool,
    /// Status of the answer; 0 is 201.
    status: u16,
    panic: bool,
    hang: bool,
    /// Bytes that the answer is filled up with.
    size: usize,
    /// How many parts an answer without a length is sent in, `gap` milliseconds apart.
    chunks: usize,
    gap: u64,
    /// Does not end the run once its claim is no longer known to be held.
    careful: bool,
}

impl Behaviour {
    fn read(headers: &HeaderMap) -> Self {
        let mut behaviour = Self::default();
        let text = headers.get("x-behave").and_then(|v| v.to_str().ok());
        for word in text.unwrap_or_default().split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = value.parse::<u64>().unwrap_or(0);
            match name {
                "delay" => behaviour.delay = number,
                "gate" => behaviour.gate = Some(value.to_owned()),
                "status" => behaviour.status = value.parse().unwrap_or(0),
                "block" => behaviour.block = true,
                "panic" => behaviour.panic = true,
                "hang" => behaviour.hang = true,
                "careful" => behaviour.careful = true,
                "size" => behaviour.size = value.parse().unwrap_or(0),
                "chunks" => behaviour.chunks = value.parse().unwrap_or(0),
                "gap" => behaviour.gap = number,
                _ => {}
            }
        }
        behaviour
    }

    /// What the handler does between its write and its answer.
    async fn act(&self) {
        if self.hang {
            fired("hang");
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_millis(self.delay)).await;
        if self.block {
            fired("blocked thread");
        }
        while let Some(gate) = &self.gate
            && !std::path::Path::new(gate).exists()
        {
            let pause = Duration::from_millis(5);
            if self.block {
                std::thread::sleep(pause);
            } else {
                tokio::time::sleep(pause).await;
            }
        }
        if self.panic {
            fired("panic");
            std::panic::resume_unwind(Box::new("asked to"));
        }
    }
}

async fn pay(
    State(app): State<App>,
    headers: HeaderMap,
    context: Option<IdempotencyContext>,
    body: Bytes,
) -> Response {
    app.runs.fetch_add(1, Ordering::SeqCst);
    let behaviour = Behaviour::read(&headers);
    let entry = entry(context.as_ref(), &body);
    if let Err(error) = app.ledger.begin(&entry).await {
        tracing::error!(%error, "cannot write to the ledger");
        return (StatusCode::INTERNAL_SERVER_ERROR, "ledger").into_response();
    }
    app.failpoints.reach("handler_mid").await;
    behaviour.act().await;
    if behaviour.careful && !context.is_some_and(|context| context.is_current()) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if let Err(error) = app.ledger.finish(&entry.execution).await {
        tracing::error!(%error, "cannot finish in the ledger");
    }
    answer(&entry, &behaviour)
}

/// What it writes into the ledger is there with the record, or not at all.
async fn pay_in_transaction<T>(
    State(app): State<App>,
    mut tx: Tx<T>,
    headers: HeaderMap,
    context: IdempotencyContext,
    body: Bytes,
) -> Result<Response, TxError>
where
    T: DerefMut<Target: Write> + Send + 'static,
{
    app.runs.fetch_add(1, Ordering::SeqCst);
    let behaviour = Behaviour::read(&headers);
    let entry = entry(Some(&context), &body);
    tx.write(&entry).await?;
    app.failpoints.reach("handler_mid").await;
    behaviour.act().await;
    Ok(answer(&entry, &behaviour))
}

fn entry(context: Option<&IdempotencyContext>, body: &Bytes) -> Entry {
    let identity = context.map(IdempotencyContext::identity);
    Entry {
        execution: fresh_key(),
        scope: identity.map_or("", |i| i.scope()).to_owned(),
        key: identity.map_or("", |i| i.key()).to_owned(),
        attempt: context.map_or(0, |c| i32::try_from(c.attempt()).unwrap_or(i32::MAX)),
        pid: i32::try_from(std::process::id()).unwrap_or(i32::MAX),
        body: String::from_utf8_lossy(body).into_owned(),
        finished: false,
    }
}

fn answer(entry: &Entry, behaviour: &Behaviour) -> Response {
    let status = StatusCode::from_u16(behaviour.status).unwrap_or(StatusCode::CREATED);
    let text = json!({
        "execution": entry.execution,
        "attempt": entry.attempt,
        "filling": "x".repeat(behaviour.size),
    });
    let bytes = Bytes::from(text.to_string());
    if behaviour.chunks == 0 {
        return (status, bytes).into_response();
    }
    let length = bytes.len().div_ceil(behaviour.chunks);
    let gap = Duration::from_millis(behaviour.gap);
    let parts = futures_util::stream::unfold(bytes, move |mut left| async move {
        if left.is_empty() {
            return None;
        }
        tokio::time::sleep(gap).await;
        let part = left.split_to(length.min(left.len()));
        Some((Ok::<_, std::io::Error>(part), left))
    });
    (status, Body::from_stream(parts)).into_response()
}
