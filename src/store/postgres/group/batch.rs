//! The statements of [`protocol`](crate::store::protocol) for many records at once. They lock in the
//! order of ids, and pass over what somebody else has locked: two of them never wait for each other.

use std::collections::{HashMap, VecDeque};

use sqlx::postgres::PgRow;
use sqlx::{Error, Row as _};

use super::queue::{Job, Queues, Request};
use super::writer::Line;
use crate::identity::{Identity, RecordId};
use crate::store::postgres::PgStore;
use crate::store::postgres::claim::{insert, inserted, read, records, select};
use crate::store::postgres::settle::{delete, update};
use crate::store::postgres::types::PgUuid;
use crate::store::protocol::{Inserted, Row};
use crate::store::sql::time;
use crate::store::{Claim, ClaimRequest, StoreError};

/// Names the newest column, as the single one does.
const INSERT: &str = "
insert into idempotency.record (
    id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at, waited
)
select id, digest, scope, operation, key, 'running', token, 1, lost, fingerprint,
    now, now + make_interval(secs => lease), now + make_interval(secs => ttl),
    now + make_interval(secs => case lost when 'hold' then lease else ttl end), false
from unnest($1::uuid[], $2::bytea[], $3::text[], $4::text[], $5::text[], $6::uuid[], $7::text[],
        $8::bytea[], $9::float8[], $10::float8[])
    as claim (id, digest, scope, operation, key, token, lost, fingerprint, lease, ttl),
    (select clock_timestamp()) as clock (now)
order by id
on conflict (id) do nothing
returning id, token, extract(epoch from expires_at)::float8";

const SELECT: &str = concat!(records!(), " where id = any ($1::uuid[])");

const UPDATE_COMPLETED: &str = "
with due as (
    select record.id, done.token, done.answer, done.refs
    from unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::text[]) as done (id, token, answer, refs)
    join idempotency.record on record.id = done.id
        and record.token = done.token and record.state in ('running', 'held')
    order by record.id
    for no key update of record skip locked
)
update idempotency.record set
    state = 'completed', answer = due.answer, refs = coalesce(due.refs, record.refs), progress = null,
    expires_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end,
    sweep_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end
from due, (select clock_timestamp()) as clock (now)
where record.id = due.id and record.token = due.token and state in ('running', 'held')
returning record.id, waited";

const DELETE_CLAIMED: &str = "
with due as (
    select record.id, claim.token
    from unnest($1::uuid[], $2::uuid[]) as claim (id, token)
    join idempotency.record on record.id = claim.id and record.token = claim.token
        and progress is null and (state = 'held' or state = 'running' and not abandoned)
    order by record.id
    for update of record skip locked
)
delete from idempotency.record using due
where record.id = due.id and record.token = due.token
returning record.id, waited";

#[derive(Debug)]
pub(in crate::store::postgres) struct Insert(pub(in crate::store::postgres) ClaimRequest);

#[derive(Debug)]
pub(in crate::store::postgres) struct Select(pub(in crate::store::postgres) Identity);

/// A completion, as it is written.
#[derive(Debug)]
pub(in crate::store::postgres) struct Complete {
    pub(in crate::store::postgres) claim: Claim,
    pub(in crate::store::postgres) answer: Vec<u8>,
    pub(in crate::store::postgres) references: Option<String>,
}

#[derive(Debug)]
pub(in crate::store::postgres) struct Delete(pub(in crate::store::postgres) Claim);

impl Request for Insert {
    type Answer = Inserted;

    fn id(&self) -> RecordId {
        self.0.identity.id()
    }

    fn queue(queues: &mut Queues) -> &mut VecDeque<Job<Self>> {
        &mut queues.insertions
    }

    async fn together(claims: &[&Self], line: &mut Line) -> Result<Vec<Option<Inserted>>, Error> {
        if let [Self(claim)] = claims {
            return Ok(vec![Some(inserted(&line.run(insert(claim)).await?)?)]);
        }
        let of = |claim: &&Self| claim.0.identity.clone();
        let identities: Vec<_> = claims.iter().map(of).collect();
        let query = sqlx::query(INSERT)
            .bind(ids(claims))
            .bind(column(&identities, |of| of.digest().as_slice()))
            .bind(column(&identities, Identity::scope))
            .bind(column(&identities, Identity::operation))
            .bind(column(&identities, Identity::key))
            .bind(column(claims, |claim| PgUuid::from(claim.0.token)))
            .bind(column(claims, |claim| claim.0.lost.as_sql()))
            .bind(column(claims, |claim| claim.0.fingerprint.to_bytes()))
            .bind(column(claims, |claim| claim.0.lease.as_secs_f64()))
            .bind(column(claims, |claim| claim.0.ttl.as_secs_f64()));
        let done = line.run(query).await?;
        let mut made = HashMap::with_capacity(done.rows.len());
        for row in &done.rows {
            let key: (PgUuid, PgUuid) = (row.try_get(0)?, row.try_get(1)?);
            made.insert(key, row.try_get::<f64, _>(2)?);
        }
        let answer = |claim: &&Self| {
            let key = (claim.id().into(), claim.0.token.into());
            let until = made
                .get(&key)
                .map(|until| time(*until).map(Inserted::Until));
            let answer = until.unwrap_or(Ok(Inserted::Taken)).map_err(unreadable)?;
            Ok(Some(answer))
        };
        claims.iter().map(answer).collect()
    }

