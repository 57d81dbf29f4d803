//! What stands in a record, by the clock of its database, and what sweeps it away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};
use tower_idempotency::store::Swept;
use tower_idempotency::{Store, Sweeper};

use crate::database::{Database, postgres_store, sqlite_store};
use crate::fired::fired;
use crate::ledger::Ledger;
use crate::wait::until;

/// One record. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// `running`, `completed` or `held`.
    pub state: String,
    /// Which attempt holds it.
    pub attempt: i32,
    /// The secret of that attempt.
    pub token: String,
    /// When it was claimed.
    pub claimed_at: f64,
    /// When its lease ends.
    pub leased_until: f64,
    /// When its retention ends.
    pub expires_at: f64,
}

type Row = (String, i32, String, f64, f64, f64);

impl Database {
    /// The record of a key.
    ///
    /// # Panics
    ///
    /// When the database cannot be asked.
    pub async fn record(&self, key: &str) -> Option<Record> {
        const POSTGRES: &str = "
            select state, attempt, token::text as token,
                extract(epoch from claimed_at)::float8 as claimed_at,
                extract(epoch from leased_until)::float8 as leased_until,
                extract(epoch from expires_at)::float8 as expires_at
            from idempotency.record where key = $1";
        const SQLITE: &str = "
            select state, attempt, hex(token) as token, claimed_at, leased_until, expires_at
            from idempotency_record where key = $1";
        let row: Result<Option<Row>, _> = match &self.ledger {
            Ledger::Postgres(pool) => {
                let query = sqlx::query_as(POSTGRES).bind(key);
                query.fetch_optional(pool).await
            }
            Ledger::Sqlite(pool) => {
                let query = sqlx::query_as(SQLITE).bind(key);
                query.fetch_optional(pool).await
            }
        };
        let row = row.expect("the record can be read");
        let (state, attempt, token, claimed_at, leased_until, expires_at) = row?;
        Some(Record {
            state,
            attempt,
            token,
            claimed_at,
            leased_until,
            expires_at,
        })
    }

    /// What the database says that it is, in seconds since 1970.
    ///
    /// # Panics
    ///
    /// When it cannot be asked.
    pub async fn clock(&self) -> f64 {
        const POSTGRES: &str = "select extract(epoch from clock_timestamp())::float8";
        const SQLITE: &str = "select unixepoch('subsec') * 1.0";
        let now = match &self.ledger {
            Ledger::Postgres(pool) => sqlx::query_scalar(POSTGRES).fetch_one(pool).await,
            Ledger::Sqlite(pool) => sqlx::query_scalar(SQLITE).fetch_one(pool).await,
        };
        now.expect("the database can be asked")
    }

    /// Waits until a record's retention is over.
    pub async fn has_expired(&self, key: &str) {
        let ends = self.record(key).await.map_or(0.0, |r| r.expires_at);
        until("the retention to be over", async || {
            (self.clock().await >= ends).then_some(())
        })
        .await;
        fired("expiry");
    }

    /// What one batch of the sweeper does.
    ///
    /// # Panics
    ///
    /// When it cannot.
    pub async fn sweep(&self, batch: u32) -> Swept {
        let swept = match self.url.strip_prefix("sqlite:") {
            Some(path) => sqlite_store(path).delete_expired(batch).await,
            None => postgres_store(&self.url).delete_expired(batch).await,
        };
        let swept = swept.expect("it can be swept");
        if swept.deleted > 0 {
            fired("sweep");
        }
        swept
    }

    /// A `Sweeper` at work, until nothing is left.
    #[must_use]
    pub fn sweeper(&self, batch: u32) -> JoinHandle<Swept> {
        match self.url.strip_prefix("sqlite:") {
            Some(path) => tokio::spawn(sweep(sqlite_store(path), batch)),
            None => tokio::spawn(sweep(postgres_store(&self.url), batch)),
        }
    }

    /// Sweeps as fast as it can, with so many sweepers, each with a store of its own.
    #[must_use]
    pub fn sweepers(&self, count: usize, batch: u32) -> Sweepers {
        let sweepers = Sweepers::default();
        (0..count).fold(sweepers, |sweepers, _| {
            match self.url.strip_prefix("sqlite:") {
                Some(path) => sweepers.with(sqlite_store(path), batch),
                None => sweepers.with(postgres_store(&self.url), batch),
            }
        })
    }
}

async fn sweep<S: Store>(store: S, batch: u32) -> Swept {
    let sweeper = Sweeper::new(store).with_batch(batch).expect("a batch");
    let swept = sweeper.sweep().await.expect("it can be swept");
    fired("sweep");
    swept
}

/// Sweepers at work, until dropped.
#[derive(Debug, Default)]
pub struct Sweepers {
    tasks: JoinSet<()>,
    rounds: Arc<AtomicU64>,
    deleted: Arc<AtomicU64>,
    held: Arc<AtomicU64>,
    largest: Arc<AtomicU64>,
}

impl Sweepers {
    fn with<S: Store>(mut self, store: S, batch: u32) -> Self {
        let (rounds, deleted) = (self.rounds.clone(), self.deleted.clone());
        let (held, largest) = (self.held.clone(), self.largest.clone());
        self.tasks.spawn(async move {
            loop {
                // One that has to wait for others for too long tries again, as a `Sweeper` does.
                if let Ok(swept) = store.delete_expired(batch).await {
                    rounds.fetch_add(1, Ordering::SeqCst);
                    deleted.fetch_add(swept.deleted, Ordering::SeqCst);
                    held.fetch_add(swept.held, Ordering::SeqCst);
                    largest.fetch_max(swept.deleted, Ordering::SeqCst);
                    if swept != Swept::default() {
                        fired("sweep");
                    }
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        self
    }

    /// Batches so far, empty ones too.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::SeqCst)
    }

    /// Records deleted so far.
    #[must_use]
    pub fn deleted(&self) -> u64 {
        self.deleted.load(Ordering::SeqCst)
    }

    /// Records that they held so far.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.load(Ordering::SeqCst)
    }

    /// The most records that one batch deleted.
    #[must_use]
    pub fn largest(&self) -> u64 {
        self.largest.load(Ordering::SeqCst)
    }
}
