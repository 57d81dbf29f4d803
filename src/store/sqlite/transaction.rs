use std::time::{Duration, SystemTime};

use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{
    Connection as _, Error, Executor, Row as _, Sqlite, SqliteConnection, SqlitePool, Transaction,
};

use super::SqliteStore;
use super::connection::{BUSY_TIMEOUT, writing};
use crate::store::lent;
use crate::store::protocol::{Records, State};
use crate::store::sql::time;
use crate::store::transaction::{Begun, CommitError, Entry, TransactionalStore, Verdict, Writes};
use crate::store::{ClaimRequest, StoreError, Token};

/// The transaction of a transactional route on a [`SqliteStore`]; dereferences to
/// [`SqliteConnection`].
///
/// ```
/// use axum::http::StatusCode;
/// use tower_idempotency::sqlite::{Tx, TxError};
///
/// async fn charge(mut tx: Tx, amount: String) -> Result<StatusCode, TxError> {
///     sqlx::query("insert into charge (amount) values (?)")
///         .bind(amount)
///         .execute(&mut *tx)
///         .await?;
///     Ok(StatusCode::CREATED)
/// }
/// ```
pub type Tx = crate::store::Tx<Transaction<'static, Sqlite>>;

const HAS_RECORD: &str = "select 1 from idempotency_record where id = ?1";

pub(super) const ENTER: &str = "savepoint idempotency_handler";
const UNDO: &str = "rollback to savepoint idempotency_handler";

/// Fails where the handler has ended the transaction, and the savepoint with it.
pub(super) const LEAVE: &str = "release savepoint idempotency_handler";

const RECORD: &str = "
insert into idempotency_record (
    id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at, refs, answer
)
select ?1, ?2, ?3, ?4, ?5, ?6, ?7, 1, ?8, ?9, now, now, now + ?10,
    case ?6 when 'held' then 9e999 else now + ?10 end, ?11, ?12
from (select unixepoch('subsec') as now)
where true
on conflict (id) do nothing
returning expires_at";

/// One connection: handlers wait in order for the one writer there can be.
pub(super) fn own_pool(file: &SqliteConnectOptions) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(BUSY_TIMEOUT)
        .test_before_acquire(false)
        .after_release(|connection, _| {
            let is_clean = !connection.is_in_transaction();
            Box::pin(async move { Ok(is_clean) })
        })
        .connect_lazy_with(writing(file))
}

impl TransactionalStore for SqliteStore {
    type Transaction = Transaction<'static, Sqlite>;

    /// All writers of the file wait for it.
    const EXECUTION_LIMIT: Duration = BUSY_TIMEOUT;

    async fn begin(
        &self,
        request: &ClaimRequest,
        _limit: Duration,
    ) -> Result<Begun<Self::Transaction>, StoreError> {
        let mut transaction = begin(self).await?;
        let id = request.identity.id().as_bytes().to_vec();
        let query = sqlx::query(HAS_RECORD).bind(id);
        let found = query.fetch_optional(&mut *transaction).await;
        if found.map_err(lent::error)?.is_some() {
            transaction.rollback().await.map_err(lent::error)?;
            return Ok(Begun::Recorded);
        }
        (&mut *transaction)
            .execute(ENTER)
            .await
            .map_err(lent::error)?;
        Ok(Begun::Open(transaction))
    }

    async fn commit(
        &self,
        mut transaction: Self::Transaction,
        request: &ClaimRequest,
        entry: &Entry,
    ) -> Result<SystemTime, CommitError> {
        let connection = &mut *transaction;
        if entry.writes == Writes::Undo {
            connection.execute(UNDO).await.map_err(refused)?;
        }
        connection.execute(LEAVE).await.map_err(refused)?;
        let expires_at = record(connection, request, entry).await?;
        settled(transaction.commit().await).map(|()| expires_at)
    }

    /// Whether the handler has ended it is not asked: SQLite itself rolls back after some errors, such as a
    /// full disk, and what a handler that fails of them has done would be taken for committed.
    async fn rollback(
        &self,
        transaction: Self::Transaction,
        _token: Token,
    ) -> Result<(), CommitError> {
        let Err(error) = transaction.rollback().await else {
            return Ok(());
        };
        let cause: &dyn std::error::Error = &error;
        tracing::warn!(error = cause, "cannot roll back; the connection is closed");
        match refused(error) {
            CommitError::Ended => Ok(()),
            lost => Err(lost),
        }
    }

    fn lock_ends_with_writes(&self) -> bool {
        false
    }

    /// The connection of a commit that was cancelled may still be committing: it is free again when
    /// that is over.
    async fn confirm(&self, request: &ClaimRequest) -> Result<Verdict, StoreError> {
        drop(self.transactions.acquire().await.map_err(lent::error)?);
        Ok(match self.select(&request.identity).await? {
            Some(row) if row.token == request.token && row.state != State::Running => {
                Verdict::Committed(row.expires_at)
            }
            Some(_) => Verdict::Recorded,
            None => Verdict::RolledBack,
        })
    }
}

/// In a task of its own, since sqlx loses count of a transaction whose beginning is cancelled. A
/// deferred one that turns to writing would fail where another has written.
pub(super) async fn begin(store: &SqliteStore) -> Result<Transaction<'static, Sqlite>, StoreError> {
    let pool = store.transactions.clone();
    let begun = tokio::spawn(async move { pool.begin_with("begin immediate").await });
    let begun = begun.await.map_err(StoreError::unavailable)?;
    begun.map_err(lent::error)
}

/// What became of a commit. The handler has not ended the transaction, since its savepoint was still there,
/// but may have left one of its own open, which is what sqlx would commit.
pub(super) fn settled(committed: Result<(), Error>) -> Result<(), CommitError> {
    committed.map_err(|error| match refused(error) {
        CommitError::Conflict(error) => CommitError::Unknown(error),
        CommitError::Ended => {
            CommitError::Aborted(StoreError::unavailable("a savepoint was left open"))
        }
        error => error,
    })
}

async fn record(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    entry: &Entry,
) -> Result<SystemTime, CommitError> {
    let identity = &request.identity;
    let rows = sqlx::query(RECORD)
        .bind(identity.id().as_bytes().to_vec())
        .bind(identity.digest().to_vec())
        .bind(identity.scope())
        .bind(identity.operation())
        .bind(identity.key())
        .bind(if entry.held { "held" } else { "completed" })
        .bind(request.token.as_bytes().to_vec())
        .bind(request.lost.as_sql())
        .bind(request.fingerprint.to_bytes())
        .bind(request.ttl.as_secs_f64())
        .bind(entry.completion.references.to_json())
        .bind((!entry.held).then(|| entry.completion.answer.encode()))
        .fetch_all(connection)
        .await
        .map_err(refused)?;
    let row = rows.first().ok_or(CommitError::Recorded)?;
    let expires_at = row.try_get(0).map_err(refused)?;
    time(expires_at).map_err(CommitError::Aborted)
}

/// What an error says of the transaction, by SQLite's primary result code.
pub(super) fn refused(error: Error) -> CommitError {
    const ERROR: i32 = 1;
    const CONSTRAINT: i32 = 19;
    let code = error.as_database_error().and_then(|error| error.code());
    let code = code.and_then(|code| code.parse().ok());
    match code.map(|code: i32| code & 0xff) {
        Some(ERROR) => CommitError::Ended,
        Some(CONSTRAINT) => CommitError::Aborted(StoreError::unavailable(error)),
        _ => CommitError::Conflict(StoreError::unavailable(error)),
    }
}
