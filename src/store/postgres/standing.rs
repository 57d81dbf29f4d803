//! What a connection says of the transaction that a handler had.

use std::sync::atomic::{AtomicI32, Ordering};

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection as _, Error, Executor, PgConnection, Row as _};

use super::transaction::{code, is_refused};
use super::transactions::{START, UNDO};

fn next_question() -> i32 {
    static ASKED: AtomicI32 = AtomicI32::new(0);
    ASKED.fetch_add(1, Ordering::Relaxed) & i32::MAX
}

/// Whether the connection answers what it is asked.
pub(super) async fn answers(connection: &mut PgConnection) -> Result<(), Error> {
    let asked = next_question();
    let row = connection
        .fetch_one(AssertSqlSafe(format!("select {asked}::integer as asked")))
        .await?;
    is_of(&row, 0, asked)
}

/// Whether the session has committed the transaction of this mark, without the store. What is open is
/// rolled back, and an empty one follows, where sqlx counts one.
pub(super) async fn has_committed(
    connection: &mut PgConnection,
    mark: &str,
) -> Result<bool, Error> {
    let start = match connection.is_in_transaction() {
        true => START,
        false => "",
    };
    let asked = next_question();
    let sql = format!(
        "rollback; {start};
        select current_setting('idempotency.committed', true) = '{mark}', {asked}::integer"
    );
    let row = connection.fetch_one(AssertSqlSafe(sql)).await?;
    is_of(&row, 1, asked)?;
    let is_mark: Option<bool> = row.try_get(0)?;
    Ok(is_mark.unwrap_or(false))
}

/// sqlx miscounts the answers of a `COPY` that its handler gave up, and takes each for that of the next
/// statement.
fn is_of(row: &PgRow, column: usize, asked: i32) -> Result<(), Error> {
    let answered: i32 = row.try_get(column)?;
    if answered == asked {
        return Ok(());
    }
    Err(Error::Protocol("the answer is of another statement".into()))
}

/// Whether the transaction of this mark is not open any more.
pub(super) async fn is_over(connection: &mut PgConnection, mark: &str) -> Result<bool, Error> {
    match has_mark(connection, mark).await {
        Err(error) if is_refused(&error) => {}
        has_mark => return has_mark.map(|has_mark| !has_mark),
    }
    // Of one that has failed, its savepoint tells.
    match connection.execute(UNDO).await {
        Ok(_) => Ok(false),
        Err(error) if matches!(code(&error).as_deref(), Some("3B001" | "25P01")) => Ok(true),
        Err(error) => Err(error),
    }
}

/// A transaction of nobody's has no mark, and the mark of an ended one reads as empty. Not prepared:
/// outside of a transaction, a pooler may look for the statement on another connection.
async fn has_mark(connection: &mut PgConnection, mark: &str) -> Result<bool, Error> {
    let sql = format!("select current_setting('idempotency.attempt', true) = '{mark}'");
    let row = connection.fetch_one(AssertSqlSafe(sql)).await?;
    Ok(row.try_get::<Option<bool>, _>(0)?.unwrap_or(false))
}
