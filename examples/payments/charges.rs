//! Handlers that move money. What they do is one transaction, and every row is named by the operation.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Path, State};
use axum::http::{StatusCode, header::LOCATION};
use axum::response::IntoResponse;
use serde::Deserialize;
use tower_idempotency::IdempotencyContext;

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

/// The id is the operation's: a rerun makes the same charge, which is there already.
pub(crate) async fn create(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    context: IdempotencyContext,
    new: Result<Json<NewCharge>, JsonRejection>,
) -> Result<impl IntoResponse, ApiError> {
    let Json(new) = new?;
    let id = format!("ch_{}", context.identity().id());
    let mut transaction = app.pool.begin().await?;
    let db = &mut *transaction;
    let charge = ledger::authorize(db, principal.account, &id, new.amount, &new.currency).await?;
    transaction.commit().await?;
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
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    Path(charge): Path<String>,
) -> Result<(StatusCode, Json<Posting>), ApiError> {
    let mut transaction = app.pool.begin().await?;
    let posting = ledger::capture(&mut transaction, principal.account, &charge).await?;
    transaction.commit().await?;
    Ok((StatusCode::CREATED, Json(posting)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewRefund {
    amount: Amount,
}

/// Two refunds of one amount may both be meant: only the client's key tells them apart.
pub(crate) async fn refund(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    Path(charge): Path<String>,
    context: IdempotencyContext,
    new: Result<Json<NewRefund>, JsonRejection>,
) -> Result<(StatusCode, Json<Posting>), ApiError> {
    let Json(new) = new?;
    let id = format!("re_{}", context.identity().id());
    let mut transaction = app.pool.begin().await?;
    let db = &mut *transaction;
    let posting = ledger::refund(db, principal.account, &charge, &id, new.amount).await?;
    transaction.commit().await?;
    Ok((StatusCode::CREATED, Json(posting)))
}
