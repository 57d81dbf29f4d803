//! What holds on PostgreSQL beyond the rules of every store.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod common;

#[path = "postgres/cancelling.rs"]
mod cancelling;
#[path = "postgres/damage.rs"]
mod damage;
#[path = "postgres/group.rs"]
mod group;
#[path = "postgres/locks.rs"]
mod locks;
#[path = "postgres/schema.rs"]
mod schema;
#[path = "postgres/session.rs"]
mod session;
#[path = "postgres/sweep.rs"]
mod sweep;
#[path = "postgres/waiting.rs"]
mod waiting;

use std::time::{Duration, SystemTime};

use sqlx::{AssertSqlSafe, PgPool};
use tower_idempotency::store::{Claim, ClaimRequest, Claimed, Completion, LeaseRenewal, Token};
use tower_idempotency::{Envelope, Fingerprint, Identity, Lost, PgStore, References, Store};

use common::database::TestDatabase;

/// A migrated database, the application's pool, and a store.
struct Fixture {
    store: PgStore,
    pool: PgPool,
    database: TestDatabase,
}

impl Fixture {
    async fn new() -> Self {
        let database = TestDatabase::create().await;
        let pool = database.pool(2).await;
        let store = PgStore::new(pool.clone());
        store.migrate().await.unwrap();
        Self {
            store,
            pool,
            database,
        }
    }

    /// Closes the connections of the store; it opens others when it is used.
    fn end_sessions(&mut self) {
        self.store = PgStore::new(self.pool.clone());
    }

    /// A database with a setting that new connections begin with.
    async fn with_setting(setting: &str) -> Self {
        let database = TestDatabase::create().await;
        let name = &database.name;
        let alter = format!(r#"alter database "{name}" set {setting}"#);
        sql(&database.pool(1).await, &alter).await;
        let pool = database.pool(2).await;
        let store = PgStore::new(pool.clone());
        store.migrate().await.unwrap();
        Self {
            store,
            pool,
            database,
        }
    }
}

async fn sql(pool: &PgPool, sql: &str) {
    let statement = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
    if let Err(error) = statement.execute(pool).await {
        panic!("{sql}: {error}");
    }
}

async fn text(pool: &PgPool, sql: &str) -> String {
    let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
    match query.fetch_one(pool).await {
        Ok(text) => text,
        Err(error) => panic!("{sql}: {error}"),
    }
}

async fn number(pool: &PgPool, sql: &str) -> i64 {
    let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
    match query.fetch_one(pool).await {
        Ok(number) => number,
        Err(error) => panic!("{sql}: {error}"),
    }
}

fn request(key: &str) -> ClaimRequest {
    ClaimRequest {
        identity: Identity::new("acme", "POST /charges", key),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: Token::random().unwrap(),
        lost: Lost::Rerun,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(24 * 3600),
    }
}

/// The claim of a request that was acquired as the first attempt.
fn claim_of(request: &ClaimRequest) -> Claim {
    request.claim(1, SystemTime::UNIX_EPOCH)
}

async fn acquire(store: &PgStore, request: &ClaimRequest) -> Claim {
    match store.claim(request).await.unwrap() {
        Claimed::Acquired(claim) => claim,
        other => panic!("expected the claim to be acquired, not {other:?}"),
    }
}

fn completion() -> Completion {
    Completion {
        answer: Envelope::new(http::Response::new("answer".into())),
        references: References::default(),
    }
}

fn renewal(claim: &Claim) -> LeaseRenewal {
    LeaseRenewal {
        claim: claim.clone(),
        lease: Duration::from_secs(30),
    }
}

/// Asks again until it is so; panics after a while.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}

/// How many backends of this database are in this state.
async fn backends(pool: &PgPool, condition: &str) -> i64 {
    let sql = format!(
        "select count(*) from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid() and {condition}"
    );
    number(pool, &sql).await
}
