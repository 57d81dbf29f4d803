//! The bank's webhook: signed, delivered until it is answered with success, and handled once.

use std::env;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::StatusCode;
use serde::Deserialize;
use tower_idempotency::inbox::{self, Once};
use tower_idempotency::postgres::Tx;
use tower_idempotency::webhook::{Scheme, WebhookEvent, WebhookLayer};

use crate::error::{ApiError, BoxError};
use crate::events::tell;
use crate::ledger;
use crate::states::{self, DISPUTE, Moved, SETTLE};

/// For trials alone. A real secret is in no source.
const DEMO_SECRET: &str = "whsec_ZGVtbyBzZWNyZXQsIG9ubHkgZm9yIHRyaWFscw==";

pub(crate) fn secret() -> String {
    env::var("BANK_SECRET").unwrap_or_else(|_| DEMO_SECRET.into())
}

pub(crate) fn layer() -> Result<WebhookLayer, BoxError> {
    let scheme = Scheme::standard_webhooks("bank").with_secret(&secret());
    let scheme = scheme.map_err(|error| format!("BANK_SECRET: {error}"))?;
    Ok(WebhookLayer::new(scheme)?)
}

/// The bank may add members.
#[derive(Deserialize)]
pub(crate) struct Notice {
    r#type: String,
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    charge: String,
}

/// The record of the layer answers repeated deliveries for as long as it is kept. The inbox remembers
/// for longer, and whichever way the event comes: by this route, or from a list that somebody works off.
pub(crate) async fn bank(
    event: WebhookEvent,
    mut tx: Tx,
    notice: Result<Json<Notice>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(notice) = notice?;
    if inbox::once(&mut tx, event.source(), event.id()).await? == Once::Duplicate {
        return Ok(StatusCode::NO_CONTENT);
    }
    let (step, topic) = match notice.r#type.as_str() {
        "payout.settled" => (SETTLE, "charge.settled"),
        "charge.disputed" => (DISPUTE, "charge.disputed"),
        // Of no interest: to refuse it would only bring it again.
        _ => return Ok(StatusCode::NO_CONTENT),
    };
    let charge = ledger::any(&mut tx, &notice.data.charge).await?;
    match states::advance(&mut tx, &charge.id, step).await? {
        Moved::Now(charge) => tell(&mut tx, topic, &charge.event(charge.amount)).await?,
        Moved::Before => {}
        // Events overtake each other: the bank tries again, and by then the charge may be there.
        Moved::Not(charge) => return Err(ApiError::NotYet(charge.status)),
    }
    Ok(StatusCode::NO_CONTENT)
}
