use std::time::{Duration, SystemTime};

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::error::{OutboxError, OutboxErrorKind};
use super::message::MessageId;
use crate::PgStore;
use crate::store::postgres::PgUuid;
use crate::store::sql;

const BACKLOG: &str = "
select count(*) filter (where state = 'pending') as pending,
    count(*) filter (where state = 'dead') as dead,
    coalesce(extract(epoch from clock_timestamp() - min(created_at)
        filter (where state = 'pending')), 0)::float8 as age
from idempotency.outbox where state in ('pending', 'dead')";

const LIST_DEAD: &str = "
select id, partition_key, type, attempt, last_error,
    extract(epoch from created_at)::float8 as created_at,
    extract(epoch from finished_at)::float8 as died_at
from idempotency.outbox as dead
where state = 'dead'
    and ($1::uuid is null or position > (select position from idempotency.outbox where id = $1))
order by position limit $2";

const RETRY_DEAD: &str = "
update idempotency.outbox set
    state = 'pending', attempt = 0, finished_at = null, available_at = clock_timestamp()
where id = $1 and state = 'dead'";

const RETRY_ALL_DEAD: &str = "
update idempotency.outbox set
    state = 'pending', attempt = 0, finished_at = null, available_at = clock_timestamp()
where id = any (array(
    select id from idempotency.outbox where state = 'dead' order by position limit $1
    for update skip locked
))";

const DISCARD_DEAD: &str = "
update idempotency.outbox set state = 'discarded', finished_at = clock_timestamp()
where id = $1 and state = 'dead'";

/// In the order of the index, by physical place, and around rows that somebody has locked.
const SWEEP: &str = "
delete from idempotency.outbox where ctid = any (array(
    select ctid from idempotency.outbox
    where state in ('sent', 'discarded')
        and finished_at <= statement_timestamp() - make_interval(secs => $1)
    order by finished_at limit $2
    for update skip locked
))";

/// The outbox as a person sees it: what waits, what is dead, and what to do about it.
///
/// ```no_run
/// use tower_idempotency::PgStore;
/// use tower_idempotency::outbox::Outbox;
///
/// # async fn example(store: PgStore) -> Result<(), tower_idempotency::outbox::OutboxError> {
/// let outbox = Outbox::new(store);
/// for dead in outbox.list_dead(None, 100).await? {
///     println!("{} {}: {:?}", dead.id, dead.topic, dead.last_error);
///     outbox.retry_dead(dead.id).await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Outbox {
    store: PgStore,
}

/// What has not been published. Alert on both: `dead` above zero, and `oldest` above what a receiver's
/// outage may take; what waits behind a dead message is pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Backlog {
    /// Messages that wait, are paused, or are being published.
    pub pending: u64,
    /// Messages that wait for a person.
    pub dead: u64,
    /// How long the oldest pending one has waited. Zero where all are dead.
    pub oldest: Duration,
}

/// A message that was given up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeadMessage {
    /// For [`retry_dead`](Outbox::retry_dead) and [`discard_dead`](Outbox::discard_dead).
    pub id: MessageId,
    /// What happened.
    pub topic: String,
    /// Where it stands, or stood, in the way of others.
    pub partition_key: String,
    /// How often it was tried.
    pub attempts: u32,
    /// What the publisher said last.
    pub last_error: Option<String>,
    /// When it was enqueued, by the database's clock.
    pub created_at: SystemTime,
    /// When it was given up, by the database's clock.
    pub died_at: SystemTime,
}

impl Outbox {
    /// The outbox in the database of `store`.
    #[must_use]
    pub fn new(store: PgStore) -> Self {
        Self { store }
    }

