//! A service that takes orders, and takes each of them once, however often it is sent.
//!
//! `cargo run --example quickstart` needs nothing installed: orders and idempotency records are in
//! one SQLite file. It prints what to type.

use std::env;
use std::error::Error;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Path as UrlPath, Request, State};
use axum::http::{StatusCode, header::LOCATION};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow};
use sqlx::{FromRow, Row, SqlitePool};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tower_idempotency::{IdempotencyLayer, Outcome, Scope, SqliteStore, Sweeper};

type BoxError = Box<dyn Error + Send + Sync>;

/// How long requests that are running may go on once the service was told to stop.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<(), BoxError> {
    let listener = listen().await?;
    let file = database_file();
    let (pool, store) = open(&file).await.map_err(|error| {
        let file = file.display();
        format!(
            "cannot use {file} as the database: {error}\n\
             Name a file that can be written: QUICKSTART_DB=./quickstart.db cargo run --example quickstart"
        )
    })?;

    // Deletes records that are kept for long enough.
    tokio::spawn(Sweeper::new(store.clone()).run());

    // A key belongs to the tenant who sent it.
    let scope = Scope::extension::<Tenant>(|tenant| &tenant.0);
    let idempotency = IdempotencyLayer::new(store, scope);

    let app = Router::new()
        .route("/orders", post(create_order).layer(idempotency.clone()))
        .route("/orders", get(list_orders))
        .route("/orders/{id}", get(show_order))
        // Added last, so it is outermost: who asks is known before the key is looked at.
        .layer(middleware::from_fn(authenticate))
        .with_state(pool);

    let stop = stop_signal()?;
    print_what_to_type(&listener, &file)?;
    let (stopping, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, app).with_graceful_shutdown(async {
        stop.await;
        drop(stopping);
    });
    tokio::select! {
        served = server.into_future() => served?,
        // A client that never sends the rest of its request does not keep the service.
        () = async { drop(stopped.await); sleep(GRACE).await } => {}
    }

    // Handlers run to their end even if their clients have hung up: wait for those too.
    let report = idempotency.shutdown(GRACE).await;
    println!(
        "Stopped; {} requests were not finished.",
        report.unfinished.len()
    );
    Ok(())
}

/// Demo only: anybody can send `X-Tenant-Id`. In a real service use the authenticated principal: verify
/// a session or token here, and leave the account it belongs to.
async fn authenticate(mut request: Request, next: Next) -> Response {
    let tenant = request.headers().get("x-tenant-id");
    match tenant.and_then(|tenant| tenant.to_str().ok()) {
        Some(tenant) if !tenant.is_empty() => {
            let tenant = Tenant(tenant.to_owned());
            request.extensions_mut().insert(tenant);
            next.run(request).await
        }
        _ => error(StatusCode::UNAUTHORIZED, "send the header `X-Tenant-Id`"),
    }
}

#[derive(Clone)]
struct Tenant(String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewOrder {
    item: String,
    #[serde(default = "one")]
    quantity: u32,
}

fn one() -> u32 {
    1
}

#[derive(Serialize)]
struct Order {
    id: i64,
    item: String,
    quantity: u32,
}

impl FromRow<'_, SqliteRow> for Order {
    fn from_row(row: &SqliteRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.try_get("id")?,
            item: row.try_get("item")?,
            quantity: row.try_get("quantity")?,
        })
    }
}

async fn create_order(
    State(pool): State<SqlitePool>,
    Extension(Tenant(tenant)): Extension<Tenant>,
    order: Result<Json<NewOrder>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(NewOrder { item, quantity }) = order?;
    if item.trim().is_empty() || quantity == 0 {
        let reason = "`item` must not be empty, and `quantity` must be at least 1";
        return Err(ApiError::Invalid(
            StatusCode::UNPROCESSABLE_ENTITY,
            reason.into(),
        ));
    }
    let insert = "insert into orders (tenant, item, quantity) values (?, ?, ?)
        returning id, item, quantity";
    let query = sqlx::query_as(insert)
        .bind(tenant)
        .bind(item)
        .bind(quantity);
    let order: Order = query.fetch_one(&pool).await?;
    let location = [(LOCATION, format!("/orders/{}", order.id))];
    Ok((StatusCode::CREATED, location, Json(order)).into_response())
}

