//! The stores, each on a place of its own.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{PgPool, SqlitePool};
use tower_idempotency::{
    IdempotencyLayer, MemoryStore, PgStore, Policy, Scope, SqliteStore, Store,
};

use crate::common::database::TestDatabase;
use crate::flaky::Flaky;

pub trait Backend: Send + Sync + Sized + 'static {
    type Store: Store + Clone;

    fn start() -> impl Future<Output = Self> + Send;

    fn store(&self) -> Self::Store;

    /// Makes every record older.
    fn age(&self, by: Duration) -> impl Future<Output = ()> + Send;

    /// A layer whose scope is the header `x-tenant`.
    fn layer(&self) -> IdempotencyLayer<Self::Store> {
        IdempotencyLayer::new(self.store(), Scope::header("x-tenant").unwrap())
    }

    /// The same under a policy, on a store that fails on demand and is soon given up.
    fn flaky(&self, policy: Policy) -> (Flaky<Self::Store>, IdempotencyLayer<Flaky<Self::Store>>) {
        let store = Flaky::new(self.store());
        let layer = IdempotencyLayer::new(store.clone(), Scope::header("x-tenant").unwrap())
            .with_policy(policy)
            .unwrap()
            .with_store_timeout(Duration::from_millis(300))
            .unwrap();
        (store, layer)
    }
}

/// Stores whose records a test can write to behind their back.
pub trait Corruptible: Backend {
    /// Sets the stored answer of every record.
    fn set_answers(&self, bytes: Vec<u8>) -> impl Future<Output = ()> + Send;

    /// The fingerprint of the only record.
    fn fingerprint(&self) -> impl Future<Output = Vec<u8>> + Send;

    /// Sets the fingerprint of every record.
    fn set_fingerprint(&self, bytes: Vec<u8>) -> impl Future<Output = ()> + Send;
}

pub struct Memory(MemoryStore);

impl Backend for Memory {
    type Store = MemoryStore;

    async fn start() -> Self {
        Self(MemoryStore::new())
    }

    fn store(&self) -> MemoryStore {
        self.0.clone()
    }

    async fn age(&self, by: Duration) {
        self.0.advance(by);
    }
}

pub struct Sqlite {
    store: SqliteStore,
    pool: SqlitePool,
    directory: PathBuf,
}

impl Backend for Sqlite {
    type Store = SqliteStore;

    async fn start() -> Self {
        static COUNTER: AtomicUsize = AtomicUsize::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("idempotency-cases-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let file = SqliteConnectOptions::new()
            .filename(directory.join("records.db"))
            .busy_timeout(Duration::from_secs(5))
            .create_if_missing(true);
        let pool = SqlitePoolOptions::new().connect_with(file).await.unwrap();
        let store = SqliteStore::new(pool.clone());
        store.migrate().await.unwrap();
        Self {
            store,
            pool,
            directory,
        }
    }

    fn store(&self) -> SqliteStore {
        self.store.clone()
    }

    async fn age(&self, by: Duration) {
        sqlx::query(
            "update idempotency_record set claimed_at = claimed_at - ?1,
             leased_until = leased_until - ?1, expires_at = expires_at - ?1, sweep_at = sweep_at - ?1",
        )
        .bind(by.as_secs_f64())
        .execute(&self.pool)
        .await
        .unwrap();
    }
}

impl Corruptible for Sqlite {
    async fn set_answers(&self, bytes: Vec<u8>) {
        let query = sqlx::query("update idempotency_record set answer = ?1").bind(bytes);
        query.execute(&self.pool).await.unwrap();
    }

    async fn fingerprint(&self) -> Vec<u8> {
        let query = sqlx::query_scalar("select fingerprint from idempotency_record");
        query.fetch_one(&self.pool).await.unwrap()
    }

    async fn set_fingerprint(&self, bytes: Vec<u8>) {
        let query = sqlx::query("update idempotency_record set fingerprint = ?1").bind(bytes);
        query.execute(&self.pool).await.unwrap();
    }
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        // An open connection keeps its file; what stays in the temporary directory does no harm.
        drop(std::fs::remove_dir_all(&self.directory));
    }
}

pub struct Postgres {
    store: PgStore,
    pub pool: PgPool,
    _database: TestDatabase,
}

impl Backend for Postgres {
    type Store = PgStore;

    async fn start() -> Self {
        let database = TestDatabase::create().await;
        let pool = database.pool(4).await;
        let store = PgStore::new(pool.clone());
        store.migrate().await.unwrap();
        Self {
            store,
            pool,
            _database: database,
        }
    }

    fn store(&self) -> PgStore {
        self.store.clone()
    }

    async fn age(&self, by: Duration) {
        sqlx::query(
            "update idempotency.record set claimed_at = claimed_at - by,
             leased_until = leased_until - by, expires_at = expires_at - by, sweep_at = sweep_at - by
             from make_interval(secs => $1) as t (by)",
        )
        .bind(by.as_secs_f64())
        .execute(&self.pool)
        .await
        .unwrap();
    }
}

impl Corruptible for Postgres {
    async fn set_answers(&self, bytes: Vec<u8>) {
        let query = sqlx::query("update idempotency.record set answer = $1").bind(bytes);
        query.execute(&self.pool).await.unwrap();
    }

    async fn fingerprint(&self) -> Vec<u8> {
        let query = sqlx::query_scalar("select fingerprint from idempotency.record");
        query.fetch_one(&self.pool).await.unwrap()
    }

    async fn set_fingerprint(&self, bytes: Vec<u8>) {
        let query = sqlx::query("update idempotency.record set fingerprint = $1").bind(bytes);
        query.execute(&self.pool).await.unwrap();
    }
}
