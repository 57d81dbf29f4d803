//! Databases whose transactions are stricter by default.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _};

use crate::fired::fired;

/// Sets the isolation of all transactions that ask for none, in the database of a URL, and sees that a
/// new session has it.
///
/// # Panics
///
/// When it has not.
pub async fn make_stricter(url: &str, isolation: &str) {
    let mut connection = PgConnection::connect(url).await.expect("it is there");
    let alter = format!(
        "do $$ begin execute format('alter database %I set default_transaction_isolation = ''{isolation}''',
            current_database()); end $$"
    );
    let altered = sqlx::raw_sql(AssertSqlSafe(alter)).execute(&mut connection);
    altered.await.expect("it can be altered");
    let mut session = PgConnection::connect(url).await.expect("it is there");
    let shown = sqlx::query_scalar("show transaction_isolation");
    let shown: String = shown.fetch_one(&mut session).await.expect("it is shown");
    assert_eq!(shown, isolation);
    fired(&format!("isolation {isolation}"));
}
