//! Who receives the messages: an effect for each, acknowledged after its commit.

use std::error::Error;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::net::TcpListener;
use tower_idempotency::inbox::{self, Once};

/// Of so many acknowledgements one does not arrive, so that messages come again.
const LOST_ACKNOWLEDGEMENT: u64 = 8;

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) database: String,
    pub(crate) port: u16,
}

#[derive(Debug, Clone)]
struct App {
    pool: PgPool,
    taken: Arc<AtomicU64>,
}

pub(crate) async fn run(settings: Settings) -> Result<(), Box<dyn Error>> {
    let pool = PgPoolOptions::new().max_connections(8);
    let app = App {
        pool: pool.connect_lazy(&settings.database)?,
        taken: Arc::default(),
    };
    let router = Router::new().route("/", post(receive)).with_state(app);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, settings.port)).await?;
    println!("port {}", settings.port);
    axum::serve(listener, router).await?;
    Ok(())
}

async fn receive(State(app): State<App>, headers: HeaderMap, payload: String) -> StatusCode {
    let id = headers.get("webhook-id").and_then(|id| id.to_str().ok());
    let Some(id) = id.map(ToOwned::to_owned) else {
        return StatusCode::BAD_REQUEST;
    };
    // In a task of its own, since axum drops this one when the relay hangs up, and sqlx loses count
    // of a transaction whose beginning is cancelled (https://github.com/launchbadge/sqlx/issues/4385).
    let taken = tokio::spawn(async move { take_in(&app, &id, &payload).await });
    match taken.await.map_err(Box::from).flatten() {
        Ok(count) if count % LOST_ACKNOWLEDGEMENT == 0 => StatusCode::GATEWAY_TIMEOUT,
        Ok(_) => StatusCode::NO_CONTENT,
        Err(error) => {
            tracing::warn!(error, "not taken in");
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

/// How many it has taken in since it was started.
async fn take_in(app: &App, id: &str, payload: &str) -> Result<u64, Box<dyn Error + Send + Sync>> {
    let mut transaction = app.pool.begin().await?;
    if inbox::once(&mut transaction, "charges", id).await? == Once::First {
        let insert = "insert into effect (message, key) values ($1, $2::json ->> 'key')";
        let query = sqlx::query(insert).bind(id).bind(payload);
        query.execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    Ok(app.taken.fetch_add(1, Ordering::Relaxed) + 1)
}
