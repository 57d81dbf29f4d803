//! The statements of [`protocol`](crate::store::protocol) for many records at once. They lock in the
//! order of ids. Where somebody else has one of them locked, those that follow pass over what is. A claim
//! may wait for a transaction that is about to make, or to end, the record of its id; where that takes
//! long, the claims go alone.
//!
//! What looks records up says `record.id = any (array[done.id])`, or asks by a subquery for one value. To a
//! planner that is told `record.id = done.id`, or `order by record.id`, a walk along the whole index is of
//! use, and where statistics say that the table is empty, as after all of it was swept, it is the plan, until
//! they say otherwise.

use std::collections::{HashMap, VecDeque};

use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Error, Postgres, Row as _};

use super::queue::{Job, Queues, Request};
use super::writer::Line;
use crate::identity::{Identity, RecordId};
use crate::store::postgres::PgStore;
use crate::store::postgres::claim::{insert, inserted, read, records, select};
use crate::store::postgres::connection::is_locked;
use crate::store::postgres::settle::{delete, update};
use crate::store::postgres::types::PgUuid;
use crate::store::protocol::{Inserted, Row};
use crate::store::sql::time;
use crate::store::{Claim, ClaimRequest, StoreError};

/// Claims, of the arrays in these parameters. One whose record is seen is not tried: it would wait for
/// whoever changes the record, while what is completed beside it is locked. Names the newest column, as
/// the single statement does.
macro_rules! insert {
    ($id:literal, $digest:literal, $scope:literal, $operation:literal, $key:literal, $token:literal,
        $lost:literal, $fingerprint:literal, $lease:literal, $ttl:literal) => {
        concat!(
            "
insert into idempotency.record (
    id, digest, scope, operation, key, state, token, attempt, lost, fingerprint,
    claimed_at, leased_until, expires_at, sweep_at, waited
)
select id, digest, scope, operation, key, 'running', token, 1, lost, fingerprint,
    now, now + make_interval(secs => lease), now + make_interval(secs => ttl),
    now + make_interval(secs => case lost when 'hold' then lease else ttl end), false
from unnest(",
            $id,
            "::uuid[], ",
            $digest,
            "::bytea[], ",
            $scope,
            "::text[], ",
            $operation,
            "::text[], ",
            $key,
            "::text[], ",
            $token,
            "::uuid[], ",
            $lost,
            "::text[], ",
            $fingerprint,
            "::bytea[], ",
            $lease,
            "::float8[], ",
            $ttl,
            "::float8[])
    as claim (id, digest, scope, operation, key, token, lost, fingerprint, lease, ttl),
    (select clock_timestamp()) as clock (now)
where (select taken.id from idempotency.record as taken where taken.id = claim.id) is null
order by id
on conflict (id) do nothing
returning id, token, date_part('epoch', expires_at) as until"
        )
    };
}

const INSERT: &str = insert!("$1", "$2", "$3", "$4", "$5", "$6", "$7", "$8", "$9", "$10");

/// Large answers are looked up alone: of those that travel together, nobody has one before all have come, and
/// 128 of a megabyte take longer than their callers wait. 8 MB travel at most.
const SELECT: &str = concat!(
    records!(
        "coalesce(octet_length(answer) > 65536, false) as is_large,
    case when octet_length(answer) <= 65536 then answer end as answer"
    ),
    " where id = any ($1::uuid[])"
);

/// Answers, which are in the order of their ids. Each waits for its record, where somebody has locked it.
macro_rules! done {
    () => {
        "unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::text[]) as done (id, token, answer, refs)"
    };
}

/// Those whose records nobody else has locked, which are locked now.
macro_rules! unlocked {
    () => {
        concat!(
            "(
    select record.id, done.token, done.answer, done.refs from ",
            done!(),
            "
    join idempotency.record on record.id = any (array[done.id])
        and record.token = done.token and record.state in ('running', 'held')
    order by done.id
    for no key update of record skip locked
) as done"
        )
    };
}

macro_rules! update {
    ($done:expr) => {
        concat!(
            "
update idempotency.record set
    state = 'completed', answer = done.answer, refs = coalesce(done.refs, record.refs), progress = null,
    expires_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end,
    sweep_at = case when state = 'running' and expires_at > now then expires_at
        else now + (expires_at - claimed_at) end
from ",
            $done,
            ", (select clock_timestamp()) as clock (now)
where record.id = any (array[done.id]) and record.token = done.token and state in ('running', 'held')
returning record.id, waited"
        )
    };
}

const UPDATE_COMPLETED: &str = update!(done!());

const UPDATE_UNLOCKED: &str = update!(unlocked!());

/// Both in one commit. Neither sees what the other does, and neither has to: they are of different
/// attempts.
macro_rules! complete_and_insert {
    ($done:expr) => {
        concat!(
            "with completed as (",
            update!($done),
            "), claimed as (",
            insert!(
                "$5", "$6", "$7", "$8", "$9", "$10", "$11", "$12", "$13", "$14"
            ),
            ")
select id, waited, null::uuid as token, null::float8 as until from completed
union all
select id, null, token, until from claimed"
        )
    };
}

const COMPLETE_AND_INSERT: &str = complete_and_insert!(done!());

const COMPLETE_UNLOCKED_AND_INSERT: &str = complete_and_insert!(unlocked!());

