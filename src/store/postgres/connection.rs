use std::mem;
use std::time::Duration;

use futures_util::TryStreamExt;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgPoolOptions, PgRow};
use sqlx::query::Query;
use sqlx::{
    AssertSqlSafe, Connection as _, Either, Error, Executor, PgConnection, PgPool, Postgres,
    Row as _, SqlSafeStr, SqlStr, Transaction,
};
use tokio::time::timeout;

use super::{PgStore, PgStoreBuilder, group};
use crate::store::StoreError;
use crate::store::lent::{self, Lent};

/// How long a statement waits for a record that somebody else has locked: few connections must not
/// be taken up by those who want one record, and each of them can come again. `complete` and
/// `release` do so until they are heard.
pub(super) const LOCK_TIMEOUT: &str = "100ms";

/// The same for a statement of many records: one that is locked holds up all of them.
const GROUP_LOCK_TIMEOUT: &str = "50ms";

/// How long the answer to a statement is waited for: longer than the server works on it, and on
/// preparing it. The server cannot say so where nothing comes through any more, and not everybody who
/// calls the store has a limit of their own.
pub(super) fn patience(statement_timeout: Duration) -> Duration {
    (statement_timeout * 2).max(Duration::from_secs(5))
}

/// What the guarantee asks of a session: commits that survive a crash unless the server asks for
/// more, one snapshot for each statement, and an end to waiting. Records are found by an index: a plan
/// made while the table is empty would else read all of it, for as long as the server keeps the plan.
const SESSION: &str = "select
    set_config('synchronous_commit', case current_setting('synchronous_commit') when 'off' then 'on'
        else current_setting('synchronous_commit') end, false),
    set_config('default_transaction_isolation', 'read committed', false),
    set_config('statement_timeout', $1, false),
    set_config('lock_timeout', $2, false),
    set_config('idle_in_transaction_session_timeout', $1, false),
    set_config('enable_seqscan', 'off', false),
    set_config('enable_hashjoin', 'off', false),
    set_config('enable_mergejoin', 'off', false),
    set_config('plan_cache_mode', $3, false),
    set_config('jit', 'off', false)";

/// Whether a plan depends on the values it is for. Those of batches do not, while the planner reckons by
/// how many there are: a small batch would be planned anew each time, for longer than it takes.
const PLANS: &str = "auto";
const GROUP_PLANS: &str = "force_generic_plan";

/// How long a session waits where there is a crowd, until it looks again.
const CROWD_PAUSE: Duration = Duration::from_millis(250);

