//! PostgreSQL, the store of record: durable, shared by every process of a service.
//!
//! The table is `idempotency.record`, made by [`PgStore::migrate`]; its columns are explained in
//! `migrations/postgres`. Every decision is made by the database's clock.
//!
//! What is durable is the database's to say: with `synchronous_commit = off` an acknowledged commit
//! can vanish in a crash, so the store turns it on for its own connections; an asynchronous standby
//! that is promoted may lack the last commits.

mod claim;
mod connection;
mod entrance;
mod find;
mod group;
mod handover;
mod heartbeat;
mod held;
mod listen;
mod migrate;
mod phases;
mod settle;
mod standing;
mod sweep;
mod transaction;
mod transactions;
mod types;
mod waiting;

use std::hash::{BuildHasher as _, RandomState};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use sqlx::{PgPool, SqlStr};
use tokio::sync::Semaphore;

use super::protocol;
use super::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, RecordSummary,
    Renewed, Resolution, Store, StoreError, Swept, Token, Within,
};
use crate::error::ConfigError;
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::{Identity, RecordId};

pub use super::phases::{PhaseError, SavedError};
pub use super::schema_error::SchemaError;
pub use super::tx_error::{TxError, is_conflict};
use group::Group;
pub use phases::Phases;
use sweep::Sweeping;
pub use transaction::Tx;
use transactions::Transactions;
pub(crate) use types::PgUuid;
use waiting::{Waiting, Wakes};

/// Records in PostgreSQL 14 or later.
///
/// The store opens connections of its own, with the options of the pool it is given: a cancelled
/// `pool.begin()` of an application can hand the next borrower a connection inside an abandoned
/// transaction (sqlx [#4385](https://github.com/launchbadge/sqlx/issues/4385)), and a record
/// written in there would be lost. Plan for [8](PgStoreBuilder::with_max_connections) more a
/// process, 4 for [group commit](PgStoreBuilder::with_group_commit), [10](PgStoreBuilder::with_max_transactions) for the handlers of transactional routes,
/// which then need none of the application's, and one that listens while duplicates
/// [wait](crate::Duplicates::Wait) for other processes. What was given up goes on in the server while its commits
/// wait for a standby, or for the disk: where twice as many of a kind are at work there, another one waits, and
/// what needs it is [`Unavailable`](crate::StoreErrorKind::Unavailable). (Not where a pooler changes their names.)
///
/// Their `application_name` is `tower-idempotency`, `tower-idempotency writer` or `tower-idempotency transactions`
/// with a number of the store's, or `tower-idempotency waits`.
///
/// Cheap to clone; clones share the connections.
///
/// ```no_run
/// use tower_idempotency::{IdempotencyLayer, PgStore, Scope};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = sqlx::PgPool::connect("postgres://localhost/shop").await?;
/// let store = PgStore::new(pool);
/// store.migrate().await?;
/// let layer = IdempotencyLayer::new(store, Scope::header("x-tenant-id")?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct PgStore {
    pool: PgPool,
    /// `None` where each statement goes alone.
    group: Option<Arc<Group>>,
    /// Those of handlers, which may take long.
    transactions: Transactions,
    /// How a transaction begins behind PgBouncer, where each statement needs one.
    pooled_begin: Option<SqlStr>,
    /// How long an answer may take.
    patience: Duration,
    /// Who waits for other processes, where there can be a connection that listens.
    waiting: Option<Waiting>,
    /// Who is to be told that a record has changed.
    wakes: Wakes,
    sweeping: Sweeping,
    /// Who asks whether a claim is under way. Each may wait for one, and many ask where a server stalls:
    /// they must not take up all connections.
    settling: Arc<Semaphore>,
}

const MAX_SETTLING: usize = 2;

/// Settings of a [`PgStore`].
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_idempotency::PgStore;
///
/// let pool = sqlx::PgPool::connect("postgres://localhost:6432/shop").await?;
/// let store = PgStore::builder(pool).with_pgbouncer(true).with_max_connections(4)?.build();
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct PgStoreBuilder {
    pool: PgPool,
    max_connections: u32,
    max_transactions: u32,
    statement_timeout: Duration,
    pgbouncer: bool,
    share_pool: bool,
    group_commit: bool,
    /// Tells its sessions from those of other processes.
    number: u32,
}

