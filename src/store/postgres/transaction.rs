use std::borrow::Cow;
use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use sqlx::error::DatabaseError;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgDatabaseError, PgPoolOptions, PgSeverity};
use sqlx::{
    AssertSqlSafe, Connection as _, Error, Executor, PgConnection, PgPool, Postgres, Row as _,
    SqlSafeStr, Transaction,
};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;
use uuid::Uuid;

use super::handover::{Chained, Handover};
use super::types::PgUuid;
use super::{PgStore, PgStoreBuilder};
use crate::digest::Fields;
use crate::identity::Identity;
use crate::store::lent::{self, RETURN_TIMEOUT};
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

/// How many transactions a store has open at once, where nothing else is said.
pub(super) const MAX_TRANSACTIONS: u32 = 10;

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

/// Ends the transaction whatever savepoints the handler has left open, where a plain commit of sqlx
/// would only release the innermost of them. The empty one that follows is rolled back in passing, with the
/// next that begins on the connection, or when it goes back to its pool.
pub(super) const COMMIT: &str = "commit and chain";

/// Likewise: sqlx would roll back to the innermost savepoint, and the next of a shared pool would write
/// in what is left of the transaction.
const ROLLBACK: &str = "rollback and chain";

/// What `and chain` does, where nothing was ended.
const CHAIN: &str = "start transaction";

const UNDO: &str = "rollback to savepoint idempotency_handler";

/// `raise` of `idempotency.enter`.
const LOCKED: &str = "IK001";
const RECORDED: &str = "IK002";

/// Nothing is written outside of the transaction. sqlx rolls all of it back where a handler begins a
/// savepoint and gives up waiting (https://github.com/launchbadge/sqlx/issues/4385); what the handler
/// writes next would be committed alone.
const SESSION: &str = "set default_transaction_read_only = on";

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

/// Whose the connections are that transactions run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The store's.
    Own,
    /// The store's, to a pooler: each is a server's for as long as its transaction is open.
    Pooled,
    /// The application's, which may wait for them, too.
    Shared,
}

/// Opens transactions for handlers.
#[derive(Debug, Clone)]
pub(super) struct Transactions {
    pool: Arc<Mutex<PgPool>>,
    /// Pools that were replaced, and may have connections in use.
    replaced: Arc<Mutex<Vec<PgPool>>>,
    kind: Kind,
    /// How long one may take to begin.
    patience: Duration,
    handover: Handover,
    /// Whoever is left to open a connection after its caller.
    opening: Arc<Semaphore>,
}

impl Transactions {
    pub(super) fn new(pool: PgPool, kind: Kind, patience: Duration) -> Self {
        Self {
            pool: Arc::new(Mutex::new(pool)),
            replaced: Arc::default(),
            kind,
            patience,
            handover: Handover::default(),
            opening: Arc::new(Semaphore::new(1)),
        }
    }

