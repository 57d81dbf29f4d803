//! A server of one variant: the same handler behind different middleware.

use std::error::Error;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::serve::ListenerExt as _;
use bytes::Bytes;
use faults::random::{Random, fresh_key};
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use tokio::net::TcpListener;
use tower_idempotency::postgres::{Tx, TxError};

use crate::variants::{self, Variant};

/// What its handler does beside answering.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Work {
    Nothing,
    /// A row of the business.
    Insert,
    /// A row that tells of the run, and an answer that no other run gives.
    Track,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) variant: Variant,
    pub(crate) database: String,
    /// Bytes of an answer.
    pub(crate) answer: usize,
    pub(crate) work: Work,
}

#[derive(Debug, Clone)]
pub(crate) struct App {
    answer: Bytes,
    pub(crate) pool: PgPool,
    work: Work,
    pub(crate) runs: Arc<AtomicU64>,
}

const CHARGE: &str = "insert into charge (account, amount) values ($1, $2)";
const RUN: &str = "insert into execution (key) values ($1)";

pub(crate) async fn run(settings: Settings) -> Result<(), Box<dyn Error>> {
    let app = App {
        answer: noise(settings.answer),
        pool: pool(&settings)?,
        work: settings.work,
        runs: Arc::default(),
    };
    let runs = app.runs.clone();
    let router = variants::router(settings.variant, &app).await?;
    let router = router.route(
        "/runs",
        get(move || async move { runs.load(Ordering::SeqCst).to_string() }),
    );
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("port {}", listener.local_addr()?.port());
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await?;
    Ok(())
}

/// Random bytes, which no compression makes smaller.
pub(crate) fn noise(length: usize) -> Bytes {
    let mut random = Random::from_seed(7);
    let words = std::iter::repeat_with(|| random.draw().to_le_bytes());
    words.flatten().take(length).collect()
}

fn pool(settings: &Settings) -> Result<PgPool, sqlx::Error> {
    let options = match settings.variant.pool() {
        // As sqlx has it where nothing is said.
        None => PgPoolOptions::new(),
        Some(size) => PgPoolOptions::new()
            .max_connections(size)
            .test_before_acquire(false),
    };
    options.connect_lazy(&settings.database)
}

pub(crate) async fn list(State(app): State<App>) -> Response {
    app.answer()
}

pub(crate) async fn charge(
    State(app): State<App>,
    headers: HeaderMap,
    _body: Bytes,
) -> Result<Response, StatusCode> {
    app.runs.fetch_add(1, Ordering::SeqCst);
    let done = match app.work {
        Work::Nothing => return Ok(app.answer()),
        Work::Insert => sqlx::query(CHARGE).bind("acme").bind(100_i64),
        Work::Track => sqlx::query(RUN).bind(key(&headers)),
    };
    let done = done.execute(&app.pool).await;
    done.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    if app.work == Work::Track {
        return Ok((StatusCode::CREATED, fresh_key()).into_response());
    }
    Ok(app.answer())
}

/// The same in a transaction of the layer.
pub(crate) async fn charge_within(
    State(app): State<App>,
    mut tx: Tx,
    _body: Bytes,
) -> Result<Response, TxError> {
    app.runs.fetch_add(1, Ordering::SeqCst);
    app.insert(&mut tx).await?;
    Ok(app.answer())
}

/// The same in a transaction of its own.
pub(crate) async fn charge_alone(
    State(app): State<App>,
    _body: Bytes,
) -> Result<Response, TxError> {
    app.runs.fetch_add(1, Ordering::SeqCst);
    let mut transaction = app.pool.begin().await?;
    app.insert(&mut transaction).await?;
    transaction.commit().await?;
    Ok(app.answer())
}

impl App {
    pub(crate) async fn insert(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        if self.work == Work::Insert {
            let insert = sqlx::query(CHARGE).bind("acme").bind(100_i64);
            insert.execute(connection).await?;
        }
        Ok(())
    }

    pub(crate) fn answer(&self) -> Response {
        let kind = [(CONTENT_TYPE, "application/octet-stream")];
        (StatusCode::CREATED, kind, self.answer.clone()).into_response()
    }
}

fn key(headers: &HeaderMap) -> &str {
    let key = headers.get("idempotency-key");
    key.and_then(|key| key.to_str().ok()).unwrap_or_default()
}
