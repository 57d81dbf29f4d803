//! The connections that handlers' transactions run on, and how a transaction begins and ends on one.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgPoolOptions;
use sqlx::{
    AssertSqlSafe, Connection as _, Error, Executor, PgConnection, PgPool, Postgres, SqlSafeStr,
    Transaction,
};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::PgStoreBuilder;
use super::connection::wait_for_crowd;
use super::entrance::{Entrance, LOCKED, RECORDED, mark};
use super::handover::{Chained, Handover};
use super::standing::{answers, has_committed, is_over};
use super::transaction::{code, is_certain, is_refused, refused};
use crate::store::lent::RETURN_TIMEOUT;
use crate::store::transaction::CommitError;
use crate::store::{StoreError, Token};

/// How many transactions a store has open at once, where nothing else is said.
pub(super) const MAX_TRANSACTIONS: u32 = 10;

/// Ends the transaction whatever savepoints the handler has left open, where a plain commit of sqlx
/// would only release the innermost of them. In the empty one that follows the next operation is entered,
/// or it is begun anew, or rolled back, where the connection goes back to its pool. It is read committed, too:
/// the isolation of a transaction cannot be changed after its first query, which was the store's.
const COMMIT: &str = "commit and chain";

/// Likewise: sqlx would roll back to the innermost savepoint, and the next of a shared pool would write
/// in what is left of the transaction.
const ROLLBACK: &str = "rollback and chain";

/// Sessions in the middle of a [`COMMIT`], of which this has not the text: what looks for commits on the wire would
/// take it for one. Other statements that were given up end with their time.
const COMMITTING: &str = "state = 'active' and query like 'commit and %'";

/// The empty one, after a rollback.
pub(super) const START: &str = "start transaction isolation level read committed, read write";

/// Where the connection is not the store's own. Of a transaction that has failed, it tells whether it is open.
const SAVEPOINT: &str = "savepoint idempotency_handler";
pub(super) const UNDO: &str = "rollback to savepoint idempotency_handler";

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

/// Nothing is written outside of the transaction. sqlx rolls all of it back where a handler begins a
/// savepoint and gives up waiting (https://github.com/launchbadge/sqlx/issues/4385); what the handler
/// writes next would be committed alone.
const SESSION: &str = "set default_transaction_read_only = on";

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
    /// Whether a pooler is in between.
    is_pooled: bool,
    /// How long one may take to begin.
    patience: Duration,
    handover: Handover,
    /// Whoever is left to open a connection after its caller.
    opening: Arc<Semaphore>,
}

impl Transactions {
    pub(super) fn new(pool: PgPool, kind: Kind, is_pooled: bool, patience: Duration) -> Self {
        Self {
            pool: Arc::new(Mutex::new(pool)),
            replaced: Arc::default(),
            kind,
            is_pooled,
            patience,
            handover: Handover::default(),
            opening: Arc::new(Semaphore::new(1)),
        }
    }

