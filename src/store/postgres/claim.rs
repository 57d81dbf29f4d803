use std::time::{Duration, SystemTime};

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Postgres, Row as _};
use tokio::time::timeout;

use super::PgStore;
use super::connection::{Done, is_locked};
use super::group::{Complete, Delete, Insert, Select};
use super::settle::{delete, update};
use super::types::PgUuid;
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::Identity;
use crate::policy::Lost;
use crate::store::lent::error;
use crate::store::protocol::{Inserted, Records, Row, State, Takeover};
use crate::store::sql::{left, time};
use crate::store::{Claim, ClaimRequest, Completion, StoreError, Token};

/// Names the newest column, which only what ends an attempt reads: on an older schema the claim is what
/// fails, before the handler has run.
const INSERT: &str = "
insert into idempotency.record (
    id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at, waited
)
select $1, $2, $3, $4, $5, 'running', $6, 1, $7, $8,
    now, now + make_interval(secs => $9), now + make_interval(secs => $10),
    now + make_interval(secs => case $7 when 'hold' then $9 else $10 end), false
from (select clock_timestamp()) as clock (now)
on conflict (id) do nothing
returning date_part('epoch', expires_at)";

/// Everything of a record, in one snapshot.
macro_rules! records {
    ($answer:literal) => {
        concat!(
            "
select id, digest, state, token, attempt, lost, abandoned, fingerprint, refs, ",
            $answer,
            ",
    date_part('epoch', leased_until) - date_part('epoch', clock_timestamp()) as lease_left,
    expires_at <= clock_timestamp() as expired,
    date_part('epoch', expires_at) - date_part('epoch', clock_timestamp()) as retention_left,
    date_part('epoch', expires_at) as expires_at
from idempotency.record"
        )
    };
}
pub(super) use records;

const SELECT: &str = concat!(records!("answer"), " where id = $1");

/// Passes over a record that somebody has locked, as does the next: those who retry a record that is
/// locked for long would else take up every connection, and hold up all other records.
///
/// The first attempt of a new operation begins without what the old one had.
const TAKE_OVER: &str = "
update idempotency.record set
    state = 'running', token = $2, attempt = $3, lost = $4, fingerprint = $5,
    claimed_at = now, leased_until = now + make_interval(secs => $6),
    expires_at = now + make_interval(secs => $7),
    sweep_at = now + make_interval(secs => case $4 when 'hold' then $6 else $7 end),
    refs = case when $3 > 1 then refs end, progress = case when $3 > 1 then progress end,
    answer = null, abandoned = $9, waited = false
from (select clock_timestamp()) as clock (now)
where id = (
    select id from idempotency.record
    where id = $1 and token = $8 and (
        state = 'running' and leased_until <= clock_timestamp()
        or state = 'completed' and expires_at <= clock_timestamp()
    )
    for update skip locked
)
returning date_part('epoch', expires_at)";

const UNLOCKED: &str = "
select from idempotency.record where id = $1 for no key update skip locked";

const HOLD_LOST: &str = "
update idempotency.record set state = 'held', sweep_at = 'infinity'
where id = (
    select id from idempotency.record
    where id = $1 and token = $2 and state = 'running' and leased_until <= clock_timestamp()
    for update skip locked
)";

impl Records for PgStore {
    fn expects_a_record(&self) -> bool {
        self.group
            .as_ref()
            .is_some_and(|group| group.expects_a_record())
    }

    async fn insert(&self, request: &ClaimRequest) -> Result<Inserted, StoreError> {
        match &self.group {
            Some(group) => group.submit(Insert(request.clone())).await,
            None => self.insert_alone(request).await,
        }
    }

    async fn select(&self, identity: &Identity) -> Result<Option<Row>, StoreError> {
        match &self.group {
            Some(group) => group.submit(Select(identity.clone())).await,
            None => self.select_alone(identity).await,
        }
    }

    async fn take_over(
        &self,
        request: &ClaimRequest,
        old: Token,
        takeover: Takeover,
    ) -> Result<Option<SystemTime>, StoreError> {
        let query = sqlx::query(TAKE_OVER)
            .bind(PgUuid::from(request.identity.id()))
            .bind(PgUuid::from(request.token))
            .bind(i32::try_from(takeover.attempt).unwrap_or(i32::MAX))
            .bind(takeover.lost(request).as_sql())
            .bind(request.fingerprint.to_bytes())
            .bind(request.lease.as_secs_f64())
            .bind(request.ttl.as_secs_f64())
            .bind(PgUuid::from(old))
            .bind(takeover.abandoned);
        returned(&self.run(query).await?)
    }

    async fn hold_lost(&self, identity: &Identity, token: Token) -> Result<bool, StoreError> {
        let query = sqlx::query(HOLD_LOST)
            .bind(PgUuid::from(identity.id()))
            .bind(PgUuid::from(token));
        self.changes_one(query).await
    }

