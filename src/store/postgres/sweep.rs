use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sqlx::Row as _;

use super::PgStore;
use crate::store::lent::error;
use crate::store::{StoreError, Swept};

/// What is over is deleted, and what was lost and is to be held is held, in one walk along the index:
/// each of two would walk over what is for the other to do. By physical place, and around rows that
/// somebody has locked. The start of the statement is a time that the planner knows, which lets it use
/// the index, and it is never later than the clock.
///
/// Begins where the batch before it has ended: what is deleted stays in the index for a while, as long
/// as anybody reads in a transaction that began before, and each batch would walk over all of it.
///
/// What a crash undoes is swept again, so nobody waits for the disk.
const SWEEP: &str = "
with due as (
    select ctid as place, sweep_at, state = 'running' and lost = 'hold' as is_to_be_held
    from idempotency.record
    where sweep_at <= statement_timestamp()
        and sweep_at >= coalesce('epoch'::timestamptz + $2 * interval '1 microsecond', '-infinity')
        and (state = 'completed' or state = 'running' and leased_until <= statement_timestamp())
        and (expires_at <= statement_timestamp() or state = 'running' and lost = 'hold')
    order by sweep_at limit $1
    for update skip locked
), held as (
    update idempotency.record set state = 'held', sweep_at = 'infinity'
    where ctid = any (array(select place from due where is_to_be_held))
    returning 1
), deleted as (
    delete from idempotency.record
    where ctid = any (array(select place from due where not is_to_be_held))
    returning 1
)
select (select count(*) from held) as held, (select count(*) from deleted) as deleted,
    (select (extract(epoch from max(sweep_at)) * 1000000)::int8 from due) as until,
    set_config('synchronous_commit', 'off', true)";

/// How far a sweep has come that has not ended: in microseconds since the epoch.
#[derive(Debug, Clone, Default)]
pub(super) struct Sweeping(Arc<Mutex<Option<i64>>>);

impl Sweeping {
    fn until(&self) -> MutexGuard<'_, Option<i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PgStore {
    /// Less than `limit` are swept only where the walk is at its end. The next one begins anew, and finds
    /// what was locked, or has come into the way, behind this one.
    pub(super) async fn sweep(&self, limit: u32) -> Result<Swept, StoreError> {
        let from = self.sweeping.until().take();
        let query = sqlx::query(SWEEP).bind(i64::from(limit)).bind(from);
        let done = self.run(query).await?;
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
            *self.sweeping.until() = row.try_get("until").map_err(error)?;
        }
        Ok(swept)
    }
}
