//! The connections that handlers' transactions run on, and how a transaction begins and ends on one.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgPoolOptions;
use sqlx::{
    AssertSqlSafe, Connection as _, Error, Executor, PgConnection, PgPool, Postgres, Row as _,
    SqlSafeStr, Transaction,
};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::PgStoreBuilder;
use super::handover::{Chained, Handover};
use super::transaction::{LOCKED, RECORDED, UNDO, code, has_mark, is_certain, mark, refused};
use crate::store::lent::RETURN_TIMEOUT;
use crate::store::transaction::CommitError;
use crate::store::{StoreError, Token};

/// How many transactions a store has open at once, where nothing else is said.
pub(super) const MAX_TRANSACTIONS: u32 = 10;

/// Ends the transaction whatever savepoints the handler has left open, where a plain commit of sqlx
/// would only release the innermost of them. The empty one that follows is rolled back in passing, with the
/// next that begins on the connection, or when it goes back to its pool.
const COMMIT: &str = "commit and chain";

/// The same in a session of the store's own, which keeps the mark of what was committed by somebody else.
const OWN_COMMIT: &str = "set idempotency.committed = ''; commit and chain";

/// Likewise: sqlx would roll back to the innermost savepoint, and the next of a shared pool would write
/// in what is left of the transaction.
const ROLLBACK: &str = "rollback and chain";

/// What `and chain` does, where nothing was ended.
const CHAIN: &str = "start transaction";

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

    /// Has a session of the store's own keep the mark of a transaction that somebody else commits. An
    /// expression, which is normalised where statements are counted.
    pub(super) fn keep_mark(&self, token: Token) -> String {
        match self.kind {
            Kind::Own => format!(
                "set_config('idempotency.committed', '{}', false)",
                mark(token)
            ),
            Kind::Pooled | Kind::Shared => "null".to_owned(),
        }
    }

    pub(super) async fn commit(&self, mut transaction: Chained) -> Result<(), CommitError> {
        let commit = match self.kind {
            Kind::Own => OWN_COMMIT,
            Kind::Pooled | Kind::Shared => COMMIT,
        };
        match (&mut *transaction).execute(commit).await {
            Ok(_) => {
                self.end(transaction);
                Ok(())
            }
            Err(error) if is_certain(&error) => Err(refused(error)),
            Err(error) => Err(CommitError::Unknown(StoreError::unavailable(error))),
        }
    }

    pub(super) async fn roll_back(
        &self,
        mut transaction: Chained,
        token: Token,
    ) -> Result<(), CommitError> {
        match self.has_ended(&mut transaction, token).await {
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
            self.end(transaction);
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
        // The mark was there.
        if matches!(error, CommitError::Recorded) {
            return error;
        }
        match (self.has_ended(connection, token).await, error) {
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
    async fn has_ended(&self, connection: &mut PgConnection, token: Token) -> Result<bool, Error> {
        let mark = mark(token);
        let mut rounds = 3;
        loop {
            let told = match self.kind {
                Kind::Own => has_committed(connection, &mark).await,
                Kind::Pooled | Kind::Shared => is_over(connection, &mark).await,
            };
            rounds -= 1;
            match told {
                // The first answer may be the error of a statement that was cut off.
                Err(error) if rounds > 0 && is_certain(&error) => {}
                told => return told,
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

/// Whether the session has committed the transaction of this mark, without the store. What is open is
/// rolled back, and an empty one follows, where sqlx counts one.
async fn has_committed(connection: &mut PgConnection, mark: &str) -> Result<bool, Error> {
    let chain = match connection.is_in_transaction() {
        true => CHAIN,
        false => "",
    };
    let sql = format!(
        "rollback; select current_setting('idempotency.committed', true) = '{mark}'; {chain}"
    );
    let rows = connection.fetch_all(AssertSqlSafe(sql)).await?;
    let is_mark = rows.first().map(|row| row.try_get(0)).transpose()?;
    Ok(is_mark.flatten().unwrap_or(false))
}

/// Whether the transaction of this mark is not open any more.
async fn is_over(connection: &mut PgConnection, mark: &str) -> Result<bool, Error> {
    match has_mark(connection, mark).await {
        Err(error) if is_certain(&error) => {}
        has_mark => return has_mark.map(|has_mark| !has_mark),
    }
    // Of one that has failed, its savepoint tells.
    match connection.execute(UNDO).await {
        Ok(_) => Ok(false),
        Err(error) if matches!(code(&error).as_deref(), Some("3B001" | "25P01")) => Ok(true),
        Err(error) => Err(error),
    }
}
