use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use sqlx::error::DatabaseError;
use sqlx::postgres::types::PgInterval;
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use sqlx::{Error, PgConnection, Postgres, Transaction};

use super::PgStore;
use super::entrance::{Entrance, LOCKED, RECORDED, mark};
use super::types::PgUuid;
use crate::store::lent;
use crate::store::protocol::{Records, State};
use crate::store::sql::time;
use crate::store::transaction::{Begun, CommitError, Entry, TransactionalStore, Verdict, Writes};
use crate::store::tx_error::is_conflict;
use crate::store::{ClaimRequest, StoreError, Token};

/// The transaction of a transactional route on a [`PgStore`]; dereferences to
/// [`PgConnection`](sqlx::PgConnection).
///
/// ```
/// use axum::http::StatusCode;
/// use tower_idempotency::postgres::{Tx, TxError};
///
/// async fn charge(mut tx: Tx, amount: String) -> Result<StatusCode, TxError> {
///     sqlx::query("insert into charge (amount) values ($1)")
///         .bind(amount)
///         .execute(&mut *tx)
///         .await?;
///     Ok(StatusCode::CREATED)
/// }
/// ```
pub type Tx = crate::store::Tx<Transaction<'static, Postgres>>;

/// The record comes last, and only into the transaction that carries the attempt's mark: where the
/// handler has ended it, the mark is gone.
const RECORD: &str = "
insert into idempotency.record (
    id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at, refs, answer
)
select $1, $2, $3, $4, $5, $7, $6, 1, $8, $9, now, now, now + $10,
    case $7 when 'held' then 'infinity' else now + $10 end, $11, $12
from (select clock_timestamp() as now) as attempt
where current_setting('idempotency.attempt', true) = $13
returning date_part('epoch', expires_at), set_config('idempotency.committed', '', false)";

impl TransactionalStore for PgStore {
    type Transaction = Transaction<'static, Postgres>;

    const EXECUTION_LIMIT: Duration = Duration::from_secs(60);

    async fn begin(
        &self,
        request: &ClaimRequest,
        limit: Duration,
    ) -> Result<Begun<Self::Transaction>, StoreError> {
        let entrance = Entrance::operation(request, limit);
        match self.transactions.begin(entrance).await {
            Ok(transaction) => Ok(Begun::Open(transaction)),
            Err(error) => match code(&error).as_deref() {
                Some(LOCKED) => Ok(Begun::Locked),
                Some(RECORDED) => Ok(Begun::Recorded),
                _ => Err(lent::error(error)),
            },
        }
    }

    async fn commit(
        &self,
        mut transaction: Self::Transaction,
        request: &ClaimRequest,
        entry: &Entry,
    ) -> Result<SystemTime, CommitError> {
        let recorded = async {
            if entry.writes == Writes::Undo {
                let entrance = Entrance::operation(request, Self::EXECUTION_LIMIT);
                self.transactions.undo(&mut transaction, &entrance).await?;
            }
            record(&mut transaction, request, entry).await
        };
        match recorded.await {
            Ok(expires_at) => {
                self.transactions.commit(transaction).await?;
                Ok(expires_at)
            }
            Err(error) => {
                let transactions = &self.transactions;
                let refused = transactions.refused(&mut transaction, request.token, error);
                Err(refused.await)
            }
        }
    }

    async fn rollback(
        &self,
        transaction: Self::Transaction,
        token: Token,
    ) -> Result<(), CommitError> {
        self.transactions.roll_back(transaction, token).await
    }

    fn lock_ends_with_writes(&self) -> bool {
        self.transactions.lock_ends_with_writes()
    }

    async fn confirm(&self, request: &ClaimRequest) -> Result<Verdict, StoreError> {
        if self.probe(&request.identity).await? {
            return Ok(Verdict::RolledBack);
        }
        match self.select(&request.identity).await? {
            Some(row) if row.token == request.token && row.state != State::Running => {
                Ok(Verdict::Committed(row.expires_at))
            }
            Some(_) => Ok(Verdict::Recorded),
            None => Err(StoreError::unavailable("the record vanished")),
        }
    }
}

async fn record(
    connection: &mut PgConnection,
    request: &ClaimRequest,
    entry: &Entry,
) -> Result<SystemTime, CommitError> {
    let (identity, mark) = (&request.identity, mark(request.token));
    let expires_at: Option<f64> = sqlx::query_scalar(RECORD)
        .bind(PgUuid::from(identity.id()))
        .bind(identity.digest().as_slice())
        .bind(identity.scope())
        .bind(identity.operation())
        .bind(identity.key())
        .bind(PgUuid::from(request.token))
        .bind(if entry.held { "held" } else { "completed" })
        .bind(request.lost.as_sql())
        .bind(request.fingerprint.to_bytes())
        .bind(interval(request.ttl))
        .bind(entry.completion.references.to_json())
        .bind((!entry.held).then(|| entry.completion.answer.encode()))
        .bind(&mark)
        .fetch_optional(connection)
        .await
        .map_err(|error| match is_recorded(&error) {
            true => CommitError::Recorded,
            false => refused(error),
        })?;
    let expires_at = expires_at.ok_or(CommitError::Ended)?;
    time(expires_at).map_err(CommitError::Aborted)
}

/// Or it is the error of a statement that the handler gave up.
fn is_recorded(error: &Error) -> bool {
    let constraint = error
        .as_database_error()
        .and_then(DatabaseError::constraint);
    code(error).as_deref() == Some("23505") && constraint == Some("record_pkey")
}

fn interval(ttl: Duration) -> PgInterval {
    PgInterval {
        months: 0,
        days: 0,
        microseconds: i64::try_from(ttl.as_micros()).unwrap_or(i64::MAX),
    }
}

/// What an error before the commit, or of a commit that was refused, says of the transaction.
pub(super) fn refused(error: Error) -> CommitError {
    match code(&error).as_deref() {
        // No savepoint of ours, no transaction to have one, or one that is not ours and may not write.
        Some("3B001" | "25P01" | "25006") => CommitError::Ended,
        _ if is_certain(&error) && !is_conflict(&error) => {
            CommitError::Aborted(StoreError::unavailable(error))
        }
        _ => CommitError::Conflict(StoreError::unavailable(error)),
    }
}

/// A server that reports an `ERROR` has not committed: once the commit is written, only `FATAL` and
/// `PANIC` are left to it, a cancelled statement, whose log line may be cancelled after the commit, and one
/// whose memory does not suffice for the transaction that is chained to it.
pub(super) fn is_certain(error: &Error) -> bool {
    is_refused(error) && !matches!(code(error).as_deref(), Some("57014" | "53200"))
}

/// The server answers, and the session goes on.
pub(super) fn is_refused(error: &Error) -> bool {
    let error = error.as_database_error();
    let error = error.and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| error.severity() == PgSeverity::Error)
}

pub(super) fn code(error: &Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(DatabaseError::code)
}
