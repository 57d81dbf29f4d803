use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::{Error, Row as _};

use super::PgStore;
use super::connection::is_locked;
use crate::store::lent::error;
use crate::store::tx_error::is_conflict;
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

/// Whence the walk goes on: where the batch before it has ended. What is deleted stays in the index for a while,
/// as long as anybody reads in a transaction that began before, and each batch would walk over all of it.
macro_rules! is_ahead {
    () => {
        "sweep_at >= coalesce('epoch'::timestamptz + $2 * interval '1 microsecond', '-infinity')"
    };
}

/// Deletes what is over of as many records as may be swept, up to the moment of the next one. Where more is left
/// than fits into a batch, it takes three quarters of the time that [`SWEEP`] takes. Waits a moment for what
/// somebody has locked, which is hardly ever anything.
///
/// What a crash undoes is swept again, so nobody waits for the disk.
const DELETE: &str = concat!(
    "
with next as materialized (
    select moment,
        set_config('lock_timeout', '10ms', true) as patience,
        set_config('synchronous_commit', 'off', true) as durability
    from (
        select sweep_at as moment
        from idempotency.record
        where sweep_at <= statement_timestamp() and ",
    is_ahead!(),
    "
        order by sweep_at offset $1 limit 1
    ) as record
), deleted as (
    delete from idempotency.record
    where sweep_at < (select moment from next) and ",
    is_ahead!(),
    " and ",
    is_over!(),
    "
    returning 1
)
select (select count(*) from deleted) as deleted, 0::int8 as held,
    (extract(epoch from moment) * 1000000)::int8 as until, patience, durability
from next"
);

/// What is over is deleted, and what was lost and is to be held is held, in one walk along the index that goes
/// around what somebody has locked. What is found is locked, and so it is where it was found.
const SWEEP: &str = concat!(
    "
with due as materialized (
    select max(sweep_at) as until,
        array_agg(place) filter (where not is_to_be_held) as over,
        array_agg(place) filter (where is_to_be_held) as lost,
        set_config('lock_timeout', '100ms', true) as patience,
        set_config('synchronous_commit', 'off', true) as durability
    from (
        select ctid as place, sweep_at, ",
    is_to_be_held!(),
    " as is_to_be_held
        from idempotency.record
        where sweep_at <= statement_timestamp() and ",
    is_ahead!(),
    "
            and (",
    is_over!(),
    " or ",
    is_to_be_held!(),
    ")
        order by sweep_at limit $1 for update skip locked
    ) as record
), held as (
    update idempotency.record set state = 'held', sweep_at = 'infinity'
    where ctid = any ((select lost from due)::tid[])
    returning 1
), deleted as (
    delete from idempotency.record
    where ctid = any ((select over from due)::tid[])
    returning 1
)
select (select count(*) from deleted) as deleted, (select count(*) from held) as held,
    (extract(epoch from until) * 1000000)::int8 as until, patience, durability
from due"
);

/// The sweep that has not ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Sweeping(Arc<Mutex<Walk>>);

#[derive(Debug, Default)]
struct Walk {
    /// How far it has come: in microseconds since the epoch.
    until: Option<i64>,
    /// Whether something was locked: then more may be.
    is_wary: bool,
}

impl Sweeping {
    fn walk(&self) -> MutexGuard<'_, Walk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PgStore {
    /// Less than `limit` are swept where the walk is at its end, or somebody else was in the way. The next
    /// one begins anew, and finds what was locked, or has come into the way, behind this one.
    pub(super) async fn sweep(&self, limit: u32) -> Result<Swept, StoreError> {
        let Walk { until, mut is_wary } = mem::take(&mut *self.sweeping.walk());
        let mut swept = Swept::default();
        if !is_wary {
            match self.sweep_by(DELETE, limit, until).await {
                Ok((deleted, until)) if deleted.deleted >= u64::from(limit) => {
                    *self.sweeping.walk() = Walk { until, is_wary };
                    return Ok(deleted);
                }
                // The last batch, or one that meets what is to be held, or many records of one moment.
                Ok((deleted, _)) => swept = deleted,
                Err(locked) if is_in_the_way(&locked) => is_wary = true,
                Err(other) => return Err(error(other)),
            }
        }
        let left = limit.saturating_sub(u32::try_from(swept.deleted).unwrap_or(limit));
        let (rest, until) = match self.sweep_by(SWEEP, left, until).await {
            Ok(rest) => rest,
            // It stays swept, and the next sweep will hear of the error.
            Err(_) if swept.deleted > 0 => return Ok(swept),
            Err(other) => return Err(error(other)),
        };
        swept.deleted += rest.deleted;
        swept.held += rest.held;
        if swept.deleted + swept.held >= u64::from(limit) {
            *self.sweeping.walk() = Walk { until, is_wary };
        }
        Ok(swept)
    }

    /// What a batch from this moment on has swept, and how far it has come.
    async fn sweep_by(
        &self,
        sql: &'static str,
        limit: u32,
        until: Option<i64>,
    ) -> Result<(Swept, Option<i64>), Error> {
        let query = sqlx::query(sql).bind(i64::from(limit)).bind(until);
        let done = self.try_run(query).await?;
        let Some(row) = done.rows.first() else {
            return Ok((Swept::default(), None));
        };
        let count = |column| {
            let count: i64 = row.try_get(column)?;
            u64::try_from(count).map_err(|error| Error::Decode(error.into()))
        };
        let swept = Swept {
            deleted: count("deleted")?,
            held: count("held")?,
        };
        Ok((swept, row.try_get("until")?))
    }
}

/// A lock, in the stricter sessions of an application a change, or what else may pass.
fn is_in_the_way(error: &Error) -> bool {
    is_locked(error) || is_conflict(error)
}
