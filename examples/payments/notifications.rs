//! An effect in a foreign system. No transaction spans both, so the receiver gets a key of its own.

use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::header::{CONTENT_TYPE, HOST};
use axum::http::{Request, Uri};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tower_idempotency::IdempotencyContext;

use crate::App;
use crate::auth::Principal;
use crate::error::{ApiError, BoxError};
use crate::ledger;

const PATIENCE: Duration = Duration::from_secs(5);

/// Every try sends the same key, made of the operation's identity: after a failure, after a crash, and
/// when a paused attempt meets its successor.
pub(crate) async fn create(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    Path(charge): Path<String>,
    context: IdempotencyContext,
) -> Result<Json<Value>, ApiError> {
    // The connection is back in the pool before the receiver is called.
    let charge = ledger::find(&mut *app.pool.acquire().await?, principal.account, &charge).await?;
    let key = context.identity().id().to_string();
    let told = timeout(PATIENCE, tell(&app.receiver, &key, &json!(charge))).await;
    told.map_err(BoxError::from)
        .flatten()
        .map_err(ApiError::Receiver)?;
    Ok(Json(json!({ "charge": charge.id, "notification": key })))
}

/// Anything but a success is an error: it must not become an answer that is kept.
async fn tell(receiver: &Uri, key: &str, event: &Value) -> Result<(), BoxError> {
    let host = receiver.host().ok_or("the receiver's URL has no host")?;
    let stream = TcpStream::connect((host, receiver.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with `sender`; what goes wrong with it is told there.
    tokio::spawn(connection);
    let request = Request::post(receiver.path())
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .header("idempotency-key", key)
        .body(Body::from(event.to_string()))?;
    let response = sender.send_request(request).await?;
    match response.status() {
        status if status.is_success() => Ok(()),
        status => Err(format!("the receiver answered {status}").into()),
    }
}
