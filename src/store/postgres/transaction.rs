use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use sqlx::error::DatabaseError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use sqlx::{AssertSqlSafe, Error, Executor, PgConnection, Postgres, Row as _, Transaction};
use uuid::Uuid;

use super::PgStore;
use super::types::PgUuid;
use crate::digest::Fields;
use crate::identity::Identity;
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
select $1, $2, $3, $4, $5, $7, $6, 1, $8, $9, now, now, now + make_interval(secs => $10),
    case $7 when 'held' then 'infinity' else now + make_interval(secs => $10) end, $11, $12
from (select clock_timestamp() as now) as attempt
where current_setting('idempotency.attempt', true) = $13
on conflict (id) do nothing
returning extract(epoch from expires_at)::float8 as expires_at";

pub(super) const UNDO: &str = "rollback to savepoint idempotency_handler";

/// `raise` of `idempotency.enter`.
pub(super) const LOCKED: &str = "IK001";
pub(super) const RECORDED: &str = "IK002";

/// sqlx names the statements of a handler `sqlx_s_1` and so on, on each connection anew, also where it
/// keeps none of them: behind a pooler another connection has left the same names in the session. A
/// pooler that knows prepared statements gives them names of its own.
const FORGET_STATEMENTS: &str = r"
do $$
declare
    statement text;
begin
    for statement in select name from pg_catalog.pg_prepared_statements where name like 'sqlx\_s\_%' loop
        execute pg_catalog.format('deallocate %I', statement);
    end loop;
end
$$;";

impl PgStore {
    /// Everything before the handler, in one round trip. It begins as the implicit transaction of a
    /// query of several statements, which `begin` turns into an explicit one (PostgreSQL documentation,
    /// 55.2.2.1): if the operation cannot be entered, nothing is left open.
    fn enter(&self, request: &ClaimRequest, limit: Duration) -> String {
        let (identity, lock) = (&request.identity, lock_of(&request.identity));
        let (id, attempt) = (identity.id(), attempt(request.token, limit));
        let step = format!("idempotency.enter('{id}', {lock}, {attempt})");
        self.begin_with(&step, request.token)
    }

    /// The same for a phase.
    pub(super) fn begin_for(&self, identity: &Identity, token: Token, limit: Duration) -> String {
        let (id, attempt) = (identity.id(), attempt(token, limit));
        self.begin_with(&format!("idempotency.mark('{id}', {attempt})"), token)
    }

    fn begin_with(&self, step: &str, token: Token) -> String {
        let forget = match self.pooled_begin {
            Some(_) => FORGET_STATEMENTS,
            None => "",
        };
        let keep_mark = self.transactions.keep_mark(token);
        format!(
            "set transaction isolation level read committed, read write; {forget};
            select {step}, {keep_mark};
            begin;
            savepoint idempotency_handler"
        )
    }
}

/// The last arguments of `idempotency.enter` and `idempotency.mark`.
fn attempt(token: Token, limit: Duration) -> String {
    let (mark, limit) = (mark(token), limit.as_millis().clamp(1, i32::MAX as u128));
    format!("'{mark}', {limit}")
}

/// What tells the transaction of an attempt from others. Not its token: it is in the text of a statement,
/// which is logged where it is slow.
pub(super) fn mark(token: Token) -> String {
    let digest = Fields::new("mark").push(token.as_bytes()).finish();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    Uuid::from_bytes(bytes).to_string()
}

/// Not of the id, which is partly the client's to choose.
fn lock_of(identity: &Identity) -> i64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&identity.digest()[16..24]);
    i64::from_be_bytes(bytes)
}

impl TransactionalStore for PgStore {
    type Transaction = Transaction<'static, Postgres>;

    const EXECUTION_LIMIT: Duration = Duration::from_secs(60);

    async fn begin(
        &self,
        request: &ClaimRequest,
        limit: Duration,
    ) -> Result<Begun<Self::Transaction>, StoreError> {
        match self.transactions.begin(self.enter(request, limit)).await {
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
        let connection = &mut *transaction;
        let recorded = async {
            if entry.writes == Writes::Undo {
                connection.execute(UNDO).await.map_err(refused)?;
            }
            record(connection, request, entry).await
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
        .bind(request.ttl.as_secs_f64())
        .bind(entry.completion.references.to_json())
        .bind((!entry.held).then(|| entry.completion.answer.encode()))
        .bind(&mark)
        .fetch_optional(&mut *connection)
        .await
        .map_err(refused)?;
    if let Some(expires_at) = expires_at {
        return time(expires_at).map_err(CommitError::Aborted);
    }
    // Nothing was recorded. Unless the mark is still there, the handler may have committed.
    Err(match has_mark(connection, &mark).await {
        Ok(true) => CommitError::Recorded,
        Ok(false) | Err(_) => CommitError::Ended,
    })
}

/// A transaction of nobody's has no mark, and the mark of an ended one reads as empty. Not prepared:
/// outside of a transaction, a pooler may look for the statement on another connection.
pub(super) async fn has_mark(connection: &mut PgConnection, mark: &str) -> Result<bool, Error> {
    let sql = format!("select current_setting('idempotency.attempt', true) = '{mark}'");
    let row = connection.fetch_one(AssertSqlSafe(sql)).await?;
    Ok(row.try_get::<Option<bool>, _>(0)?.unwrap_or(false))
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
    let error = error.as_database_error();
    let error = error.and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| {
        error.severity() == PgSeverity::Error && !matches!(error.code(), "57014" | "53200")
    })
}

pub(super) fn code(error: &Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(DatabaseError::code)
}
