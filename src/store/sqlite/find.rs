use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use super::settle::identity;
use crate::identity::{Identity, RecordId};
use crate::store::lent::error;
use crate::store::protocol::{self, MAX_PAGE, State};
use crate::store::sql::time;
use crate::store::{RecordSummary, StoreError, Within};

/// The status is in the first bytes of the answer.
const INSPECT: &str = "
select scope, operation, key, state, attempt, refs, substr(answer, 1, 4) as head,
    claimed_at, expires_at
from idempotency_record
where id = ?1 and not (expires_at <= unixepoch('subsec') and (state = 'completed'
    or state = 'running' and lost <> 'hold' and leased_until <= unixepoch('subsec')))";

const FIND_BY_REFERENCE: &str = "
select scope, operation, key, state, attempt, refs, substr(answer, 1, 4) as head,
    claimed_at, expires_at
from idempotency_reference as entry
join idempotency_record as record on record.id = entry.id
where entry.kind = ?2 and entry.reference = ?3
    and (?1 is null or scope = ?1) and (?4 is null or entry.id > ?4)
    and not (expires_at <= unixepoch('subsec') and (state = 'completed'
        or state = 'running' and lost <> 'hold' and leased_until <= unixepoch('subsec')))
order by entry.id limit ?5";

impl SqliteStore {
    pub(super) async fn select_summary(
        &self,
        identity: &Identity,
    ) -> Result<Option<RecordSummary>, StoreError> {
        let query = sqlx::query(INSPECT).bind(identity.id().as_bytes().to_vec());
        let mut connection = self.connection().await?;
        let result = query.fetch_optional(&mut *connection).await;
        connection.finish(result)?.as_ref().map(read).transpose()
    }

    pub(super) async fn select_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        let query = sqlx::query(FIND_BY_REFERENCE)
            .bind(within.scope())
            .bind(kind)
            .bind(id)
            .bind(after.map(|id| id.as_bytes().to_vec()))
            .bind(limit.min(MAX_PAGE));
        let mut connection = self.connection().await?;
        let result = query.fetch_all(&mut *connection).await;
        connection.finish(result)?.iter().map(read).collect()
    }
}

fn read(row: &SqliteRow) -> Result<RecordSummary, StoreError> {
    let state = State::from_sql(row.try_get("state").map_err(error)?)?;
    let head: Option<&[u8]> = row.try_get("head").map_err(error)?;
    let references: Option<&str> = row.try_get("refs").map_err(error)?;
    Ok(RecordSummary {
        identity: identity(row).map_err(error)?,
        state: protocol::state(state, head)?,
        attempt: row.try_get("attempt").map_err(error)?,
        references: protocol::references(references)?,
        claimed_at: time(row.try_get("claimed_at").map_err(error)?)?,
        expires_at: time(row.try_get("expires_at").map_err(error)?)?,
    })
}