const DELETE_CLAIMED: &str = "
with due as (
    select record.id, claim.token
    from unnest($1::uuid[], $2::uuid[]) as claim (id, token)
    join idempotency.record on record.id = any (array[claim.id]) and record.token = claim.token
        and progress is null and (state = 'held' or state = 'running' and not abandoned)
    order by claim.id
    for update of record skip locked
)
delete from idempotency.record using due
where record.id = any (array[due.id]) and record.token = due.token
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
        let done = line.run(bind_claims(sqlx::query(INSERT), claims)).await?;
        inserted_of(claims, &done.rows)
    }

    async fn alone(&self, store: &PgStore) -> Result<Inserted, StoreError> {
        store.insert_alone(&self.0).await
    }
}

impl Request for Select {
    const WRITES: bool = false;

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
        let is_large = |row: &PgRow| row.try_get("is_large").unwrap_or(false);
        // A row that cannot be read is looked at alone, too, so that its error is its own.
        let answer = |wanted: &&Self| match rows.remove(&wanted.id().into()) {
            None => Some(None),
            Some(row) if is_large(row) => None,
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

    fn weight(&self) -> usize {
        self.answer.len()
    }

    fn queue(queues: &mut Queues) -> &mut VecDeque<Job<Self>> {
        &mut queues.completions
    }

    async fn together(done: &[&Self], line: &mut Line) -> Result<Vec<Option<bool>>, Error> {
        if let [one] = done
            && !line.is_wary()
        {
            let done = line.run(update(one)).await?;
            return Ok(vec![Some(line.store().ended(one.id(), &done))]);
        }
        let update = |sql| bind_answers(sqlx::query(sql), done);
        let changed = if line.is_wary() {
            line.run(update(UPDATE_UNLOCKED)).await?
        } else {
            match line.run(update(UPDATE_COMPLETED)).await {
                Err(error) if is_locked(&error) => line.run(update(UPDATE_UNLOCKED)).await?,
                changed => changed?,
            }
        };
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
        if let [Self(claim)] = claims
            && !line.is_wary()
        {
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

/// What [`complete_and_insert`] tells of both.
type Both = (Vec<Option<bool>>, Vec<Option<Inserted>>);

/// Answers and claims in one statement.
pub(super) async fn complete_and_insert(
    done: &[&Complete],
    claims: &[&Insert],
    line: &mut Line,
) -> Result<Both, Error> {
    let sql = if line.is_wary() {
        COMPLETE_UNLOCKED_AND_INSERT
    } else {
        COMPLETE_AND_INSERT
    };
    let query = bind_answers(sqlx::query(sql), done);
    let rows = line.run(bind_claims(query, claims)).await?.rows;
    let is_claim = |row: &PgRow| Ok(row.try_get::<Option<PgUuid>, _>("token")?.is_some());
    let (mut completed, mut claimed) = (Vec::new(), Vec::new());
    for row in rows {
        let is_claim: Result<bool, Error> = is_claim(&row);
        if is_claim? {
            claimed.push(row);
        } else {
            completed.push(row);
        }
    }
    let completed = changed_of(done, &completed, line.store())?;
    Ok((completed, inserted_of(claims, &claimed)?))
}

type PgQuery<'q> = Query<'q, Postgres, PgArguments>;

fn bind_answers<'q>(query: PgQuery<'q>, done: &[&'q Complete]) -> PgQuery<'q> {
    let mut done = done.to_vec();
    done.sort_unstable_by_key(|done| *done.id().as_bytes());
    query
        .bind(ids(&done))
        .bind(column(&done, |done| PgUuid::from(done.claim.token)))
        .bind(column(&done, |done| done.answer.as_slice()))
        .bind(column(&done, |done| done.references.as_deref()))
}

fn bind_claims<'q>(query: PgQuery<'q>, claims: &'q [&'q Insert]) -> PgQuery<'q> {
    query
        .bind(ids(claims))
        .bind(column(claims, |of| of.0.identity.digest().as_slice()))
        .bind(column(claims, |of| of.0.identity.scope()))
        .bind(column(claims, |of| of.0.identity.operation()))
        .bind(column(claims, |of| of.0.identity.key()))
        .bind(column(claims, |of| PgUuid::from(of.0.token)))
        .bind(column(claims, |of| of.0.lost.as_sql()))
        .bind(column(claims, |of| of.0.fingerprint.to_bytes()))
        .bind(column(claims, |of| of.0.lease.as_secs_f64()))
        .bind(column(claims, |of| of.0.ttl.as_secs_f64()))
}

/// A claim that made no row met another's.
fn inserted_of(claims: &[&Insert], rows: &[PgRow]) -> Result<Vec<Option<Inserted>>, Error> {
    let mut made = HashMap::with_capacity(rows.len());
    for row in rows {
        let key: (PgUuid, PgUuid) = (row.try_get("id")?, row.try_get("token")?);
        let until = row.try_get("until")?;
        made.insert(key, Inserted::Until(time(until).map_err(unreadable)?));
    }
    let key = |claim: &&Insert| (claim.id().into(), claim.0.token.into());
    let answer = |claim| made.get(&key(claim)).copied().unwrap_or(Inserted::Taken);
    Ok(claims.iter().map(|claim| Some(answer(claim))).collect())
}

fn ids<R: Request>(requests: &[&R]) -> Vec<PgUuid> {
    column(requests, |request| request.id().into())
}

/// One column of a batch, as an array.
fn column<R: Copy, T>(requests: &[R], of: impl Fn(R) -> T) -> Vec<T> {
    requests.iter().copied().map(of).collect()
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
        changed.insert(
            row.try_get::<PgUuid, _>("id")?,
            row.try_get::<bool, _>("waited")?,
        );
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
