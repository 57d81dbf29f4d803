use std::time::SystemTime;

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Row as _, Sqlite};

use super::SqliteStore;
use super::settle::fenced;
use crate::extract::References;
use crate::identity::Identity;
use crate::policy::Lost;
use crate::store::lent::error;
use crate::store::protocol::{Inserted, Records, Row, State, Takeover};
use crate::store::sql::{left, time};
use crate::store::{Claim, ClaimRequest, Completion, StoreError, Token};

/// Names the newest column, as on PostgreSQL: on an older table the claim is what fails.
const INSERT: &str = "
insert into idempotency_record (
    id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at, progress
)
select ?1, ?2, ?3, ?4, ?5, 'running', ?6, 1, ?7, ?8,
    now, now + ?9, now + ?10, now + case ?7 when 'hold' then ?9 else ?10 end, null
from (select unixepoch('subsec') as now)
where true
on conflict (id) do nothing
returning expires_at";

const SELECT: &str = "
select digest, state, token, attempt, lost, abandoned, fingerprint, refs, answer,
    leased_until - unixepoch('subsec') as lease_left,
    expires_at <= unixepoch('subsec') as expired, expires_at,
    expires_at - unixepoch('subsec') as retention_left
from idempotency_record where id = ?1";

/// The first attempt of a new operation begins without what the old one had.
const TAKE_OVER: &str = "
update idempotency_record set
    state = 'running', token = ?2, attempt = ?3, lost = ?4, fingerprint = ?5,
    claimed_at = now, leased_until = now + ?6, expires_at = now + ?7,
    sweep_at = now + case ?4 when 'hold' then ?6 else ?7 end,
    refs = case when ?3 > 1 then refs end, progress = case when ?3 > 1 then progress end,
    answer = null, abandoned = ?9
from (select unixepoch('subsec') as now)
where id = ?1 and token = ?8 and (
    state = 'running' and leased_until <= now
    or state = 'completed' and expires_at <= now
)
returning expires_at";

const HOLD_LOST: &str = "
update idempotency_record set state = 'held', sweep_at = 9e999
where id = ?1 and token = ?2 and state = 'running' and leased_until <= unixepoch('subsec')";

/// What was held, or is over, would be forgotten with its answer: retention begins anew.
const UPDATE_COMPLETED: &str = "
update idempotency_record set
    state = 'completed', answer = ?3, refs = coalesce(?4, refs), progress = null,
    expires_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end,
    sweep_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end
from (select unixepoch('subsec') as now)
where id = ?1 and token = ?2 and state in ('running', 'held')";

const DELETE_CLAIMED: &str = "
delete from idempotency_record
where id = ?1 and token = ?2 and progress is null
    and (state = 'held' or state = 'running' and not abandoned)";

/// Finished phases are not undone: what has progress is resumed, whatever becomes of lost attempts.
const GIVE_UP: &str = "
update idempotency_record set
    state = 'running', leased_until = now, lost = case when abandoned then lost else 'rerun' end,
    expires_at = case state when 'running' then expires_at else now + (expires_at - claimed_at) end,
    sweep_at = case state when 'running' then expires_at else now + (expires_at - claimed_at) end
from (select unixepoch('subsec') as now)
where id = ?1 and token = ?2 and (
    state = 'running' and abandoned or state in ('running', 'held') and progress is not null
)";

const UPDATE_HELD: &str = "
update idempotency_record set state = 'held', refs = coalesce(?3, refs), sweep_at = 9e999
where id = ?1 and token = ?2 and state in ('running', 'held')";

impl Records for SqliteStore {
    async fn insert(&self, request: &ClaimRequest) -> Result<Inserted, StoreError> {
        let identity = &request.identity;
        let query = sqlx::query(INSERT)
            .bind(identity.id().as_bytes().to_vec())
            .bind(identity.digest().to_vec())
            .bind(identity.scope())
            .bind(identity.operation())
            .bind(identity.key())
            .bind(request.token.as_bytes().to_vec())
            .bind(request.lost.as_sql())
            .bind(request.fingerprint.to_bytes())
            .bind(request.lease.as_secs_f64())
            .bind(request.ttl.as_secs_f64());
        let inserted = self.returned(query).await?;
        Ok(inserted.map_or(Inserted::Taken, Inserted::Until))
    }

