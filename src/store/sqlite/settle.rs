use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Connection as _, Error, Row as _, Sqlite, SqliteConnection};

use super::SqliteStore;
use super::records::{token, uuid};
use crate::identity::{Identity, RecordId};
use crate::store::lent::error;
use crate::store::protocol::MAX_PAGE;
use crate::store::sql::{HeldRow, shown};
use crate::store::{HeldRecord, LeaseRenewal, Renewed, Resolution, StoreError, Swept, Token};

const EXTEND: &str = "
update idempotency_record set leased_until = unixepoch('subsec') + ?3
where id = ?1 and token = ?2 and state = 'running'";

/// A new token fences whatever the held attempt still does; retention begins anew, for as long as it was.
const RESOLVE_ANSWER: &str = "
update idempotency_record set
    state = 'completed', token = ?3, answer = ?4, progress = null,
    expires_at = now + (expires_at - claimed_at), sweep_at = now + (expires_at - claimed_at)
from (select unixepoch('subsec') as now)
where id = ?1 and token = ?2 and state = 'held'";

const RESOLVE_RELEASE: &str = "
delete from idempotency_record
where id = ?1 and token = ?2 and state = 'held' and progress is null";

/// What has progress is resumed by the next request.
const RESOLVE_RESUME: &str = "
update idempotency_record set
    state = 'running', token = ?3, lost = 'rerun', leased_until = now,
    expires_at = now + (expires_at - claimed_at), sweep_at = now + (expires_at - claimed_at)
from (select unixepoch('subsec') as now)
where id = ?1 and token = ?2 and state = 'held' and progress is not null";

/// Held rows alone have an infinite `sweep_at`, so the index finds them.
const LIST_HELD: &str = "
select id, scope, operation, key, token, attempt, refs, claimed_at
from idempotency_record
where sweep_at = 9e999 and state = 'held' and (?1 is null or id > ?1)
order by id limit ?2";

const DELETE_EXPIRED: &str = "
delete from idempotency_record where id in (
    select id from idempotency_record
    where sweep_at <= unixepoch('subsec') and expires_at <= unixepoch('subsec')
        and (state = 'completed' or state = 'running'
            and lost <> 'hold' and leased_until <= unixepoch('subsec'))
    order by sweep_at limit ?1
)";

const HOLD_LOST: &str = "
update idempotency_record set state = 'held', sweep_at = 9e999 where id in (
    select id from idempotency_record
    where sweep_at <= unixepoch('subsec') and leased_until <= unixepoch('subsec')
        and state = 'running' and lost = 'hold'
    order by sweep_at limit ?1
)";

impl SqliteStore {
    /// In one transaction, which is one write to the disk. SQLite locks the file, never a row, so
    /// none can be stuck by itself.
    pub(super) async fn extend_leases(
        &self,
        leases: &[LeaseRenewal],
    ) -> Result<Vec<Renewed>, StoreError> {
        if leases.is_empty() {
            return Ok(Vec::new());
        }
        let mut connection = self.connection().await?;
        let result = extend(&mut connection, leases).await;
        connection.finish(result)
    }

    pub(super) async fn resolve_held(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let fence = Token::random()?.as_bytes().to_vec();
        let held = |sql| fenced(sql, identity, token);
        let resolved = match resolution {
            Resolution::Answer(answer) => {
                let query = held(RESOLVE_ANSWER).bind(fence).bind(answer.encode());
                self.execute(query).await?
            }
            Resolution::Release => match self.execute(held(RESOLVE_RELEASE)).await? {
                0 => self.execute(held(RESOLVE_RESUME).bind(fence)).await?,
                released => released,
            },
        };
        match resolved {
            0 => Err(StoreError::claim_lost()),
            _ => Ok(()),
        }
    }

    pub(super) async fn select_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        let read = |after: Option<RecordId>| async move {
            let query = sqlx::query(LIST_HELD)
                .bind(after.map(|id| id.as_bytes().to_vec()))
                .bind(limit.min(MAX_PAGE));
            let mut connection = self.connection().await?;
            let result = query.fetch_all(&mut *connection).await;
            let rows = connection.finish(result)?;
            rows.iter().map(|row| Ok(read_held(row)?.show())).collect()
        };
        shown(after, read).await
    }

    /// What is to be held comes when nothing is left to delete: looking for it, each batch would else
    /// walk over all that is.
    pub(super) async fn sweep(&self, limit: u32) -> Result<Swept, StoreError> {
        let delete = sqlx::query(DELETE_EXPIRED).bind(limit);
        let deleted = self.execute(delete).await?;
        if deleted >= u64::from(limit) {
            return Ok(Swept { deleted, held: 0 });
        }
        let hold = sqlx::query(HOLD_LOST).bind(limit);
        let held = self.execute(hold).await?;
        Ok(Swept { deleted, held })
    }
}

async fn extend(
    connection: &mut SqliteConnection,
    leases: &[LeaseRenewal],
) -> Result<Vec<Renewed>, Error> {
    let mut transaction = connection.begin_with("begin immediate").await?;
    let mut renewed = Vec::with_capacity(leases.len());
    for renewal in leases {
        let query = fenced(EXTEND, &renewal.claim.identity, renewal.claim.token)
            .bind(renewal.lease.as_secs_f64());
        let done = query.execute(&mut *transaction).await?;
        renewed.push(match done.rows_affected() {
            0 => Renewed::Lost,
            _ => Renewed::Kept,
        });
    }
    transaction.commit().await?;
    Ok(renewed)
}

pub(super) fn fenced(
    sql: &'static str,
    identity: &Identity,
    token: Token,
) -> Query<'static, Sqlite, SqliteArguments> {
    sqlx::query(sql)
        .bind(identity.id().as_bytes().to_vec())
        .bind(token.as_bytes().to_vec())
}

fn read_held(row: &SqliteRow) -> Result<HeldRow, StoreError> {
    Ok(HeldRow {
        id: RecordId::from_bytes(uuid(row, "id")?),
        identity: identity(row).map_err(error),
        token: token(row),
        attempt: row.try_get("attempt").map_err(error),
        references: row.try_get("refs").map_err(error),
        claimed_at: row.try_get("claimed_at").map_err(error),
    })
}

pub(super) fn identity(row: &SqliteRow) -> Result<Identity, Error> {
    let text = |column| row.try_get::<String, _>(column);
    Ok(Identity::new(
        text("scope")?,
        text("operation")?,
        text("key")?,
    ))
}