    /// What has not been published. Counts every row that waits.
    ///
    /// # Errors
    ///
    /// [`OutboxErrorKind::Database`].
    pub async fn backlog(&self) -> Result<Backlog, OutboxError> {
        let rows = self.store.run(sqlx::query(BACKLOG)).await?.rows;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound)?;
        let count = |column| u64::try_from(row.try_get::<i64, _>(column)?).map_err(number);
        let age: f64 = row.try_get("age")?;
        Ok(Backlog {
            pending: count("pending")?,
            dead: count("dead")?,
            oldest: Duration::try_from_secs_f64(age.max(0.0)).map_err(number)?,
        })
    }

    /// Dead messages in the order they were enqueued, at most `limit` and never more than 1,000,
    /// beginning after one of them.
    ///
    /// # Errors
    ///
    /// [`OutboxErrorKind::Database`].
    pub async fn list_dead(
        &self,
        after: Option<MessageId>,
        limit: u32,
    ) -> Result<Vec<DeadMessage>, OutboxError> {
        let query = sqlx::query(LIST_DEAD)
            .bind(after.map(|id| PgUuid(*id.as_bytes())))
            .bind(i64::from(limit.min(1000)));
        let rows = self.store.run(query).await?.rows;
        rows.iter().map(read).collect()
    }

    /// Publishes a dead message after all, with as many attempts as a new one has. Where relays
    /// [skip](super::Poison::Skip) dead messages, it comes after those that have overtaken it.
    ///
    /// # Errors
    ///
    /// [`OutboxErrorKind::NotDead`], [`OutboxErrorKind::Database`].
    pub async fn retry_dead(&self, id: MessageId) -> Result<(), OutboxError> {
        self.change_dead(RETRY_DEAD, id).await
    }

    /// Publishes the oldest dead messages after all, at most `limit`, and says how many: after an
    /// outage of the receiver, until it says 0. See [`retry_dead`](Self::retry_dead).
    ///
    /// # Errors
    ///
    /// [`OutboxErrorKind::Database`].
    pub async fn retry_all_dead(&self, limit: u32) -> Result<u64, OutboxError> {
        let query = sqlx::query(RETRY_ALL_DEAD).bind(i64::from(limit));
        Ok(self.store.run(query).await?.affected)
    }

    /// Gives up a dead message for good, which lets its partition go on. It is swept like one that
    /// was sent.
    ///
    /// # Errors
    ///
    /// [`OutboxErrorKind::NotDead`], [`OutboxErrorKind::Database`].
    pub async fn discard_dead(&self, id: MessageId) -> Result<(), OutboxError> {
        self.change_dead(DISCARD_DEAD, id).await
    }

    async fn change_dead(&self, sql: &'static str, id: MessageId) -> Result<(), OutboxError> {
        let query = sqlx::query(sql).bind(PgUuid(*id.as_bytes()));
        match self.store.run(query).await?.affected {
            0 => Err(OutboxError::new(OutboxErrorKind::NotDead)),
            _ => Ok(()),
        }
    }

    /// Deletes at most `limit` messages that were sent or discarded longer ago than `retention`,
    /// and says how many. A running relay does it by itself.
    ///
    /// # Errors
    ///
    /// [`OutboxErrorKind::Database`].
    pub async fn sweep(&self, retention: Duration, limit: u32) -> Result<u64, OutboxError> {
        let query = sqlx::query(SWEEP)
            .bind(retention.as_secs_f64())
            .bind(i64::from(limit));
        Ok(self.store.run(query).await?.affected)
    }
}

fn number(error: impl std::error::Error + Send + Sync + 'static) -> OutboxError {
    OutboxError::database(error)
}

fn read(row: &PgRow) -> Result<DeadMessage, OutboxError> {
    let attempts: i32 = row.try_get("attempt")?;
    Ok(DeadMessage {
        id: MessageId::from_bytes(row.try_get::<PgUuid, _>("id")?.0),
        topic: row.try_get("type")?,
        partition_key: row.try_get("partition_key")?,
        attempts: u32::try_from(attempts).map_err(number)?,
        last_error: row.try_get("last_error")?,
        created_at: sql::time(row.try_get("created_at")?)?,
        died_at: sql::time(row.try_get("died_at")?)?,
    })
}