    /// In a task of its own, since sqlx loses count of a transaction whose beginning is cancelled
    /// (https://github.com/launchbadge/sqlx/issues/4385).
    pub(super) async fn begin(
        &self,
        begin: String,
    ) -> Result<Transaction<'static, Postgres>, Error> {
        let transactions = self.clone();
        let (caller, gone) = oneshot::channel::<Infallible>();
        let begun = tokio::spawn(async move {
            let pool = transactions.pool().clone();
            let mut begun = pin!(transactions.begin_on_any(&pool, begin, gone));
            if let Ok(begun) = timeout(transactions.patience, &mut begun).await {
                return begun;
            }
            transactions.replace(&pool);
            begun.await
        });
        let begun = begun.await;
        drop(caller);
        begun.unwrap_or_else(|error| Err(Error::Io(io::Error::other(error))))
    }

    /// Whoever does not wait any more gets no connection: it would only hold up who does.
    async fn begin_on_any(
        &self,
        pool: &PgPool,
        begin: String,
        gone: oneshot::Receiver<Infallible>,
    ) -> Result<Transaction<'static, Postgres>, Error> {
        let next = async {
            match self.kind {
                Kind::Own => self.handover.next().await,
                Kind::Pooled | Kind::Shared => std::future::pending().await,
            }
        };
        let mut acquired = Box::pin(acquire(pool.clone()));
        tokio::select! {
            biased;
            Ok(chained) = next => {
                self.complete(acquired);
                self.begin_after(chained, &begin).await
            }
            connection = &mut acquired => {
                let begin = AssertSqlSafe(begin).into_sql_str();
                Transaction::begin(connection?, Some(begin)).await
            }
            _ = gone => {
                self.complete(acquired);
                Err(Error::PoolTimedOut)
            }
        }
    }

    /// A connection that is being opened is opened, and goes to its pool. Given up for each that is handed
    /// over, none would ever be, and a pool that is always in use would not recover those it has lost.
    fn complete(
        &self,
        acquired: impl Future<Output = Result<PoolConnection<Postgres>, Error>> + Send + 'static,
    ) {
        // One at a time is enough: it is the first in the queue of its pool, or soon will be.
        if let Ok(turn) = self.opening.clone().try_acquire_owned() {
            tokio::spawn(async move {
                drop(acquired.await);
                drop(turn);
            });
        }
    }

    /// Where it is refused, the server has left the transaction, and another one may have the connection.
    async fn begin_after(
        &self,
        mut chained: Chained,
        begin: &str,
    ) -> Result<Transaction<'static, Postgres>, Error> {
        let begin = AssertSqlSafe(format!("rollback; {begin}"));
        match (&mut *chained).execute(begin).await {
            Ok(_) => Ok(chained),
            Err(refused) => {
                if matches!(code(&refused).as_deref(), Some(LOCKED | RECORDED)) {
                    let transactions = self.clone();
                    tokio::spawn(async move {
                        let begun = timeout(RETURN_TIMEOUT, (&mut *chained).execute(CHAIN));
                        if matches!(begun.await, Ok(Ok(_))) {
                            transactions.end(chained);
                        }
                    });
                }
                Err(refused)
            }
        }
    }

    /// What becomes of the connection of a transaction that is over, and that `and chain` has left in
    /// another: it is given to whoever waits, or dropped, and back in its pool.
    pub(super) fn end(&self, chained: Chained) {
        let pool = self.pool().clone();
        let is_in_use = pool.num_idle() == 0 && is_full(&pool) && !pool.is_closed();
        // sqlx loses count where a handler gives up waiting for a savepoint.
        let is_counted = chained.is_in_transaction();
        if self.kind == Kind::Own && is_in_use && is_counted && !self.is_replacing() {
            self.handover.give(chained);
        }
    }

    /// Connections of an old pool end with their transactions.
    fn is_replacing(&self) -> bool {
        let replaced = self.replaced.lock();
        let mut replaced = replaced.unwrap_or_else(PoisonError::into_inner);
        replaced.retain(|pool| pool.size() > 0);
        !replaced.is_empty()
    }

    pub(super) async fn close(&self) {
        let pool = self.pool().clone();
        pool.close().await;
    }

    fn pool(&self) -> MutexGuard<'_, PgPool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that has fallen silent keeps its place in the pool until the kernel gives it up, a
    /// quarter of an hour later, and most likely it is not alone: the next transactions begin in a new
    /// pool, and those that are open end in the old one.
    fn replace(&self, silent: &PgPool) {
        if self.kind == Kind::Shared {
            return;
        }
        let mut pool = self.pool();
        // Another transaction has noticed it before, or the store is closed.
        if silent.is_closed() {
            return;
        }
        tracing::warn!("connections have fallen silent; transactions go on over new ones");
        // It is closed from here on; waiting for its connections is of no use.
        drop(silent.close());
        let server = silent.connect_options().as_ref().clone();
        *pool = silent.options().clone().connect_lazy_with(server);
        let replaced = self.replaced.lock();
        replaced
            .unwrap_or_else(PoisonError::into_inner)
            .push(silent.clone());
    }
}

fn is_full(pool: &PgPool) -> bool {
    pool.size() >= pool.options().get_max_connections()
}

/// A new connection is opened in a task of its own, and goes to its pool where the caller has got another
/// meanwhile.
async fn acquire(pool: PgPool) -> Result<PoolConnection<Postgres>, Error> {
    if pool.num_idle() > 0 || is_full(&pool) {
        return pool.acquire().await;
    }
    let opened = tokio::spawn(async move { pool.acquire().await });
    opened.await.map_err(|_panic| Error::WorkerCrashed)?
}

