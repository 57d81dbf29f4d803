use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{
    ConnectOptions as _, Connection as _, Error, Executor, Sqlite, SqliteConnection, SqlitePool,
    query::Query,
};

use super::SqliteStore;
use crate::store::StoreError;
use crate::store::lent::Lent;

/// How long a statement waits for another process's transaction, and a caller for the connection.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// One connection: SQLite has one writer at a time, and waiting in order beats polling a lock.
pub(super) fn own_pool(file: &SqliteConnectOptions) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(BUSY_TIMEOUT)
        .test_before_acquire(false)
        .connect_lazy_with(writing(file))
}

/// What the guarantee asks of a connection.
pub(super) fn writing(file: &SqliteConnectOptions) -> SqliteConnectOptions {
    file.clone()
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT)
}

/// sqlx names a database in memory `file:sqlx-in-memory-N`.
pub(super) fn is_file(options: &SqliteConnectOptions) -> bool {
    let name = options.get_filename().to_string_lossy();
    // `sqlite://orders?mode=memory`, or `in_memory(true)`: sqlx shows it nowhere else, and panics on
    // names that make no URL.
    let url = options.clone().filename("/").to_url_lossy();
    let in_memory = url
        .query_pairs()
        .any(|(key, mode)| key == "mode" && mode == "memory");
    // An empty name is a temporary file, deleted when it is closed.
    !in_memory && !name.is_empty() && !name.contains("sqlx-in-memory") && !name.contains(":memory:")
}

const HAS_PROGRESS: &str =
    "select 1 from pragma_table_info('idempotency_record') where name = 'progress'";

/// `begin immediate`: a deferred transaction that turns to writing fails where another has written.
pub(super) async fn migrate(
    connection: &mut SqliteConnection,
    migrator: fn(bool) -> Migrator,
) -> Result<(), MigrateError> {
    let mut transaction = connection.begin_with("begin immediate").await?;
    let progress = sqlx::query(HAS_PROGRESS).fetch_optional(&mut *transaction);
    let migrator = migrator(progress.await?.is_some());
    migrator.run_direct(None, &mut *transaction, false).await?;
    transaction.commit().await?;
    Ok(())
}

impl SqliteStore {
    pub(super) async fn acquire(&self) -> Result<Lent<Sqlite>, Error> {
        self.pool.acquire().await.map(Lent::new)
    }

    pub(super) async fn connection(&self) -> Result<Lent<Sqlite>, StoreError> {
        self.acquire().await.map_err(crate::store::lent::error)
    }

    /// How many rows the statement changed.
    pub(super) async fn execute(
        &self,
        query: Query<'_, Sqlite, SqliteArguments>,
    ) -> Result<u64, StoreError> {
        let mut connection = self.connection().await?;
        let result = (&mut *connection).execute(query).await;
        Ok(connection.finish(result)?.rows_affected())
    }
}
