//! The books. Each function works inside the transaction of its caller and can be run again: it then
//! finds what it wrote, and says the same.

use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection, Row};

use crate::error::ApiError;
use crate::money::{Amount, Currency};

#[derive(Debug, Serialize)]
pub(crate) struct Charge {
    pub(crate) id: String,
    amount: i64,
    currency: String,
    status: String,
    refunded: i64,
}

impl FromRow<'_, PgRow> for Charge {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.try_get("id")?,
            amount: row.try_get("amount")?,
            currency: row.try_get("currency")?,
            status: row.try_get("status")?,
            refunded: row.try_get("refunded")?,
        })
    }
}

/// Money that moves from one book to another.
#[derive(Debug, PartialEq, Serialize)]
pub(crate) struct Posting {
    id: String,
    charge: String,
    debit: String,
    credit: String,
    amount: i64,
    currency: String,
}

impl FromRow<'_, PgRow> for Posting {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.try_get("id")?,
            charge: row.try_get("charge")?,
            debit: row.try_get("debit")?,
            credit: row.try_get("credit")?,
            amount: row.try_get("amount")?,
            currency: row.try_get("currency")?,
        })
    }
}

/// What its customer still has.
const AVAILABLE: &str = "customer:available";
/// What its customer has, but cannot spend.
const RESERVED: &str = "customer:reserved";

/// Makes the charge `id`, and reserves its amount.
pub(crate) async fn authorize(
    db: &mut PgConnection,
    account: &str,
    id: &str,
    amount: Amount,
    currency: &Currency,
) -> Result<Charge, ApiError> {
    // The constraint decides, not a look before: between the two, another attempt may insert.
    let insert = "insert into payments.charge (id, account, amount, currency)
        values ($1, $2, $3, $4) on conflict (id) do nothing";
    let query = sqlx::query(insert).bind(id).bind(account);
    let query = query.bind(amount.minor_units()).bind(currency.code());
    let is_new = query.execute(&mut *db).await?.rows_affected() == 1;
    let charge = find(db, account, id).await?;
    if is_new {
        let posting = charge.posting(id, AVAILABLE, RESERVED, charge.amount);
        post(db, &posting).await?;
    } else if (charge.amount, charge.currency.as_str()) != (amount.minor_units(), currency.code()) {
        return Err(refused("key-spent", "this key has made another charge"));
    }
    Ok(charge)
}

/// Takes the whole amount. A charge is captured once; to ask again is to be told what came of it.
pub(crate) async fn capture(
    db: &mut PgConnection,
    account: &str,
    charge: &str,
) -> Result<Posting, ApiError> {
    let charge = lock(db, account, charge).await?;
    let id = format!("{}_capture", charge.id);
    if let Some(posted) = posted(db, &id).await? {
        return Ok(posted);
    }
    let update = "update payments.charge set status = 'captured' where id = $1";
    sqlx::query(update)
        .bind(&charge.id)
        .execute(&mut *db)
        .await?;
    let posting = charge.posting(&id, RESERVED, &merchant(account), charge.amount);
    post(db, &posting).await?;
    Ok(posting)
}

/// Gives a part of a captured amount back, or all of it.
pub(crate) async fn refund(
    db: &mut PgConnection,
    account: &str,
    charge: &str,
    id: &str,
    amount: Amount,
) -> Result<Posting, ApiError> {
    // Refunds of one charge wait for each other here, or two could each find enough left.
    let charge = lock(db, account, charge).await?;
    let posting = charge.posting(id, &merchant(account), AVAILABLE, amount.minor_units());
    if let Some(posted) = posted(db, id).await? {
        let is_same = posted == posting;
        let other = || refused("key-spent", "this key has made another refund");
        return is_same.then_some(posted).ok_or_else(other);
    }
    if charge.status != "captured" {
        return Err(refused("not-captured", "the charge is not captured yet"));
    }
    let left = charge.amount - charge.refunded;
    if posting.amount > left {
        let detail = format!("only {left} of the captured amount are left to refund");
        return Err(refused("refund-too-large", detail));
    }
    let update = "update payments.charge set refunded = refunded + $2 where id = $1";
    let query = sqlx::query(update).bind(&charge.id).bind(posting.amount);
    query.execute(&mut *db).await?;
    post(db, &posting).await?;
    Ok(posting)
}

pub(crate) async fn find(
    db: &mut PgConnection,
    account: &str,
    id: &str,
) -> Result<Charge, ApiError> {
    let select = "select id, amount, currency, status, refunded from payments.charge
        where account = $1 and id = $2";
    one(db, select, account, id).await
}

pub(crate) async fn list(db: &mut PgConnection, account: &str) -> sqlx::Result<Vec<Charge>> {
    let select = "select id, amount, currency, status, refunded from payments.charge
        where account = $1 order by created_at desc limit 100";
    sqlx::query_as(select).bind(account).fetch_all(db).await
}

/// The charge, for this transaction alone.
async fn lock(db: &mut PgConnection, account: &str, id: &str) -> Result<Charge, ApiError> {
    let select = "select id, amount, currency, status, refunded from payments.charge
        where account = $1 and id = $2 for update";
    one(db, select, account, id).await
}

async fn one(
    db: &mut PgConnection,
    select: &'static str,
    account: &str,
    id: &str,
) -> Result<Charge, ApiError> {
    // PostgreSQL has no text with a NUL, and so no such charge.
    if id.contains('\0') {
        return Err(ApiError::NotFound);
    }
    let query = sqlx::query_as(select).bind(account).bind(id);
    query.fetch_optional(db).await?.ok_or(ApiError::NotFound)
}

async fn posted(db: &mut PgConnection, id: &str) -> sqlx::Result<Option<Posting>> {
    let select = "select id, charge, debit, credit, amount, currency from payments.ledger
        where id = $1";
    sqlx::query_as(select).bind(id).fetch_optional(db).await
}

/// Adds a row. One with this id is an error, and rolls everything back: money never moves twice.
async fn post(db: &mut PgConnection, posting: &Posting) -> sqlx::Result<()> {
    let insert = "insert into payments.ledger (id, charge, debit, credit, amount, currency)
        values ($1, $2, $3, $4, $5, $6)";
    let query = sqlx::query(insert).bind(&posting.id).bind(&posting.charge);
    let query = query.bind(&posting.debit).bind(&posting.credit);
    let query = query.bind(posting.amount).bind(&posting.currency);
    query.execute(db).await.map(drop)
}

impl Charge {
    fn posting(&self, id: &str, debit: &str, credit: &str, amount: i64) -> Posting {
        Posting {
            id: id.to_owned(),
            charge: self.id.clone(),
            debit: debit.to_owned(),
            credit: credit.to_owned(),
            amount,
            currency: self.currency.clone(),
        }
    }
}

fn merchant(account: &str) -> String {
    format!("merchant:{account}")
}

fn refused(code: &'static str, detail: impl Into<String>) -> ApiError {
    let detail = detail.into();
    ApiError::Refused { code, detail }
}