/// A connection that is not out of its transaction by now is of no more use, nor is a silent one.
pub(super) fn own_pool(settings: &PgStoreBuilder) -> PgPool {
    let mut server = settings.pool.connect_options().as_ref().clone();
    if settings.pgbouncer {
        server = server.statement_cache_capacity(0);
    }
    let is_own_session = !settings.pgbouncer;
    PgPoolOptions::new()
        .max_connections(settings.max_transactions)
        .acquire_timeout(settings.statement_timeout)
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                if is_own_session {
                    connection.execute(SESSION).await?;
                }
                Ok(())
            })
        })
        .after_release(|connection, _| {
            Box::pin(async move {
                if connection.is_in_transaction() {
                    return Ok(false);
                }
                // sqlx asks, too, and would wait for ever.
                let answered = timeout(RETURN_TIMEOUT, connection.ping()).await;
                answered.unwrap_or_else(|late| Err(Error::Io(late.into())))?;
                Ok(true)
            })
        })
        .connect_lazy_with(server.application_name("tower-idempotency"))
}

/// Everything before the handler, in one round trip. It begins as the implicit transaction of a
/// query of several statements, which `begin` turns into an explicit one (PostgreSQL documentation,
/// 55.2.2.1): if the operation cannot be entered, nothing is left open.
fn begin(request: &ClaimRequest, limit: Duration, pgbouncer: bool) -> String {
    let (identity, lock) = (&request.identity, lock_of(&request.identity));
    let writes = writes(pgbouncer);
    let attempt = attempt(request.token, limit);
    format!(
        "{writes};
        select idempotency.enter('{}', {lock}, {attempt});
        begin;
        savepoint idempotency_handler",
        identity.id()
    )
}

/// What a transaction that handlers write in is like, and whose it is.
pub(super) fn settings(
    identity: &Identity,
    token: Token,
    limit: Duration,
    pgbouncer: bool,
) -> String {
    let (id, writes) = (identity.id(), writes(pgbouncer));
    let attempt = attempt(token, limit);
    format!("{writes}; select idempotency.mark('{id}', {attempt})")
}

fn writes(pgbouncer: bool) -> String {
    let forget = if pgbouncer { FORGET_STATEMENTS } else { "" };
    format!("set transaction isolation level read committed, read write; {forget}")
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
        let begin = begin(request, limit, self.pooled_begin.is_some());
        match self.transactions.begin(begin).await {
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
        if entry.writes == Writes::Undo {
            connection.execute(UNDO).await.map_err(refused)?;
        }
        let expires_at = record(connection, request, entry).await?;
        match connection.execute(COMMIT).await {
            Ok(_) => {
                self.transactions.end(transaction);
                Ok(expires_at)
            }
            Err(error) if is_certain(&error) => Err(refused(error)),
            Err(error) => Err(CommitError::Unknown(StoreError::unavailable(error))),
        }
    }

    async fn rollback(&self, mut transaction: Self::Transaction) {
        match (&mut *transaction).execute(ROLLBACK).await {
            Ok(_) => self.transactions.end(transaction),
            Err(error) => {
                let cause: &dyn std::error::Error = &error;
                tracing::warn!(error = cause, "cannot roll back; the server will");
            }
        }
    }

    /// A row under the same id waits for the old transaction to end, and is never committed: that
    /// would be a record without an effect.
    async fn confirm(&self, request: &ClaimRequest) -> Result<Verdict, StoreError> {
        if self.probe(request).await? {
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

impl PgStore {
    /// Whether the identity has no record, committed or about to be.
    async fn probe(&self, request: &ClaimRequest) -> Result<bool, StoreError> {
        let probe = ClaimRequest {
            token: Token::random()?,
            ..request.clone()
        };
        let mut connection = self.connection().await?;
        let result = async {
            let mut transaction = self.begin(&mut connection).await?;
            let query = super::claim::insert(&probe).persistent(false);
            let inserted = query.fetch_optional(&mut *transaction).await?;
            transaction.rollback().await?;
            Ok(inserted.is_some())
        };
        let result = result.await;
        connection.finish(result)
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
        Ok(Some(true)) => CommitError::Recorded,
        Ok(_) | Err(_) => CommitError::Ended,
    })
}

/// A transaction of nobody's has no mark, and the mark of an ended one reads as empty. Not prepared:
/// outside of a transaction, a pooler may look for the statement on another connection.
async fn has_mark(connection: &mut PgConnection, mark: &str) -> Result<Option<bool>, Error> {
    let sql = format!("select current_setting('idempotency.attempt', true) = '{mark}'");
    let row = connection.fetch_one(AssertSqlSafe(sql)).await?;
    row.try_get(0)
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

fn code(error: &Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(DatabaseError::code)
}