/// Holds up one more session where twice as many of its name are at work as its pool may have. Those that were
/// given up are: while a commit waits for a standby, or for the disk, the server does not notice that its client is
/// gone, and to open another one for each would take all that the server has.
///
/// By the name that was asked for, which a pooler may have changed, and where the server does not say: nobody is
/// counted then.
pub(super) async fn wait_for_crowd(
    connection: &mut PgConnection,
    name: &str,
    max: u32,
    at_work: &str,
) -> Result<(), Error> {
    let sql = format!(
        "select count(*) from pg_catalog.pg_stat_activity
        where application_name = '{name}' and pid <> pg_catalog.pg_backend_pid() and {at_work}"
    );
    let mut is_told = false;
    loop {
        let counted = connection.fetch_one(AssertSqlSafe(sql.clone())).await;
        let at_work: i64 = match counted {
            Ok(row) => row.try_get(0)?,
            Err(Error::Database(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        if at_work < i64::from(max) * 2 {
            return Ok(());
        }
        if !mem::replace(&mut is_told, true) {
            tracing::warn!(
                at_work,
                sessions = name,
                "the server does not finish what was given up: waiting with another session"
            );
        }
        tokio::time::sleep(CROWD_PAUSE).await;
    }
}

pub(super) fn own_pool(settings: &PgStoreBuilder) -> PgPool {
    let (max, name) = (settings.max_connections, settings.session_name(""));
    pool(settings, max, LOCK_TIMEOUT, PLANS, &name)
}

/// Those of [`Group`](super::group::Group).
pub(super) fn writers(settings: &PgStoreBuilder) -> PgPool {
    let (max, name) = (group::MAX_WRITERS, settings.session_name(" writer"));
    pool(settings, max, GROUP_LOCK_TIMEOUT, GROUP_PLANS, &name)
}

fn pool(
    settings: &PgStoreBuilder,
    max: u32,
    lock_timeout: &'static str,
    plans: &'static str,
    name: &str,
) -> PgPool {
    let options = PgPoolOptions::new()
        .max_connections(max)
        .acquire_timeout(settings.statement_timeout)
        // A connection that broke while idle is noticed by its next statement, which is sent again.
        .test_before_acquire(false);
    let options = if settings.pgbouncer {
        options
    } else {
        let timeout = milliseconds(settings.statement_timeout);
        let name = name.to_owned();
        options.after_connect(move |connection, _| {
            let name = name.clone();
            let query = sqlx::query(SESSION)
                .bind(timeout.clone())
                .bind(lock_timeout)
                .bind(plans)
                .persistent(false);
            Box::pin(async move {
                wait_for_crowd(connection, &name, max, "state = 'active'").await?;
                connection.execute(query).await.map(drop)
            })
        })
    };
    let server = settings.pool.connect_options().as_ref().clone();
    options.connect_lazy_with(server.application_name(name))
}

fn milliseconds(timeout: Duration) -> String {
    format!("{}ms", timeout.as_millis())
}

/// The same as [`SESSION`] for one transaction, and sent with its `begin`: behind PgBouncer the
/// session is somebody else's a moment later.
pub(super) fn pooled_begin(settings: &PgStoreBuilder) -> SqlStr {
    let timeout = milliseconds(settings.statement_timeout);
    let sql = format!(
        "begin isolation level read committed;
        set local statement_timeout = '{timeout}';
        set local lock_timeout = '{LOCK_TIMEOUT}';
        set local idle_in_transaction_session_timeout = '{timeout}';
        set local jit = off;
        select set_config('synchronous_commit', 'on', true)
        where current_setting('synchronous_commit') = 'off'"
    );
    AssertSqlSafe(sql).into_sql_str()
}

/// What a statement did.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) rows: Vec<PgRow>,
    pub(crate) affected: u64,
}

impl PgStore {
    /// Runs one statement to its end, which is when it is committed.
    pub(crate) async fn run(
        &self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Done, StoreError> {
        self.try_run(query).await.map_err(lent::error)
    }

    /// The same, for those who look at the error.
    pub(super) async fn try_run(
        &self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Done, Error> {
        // What sqlx needs for a statement would else be part of every request that may send one.
        let run = Box::pin(async {
            let mut connection = self.acquire().await?;
            let result = self.run_on(&mut connection, query).await;
            if result.as_ref().map_or_else(is_locked, |_| true) {
                connection.keep();
            }
            result
        });
        run.await
    }

    /// The same, on a connection of the caller's.
    pub(super) async fn run_on(
        &self,
        connection: &mut PgConnection,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Done, Error> {
        let done = async {
            match self.pooled_begin {
                Some(_) => self.collect_pooled(connection, query).await,
                None => collect(connection, query).await,
            }
        };
        match timeout(self.patience, done).await {
            Ok(result) => result,
            Err(silent) => Err(Error::Io(silent.into())),
        }
    }

    /// sqlx prepares a statement and executes it in two steps. A transaction pooler may send the
    /// second one to another server unless both are in one transaction.
    async fn collect_pooled(
        &self,
        connection: &mut PgConnection,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Done, Error> {
        let mut transaction = self.begin(connection).await?;
        let done = collect(&mut transaction, query.persistent(false)).await?;
        transaction.commit().await?;
        Ok(done)
    }

    pub(super) async fn begin<'c>(
        &self,
        connection: &'c mut PgConnection,
    ) -> Result<Transaction<'c, Postgres>, Error> {
        match &self.pooled_begin {
            None => connection.begin().await,
            Some(begin) => connection.begin_with(begin.clone()).await,
        }
    }

    /// How to connect to where the store does.
    pub(crate) fn connect_options(&self) -> PgConnectOptions {
        self.pool.connect_options().as_ref().clone()
    }

    /// A new connection is opened in a task of its own: where opening takes longer than callers wait,
    /// each would else begin anew what the one before it gave up, and none would ever have one.
    pub(super) async fn acquire(&self) -> Result<Lent<Postgres>, Error> {
        let is_full = self.pool.size() >= self.pool.options().get_max_connections();
        if is_full || self.pool.num_idle() > 0 {
            return self.pool.acquire().await.map(Lent::new);
        }
        let pool = self.pool.clone();
        let opened = tokio::spawn(async move { pool.acquire().await });
        let opened = opened.await.map_err(|_panic| Error::WorkerCrashed)?;
        opened.map(Lent::new)
    }

    /// Boxed, as in `try_run`.
    pub(super) async fn connection(&self) -> Result<Lent<Postgres>, StoreError> {
        Box::pin(self.acquire()).await.map_err(lent::error)
    }
}

/// `lock_not_available` in PostgreSQL's table of error codes. The statement has ended, and what is left of
/// its transaction is rolled back with the next that the connection is asked; after any other error it may
/// still be under way.
pub(super) fn is_locked(error: &Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.as_deref() == Some("55P03")
}

async fn collect(
    connection: &mut PgConnection,
    query: Query<'_, Postgres, PgArguments>,
) -> Result<Done, Error> {
    let mut steps = connection.fetch_many(query);
    let mut done = Done::default();
    while let Some(step) = steps.try_next().await? {
        match step {
            Either::Left(result) => done.affected += result.rows_affected(),
            Either::Right(row) => done.rows.push(row),
        }
    }
    Ok(done)
}
