//! The books. Each function works inside the transaction of its caller, in which it also writes what
//! others are to be told.
//!
//! While a record is kept, its operation gets here once. After that the same key may come again, and
//! finds the rows that bear its name: money never moves twice for one key, however old.

use serde::Serialize;
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgConnection, Row};

use crate::error::ApiError;
use crate::events::{Event, tell};
use crate::money::{Amount, Currency};
use crate::states::{self, CAPTURE, Moved};

#[derive(Debug, Serialize)]
pub(crate) struct Charge {
    pub(crate) id: String,
    #[serde(skip)]
    account: String,
    pub(crate) amount: i64,
    currency: String,
    pub(crate) status: String,
    refunded: i64,
}

impl FromRow<'_, PgRow> for Charge {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self {
            id: row.try_get("id")?,
            account: row.try_get("account")?,
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
    let insert = "insert into payments.charge (id, account, amount, currency)
        values ($1, $2, $3, $4) on conflict (id) do nothing";
    let query = sqlx::query(insert).bind(id).bind(account);
    let query = query.bind(amount.minor_units()).bind(currency.code());
    let is_new = query.execute(&mut *db).await?.rows_affected() == 1;
    let charge = find(db, account, id).await?;
    if is_new {
        let posting = charge.posting(id, AVAILABLE, RESERVED, charge.amount);
        post(db, &posting).await?;
        tell(db, "charge.created", &charge.event(charge.amount)).await?;
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
    let charge = find(db, account, charge).await?;
    let id = format!("{}_capture", charge.id);
    match states::advance(db, &charge.id, CAPTURE).await? {
        Moved::Now(charge) => {
            let posting = charge.posting(&id, RESERVED, &charge.merchant(), charge.amount);
            post(db, &posting).await?;
            tell(db, "charge.captured", &charge.event(charge.amount)).await?;
            Ok(posting)
        }
        Moved::Before => posted(db, &id).await?.ok_or(ApiError::NotFound),
        Moved::Not(charge) => Err(refused(
            "not-authorized",
            format!("a charge that is {} cannot be captured", charge.status),
        )),
    }
}

/// Gives a part of a captured amount back, or all of it.
pub(crate) async fn refund(
    db: &mut PgConnection,
    account: &str,
    charge: &str,
    id: &str,
    amount: Amount,
) -> Result<Posting, ApiError> {
    let charge = find(db, account, charge).await?;
    let amount = amount.minor_units();
    let posting = charge.posting(id, &charge.merchant(), AVAILABLE, amount);
    if let Some(posted) = posted(db, id).await? {
        let is_same = posted == posting;
        let other = || refused("key-spent", "this key has made another refund");
        return is_same.then_some(posted).ok_or_else(other);
    }
    // Refunds of one charge wait for each other here, and each counts what the one before has left.
    let update = "update payments.charge set refunded = refunded + $2
        where id = $1 and status in ('captured', 'settled') and refunded + $2 <= amount";
    let query = sqlx::query(update).bind(&charge.id).bind(amount);
    if query.execute(&mut *db).await?.rows_affected() == 0 {
        return Err(find(db, account, &charge.id).await?.not_refundable());
    }
    post(db, &posting).await?;
    tell(db, "charge.refunded", &charge.event(amount)).await?;
    Ok(posting)
}

/// A charge of an account.
pub(crate) async fn find(
    db: &mut PgConnection,
    account: &str,
    id: &str,
) -> Result<Charge, ApiError> {
    let charge = any(db, id).await?;
    let is_own = charge.account == account;
    is_own.then_some(charge).ok_or(ApiError::NotFound)
}

/// A charge, whosever it is.
pub(crate) async fn any(db: &mut PgConnection, id: &str) -> Result<Charge, ApiError> {
    let select = "select id, account, amount, currency, status, refunded from payments.charge
        where id = $1";
    // PostgreSQL has no text with a NUL, and so no such charge.
    if id.contains('\0') {
        return Err(ApiError::NotFound);
    }
    let query = sqlx::query_as(select).bind(id);
    query.fetch_optional(db).await?.ok_or(ApiError::NotFound)
}

pub(crate) async fn list(db: &mut PgConnection, account: &str) -> sqlx::Result<Vec<Charge>> {
    let select = "select id, account, amount, currency, status, refunded from payments.charge
        where account = $1 order by created_at desc limit 100";
    sqlx::query_as(select).bind(account).fetch_all(db).await
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

    pub(crate) fn event(&self, amount: i64) -> Event {
        Event {
            account: self.account.clone(),
            charge: self.id.clone(),
            amount,
            currency: self.currency.clone(),
        }
    }

    fn merchant(&self) -> String {
        format!("merchant:{}", self.account)
    }

    fn not_refundable(&self) -> ApiError {
        let left = self.amount - self.refunded;
        match self.status.as_str() {
            "authorized" => refused("not-captured", "the charge is not captured yet"),
            "disputed" => refused("disputed", "the bank decides what becomes of the charge"),
            _ => {
                let detail = format!("only {left} of the captured amount are left to refund");
                refused("refund-too-large", detail)
            }
        }
    }
}

fn refused(code: &'static str, detail: impl Into<String>) -> ApiError {
    let detail = detail.into();
    ApiError::Refused { code, detail }
}
