use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::PgStore;
use super::claim::attempt;
use super::types::PgUuid;
use crate::identity::{Identity, RecordId};
use crate::store::lent::error;
use crate::store::protocol::MAX_PAGE;
use crate::store::sql::{HeldRow, shown};
use crate::store::{HeldRecord, Resolution, StoreError, Token};

/// A new token fences whatever the held attempt still does; retention begins anew, for as long as it was.
const RESOLVE_ANSWER: &str = "
update idempotency.record set
    state = 'completed', token = $3, answer = $4, progress = null,
    expires_at = now + (expires_at - claimed_at), sweep_at = now + (expires_at - claimed_at)
from (select clock_timestamp()) as clock (now)
where id = $1 and token = $2 and state = 'held'";

const RESOLVE_RELEASE: &str = "
delete from idempotency.record
where id = $1 and token = $2 and state = 'held' and progress is null";

/// What has progress is resumed by the next request.
const RESOLVE_RESUME: &str = "
update idempotency.record set
    state = 'running', token = $3, lost = 'rerun', leased_until = now,
    expires_at = now + (expires_at - claimed_at), sweep_at = now + (expires_at - claimed_at)
from (select clock_timestamp()) as clock (now)
where id = $1 and token = $2 and state = 'held' and progress is not null";

/// Held rows alone have `sweep_at = 'infinity'`, so the index finds them. Apart, by `offset`: a planner
/// that believes in many, or in an empty table, would walk through all records in the order of their ids.
const LIST_HELD: &str = "
select id, scope, operation, key, token, attempt, refs,
    date_part('epoch', claimed_at) as claimed_at
from (
    select * from idempotency.record where sweep_at = 'infinity' and state = 'held' offset 0
) as held
where $1::uuid is null or id > $1
order by id limit $2";

impl PgStore {
    pub(super) async fn resolve_held(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let fence = PgUuid::from(Token::random()?);
        let held = |sql| {
            sqlx::query(sql)
                .bind(PgUuid::from(identity.id()))
                .bind(PgUuid::from(token))
        };
        let is_resolved = match resolution {
            Resolution::Answer(answer) => {
                let query = held(RESOLVE_ANSWER).bind(fence).bind(answer.encode());
                self.changes_one(query).await?
            }
            Resolution::Release => {
                self.changes_one(held(RESOLVE_RELEASE)).await?
                    || self.changes_one(held(RESOLVE_RESUME).bind(fence)).await?
            }
        };
        is_resolved.then_some(()).ok_or_else(StoreError::claim_lost)
    }

    pub(super) async fn select_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        let read = |after: Option<RecordId>| async move {
            let query = sqlx::query(LIST_HELD)
                .bind(after.map(PgUuid::from))
                .bind(i64::from(limit.min(MAX_PAGE)));
            let rows = self.run(query).await?.rows;
            rows.iter().map(|row| Ok(read_held(row)?.show())).collect()
        };
        shown(after, read).await
    }
}

fn read_held(row: &PgRow) -> Result<HeldRow, StoreError> {
    let uuid = |column| row.try_get::<PgUuid, _>(column).map_err(error);
    Ok(HeldRow {
        id: RecordId::from_bytes(uuid("id")?.0),
        identity: identity(row).map_err(error),
        token: uuid("token").map(|token| Token::from_bytes(token.0)),
        attempt: attempt(row),
        references: row.try_get("refs").map_err(error),
        claimed_at: row.try_get("claimed_at").map_err(error),
    })
}

pub(super) fn identity(row: &PgRow) -> Result<Identity, sqlx::Error> {
    let text = |column| row.try_get::<String, _>(column);
    Ok(Identity::new(
        text("scope")?,
        text("operation")?,
        text("key")?,
    ))
}
