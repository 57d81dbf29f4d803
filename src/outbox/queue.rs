//! The statements of the relay. Each is atomic, decides by the database's clock, and every one
//! after the claim is fenced by its token.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Postgres, SqlSafeStr, SqlStr};

use super::error::OutboxError;
use super::message::MessageId;
use super::publisher::Outgoing;
use super::relay::Poison;
use crate::PgStore;
use crate::identity::RecordId;
use crate::store::Token;
use crate::store::postgres::PgUuid;

/// Steps from partition to partition through the index, beginning after a key, and looks at the
/// first unsent row of each alone: a partition that is blocked, paused or claimed costs one step,
/// however long it is. A row that changed since the snapshot is judged anew once it is locked. What
/// was the head in the snapshot is no longer one only if it was sent meanwhile, and then it fails.
///
/// Once its id is known, a message is found by it alone, whatever the planner believes of the table:
/// joined by `any (array[id])`, as `store/postgres/group/batch.rs` says, and told to be pending by
/// `finished_at`, since the state is the condition of an index that would be walked instead.
const CLAIM: &str = "
with recursive head as (
    (select id, partition_key from idempotency.outbox
        where {unsent} and partition_key > $1 order by partition_key, position limit 1)
    union all
    select next.id, next.partition_key from head cross join lateral (
        select id, partition_key from idempotency.outbox
        where {unsent} and partition_key > head.partition_key
        order by partition_key, position limit 1
    ) as next
), due as materialized (
    select claimable.id from head cross join lateral (
        select id from idempotency.outbox
        where outbox.id = head.id and finished_at is null and available_at <= clock_timestamp()
        for no key update skip locked
    ) as claimable
    limit $2
)
update idempotency.outbox set
    token = $3, attempt = attempt + 1,
    available_at = clock_timestamp() + make_interval(secs => $4)
from due where outbox.id = any (array[due.id])
returning {columns}";

/// Marks one as sent and, while its claim still keeps others out of the partition, claims the next.
/// Sent again after a lost acknowledgement, it finds its own mark, and claims nothing.
const SENT: &str = "
with sent as (
    update idempotency.outbox set state = 'sent', last_error = null,
        finished_at = coalesce(finished_at, clock_timestamp())
    where id = $1 and token = $2 and state in ('pending', 'sent')
    returning partition_key, position
), next as (
    select following.id from sent cross join lateral (
        select id from idempotency.outbox
        where {unsent} and outbox.partition_key = sent.partition_key
            and outbox.position > sent.position and $5
        order by outbox.position limit 1
    ) as following
), claimed as (
    update idempotency.outbox set
        token = $3, attempt = attempt + 1,
        available_at = clock_timestamp() + make_interval(secs => $4)
    from next
    where outbox.id = any (array[next.id]) and finished_at is null
        and available_at <= clock_timestamp()
    returning {columns}
)
select claimed.* from sent left join claimed on true";

const PAUSE: &str = "
update idempotency.outbox set
    token = null, last_error = $3, attempt = attempt - $5,
    available_at = clock_timestamp() + make_interval(secs => $4)
where id = $1 and token = $2 and finished_at is null";

const DIE: &str = "
update idempotency.outbox set
    state = 'dead', token = null, finished_at = clock_timestamp(),
    last_error = $3
where id = $1 and token = $2 and finished_at is null";

const COLUMNS: &str = "outbox.id, outbox.partition_key, aggregatetype, aggregateid, type,
    payload::text as payload, headers::text as headers, operation_id, attempt";

#[derive(Debug)]
pub(super) struct Queue {
    store: PgStore,
    lease: Duration,
    claim: SqlStr,
    sent: SqlStr,
}

/// The right to publish one message.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) message: Outgoing,
    /// Somebody else has written its headers, and they are none. It must not hold up the others that
    /// were claimed with it.
    pub(super) is_damaged: bool,
    token: Token,
}

/// What marking a message as sent came to.
#[derive(Debug)]
pub(super) enum Marked {
    /// It is marked, and this is the next of its partition.
    Next(Box<Claimed>),
    /// It is marked.
    Done,
    /// Somebody else has claimed it meanwhile: the mark is theirs to make.
    Lost,
}

