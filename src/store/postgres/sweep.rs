use super::PgStore;
use crate::store::{StoreError, Swept};

/// By physical place, in the order of the index, and around rows that somebody has locked. The
/// start of the statement is a time that the planner knows, which lets it use the index, and it is
/// never later than the clock.
const DELETE_EXPIRED: &str = "
delete from idempotency.record where ctid = any (array(
    select ctid from idempotency.record
    where sweep_at <= statement_timestamp() and expires_at <= statement_timestamp()
        and (state = 'completed' or state = 'running'
            and lost <> 'hold' and leased_until <= statement_timestamp())
    order by sweep_at limit $1
    for update skip locked
))";

const HOLD_LOST: &str = "
update idempotency.record set state = 'held', sweep_at = 'infinity' where ctid = any (array(
    select ctid from idempotency.record
    where sweep_at <= statement_timestamp() and leased_until <= statement_timestamp()
        and state = 'running' and lost = 'hold'
    order by sweep_at limit $1
    for update skip locked
))";

impl PgStore {
    pub(super) async fn sweep(&self, limit: u32) -> Result<Swept, StoreError> {
        Ok(Swept {
            held: self.sweep_with(HOLD_LOST, limit).await?,
            deleted: self.sweep_with(DELETE_EXPIRED, limit).await?,
        })
    }

    async fn sweep_with(&self, sql: &'static str, limit: u32) -> Result<u64, StoreError> {
        let query = sqlx::query(sql).bind(i64::from(limit));
        Ok(self.run(query).await?.affected)
    }
}
