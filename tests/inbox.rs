//! What the inbox promises, on PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod common;

#[path = "inbox/once.rs"]
mod once;
#[path = "inbox/order.rs"]
mod order;
#[path = "inbox/sweep.rs"]
mod sweep;

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgPool};
use tower_idempotency::PgStore;

use common::database::TestDatabase;

/// A migrated database with a table of effects.
struct Fixture {
    store: PgStore,
    pool: PgPool,
    database: TestDatabase,
}

impl Fixture {
    async fn new() -> Self {
        let database = TestDatabase::create().await;
        let pool = database.pool(12).await;
        let store = PgStore::new(pool.clone());
        store.migrate().await.unwrap();
        let fixture = Self {
            store,
            pool,
            database,
        };
        fixture.execute("create table effect (n bigint)").await;
        fixture
    }

    async fn execute(&self, sql: &str) {
        let statement = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        statement.execute(&self.pool).await.unwrap();
    }

    async fn number(&self, sql: &str) -> i64 {
        let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
        query.fetch_one(&self.pool).await.unwrap()
    }

    async fn effects(&self) -> i64 {
        self.number("select count(*) from effect").await
    }

    /// Waits until a backend of this database waits for another transaction.
    async fn somebody_waits(&self) {
        let waiting = "select count(*) from pg_stat_activity
            where datname = current_database() and wait_event_type = 'Lock'";
        until("somebody waits", async || self.number(waiting).await == 1).await;
    }
}

async fn effect(connection: &mut sqlx::PgConnection, n: i64) {
    let insert = sqlx::query("insert into effect values ($1)").bind(n);
    insert.execute(connection).await.unwrap();
}

/// Asks again until it is so; panics after a while.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}