async fn list_orders(
    State(pool): State<SqlitePool>,
    Extension(Tenant(tenant)): Extension<Tenant>,
) -> Result<Json<Vec<Order>>, ApiError> {
    let select = "select id, item, quantity from orders where tenant = ? order by id";
    let query = sqlx::query_as(select).bind(tenant);
    Ok(Json(query.fetch_all(&pool).await?))
}

async fn show_order(
    State(pool): State<SqlitePool>,
    Extension(Tenant(tenant)): Extension<Tenant>,
    UrlPath(id): UrlPath<i64>,
) -> Result<Json<Order>, ApiError> {
    let select = "select id, item, quantity from orders where tenant = ? and id = ?";
    let query = sqlx::query_as(select).bind(tenant).bind(id);
    let order = query.fetch_optional(&pool).await?;
    order.map(Json).ok_or(ApiError::NotFound)
}

enum ApiError {
    Invalid(StatusCode, String),
    NotFound,
    Database(sqlx::Error),
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self::Invalid(rejection.status(), rejection.body_text())
    }
}

impl From<sqlx::Error> for ApiError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        match self {
            // Nothing was done: the client may correct the request and send it under the same key.
            Self::Invalid(status, reason) => {
                (Outcome::Release, error(status, &reason)).into_response()
            }
            Self::NotFound => error(StatusCode::NOT_FOUND, "no such order"),
            // Nobody knows whether the order was written. By default this answer is kept, and a
            // retry gets it again: no second order.
            Self::Database(cause) => {
                tracing::error!(%cause, "database");
                error(StatusCode::INTERNAL_SERVER_ERROR, "the database failed")
            }
        }
    }
}

fn error(status: StatusCode, reason: &str) -> Response {
    (status, Json(json!({ "error": reason }))).into_response()
}

/// Opens the file, and creates in it what is not there yet.
async fn open(file: &Path) -> Result<(SqlitePool, SqliteStore), BoxError> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal);
    let pool = SqlitePoolOptions::new().connect_with(options).await?;
    sqlx::query(
        "create table if not exists orders (
            id integer primary key,
            tenant text not null,
            item text not null,
            quantity integer not null
        )",
    )
    .execute(&pool)
    .await?;
    let store = SqliteStore::new(pool.clone());
    store.migrate().await?;
    Ok((pool, store))
}

/// Always the same place, so that answers are found again after a restart.
fn database_file() -> PathBuf {
    match env::var_os("QUICKSTART_DB").filter(|file| !file.is_empty()) {
        Some(file) => file.into(),
        None => env::temp_dir().join("tower-idempotency-quickstart.db"),
    }
}

async fn listen() -> Result<TcpListener, BoxError> {
    let port = env::var("PORT").unwrap_or_else(|_| "3000".into());
    let fix = "Choose another: PORT=3001 cargo run --example quickstart";
    let Ok(port) = port.parse::<u16>() else {
        return Err(format!("PORT={port} is not a port number (0 to 65535).\n{fix}").into());
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    Ok(listener.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => format!("port {port} is taken.\n{fix}"),
        _ => format!("cannot listen on port {port}: {error}.\n{fix}"),
    })?)
}

/// Ctrl-C (SIGINT), or SIGTERM, which supervisors send.
#[cfg(unix)]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { tokio::signal::ctrl_c().await.unwrap_or_default() })
}

fn print_what_to_type(listener: &TcpListener, file: &Path) -> Result<(), BoxError> {
    let url = format!("http://{}/orders", listener.local_addr()?);
    let file = file.display();
    println!(
        r#"Listening on {url}
Orders and idempotency records are in {file}
X-Tenant-Id says who asks. Demo only: in a real service use the authenticated principal.

Order a book:

    curl -i {url} -H 'X-Tenant-Id: acme' -H 'Idempotency-Key: order-1' \
        -H 'Content-Type: application/json' -d '{{"item": "book"}}'

Send the same again, as often as you like: the same answer, marked `idempotent-replayed: true`.
Stop this with Ctrl-C, start it again, and send it once more: still the same answer.

Send another payload under the same key: 409, for a key stands for one order.

    curl -i {url} -H 'X-Tenant-Id: acme' -H 'Idempotency-Key: order-1' \
        -H 'Content-Type: application/json' -d '{{"item": "book", "quantity": 2}}'

List the orders: there is one.

    curl {url} -H 'X-Tenant-Id: acme'
"#
    );
    Ok(())
}
