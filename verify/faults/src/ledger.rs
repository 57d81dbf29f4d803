//! What the handlers did: the oracle of every test, written past the layer.

use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
};
use sqlx::{Error, Row as _};
use std::time::Duration;

const TABLE: &str = "
create table if not exists ledger (
    execution text primary key,
    scope text not null,
    key text not null,
    attempt integer not null,
    pid integer not null,
    body text not null,
    started_at text not null default current_timestamp,
    finished integer not null default 0,
    xid text
)";

const BEGIN: &str = "
insert into ledger (execution, scope, key, attempt, pid, body) values ($1, $2, $3, $4, $5, $6)";

/// In a transaction that is not committed yet, the run counts as finished.
const WRITE: &str = "
insert into ledger (execution, scope, key, attempt, pid, body, finished, xid)
values ($1, $2, $3, $4, $5, $6, 1, pg_current_xact_id()::text)";

const WRITE_SQLITE: &str = "
insert into ledger (execution, scope, key, attempt, pid, body, finished)
values ($1, $2, $3, $4, $5, $6, 1)";

const FINISH: &str = "update ledger set finished = 1 where execution = $1";

const ROWS: &str = "
select execution, scope, key, attempt, pid, body, finished from ledger
where scope = $1 and key = $2 order by started_at, attempt";

const COUNT: &str = "select count(*) from ledger";

/// One run of the handler.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Its name, unique; part of the answer.
    pub execution: String,
    /// Who asked.
    pub scope: String,
    /// Under which key.
    pub key: String,
    /// Which attempt the layer said it is.
    pub attempt: i32,
    /// The process it ran in.
    pub pid: i32,
    /// The request's body.
    pub body: String,
    /// Whether it came to its end.
    pub finished: bool,
}

/// The table, in a database of either kind.
#[derive(Debug, Clone)]
pub enum Ledger {
    /// In PostgreSQL.
    Postgres(PgPool),
    /// In a SQLite file.
    Sqlite(SqlitePool),
}

/// A connection with a transaction, in which a run is noted together with its record.
pub trait Write: Send {
    /// Notes a run.
    fn write(&mut self, entry: &Entry) -> impl Future<Output = Result<(), Error>> + Send;
}

macro_rules! insert {
    ($executor:expr, $sql:expr, $entry:expr) => {
        sqlx::query($sql)
            .bind(&$entry.execution)
            .bind(&$entry.scope)
            .bind(&$entry.key)
            .bind($entry.attempt)
            .bind($entry.pid)
            .bind(&$entry.body)
            .execute($executor)
            .await
            .map(drop)
    };
}

impl Write for PgConnection {
    async fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        insert!(self, WRITE, entry)
    }
}

impl Write for SqliteConnection {
    async fn write(&mut self, entry: &Entry) -> Result<(), Error> {
        insert!(self, WRITE_SQLITE, entry)
    }
}

impl Ledger {
    /// Opens the database at `postgres://..` or `sqlite:PATH`.
    ///
    /// # Errors
    ///
    /// When it cannot be reached.
    pub async fn open(url: &str) -> Result<Self, Error> {
        let patience = Duration::from_secs(10);
        match url.strip_prefix("sqlite:") {
            Some(path) => {
                let options = sqlite_options(path);
                let pool = SqlitePoolOptions::new()
                    .max_connections(2)
                    .acquire_timeout(patience);
                Ok(Self::Sqlite(pool.connect_with(options).await?))
            }
            None => {
                let pool = PgPoolOptions::new()
                    .max_connections(4)
                    .acquire_timeout(patience);
                Ok(Self::Postgres(pool.connect(url).await?))
            }
        }
    }

    /// Creates the table where it is missing. Several processes may do so at once.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn create(&self) -> Result<(), Error> {
        match self {
            Self::Postgres(pool) => {
                let mut transaction = pool.begin().await?;
                sqlx::query("select pg_advisory_xact_lock(4711)")
                    .execute(&mut *transaction)
                    .await?;
                sqlx::query(TABLE).execute(&mut *transaction).await?;
                transaction.commit().await
            }
            Self::Sqlite(pool) => sqlx::query(TABLE).execute(pool).await.map(drop),
        }
    }

    /// Notes that a run began.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn begin(&self, entry: &Entry) -> Result<(), Error> {
        match self {
            Self::Postgres(pool) => insert!(pool, BEGIN, entry),
            Self::Sqlite(pool) => insert!(pool, BEGIN, entry),
        }
    }

    /// Notes that a run came to its end.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn finish(&self, execution: &str) -> Result<(), Error> {
        match self {
            Self::Postgres(pool) => {
                let query = sqlx::query(FINISH).bind(execution);
                query.execute(pool).await.map(drop)
            }
            Self::Sqlite(pool) => {
                let query = sqlx::query(FINISH).bind(execution);
                query.execute(pool).await.map(drop)
            }
        }
    }

    /// The runs of one key, in the order in which they began.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn entries(&self, scope: &str, key: &str) -> Result<Vec<Entry>, Error> {
        macro_rules! select {
            ($pool:expr) => {{
                let query = sqlx::query(ROWS).bind(scope).bind(key);
                let rows = query.fetch_all($pool).await?;
                rows.iter()
                    .map(|row| {
                        Ok(Entry {
                            execution: row.try_get(0)?,
                            scope: row.try_get(1)?,
                            key: row.try_get(2)?,
                            attempt: row.try_get(3)?,
                            pid: row.try_get(4)?,
                            body: row.try_get(5)?,
                            finished: row.try_get::<i32, _>(6)? == 1,
                        })
                    })
                    .collect()
            }};
        }
        match self {
            Self::Postgres(pool) => select!(pool),
            Self::Sqlite(pool) => select!(pool),
        }
    }

    /// All runs of all keys.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn count(&self) -> Result<i64, Error> {
        match self {
            Self::Postgres(pool) => sqlx::query_scalar(COUNT).fetch_one(pool).await,
            Self::Sqlite(pool) => sqlx::query_scalar(COUNT).fetch_one(pool).await,
        }
    }
}

/// How a SQLite file is opened, by subjects and tests alike.
#[must_use]
pub fn sqlite_options(path: &str) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(10))
}
