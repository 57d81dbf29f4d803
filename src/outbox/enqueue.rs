use sqlx::{Connection as _, PgConnection};

use super::error::{OutboxError, OutboxErrorKind};
use super::message::{Message, MessageId};
use crate::store::postgres::PgUuid;

/// The lock comes first: a row is made only for what the expression yields, and the position is
/// drawn for that row. So whoever is second in a partition draws after the first has committed.
/// The number keeps these locks apart from the application's own.
const ENQUEUE: &str = "
with turn as materialized (
    select case when $9 then pg_advisory_xact_lock(hashtextextended($2, 7163904716390472)) end
)
insert into idempotency.outbox (
    id, partition_key, aggregatetype, aggregateid, type, payload, headers, operation_id
)
select $1, $2, $3, $4, $5, $6::text::json, $7::text::json,
    nullif(current_setting('idempotency.identity', true), '')::uuid
from turn
where not $8 or pg_notify('idempotency_outbox', '') is not null";

/// Writes `message` in the transaction that `connection` is in, and returns the id it will be
/// published under. If the transaction commits it is published at least once, else never.
///
/// Takes `&mut transaction` of sqlx, or anything that derefs to a `PgConnection` within one. Call it
/// late in the transaction: from here to the commit, others that enqueue into the same partition
/// wait. A transaction that enqueues into several partitions can deadlock with one that does so in
/// another order (40001 and 40P01 are for running it again); enqueue in the order of their keys.
///
/// What sqlx has begun, end through sqlx. A `commit` that is sent as a statement ends the transaction
/// behind its back, and what is enqueued after it is published whatever becomes of the rest. Only
/// transactional routes and phases notice, and hold the key; on connections of the store's own all writes
/// after it are refused, on those of a shared pool or of PgBouncer they are not.
///
/// # Errors
///
/// See [`OutboxErrorKind`]. The transaction is to be rolled back after
/// [`Database`](OutboxErrorKind::Database).
///
/// # Cancel safety
///
/// As any statement of sqlx: once dropped, roll the transaction back.
///
/// ```no_run
/// use tower_idempotency::outbox::{self, Message};
///
/// # async fn example(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
/// let mut transaction = pool.begin().await?;
/// // The writes that the message tells of.
/// let message = Message::new("charge.created", "ch_1").with_aggregate("charge", "ch_1");
/// outbox::enqueue(&mut transaction, message).await?;
/// transaction.commit().await?;
/// # Ok(())
/// # }
/// ```
pub async fn enqueue(
    connection: &mut PgConnection,
    message: Message,
) -> Result<MessageId, OutboxError> {
    message.check()?;
    if !connection.is_in_transaction() {
        return Err(OutboxError::new(OutboxErrorKind::NotInTransaction));
    }
    let id = MessageId::new()?;
    let partition = message.partition();
    let is_shared = partition.is_some();
    let payload = message.payload.map_err(OutboxError::payload)?;
    let (kind, about) = message
        .aggregate
        .unwrap_or_else(|| (message.topic.clone(), id.to_string()));
    sqlx::query(ENQUEUE)
        .bind(PgUuid(*id.as_bytes()))
        .bind(partition.unwrap_or_else(|| id.to_string()))
        .bind(kind)
        .bind(about)
        .bind(message.topic)
        .bind(payload)
        .bind(serde_json::to_string(&message.headers).map_err(OutboxError::payload)?)
        .bind(message.notify)
        .bind(is_shared)
        .execute(connection)
        .await?;
    Ok(id)
}