impl Queue {
    pub(super) fn new(store: PgStore, lease: Duration, poison: Poison) -> Self {
        let unsent = match poison {
            Poison::Block => "state in ('pending', 'dead')",
            Poison::Skip => "state = 'pending'",
        };
        let sql = |text: &str| {
            let text = text
                .replace("{unsent}", unsent)
                .replace("{columns}", COLUMNS);
            AssertSqlSafe(text).into_sql_str()
        };
        Self {
            claim: sql(CLAIM),
            sent: sql(SENT),
            store,
            lease,
        }
    }

    pub(super) fn store(&self) -> &PgStore {
        &self.store
    }

    /// The heads of at most `limit` partitions whose keys come after `after`.
    pub(super) async fn claim(
        &self,
        after: &str,
        limit: usize,
    ) -> Result<Vec<Claimed>, OutboxError> {
        let token = Token::random()?;
        let query = sqlx::query(self.claim.clone())
            .bind(after)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .bind(PgUuid::from(token))
            .bind(self.lease.as_secs_f64());
        let rows = self.store.run(query).await?.rows;
        rows.iter().map(|row| read(row, token)).collect()
    }

    pub(super) async fn sent(&self, claimed: &Claimed, go_on: bool) -> Result<Marked, OutboxError> {
        let token = Token::random()?;
        let query = fenced(self.sent.clone(), claimed)
            .bind(PgUuid::from(token))
            .bind(self.lease.as_secs_f64())
            .bind(go_on);
        let done = self.store.run(query).await?;
        let Some(row) = done.rows.first() else {
            return Ok(Marked::Lost);
        };
        if row.try_get::<Option<PgUuid>, _>("id")?.is_none() {
            return Ok(Marked::Done);
        }
        Ok(Marked::Next(Box::new(read(row, token)?)))
    }

    /// Gives the message back, to be claimed after a pause. False when the claim is lost.
    pub(super) async fn pause(
        &self,
        claimed: &Claimed,
        error: &str,
        pause: Duration,
        counts: bool,
    ) -> Result<bool, OutboxError> {
        let query = fenced(PAUSE.into_sql_str(), claimed)
            .bind(error)
            .bind(pause.as_secs_f64())
            .bind(i32::from(!counts));
        Ok(self.store.run(query).await?.affected == 1)
    }

    /// Leaves the message to a person. False when the claim is lost.
    pub(super) async fn die(&self, claimed: &Claimed, error: &str) -> Result<bool, OutboxError> {
        let query = fenced(DIE.into_sql_str(), claimed).bind(error);
        Ok(self.store.run(query).await?.affected == 1)
    }
}

fn fenced<'q>(sql: SqlStr, claimed: &Claimed) -> Query<'q, Postgres, PgArguments> {
    sqlx::query(sql)
        .bind(PgUuid(*claimed.message.id.as_bytes()))
        .bind(PgUuid::from(claimed.token))
}

fn read(row: &PgRow, token: Token) -> Result<Claimed, OutboxError> {
    let headers: &str = row.try_get("headers")?;
    let headers: Option<BTreeMap<String, String>> = serde_json::from_str(headers).ok();
    let is_damaged = headers.is_none();
    let mut headers = headers.unwrap_or_default();
    let operation = row
        .try_get::<Option<PgUuid>, _>("operation_id")?
        .map(|id| RecordId::from_bytes(id.0));
    if let Some(id) = operation {
        headers.insert(super::OPERATION_HEADER.into(), id.to_string());
    }
    let attempt: i32 = row.try_get("attempt")?;
    let message = Outgoing {
        id: MessageId::from_bytes(row.try_get::<PgUuid, _>("id")?.0),
        topic: row.try_get("type")?,
        aggregate: (row.try_get("aggregatetype")?, row.try_get("aggregateid")?),
        partition_key: row.try_get("partition_key")?,
        payload: row.try_get("payload")?,
        headers,
        operation,
        attempt: u32::try_from(attempt).unwrap_or_default(),
    };
    Ok(Claimed {
        message,
        is_damaged,
        token,
    })
}
