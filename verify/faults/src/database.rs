//! A database for one test, of either kind, and what stands in its records.

use std::path::PathBuf;
use std::time::Duration;

use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::SqlitePoolOptions;
use tower_idempotency::store::{HeldRecord, Resolution};
use tower_idempotency::{PgStore, SqliteStore, Store as _, StoreError};

use crate::ledger::{Entry, Ledger, sqlite_options};
use crate::random::fresh_key;
use crate::settings::Settings;
use crate::wait::until;

#[path = "../../../tests/common/database.rs"]
mod postgres;

/// A fresh database, removed with the value.
#[derive(Debug)]
pub struct Database {
    /// `postgres://..` or `sqlite:PATH`.
    pub url: String,
    /// What the handlers did.
    pub ledger: Ledger,
    // Declared last: removed after everything that uses it.
    _place: Place,
}

#[derive(Debug)]
enum Place {
    Postgres { _database: postgres::TestDatabase },
    Sqlite(PathBuf),
    Foreign,
}

impl Database {
    /// On the server of `DATABASE_URL`.
    ///
    /// # Panics
    ///
    /// Without such a server.
    pub async fn postgres() -> Self {
        let database = postgres::TestDatabase::create().await;
        let url = database.url.clone();
        Self::at(
            url,
            Place::Postgres {
                _database: database,
            },
        )
        .await
    }

