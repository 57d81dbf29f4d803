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

/// What is over is deleted, and what was lost and is to be held is held, in one walk along the index:
/// each of two would walk over what is for the other to do. By physical place, and asked again: servers of
/// before November 2025 do not notice that what has changed since it was found is at another place now.
///
/// Begins where the batch before it has ended: what is deleted stays in the index for a while, as long
/// as anybody reads in a transaction that began before, and each batch would walk over all of it.
///
/// What a crash undoes is swept again, so nobody waits for the disk.
macro_rules! sweep {
    ($lock:expr, $patience:expr) => {
        concat!(
            "
with due as materialized (
    select max(sweep_at) as until,
        array_agg(place) filter (where not is_to_be_held) as over,
        array_agg(place) filter (where is_to_be_held) as lost,
        set_config('lock_timeout', '",
            $patience,
            "', true) as patience,
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
select (select count(*) from held) as held, (select count(*) from deleted) as deleted,
    (extract(epoch from until) * 1000000)::int8 as until, patience, durability
from due"
        )
    };
}

/// Waits a moment for what somebody has locked. That is hardly ever anything, and to lock first what is
/// deleted next is a quarter of the work.
const SWEEP: &str = sweep!("", "10ms");

/// Goes around it.
const SWEEP_UNLOCKED: &str = sweep!("for update skip locked", "100ms");

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
        let sweep = |sql| self.try_run(sqlx::query(sql).bind(i64::from(limit)).bind(until));
        let mut done = sweep(if is_wary { SWEEP_UNLOCKED } else { SWEEP }).await;
        if !is_wary && done.as_ref().is_err_and(is_in_the_way) {
            is_wary = true;
            done = sweep(SWEEP_UNLOCKED).await;
        }
        let done = done.map_err(error)?;
        let Some(row) = done.rows.first() else {
            return Ok(Swept::default());
        };
        let count = |column| {
            let count: i64 = row.try_get(column).map_err(error)?;
            u64::try_from(count).map_err(StoreError::corrupt)
        };
        let swept = Swept {
            deleted: count("deleted")?,
            held: count("held")?,
        };
        if swept.deleted + swept.held >= u64::from(limit) {
            let until = row.try_get("until").map_err(error)?;
            *self.sweeping.walk() = Walk { until, is_wary };
        }
        Ok(swept)
    }
}

/// A lock, in the stricter sessions of an application a change, or what else may pass.
fn is_in_the_way(error: &Error) -> bool {
    is_locked(error) || is_conflict(error)
}
