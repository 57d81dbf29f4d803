//! SQLite, the embedded store: one file, one host, nothing to install.
//!
//! The table is `idempotency_record`, made by [`SqliteStore::migrate`]. Several processes of one
//! host may share the file. Decisions are made by the host's clock: when it is set back, leases and
//! retention last longer by as much.

mod connection;
mod find;
mod phases;
mod records;
mod settle;
mod transaction;

use sqlx::SqlSafeStr;
use sqlx::SqlitePool;
use sqlx::migrate::{Migration, MigrationType, Migrator};

use super::protocol;
use super::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, RecordSummary,
    Renewed, Resolution, Store, StoreError, Swept, Token, Within,
};
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::{Identity, RecordId};

pub use super::phases::{PhaseError, SavedError};
pub use super::schema_error::SchemaError;
pub use super::tx_error::TxError;
pub use phases::Phases;
pub use transaction::Tx;

/// Records in one SQLite file.
///
/// The store opens one connection of its own to the file of the pool it is given, and a second one
/// where routes are transactional; every statement goes through it, with `synchronous = full` and a write-ahead log, so that a recorded answer
/// survives the end of the process and of the machine.
///
/// Cheap to clone; clones share the connection.
///
/// ```
/// use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
/// use tower_idempotency::{IdempotencyLayer, Policy, Scope, SqliteStore};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory)?;
/// # let path = directory.join("shop.db");
/// let file = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
/// let store = SqliteStore::new(SqlitePoolOptions::new().connect_with(file).await?);
/// store.migrate().await?;
/// let layer = IdempotencyLayer::new(store, Scope::header("x-tenant-id")?)
///     .with_policy(Policy::critical())?;
/// # std::fs::remove_dir_all(&directory)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct SqliteStore {
    pool: SqlitePool,
    /// Where transactions of handlers run, one at a time.
    transactions: SqlitePool,
    durable: bool,
}

impl SqliteStore {
    /// A store in the file of `pool`. Opens it when first used.
    ///
    /// A database in memory works, and is not durable.
    #[must_use]
    pub fn new(pool: SqlitePool) -> Self {
        let file = pool.connect_options();
        Self {
            durable: connection::is_file(&file),
            pool: connection::own_pool(&file),
            transactions: transaction::own_pool(&file),
        }
    }

    /// Closes the store's own connection, once the statement under way has ended. Every later call is
    /// [`Unavailable`](crate::StoreErrorKind::Unavailable).
    pub async fn close(&self) {
        self.pool.close().await;
        self.transactions.close().await;
    }

    /// Creates or upgrades the table, all of it or nothing. Safe to run on every start, and from
    /// several processes at once.
    ///
    /// The files in `migrations/sqlite` are the same ones, for those who run migrations with the
    /// `sqlx` command line; this method then finds everything in place.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or written, or was migrated by a newer version.
    pub async fn migrate(&self) -> Result<(), SchemaError> {
        let mut connection = self.acquire().await?;
        let migrated = connection::migrate(&mut connection, migrator).await;
        if migrated.is_ok() {
            connection.keep();
        }
        migrated.map_err(SchemaError)
    }
}

/// SQLite cannot add a column unless it is there, as it is where the files were applied by hand.
fn migrator(has_progress: bool) -> Migrator {
    let record = Migration::new(
        1,
        "record".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/sqlite/0001_record.sql").into_sql_str(),
        false,
    );
    let reference = Migration::new(
        2,
        "reference".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/sqlite/0002_reference.sql").into_sql_str(),
        false,
    );
    let mut progress = Migration::new(
        3,
        "progress".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/sqlite/0003_progress.sql").into_sql_str(),
        false,
    );
    if has_progress {
        progress.sql = "select 1".into_sql_str();
    }
    let mut migrator = Migrator::with_migrations(vec![record, reference, progress]);
    migrator.dangerous_set_table_name("_idempotency_migrations");
    migrator
}

impl Store for SqliteStore {
    fn is_durable(&self) -> bool {
        self.durable
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        protocol::claim(self, request).await
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        protocol::complete(self, claim, completion).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        protocol::release(self, claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        protocol::hold(self, claim, references).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        self.extend_leases(leases).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        protocol::lookup(self, identity, fingerprint).await
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.resolve_held(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        self.select_held(after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        let found = self.select_summary(identity).await?;
        protocol::inspected(found, identity)
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        self.select_by_reference(within, kind, id, after, limit)
            .await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.sweep(limit).await
    }
}
