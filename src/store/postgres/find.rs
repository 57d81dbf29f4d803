use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::PgStore;
use super::claim::attempt;
use super::held::identity;
use super::types::PgUuid;
use crate::identity::{Identity, RecordId};
use crate::store::lent::error;
use crate::store::protocol::{self, MAX_PAGE, State};
use crate::store::sql::time;
use crate::store::{RecordSummary, StoreError, Within};

/// The status is in the first bytes of the answer.
const INSPECT: &str = "
select scope, operation, key, state, attempt, refs, substring(answer for 4) as head,
    date_part('epoch', claimed_at) as claimed_at,
    date_part('epoch', expires_at) as expires_at
from idempotency.record
where id = $1 and not (expires_at <= clock_timestamp() and (state = 'completed'
    or state = 'running' and lost <> 'hold' and leased_until <= clock_timestamp()))";

/// Found by the index of references first: for a small page a planner that believes in many matches
/// would walk through all records in the order of their ids.
const FIND_BY_REFERENCE: &str = "
with found as materialized (
    select * from idempotency.record
    where refs is not null
        and idempotency.reference_entries(refs) @> array[idempotency.reference_entry($2, $3)]
        and ($1::text is null or scope = $1) and ($4::uuid is null or id > $4)
)
select scope, operation, key, state, attempt, refs, substring(answer for 4) as head,
    date_part('epoch', claimed_at) as claimed_at,
    date_part('epoch', expires_at) as expires_at
from found
where not (expires_at <= clock_timestamp() and (state = 'completed'
    or state = 'running' and lost <> 'hold' and leased_until <= clock_timestamp()))
order by id limit $5";

impl PgStore {
    pub(super) async fn select_summary(
        &self,
        identity: &Identity,
    ) -> Result<Option<RecordSummary>, StoreError> {
        let query = sqlx::query(INSPECT).bind(PgUuid::from(identity.id()));
        self.run(query).await?.rows.first().map(read).transpose()
    }

    pub(super) async fn select_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        // No text of PostgreSQL has one, so no record does.
        if [kind, id, within.scope().unwrap_or_default()]
            .iter()
            .any(|text| text.contains('\0'))
        {
            return Ok(Vec::new());
        }
        let query = sqlx::query(FIND_BY_REFERENCE)
            .bind(within.scope())
            .bind(kind)
            .bind(id)
            .bind(after.map(PgUuid::from))
            .bind(i64::from(limit.min(MAX_PAGE)));
        self.run(query).await?.rows.iter().map(read).collect()
    }
}

fn read(row: &PgRow) -> Result<RecordSummary, StoreError> {
    let state = State::from_sql(row.try_get("state").map_err(error)?)?;
    let head: Option<&[u8]> = row.try_get("head").map_err(error)?;
    let references: Option<&str> = row.try_get("refs").map_err(error)?;
    Ok(RecordSummary {
        identity: identity(row).map_err(error)?,
        state: protocol::state(state, head)?,
        attempt: attempt(row)?,
        references: protocol::references(references)?,
        claimed_at: time(row.try_get("claimed_at").map_err(error)?)?,
        expires_at: time(row.try_get("expires_at").map_err(error)?)?,
    })
}
