//! The account statement, which the consumer writes line by line.

use axum::Json;
use axum::extract::{Extension, State};
use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection, Row};

use crate::App;
use crate::auth::Principal;
use crate::error::ApiError;
use crate::events::Event;

#[derive(Serialize)]
pub(crate) struct Line {
    event: String,
    charge: String,
    amount: i64,
    currency: String,
}

impl FromRow<'_, PgRow> for Line {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            event: row.try_get("event")?,
            charge: row.try_get("charge")?,
            amount: row.try_get("amount")?,
            currency: row.try_get("currency")?,
        })
    }
}

/// Adds a line, each time it is called: that it is called once is the inbox's business.
pub(crate) async fn add(db: &mut PgConnection, topic: &str, event: &Event) -> sqlx::Result<()> {
    let insert = "insert into payments.statement (account, event, charge, amount, currency)
        values ($1, $2, $3, $4, $5)";
    let query = sqlx::query(insert).bind(&event.account).bind(topic);
    let query = query.bind(&event.charge).bind(event.amount);
    query.bind(&event.currency).execute(db).await.map(drop)
}

pub(crate) async fn show(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
) -> Result<Json<Vec<Line>>, ApiError> {
    let select = "select event, charge, amount, currency from payments.statement
        where account = $1 order by position desc limit 100";
    let query = sqlx::query_as(select).bind(principal.account);
    Ok(Json(query.fetch_all(&app.pool).await?))
}