    async fn alone(&self, store: &PgStore) -> Result<Inserted, StoreError> {
        store.insert_alone(&self.0).await
    }
}

impl Request for Select {
    type Answer = Option<Row>;

    fn id(&self) -> RecordId {
        self.0.id()
    }

    fn queue(queues: &mut Queues) -> &mut VecDeque<Job<Self>> {
        &mut queues.selections
    }

    async fn together(
        wanted: &[&Self],
        line: &mut Line,
    ) -> Result<Vec<Option<Option<Row>>>, Error> {
        let done = match wanted {
            [Self(identity)] => line.run(select(identity)).await?,
            _ => line.run(sqlx::query(SELECT).bind(ids(wanted))).await?,
        };
        let mut rows = by_id(&done.rows)?;
        // A row that cannot be read is looked at alone, so that its error is its own.
        let answer = |wanted: &&Self| match rows.remove(&wanted.id().into()) {
            None => Some(None),
            Some(row) => read(row).ok().map(Some),
        };
        Ok(wanted.iter().map(answer).collect())
    }

    async fn alone(&self, store: &PgStore) -> Result<Option<Row>, StoreError> {
        store.select_alone(&self.0).await
    }
}

impl Request for Complete {
    type Answer = bool;

    fn id(&self) -> RecordId {
        self.claim.identity.id()
    }

    fn queue(queues: &mut Queues) -> &mut VecDeque<Job<Self>> {
        &mut queues.completions
    }

    async fn together(done: &[&Self], line: &mut Line) -> Result<Vec<Option<bool>>, Error> {
        if let [one] = done {
            let done = line.run(update(one)).await?;
            return Ok(vec![Some(line.store().ended(one.id(), &done))]);
        }
        let query = sqlx::query(UPDATE_COMPLETED)
            .bind(ids(done))
            .bind(column(done, |done| PgUuid::from(done.claim.token)))
            .bind(column(done, |done| done.answer.as_slice()))
            .bind(column(done, |done| done.references.as_deref()));
        let changed = line.run(query).await?;
        changed_of(done, &changed.rows, line.store())
    }

    async fn alone(&self, store: &PgStore) -> Result<bool, StoreError> {
        store.ends(&self.claim, update(self)).await
    }
}

impl Request for Delete {
    type Answer = bool;

    fn id(&self) -> RecordId {
        self.0.identity.id()
    }

    fn queue(queues: &mut Queues) -> &mut VecDeque<Job<Self>> {
        &mut queues.deletions
    }

    async fn together(claims: &[&Self], line: &mut Line) -> Result<Vec<Option<bool>>, Error> {
        if let [Self(claim)] = claims {
            let done = line.run(delete(claim)).await?;
            return Ok(vec![Some(line.store().ended(claim.identity.id(), &done))]);
        }
        let query = sqlx::query(DELETE_CLAIMED)
            .bind(ids(claims))
            .bind(column(claims, |claim| PgUuid::from(claim.0.token)));
        let changed = line.run(query).await?;
        changed_of(claims, &changed.rows, line.store())
    }

    async fn alone(&self, store: &PgStore) -> Result<bool, StoreError> {
        store.ends(&self.0, delete(&self.0)).await
    }
}

fn ids<R: Request>(requests: &[&R]) -> Vec<PgUuid> {
    column(requests, |request| request.id().into())
}

/// One column of a batch, as an array.
fn column<'r, R, T>(requests: &'r [R], of: impl Fn(&'r R) -> T) -> Vec<T> {
    requests.iter().map(of).collect()
}

fn by_id(rows: &[PgRow]) -> Result<HashMap<PgUuid, &PgRow>, Error> {
    rows.iter()
        .map(|row| Ok((row.try_get("id")?, row)))
        .collect()
}

/// What was not changed is not there, not the caller's, or locked: alone, it is found out which.
fn changed_of<R: Request>(
    requests: &[&R],
    rows: &[PgRow],
    store: &PgStore,
) -> Result<Vec<Option<bool>>, Error> {
    let mut changed = HashMap::with_capacity(rows.len());
    for row in rows {
        changed.insert(row.try_get::<PgUuid, _>(0)?, row.try_get::<bool, _>(1)?);
    }
    let waited = |id: &PgUuid| changed.get(id) == Some(&true);
    let ids = requests.iter().map(|request| request.id());
    let waited: Vec<_> = ids.filter(|id| waited(&(*id).into())).collect();
    if !waited.is_empty() {
        store.wake(waited);
    }
    let answer = |request: &&R| changed.contains_key(&request.id().into()).then_some(true);
    Ok(requests.iter().map(answer).collect())
}

fn unreadable(error: StoreError) -> Error {
    Error::Decode(error.into())
}