    /// In a task of its own, since sqlx loses count of a transaction whose beginning is cancelled
    /// (https://github.com/launchbadge/sqlx/issues/4385).
    pub(super) async fn begin(
        &self,
        entrance: Entrance,
    ) -> Result<Transaction<'static, Postgres>, Error> {
        let (transactions, came) = (self.clone(), Instant::now());
        let (caller, gone) = oneshot::channel::<Infallible>();
        let begun = tokio::spawn(async move {
            let pool = transactions.pool().clone();
            let mut begun = pin!(transactions.begin_on_any(&pool, &entrance, came, gone));
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
        entrance: &Entrance,
        came: Instant,
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
                self.enter_chained(chained, entrance, came).await
            }
            connection = &mut acquired => {
                let begin = AssertSqlSafe(self.begin_and_enter(entrance)).into_sql_str();
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

    /// All in one round trip. It begins as the implicit transaction of a query of several statements, which
    /// `begin` turns into an explicit one (PostgreSQL documentation, 55.2.2.1): if the operation cannot be
    /// entered, nothing is left open.
    fn begin_and_enter(&self, entrance: &Entrance) -> String {
        let forget = match self.is_pooled {
            true => FORGET_STATEMENTS,
            false => "",
        };
        let savepoint = match self.kind {
            Kind::Own => "",
            Kind::Pooled | Kind::Shared => SAVEPOINT,
        };
        let enter = entrance.to_sql();
        format!(
            "set transaction isolation level read committed, read write; {forget}; {enter}; begin; {savepoint}"
        )
    }

    /// Where it is refused, another one may have the connection. A transaction that began before its request
    /// came is begun anew: what is written at `now()` would be older than what was answered before.
    async fn enter_chained(
        &self,
        chained: Chained,
        entrance: &Entrance,
        came: Instant,
    ) -> Result<Transaction<'static, Postgres>, Error> {
        let Chained {
            mut transaction,
            since,
        } = chained;
        if since < came {
            (&mut *transaction).execute(AssertSqlSafe(again())).await?;
        }
        match entrance.enter(&mut transaction).await {
            Ok(()) => Ok(transaction),
            Err(refused) => {
                if matches!(code(&refused).as_deref(), Some(LOCKED | RECORDED)) {
                    let transactions = self.clone();
                    tokio::spawn(async move {
                        let since = Instant::now();
                        let begun = (&mut *transaction).execute(AssertSqlSafe(again()));
                        if matches!(timeout(RETURN_TIMEOUT, begun).await, Ok(Ok(_))) {
                            transactions.end(transaction, since);
                        }
                    });
                }
                Err(refused)
            }
        }
    }

    /// Rolls back what the handler wrote, of an operation whose refusal is to be recorded. On a connection
    /// of the store's own that ends its lock, so that the operation is entered again.
    pub(super) async fn undo(
        &self,
        connection: &mut PgConnection,
        entrance: &Entrance,
    ) -> Result<(), CommitError> {
        if self.kind != Kind::Own {
            return connection.execute(UNDO).await.map(drop).map_err(refused);
        }
        match self.has_ended(connection, entrance.mark()).await {
            Ok(true) => return Err(CommitError::Ended),
            // Without one that sqlx counts, nothing would be entered.
            Ok(false) if !connection.is_in_transaction() => return Err(CommitError::Ended),
            Ok(false) => {}
            Err(lost) => return Err(CommitError::Conflict(StoreError::unavailable(lost))),
        }
        let entered = entrance.enter(connection).await;
        entered.map_err(|error| match code(&error).as_deref() {
            Some(LOCKED) => CommitError::Conflict(StoreError::unavailable(error)),
            Some(RECORDED) => CommitError::Recorded,
            _ => refused(error),
        })
    }

    pub(super) async fn commit(
        &self,
        mut transaction: Transaction<'static, Postgres>,
    ) -> Result<(), CommitError> {
        let since = Instant::now();
        match (&mut *transaction).execute(COMMIT).await {
            Ok(_) => {
                self.end(transaction, since);
                Ok(())
            }
            Err(error) if is_certain(&error) => Err(refused(error)),
            Err(error) => Err(CommitError::Unknown(StoreError::unavailable(error))),
        }
    }

    pub(super) async fn roll_back(
        &self,
        mut transaction: Transaction<'static, Postgres>,
        token: Token,
    ) -> Result<(), CommitError> {
        let since = Instant::now();
        match self.has_ended(&mut transaction, &mark(token)).await {
            Ok(true) => return Err(CommitError::Ended),
            Ok(false) => {}
            Err(lost) => {
                let cause: &dyn std::error::Error = &lost;
                tracing::warn!(error = cause, "cannot roll back; the server will");
                return Err(CommitError::Conflict(StoreError::unavailable(lost)));
            }
        }
        let is_rolled_back =
            self.kind == Kind::Own || (&mut *transaction).execute(ROLLBACK).await.is_ok();
        if is_rolled_back {
            self.end(transaction, since);
        }
        Ok(())
    }

    /// What an error before the commit says, once it is known whether the handler has ended the transaction.
    pub(super) async fn refused(
        &self,
        connection: &mut PgConnection,
        token: Token,
        error: CommitError,
    ) -> CommitError {
        match (self.has_ended(connection, &mark(token)).await, error) {
            (Ok(true), _) => CommitError::Ended,
            (Ok(false), CommitError::Ended) => {
                let reason = "the handler, or sqlx for it, rolled back by itself";
                CommitError::Aborted(StoreError::unavailable(reason))
            }
            (_, error) => error,
        }
    }

    /// Whether a handler has ended the transaction by itself, and what it did may be committed. A session
    /// of the store's own knows; elsewhere, what is not open any more may be.
    async fn has_ended(&self, connection: &mut PgConnection, mark: &str) -> Result<bool, Error> {
        let mut rounds = 3;
        loop {
            let told = match self.kind {
                Kind::Own => has_committed(connection, mark).await,
                Kind::Pooled | Kind::Shared => is_over(connection, mark).await,
            };
            rounds -= 1;
            match told {
                // The first answer may be the error of a statement that was cut off.
                Err(error) if rounds > 0 && is_refused(&error) => {}
                told => return told,
            }
        }
    }

    /// What becomes of the connection of a transaction that is over, and that was left in
    /// another: it is given to whoever waits, or dropped, and back in its pool.
    pub(super) fn end(&self, transaction: Transaction<'static, Postgres>, since: Instant) {
        let pool = self.pool().clone();
        let is_in_use = pool.num_idle() == 0 && is_full(&pool) && !pool.is_closed();
        // sqlx loses count where a handler gives up waiting for a savepoint.
        let is_counted = transaction.is_in_transaction();
        if self.kind == Kind::Own && is_in_use && is_counted && !self.is_replacing() {
            self.handover.give(Chained { transaction, since });
        }
    }

    /// Connections of an old pool end with their transactions.
    fn is_replacing(&self) -> bool {
        let replaced = self.replaced.lock();
        let mut replaced = replaced.unwrap_or_else(PoisonError::into_inner);
        replaced.retain(|pool| pool.size() > 0);
        !replaced.is_empty()
    }

    pub(super) fn lock_ends_with_writes(&self) -> bool {
        self.kind == Kind::Own
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
        drop(pool);
        let replaced = self.replaced.lock();
        let mut replaced = replaced.unwrap_or_else(PoisonError::into_inner);
        replaced.retain(|pool| pool.size() > 0);
        replaced.push(silent.clone());
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
    let (is_own_session, max) = (!settings.pgbouncer, settings.max_transactions);
    let name = settings.session_name(" transactions");
    let server = server.application_name(&name);
    PgPoolOptions::new()
        .max_connections(max)
        .acquire_timeout(settings.statement_timeout)
        .test_before_acquire(false)
        .after_connect(move |connection, _| {
            let name = name.clone();
            Box::pin(async move {
                if is_own_session {
                    wait_for_crowd(connection, &name, max, COMMITTING).await?;
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
                let answered = timeout(RETURN_TIMEOUT, answers(connection)).await;
                answered.unwrap_or_else(|late| Err(Error::Io(late.into())))?;
                Ok(true)
            })
        })
        .connect_lazy_with(server)
}

fn again() -> String {
    format!("rollback; {START}")
}