    async fn select(&self, identity: &Identity) -> Result<Option<Row>, StoreError> {
        let query = sqlx::query(SELECT).bind(identity.id().as_bytes().to_vec());
        let mut connection = self.connection().await?;
        let result = query.fetch_optional(&mut *connection).await;
        connection.finish(result)?.map(|row| read(&row)).transpose()
    }

    async fn take_over(
        &self,
        request: &ClaimRequest,
        old: Token,
        takeover: Takeover,
    ) -> Result<Option<SystemTime>, StoreError> {
        let query = sqlx::query(TAKE_OVER)
            .bind(request.identity.id().as_bytes().to_vec())
            .bind(request.token.as_bytes().to_vec())
            .bind(takeover.attempt)
            .bind(takeover.lost(request).as_sql())
            .bind(request.fingerprint.to_bytes())
            .bind(request.lease.as_secs_f64())
            .bind(request.ttl.as_secs_f64())
            .bind(old.as_bytes().to_vec())
            .bind(takeover.abandoned);
        self.returned(query).await
    }

    async fn hold_lost(&self, identity: &Identity, token: Token) -> Result<bool, StoreError> {
        Ok(self.execute(fenced(HOLD_LOST, identity, token)).await? == 1)
    }

    async fn update_completed(
        &self,
        claim: &Claim,
        completion: &Completion,
    ) -> Result<bool, StoreError> {
        let query = fenced(UPDATE_COMPLETED, &claim.identity, claim.token)
            .bind(completion.answer.encode())
            .bind(completion.references.to_json());
        Ok(self.execute(query).await? == 1)
    }

    async fn delete_claimed(&self, claim: &Claim) -> Result<bool, StoreError> {
        let query = fenced(DELETE_CLAIMED, &claim.identity, claim.token);
        Ok(self.execute(query).await? == 1)
    }

    async fn give_up(&self, claim: &Claim) -> Result<bool, StoreError> {
        let query = fenced(GIVE_UP, &claim.identity, claim.token);
        Ok(self.execute(query).await? == 1)
    }

    async fn update_held(
        &self,
        claim: &Claim,
        references: &References,
    ) -> Result<bool, StoreError> {
        let query = fenced(UPDATE_HELD, &claim.identity, claim.token).bind(references.to_json());
        Ok(self.execute(query).await? == 1)
    }
}

impl SqliteStore {
    /// The time a statement returned. `fetch_optional` would stop at the first row, and never hear
    /// that the commit after it failed.
    async fn returned(
        &self,
        query: Query<'_, Sqlite, SqliteArguments>,
    ) -> Result<Option<SystemTime>, StoreError> {
        let mut connection = self.connection().await?;
        let result = query.fetch_all(&mut *connection).await;
        let rows = connection.finish(result)?;
        let expires_at = rows.first().map(|row| row.try_get(0)).transpose();
        expires_at.map_err(error)?.map(time).transpose()
    }
}

fn read(row: &SqliteRow) -> Result<Row, StoreError> {
    Ok(Row {
        digest: row.try_get("digest").map_err(error)?,
        state: State::from_sql(row.try_get("state").map_err(error)?)?,
        token: token(row)?,
        attempt: row.try_get("attempt").map_err(error)?,
        lost: Lost::from_sql(row.try_get("lost").map_err(error)?)?,
        abandoned: row.try_get("abandoned").map_err(error)?,
        fingerprint: row.try_get("fingerprint").map_err(error)?,
        lease_left: left(row.try_get("lease_left").map_err(error)?)?,
        expired: row.try_get("expired").map_err(error)?,
        expires_at: time(row.try_get("expires_at").map_err(error)?)?,
        retention_left: left(row.try_get("retention_left").map_err(error)?)?.unwrap_or_default(),
        answer: row.try_get("answer").map_err(error)?,
        references: row.try_get("refs").map_err(error)?,
    })
}

pub(super) fn token(row: &SqliteRow) -> Result<Token, StoreError> {
    uuid(row, "token").map(Token::from_bytes)
}

pub(super) fn uuid(row: &SqliteRow, column: &str) -> Result<[u8; 16], StoreError> {
    let bytes: Vec<u8> = row.try_get(column).map_err(error)?;
    let bytes = bytes.try_into();
    bytes.map_err(|_| StoreError::corrupt("id or token is not 16 bytes long"))
}