    async fn update_completed(
        &self,
        claim: &Claim,
        completion: &Completion,
    ) -> Result<bool, StoreError> {
        let complete = Complete::new(claim, completion);
        match &self.group {
            Some(group) => group.submit(complete).await,
            None => self.ends(claim, update(&complete)).await,
        }
    }

    async fn delete_claimed(&self, claim: &Claim) -> Result<bool, StoreError> {
        match &self.group {
            Some(group) => group.submit(Delete(claim.clone())).await,
            None => self.ends(claim, delete(claim)).await,
        }
    }

    async fn give_up(&self, claim: &Claim) -> Result<bool, StoreError> {
        self.give_up(claim).await
    }

    async fn update_held(
        &self,
        claim: &Claim,
        references: &References,
    ) -> Result<bool, StoreError> {
        self.update_held(claim, references).await
    }

    /// An insert waits for one that is under way, and a takeover has the record locked.
    async fn is_settled(&self, identity: &Identity) -> Result<bool, StoreError> {
        let _turn = self.settling.acquire().await;
        Ok(self.probe(identity).await? || self.is_unlocked(identity).await?)
    }
}

impl PgStore {
    pub(super) async fn insert_alone(
        &self,
        request: &ClaimRequest,
    ) -> Result<Inserted, StoreError> {
        match self.try_run(insert(request)).await {
            Err(locked) if is_locked(&locked) => Ok(Inserted::Undecided),
            done => inserted(&done.map_err(error)?).map_err(error),
        }
    }

    pub(super) async fn select_alone(
        &self,
        identity: &Identity,
    ) -> Result<Option<Row>, StoreError> {
        let done = self.run(select(identity)).await?;
        done.rows.first().map(read).transpose()
    }

    /// Whether the identity has no record, committed or about to be. What is inserted waits for a record
    /// under the same id that is not committed yet, and is never committed itself: that would be a claim of
    /// nobody's.
    pub(super) async fn probe(&self, identity: &Identity) -> Result<bool, StoreError> {
        let probe = ClaimRequest {
            identity: identity.clone(),
            fingerprint: Fingerprint::of_bytes(b""),
            token: Token::random()?,
            lost: Lost::Rerun,
            lease: Duration::ZERO,
            ttl: Duration::ZERO,
        };
        let mut connection = self.connection().await?;
        let inserted = async {
            let mut transaction = self.begin(&mut connection).await?;
            let query = insert(&probe).persistent(false);
            let inserted = query.fetch_optional(&mut *transaction).await?;
            transaction.rollback().await?;
            Ok(inserted.is_some())
        };
        let inserted = timeout(self.patience, inserted).await;
        let inserted = inserted.unwrap_or_else(|silent| Err(sqlx::Error::Io(silent.into())));
        if inserted.as_ref().map_or_else(is_locked, |_| true) {
            connection.keep();
        }
        inserted.map_err(error)
    }

    async fn is_unlocked(&self, identity: &Identity) -> Result<bool, StoreError> {
        let query = sqlx::query(UNLOCKED).bind(PgUuid::from(identity.id()));
        Ok(!self.run(query).await?.rows.is_empty())
    }
}

pub(super) fn select(identity: &Identity) -> Query<'static, Postgres, PgArguments> {
    sqlx::query(SELECT).bind(PgUuid::from(identity.id()))
}

pub(super) fn insert(request: &ClaimRequest) -> Query<'_, Postgres, PgArguments> {
    let identity = &request.identity;
    sqlx::query(INSERT)
        .bind(PgUuid::from(identity.id()))
        .bind(identity.digest().as_slice())
        .bind(identity.scope())
        .bind(identity.operation())
        .bind(identity.key())
        .bind(PgUuid::from(request.token))
        .bind(request.lost.as_sql())
        .bind(request.fingerprint.to_bytes())
        .bind(request.lease.as_secs_f64())
        .bind(request.ttl.as_secs_f64())
}

pub(super) fn inserted(done: &Done) -> Result<Inserted, sqlx::Error> {
    let until = returned(done).map_err(|error| sqlx::Error::Decode(error.into()))?;
    Ok(until.map_or(Inserted::Taken, Inserted::Until))
}

fn returned(done: &Done) -> Result<Option<SystemTime>, StoreError> {
    let expires_at = done.rows.first().map(|row| row.try_get(0)).transpose();
    expires_at.map_err(error)?.map(time).transpose()
}

pub(super) fn read(row: &PgRow) -> Result<Row, StoreError> {
    Ok(Row {
        digest: row.try_get("digest").map_err(error)?,
        state: State::from_sql(row.try_get("state").map_err(error)?)?,
        token: Token::from_bytes(row.try_get::<PgUuid, _>("token").map_err(error)?.0),
        attempt: attempt(row)?,
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

pub(super) fn attempt(row: &PgRow) -> Result<u32, StoreError> {
    let attempt: i32 = row.try_get("attempt").map_err(error)?;
    u32::try_from(attempt).map_err(StoreError::corrupt)
}