    /// In a temporary directory.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub async fn sqlite() -> Self {
        let directory = std::env::temp_dir().join(format!("faults-{}", fresh_key()));
        std::fs::create_dir(&directory).expect("the temporary directory is writable");
        let url = format!("sqlite:{}", directory.join("subject.db").display());
        Self::at(url, Place::Sqlite(directory)).await
    }

    /// One that somebody else takes care of.
    ///
    /// # Panics
    ///
    /// When it cannot be reached.
    pub async fn foreign(url: &str) -> Self {
        Self::at(url.to_owned(), Place::Foreign).await
    }

    async fn at(url: String, place: Place) -> Self {
        let ledger = Ledger::open(&url).await.expect("it can be reached");
        ledger.create().await.expect("it can be written");
        Self {
            url,
            ledger,
            _place: place,
        }
    }

    /// Settings of a subject on this database.
    #[must_use]
    pub fn settings(&self, risk: &str) -> Settings {
        Settings::new(&self.url, risk)
    }

    /// The runs of one key of the usual tenant.
    ///
    /// # Panics
    ///
    /// When the database cannot be asked.
    pub async fn runs(&self, key: &str) -> Vec<Entry> {
        let entries = self.ledger.entries("acme", key).await;
        entries.expect("the ledger can be read")
    }

    /// Waits until this many runs of a key have begun.
    pub async fn has_begun(&self, key: &str, runs: usize) -> Vec<Entry> {
        until("the handler to begin", async || {
            let entries = self.runs(key).await;
            (entries.len() >= runs).then_some(entries)
        })
        .await
    }

    /// The state of a key's record, or `None` where there is none.
    ///
    /// # Panics
    ///
    /// When the database cannot be asked.
    pub async fn state(&self, key: &str) -> Option<String> {
        const POSTGRES: &str = "select state from idempotency.record where key = $1";
        const SQLITE: &str = "select state from idempotency_record where key = $1";
        let state = match &self.ledger {
            Ledger::Postgres(pool) => {
                let query = sqlx::query_scalar(POSTGRES).bind(key);
                query.fetch_optional(pool).await
            }
            Ledger::Sqlite(pool) => {
                let query = sqlx::query_scalar(SQLITE).bind(key);
                query.fetch_optional(pool).await
            }
        };
        state.expect("the record can be read")
    }

    /// Waits until the record of a key is in a state.
    pub async fn has_state(&self, key: &str, state: &str) {
        until(&format!("a record that is {state}"), async || {
            (self.state(key).await.as_deref() == Some(state)).then_some(())
        })
        .await;
    }

    /// How many effects a key has, which are none where it has no answer on record. On a transactional
    /// route the two are written in one transaction, whose id they carry.
    ///
    /// # Panics
    ///
    /// When they are not.
    pub async fn effects(&self, key: &str) -> usize {
        // In one statement: a process that was killed may leave a commit under way.
        const POSTGRES: &str = "
            select (select count(*) from ledger where key = $1),
                exists (select from idempotency.record where key = $1)";
        const SQLITE: &str = "
            select (select count(*) from ledger where key = $1),
                exists (select 1 from idempotency_record where key = $1)";
        let counted = match &self.ledger {
            Ledger::Postgres(pool) => {
                let query = sqlx::query_as(POSTGRES).bind(key);
                query.fetch_one(pool).await
            }
            Ledger::Sqlite(pool) => sqlx::query_as(SQLITE).bind(key).fetch_one(pool).await,
        };
        let (effects, recorded): (i64, bool) = counted.expect("both can be read");
        assert_eq!(
            effects > 0,
            recorded,
            "{effects} effects, on record: {recorded}"
        );
        assert_eq!(self.unpaired().await, 0, "effects without their record");
        usize::try_from(effects).expect("a count")
    }

    /// Effects and records that are not of one transaction, of all keys.
    ///
    /// # Panics
    ///
    /// When the database cannot be asked.
    pub async fn unpaired(&self) -> i64 {
        const POSTGRES: &str = "
            select count(*) from (select scope, key, xid, xmin as id from ledger) as effect
            full join (select scope, key, xmin as id from idempotency.record) as record
                on record.scope = effect.scope and record.key = effect.key
            where effect.id is distinct from record.id
                or pg_xact_status(effect.xid::xid8) is distinct from 'committed'";
        // Sorted, where a full join would compare each with each.
        const SQLITE: &str = "
            with effect as (select scope, key from ledger),
                record as (select scope, key from idempotency_record)
            select (select count(*) from (select * from effect except select * from record))
                + (select count(*) from (select * from record except select * from effect))";
        let unpaired = match &self.ledger {
            Ledger::Postgres(pool) => sqlx::query_scalar(POSTGRES).fetch_one(pool).await,
            Ledger::Sqlite(pool) => sqlx::query_scalar(SQLITE).fetch_one(pool).await,
        };
        unpaired.expect("effects and records can be compared")
    }

    /// How many transactions are open and wait for their client, on PostgreSQL.
    ///
    /// # Panics
    ///
    /// When the database cannot be asked.
    pub async fn open_transactions(&self) -> i64 {
        const OPEN: &str = "
            select count(*) from pg_stat_activity
            where datname = current_database() and state like 'idle in transaction%'";
        match &self.ledger {
            Ledger::Postgres(pool) => {
                let open = sqlx::query_scalar(OPEN).fetch_one(pool).await;
                open.expect("the server can be asked")
            }
            Ledger::Sqlite(_) => 0,
        }
    }

    /// Waits until no transaction is open any more.
    pub async fn is_clean(&self) {
        until("all transactions to be over", async || {
            (self.open_transactions().await == 0).then_some(())
        })
        .await;
    }

    /// All held records, as an operator sees them.
    ///
    /// # Panics
    ///
    /// When the store cannot be asked.
    pub async fn held(&self) -> Vec<HeldRecord> {
        let listed = match self.url.strip_prefix("sqlite:") {
            Some(path) => sqlite_store(path).list_held(None, 1000).await,
            None => postgres_store(&self.url).list_held(None, 1000).await,
        };
        listed.expect("held records can be listed")
    }

    /// Resolves a held record, as an operator does.
    ///
    /// # Errors
    ///
    /// The store's.
    pub async fn resolve(
        &self,
        held: &HeldRecord,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let (identity, token) = (&held.identity, held.token);
        match self.url.strip_prefix("sqlite:") {
            Some(path) => {
                let store = sqlite_store(path);
                store.resolve(identity, token, resolution).await
            }
            None => {
                let store = postgres_store(&self.url);
                store.resolve(identity, token, resolution).await
            }
        }
    }
}

pub(crate) fn sqlite_store(path: &str) -> SqliteStore {
    SqliteStore::new(SqlitePoolOptions::new().connect_lazy_with(sqlite_options(path)))
}

pub(crate) fn postgres_store(url: &str) -> PgStore {
    let pool = PgPoolOptions::new().acquire_timeout(Duration::from_secs(10));
    PgStore::new(pool.connect_lazy(url).expect("the URL is one"))
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::Sqlite(directory) = self {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}
