use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Postgres, Row as _};

use super::PgStore;
use super::connection::Done;
use super::group::Complete;
use super::types::PgUuid;
use crate::extract::References;
use crate::identity::RecordId;
use crate::store::{Claim, Completion, StoreError};

/// What was held, or is over, would be forgotten with its answer: retention begins anew.
const UPDATE_COMPLETED: &str = "
update idempotency.record set
    state = 'completed', answer = $3, refs = coalesce($4, refs), progress = null,
    expires_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end,
    sweep_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end
from (select clock_timestamp()) as clock (now)
where id = $1 and token = $2 and state in ('running', 'held')
returning waited";

const DELETE_CLAIMED: &str = "
delete from idempotency.record
where id = $1 and token = $2 and progress is null
    and (state = 'held' or state = 'running' and not abandoned)
returning waited";

/// Finished phases are not undone: what has progress is resumed, whatever becomes of lost attempts.
const GIVE_UP: &str = "
update idempotency.record set
    state = 'running', leased_until = now, lost = case when abandoned then lost else 'rerun' end,
    expires_at = case state when 'running' then expires_at else now + (expires_at - claimed_at) end,
    sweep_at = case state when 'running' then expires_at else now + (expires_at - claimed_at) end
from (select clock_timestamp()) as clock (now)
where id = $1 and token = $2 and (
    state = 'running' and abandoned or state in ('running', 'held') and progress is not null
)
returning waited";

const UPDATE_HELD: &str = "
update idempotency.record set state = 'held', refs = coalesce($3, refs), sweep_at = 'infinity'
where id = $1 and token = $2 and state in ('running', 'held')
returning waited";

impl PgStore {
    pub(super) async fn give_up(&self, claim: &Claim) -> Result<bool, StoreError> {
        self.ends(claim, fenced(GIVE_UP, claim)).await
    }

    pub(super) async fn update_held(
        &self,
        claim: &Claim,
        references: &References,
    ) -> Result<bool, StoreError> {
        let query = fenced(UPDATE_HELD, claim).bind(references.to_json());
        self.ends(claim, query).await
    }

    /// Whether the statement changed its row; ids are unique, so there is one at most.
    pub(super) async fn changes_one(
        &self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<bool, StoreError> {
        Ok(self.run(query).await?.affected == 1)
    }

    /// The same for a statement that ends an attempt, and says whether somebody waits for that.
    pub(super) async fn ends(
        &self,
        claim: &Claim,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<bool, StoreError> {
        let done = self.run(query).await?;
        Ok(self.ended(claim.identity.id(), &done))
    }

    /// Whether such a statement has ended it.
    pub(super) fn ended(&self, id: RecordId, done: &Done) -> bool {
        let is_waited = |row: &PgRow| row.try_get("waited").unwrap_or(false);
        if done.rows.iter().any(is_waited) {
            self.wake([id]);
        }
        done.affected == 1
    }
}

impl Complete {
    pub(super) fn new(claim: &Claim, completion: &Completion) -> Self {
        Self {
            claim: claim.clone(),
            answer: completion.answer.encode(),
            references: completion.references.to_json(),
        }
    }
}

pub(super) fn update(complete: &Complete) -> Query<'_, Postgres, PgArguments> {
    fenced(UPDATE_COMPLETED, &complete.claim)
        .bind(complete.answer.as_slice())
        .bind(complete.references.as_deref())
}

pub(super) fn delete(claim: &Claim) -> Query<'static, Postgres, PgArguments> {
    fenced(DELETE_CLAIMED, claim)
}

fn fenced(sql: &'static str, claim: &Claim) -> Query<'static, Postgres, PgArguments> {
    sqlx::query(sql)
        .bind(PgUuid::from(claim.identity.id()))
        .bind(PgUuid::from(claim.token))
}
