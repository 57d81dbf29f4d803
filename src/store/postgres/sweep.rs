use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::FromRow;

use super::PgStore;
use super::connection::is_locked;
use crate::store::lent::error;
use crate::store::{StoreError, Swept};

/// Whose retention is over, and nobody runs. The start of the statement is a time that the planner
/// knows, which lets it use the index, and it is never later than the clock.
macro_rules! is_over {
    () => {
        "expires_at <= statement_timestamp() and (state = 'completed'
            or state = 'running' and lost <> 'hold' and leased_until <= statement_timestamp())"
    };
}

/// Lost attempts to be held.
macro_rules! is_to_be_held {
    () => {
        "state = 'running' and lost = 'hold' and leased_until <= statement_timestamp()"
    };
}

/// What is over is deleted, and what was lost and is to be held is held, in one walk along the index:
/// each of two would walk over what is for the other to do. By physical place, and asked again: servers of
/// before November 2025 do not notice that what has changed since it was found is at another place now.
///
/// Begins where the batch before it has ended: what is deleted stays in the index for a while, as long
/// as anybody reads in a transaction that began before, and each batch would walk over all of it.
///
/// What a crash undoes is swept again, so nobody waits for the disk.
macro_rules! sweep {
    ($lock:expr) => {
        concat!(
            "
with due as materialized (
    select count(*) as found, max(sweep_at) as until,
        array_agg(place) filter (where not is_to_be_held) as over,
        array_agg(place) filter (where is_to_be_held) as lost,
        set_config('lock_timeout', '10ms', true) as patience,
        set_config('synchronous_commit', 'off', true) as durability
    from (
        select ctid as place, sweep_at, ",
            is_to_be_held!(),
            " as is_to_be_held
        from idempotency.record
        where sweep_at <= statement_timestamp()
            and sweep_at >= coalesce('epoch'::timestamptz + $2 * interval '1 microsecond', '-infinity')
            and (",
            is_over!(),
            " or ",
            is_to_be_held!(),
            ")
        order by sweep_at limit $1 ",
            $lock,
            "
    ) as record
), held as (
    update idempotency.record set state = 'held', sweep_at = 'infinity'
    where ctid = any ((select lost from due)::tid[]) and ",
            is_to_be_held!(),
            "
    returning 1
), deleted as (
    delete from idempotency.record
    where ctid = any ((select over from due)::tid[]) and ",
            is_over!(),
            "
    returning 1
)
select found, (select count(*) from held), (select count(*) from deleted),
    (extract(epoch from until) * 1000000)::int8, patience, durability
from due"
        )
    };
}

/// Waits a moment for what somebody has locked. That is hardly ever anything, and to lock first what is
/// deleted next is a quarter of the work.
const SWEEP: &str = sweep!("");

const SWEEP_UNLOCKED: &str = sweep!("for update skip locked");

/// How far a sweep has come that has not ended: in microseconds since the epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct Sweeping(Arc<Mutex<Option<i64>>>);

/// What became of one statement's records.
#[derive(Debug)]
struct Batch {
    found: i64,
    held: i64,
    deleted: i64,
    /// Where the next one begins.
    until: Option<i64>,
}

impl Sweeping {
    fn until(&self) -> MutexGuard<'_, Option<i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PgStore {
    /// Less than `limit` are swept only where the walk is at its end. The next one begins anew, and finds
    /// what was locked, or has come into the way, behind this one.
    pub(super) async fn sweep(&self, limit: u32) -> Result<Swept, StoreError> {
        let mut from = self.sweeping.until().take();
        let (mut swept, mut left) = (Swept::default(), i64::from(limit));
        while left > 0 {
            let batch = self.sweep_batch(left, from).await?;
            swept.deleted += batch.deleted.unsigned_abs();
            swept.held += batch.held.unsigned_abs();
            if batch.found < left {
                return Ok(swept);
            }
            // Less than was found, where somebody else was there before.
            left -= batch.deleted + batch.held;
            from = batch.until;
        }
        *self.sweeping.until() = from;
        Ok(swept)
    }

    async fn sweep_batch(&self, limit: i64, from: Option<i64>) -> Result<Batch, StoreError> {
        let sweep = |sql| self.try_run(sqlx::query(sql).bind(limit).bind(from));
        let done = match sweep(SWEEP).await {
            Err(locked) if is_locked(&locked) => sweep(SWEEP_UNLOCKED).await,
            done => done,
        };
        let done = done.map_err(error)?;
        let row = done.rows.first();
        let row = row.ok_or_else(|| StoreError::corrupt("a sweep reports nothing"))?;
        let (found, held, deleted, until) = FromRow::from_row(row).map_err(error)?;
        Ok(Batch {
            found,
            held,
            deleted,
            until,
        })
    }
}
