use sqlx::{Executor, Postgres, query::Query};

use super::PgStore;
use crate::store::{StoreError, Swept};

/// By physical place, in the order of the index, and around rows that somebody has locked. The
/// sub-select for the clock is evaluated once, which lets the index be used.
const DELETE_EXPIRED: &str = "
delete from idempotency.record where ctid = any (array(
    select ctid from idempotency.record
    where sweep_at <= (select clock_timestamp()) and expires_at <= (select clock_timestamp())
        and (state = 'completed' or state = 'running'
            and lost <> 'hold' and leased_until <= (select clock_timestamp()))
    order by sweep_at limit $1
    for update skip locked
))";

const HOLD_LOST: &str = "
update idempotency.record set state = 'held', sweep_at = 'infinity' where ctid = any (array(
    select ctid from idempotency.record
    where sweep_at <= (select clock_timestamp()) and leased_until <= (select clock_timestamp())
        and state = 'running' and lost = 'hold'
    order by sweep_at limit $1
    for update skip locked
))";

impl PgStore {
    pub(super) async fn sweep(&self, limit: u32) -> Result<Swept, StoreError> {
        Ok(Swept {
            held: self
                .rows_changed(sqlx::query(HOLD_LOST).bind(i64::from(limit)))
                .await?,
            deleted: self
                .rows_changed(sqlx::query(DELETE_EXPIRED).bind(i64::from(limit)))
                .await?,
        })
    }

    async fn rows_changed(
        &self,
        query: Query<'_, Postgres, sqlx::postgres::PgArguments>,
    ) -> Result<u64, StoreError> {
        let mut connection = self.connection().await?;
        let query = query.persistent(self.persistent);
        let result = (&mut *connection).execute(query).await;
        Ok(connection.finish(result)?.rows_affected())
    }
}