/// PostgreSQL counts whole milliseconds, and takes 0 for "for ever".
const STATEMENT_TIMEOUTS: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(24 * 3600);

impl PgStore {
    /// A store with the default settings, on the database of `pool`. Connects when first used.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        Self::builder(pool).build()
    }

    /// Closes the store's own connections, once the statements under way have ended. Every later call
    /// is [`Unavailable`](crate::StoreErrorKind::Unavailable). Dropping the store closes them, too,
    /// without waiting. A [shared pool](PgStoreBuilder::with_shared_pool) is closed for the application, too.
    pub async fn close(&self) {
        if let Some(group) = &self.group {
            group.close().await;
        }
        if let Some(waiting) = &self.waiting {
            waiting.close();
        }
        self.pool.close().await;
        self.transactions.close().await;
    }

    /// Settings to change.
    pub fn builder(pool: PgPool) -> PgStoreBuilder {
        PgStoreBuilder {
            pool,
            max_connections: 8,
            max_transactions: transactions::MAX_TRANSACTIONS,
            statement_timeout: Duration::from_secs(5),
            pgbouncer: false,
            share_pool: false,
            group_commit: true,
            number: 0,
        }
    }
}

/// The keys of a new hasher are the only random numbers of the standard library.
fn random() -> u32 {
    let [a, b, c, d, ..] = RandomState::new().hash_one(()).to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl PgStoreBuilder {
    /// The most connections the store opens. Default: 8.
    ///
    /// # Errors
    ///
    /// `max_connections` of zero.
    pub fn with_max_connections(mut self, max: u32) -> Result<Self, ConfigError> {
        if max == 0 {
            return Err(ConfigError::new("max_connections", "must be at least 1"));
        }
        self.max_connections = max;
        Ok(self)
    }

    /// The most transactions of handlers that are open at once, each on a connection of its own;
    /// only transactional routes and [phases](Phases) open any. Default: 10. Where nothing is heard of a
    /// connection for as long as
    /// [`with_statement_timeout`](Self::with_statement_timeout) says, the transactions after it get new
    /// ones, while the silent ones last until the operating system gives them up.
    ///
    /// # Errors
    ///
    /// `max_transactions` of zero.
    pub fn with_max_transactions(mut self, max: u32) -> Result<Self, ConfigError> {
        if max == 0 {
            return Err(ConfigError::new("max_transactions", "must be at least 1"));
        }
        self.max_transactions = max;
        Ok(self)
    }

    /// How long the server works on one statement of the store before it gives up; also how long a
    /// caller waits for a connection. Default: 5 s. For a record that somebody else has locked it waits
    /// 100 ms: a claim is then answered by what is known of its key, and a completion is tried again. A
    /// sweep waits 10 ms, and goes around it.
    /// A connection that is silent for twice the timeout, and at least 5 s, is given up.
    ///
    /// # Errors
    ///
    /// `statement_timeout` of less than a millisecond, or more than a day.
    pub fn with_statement_timeout(mut self, timeout: Duration) -> Result<Self, ConfigError> {
        if !STATEMENT_TIMEOUTS.contains(&timeout) {
            let reason = format!("must be 1 ms to 24 h, not {timeout:?}");
            return Err(ConfigError::new("statement_timeout", reason));
        }
        self.statement_timeout = timeout;
        Ok(self)
    }

    /// Set it where the pool leads to PgBouncer in transaction mode: each statement runs in a
    /// transaction of its own, which makes three round trips of one, no statement is prepared by
    /// name, and no setting of the session is relied on. Duplicates that wait only poll. Default: `false`.
    ///
    /// Nor can a session refuse what is written outside of the layer's transaction: a handler that drops the
    /// future of `tx.begin()` ends that transaction, and commits alone what it writes then. Its key is held for
    /// a person.
    ///
    /// PgBouncer needs `ignore_startup_parameters = extra_float_digits`. Run
    /// [`migrate`](PgStore::migrate) over a direct connection.
    pub fn with_pgbouncer(mut self, pgbouncer: bool) -> Self {
        self.pgbouncer = pgbouncer;
        self
    }

    /// Uses the given pool itself in place of connections of its own. Default: `false`.
    ///
    /// Only for applications that never cancel a `begin()`; sqlx may otherwise hand the store a
    /// connection inside an abandoned transaction. Session settings are then the application's, too:
    /// without a `lock_timeout`, a record that somebody has locked takes up the connections of those
    /// who want it. Duplicates that wait only poll.
    pub fn with_shared_pool(mut self, share: bool) -> Self {
        self.share_pool = share;
        self
    }

    /// Whether the claims, lookups, completions and releases of concurrent requests travel together: one
    /// statement and one commit for many, over connections of their own. Nobody waits for others to
    /// come. There is one such connection, and up to 4 where commits take long, where one is held up, and
    /// for lookups; they are not part of [`with_max_connections`](Self::with_max_connections). At most 2,048 statements
    /// are queued; whoever comes then waits for as long as a statement may take, and is
    /// [`Unavailable`](crate::StoreErrorKind::Unavailable) afterwards. Default: `true`; never where the
    /// [pool is shared](Self::with_shared_pool).
    ///
    /// ```no_run
    /// # fn example(pool: sqlx::PgPool) {
    /// use tower_idempotency::PgStore;
    ///
    /// let store = PgStore::builder(pool).with_group_commit(false).build();
    /// # }
    /// ```
    pub fn with_group_commit(mut self, group_commit: bool) -> Self {
        self.group_commit = group_commit;
        self
    }

    /// What the server shows of sessions of a kind.
    fn session_name(&self, kind: &str) -> String {
        format!("tower-idempotency{kind} {:08x}", self.number)
    }

    /// The store. Connects when first used.
    #[must_use]
    pub fn build(mut self) -> PgStore {
        self.number = random();
        let writers = self.group_commit && !self.share_pool;
        let writers = writers.then(|| connection::writers(&self));
        let alone = self.build_alone();
        let (patience, group) = (alone.patience, alone.clone());
        let group = writers.map(|pool| Arc::new(Group::new(group, pool, patience)));
        PgStore { group, ..alone }
    }

    /// Without group commit.
    fn build_alone(self) -> PgStore {
        let pooled_begin = self.pgbouncer.then(|| connection::pooled_begin(&self));
        let patience = connection::patience(self.statement_timeout);
        let (pool, transactions) = if self.share_pool {
            (self.pool.clone(), self.pool)
        } else {
            (connection::own_pool(&self), transactions::own_pool(&self))
        };
        let waiting = (!self.share_pool && !self.pgbouncer).then(|| {
            let server = pool.connect_options().as_ref().clone();
            Waiting::new(server, self.statement_timeout)
        });
        let kind = match (self.share_pool, self.pgbouncer) {
            (true, _) => transactions::Kind::Shared,
            (false, true) => transactions::Kind::Pooled,
            (false, false) => transactions::Kind::Own,
        };
        let transactions = Transactions::new(transactions, kind, self.pgbouncer, patience);
        PgStore {
            pool,
            group: None,
            transactions,
            pooled_begin,
            patience,
            waiting,
            wakes: Wakes::default(),
            sweeping: Sweeping::default(),
            settling: Arc::new(Semaphore::new(MAX_SETTLING)),
        }
    }
}

impl Store for PgStore {
    fn is_durable(&self) -> bool {
        true
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        let claimed = protocol::claim(self, request).await;
        if let (Some(group), Ok(claimed)) = (&self.group, &claimed) {
            group.claimed(matches!(claimed, Claimed::Existing(_)));
        }
        claimed
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

    /// No other writer wants what a sweep deletes; they only share the machine with it.
    fn pause_after_sweep(&self, batch: Duration) -> Duration {
        batch / 2
    }

    async fn wait_for_change(&self, identity: &Identity, limit: Duration) {
        self.wait(identity, limit).await;
    }
}
