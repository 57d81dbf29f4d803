//! Handlers that move money. What they write, and what they answer, commit together: the layer has begun
//! the transaction, and ends it.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Path, State};
use axum::http::{StatusCode, header::LOCATION};
use axum::response::IntoResponse;
use serde::Deserialize;
use tower_idempotency::IdempotencyContext;
use tower_idempotency::postgres::Tx;

use crate::App;
use crate::auth::Principal;
use crate::error::ApiError;
use crate::ledger::{self, Charge, Posting};
use crate::money::{Amount, Currency};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewCharge {
    amount: Amount,
    currency: Currency,
}

/// The id is the operation's: a key that comes back when its record is long forgotten finds its charge.
pub(crate) async fn create(
    mut tx: Tx,
    Extension(principal): Extension<Principal>,
    context: IdempotencyContext,
    new: Result<Json<NewCharge>, JsonRejection>,
) -> Result<impl IntoResponse, ApiError> {
    let Json(new) = new?;
    let id = format!("ch_{}", context.identity().id());
    let (amount, currency) = (new.amount, new.currency);
    let charge = ledger::authorize(&mut tx, principal.account, &id, amount, &currency).await?;
    let location = [(LOCATION, format!("/charges/{id}"))];
    Ok((StatusCode::CREATED, location, Json(charge)))
}

pub(crate) async fn list(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
) -> Result<Json<Vec<Charge>>, ApiError> {
    let mut db = app.pool.acquire().await?;
    Ok(Json(ledger::list(&mut db, principal.account).await?))
}

pub(crate) async fn show(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    Path(id): Path<String>,
) -> Result<Json<Charge>, ApiError> {
    let mut db = app.pool.acquire().await?;
    Ok(Json(ledger::find(&mut db, principal.account, &id).await?))
}

/// Needs no key: the charge names the operation.
pub(crate) async fn capture(
    mut tx: Tx,
    Extension(principal): Extension<Principal>,
    Path(charge): Path<String>,
) -> Result<(StatusCode, Json<Posting>), ApiError> {
    let posting = ledger::capture(&mut tx, principal.account, &charge).await?;
    Ok((StatusCode::CREATED, Json(posting)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewRefund {
    amount: Amount,
}

/// Two refunds of one amount may both be meant: only the client's key tells them apart.
pub(crate) async fn refund(
    mut tx: Tx,
    Extension(principal): Extension<Principal>,
    Path(charge): Path<String>,
    context: IdempotencyContext,
    new: Result<Json<NewRefund>, JsonRejection>,
) -> Result<(StatusCode, Json<Posting>), ApiError> {
    let Json(new) = new?;
    let id = format!("re_{}", context.identity().id());
    let posting = ledger::refund(&mut tx, principal.account, &charge, &id, new.amount).await?;
    Ok((StatusCode::CREATED, Json(posting)))
}
