use sqlx::PgConnection;

use super::error::{InboxError, InboxErrorKind, check_name, check_transaction};

const ADVANCE: &str = "
update idempotency.inbox_order set sequence = $3, updated_at = clock_timestamp()
where source = $1 and entity = $2 and sequence = $3 - 1";

const BEGIN: &str = "
insert into idempotency.inbox_order (source, entity, sequence) values ($1, $2, 1)
on conflict (source, entity) do nothing";

/// Locked, so that what is said holds until the transaction ends.
const SELECT: &str = "
select sequence from idempotency.inbox_order where source = $1 and entity = $2
for no key update";

const START_AT: &str = "
insert into idempotency.inbox_order (source, entity, sequence) values ($1, $2, $3)
on conflict (source, entity) do update
    set sequence = excluded.sequence, updated_at = excluded.updated_at";

const FORGET: &str = "
delete from idempotency.inbox_order where source = $1 and entity = $2";

/// Where a numbered message stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum InOrder {
    /// It is its turn: it takes effect in this transaction.
    Next,
    /// It, or a later one, has taken effect: acknowledge it.
    Stale,
    /// Messages before it are missing: let it be delivered again later.
    Gap {
        /// The number whose turn it is.
        expected: i64,
        /// The number of this message.
        found: i64,
    },
}

/// Takes in message number `sequence` about `entity`, in the transaction that `connection` is in.
///
/// Messages of one source and entity are numbered 1, 2, 3 and so on; for others, say where they
/// begin with [`start_at`]. `source` has at most 255 bytes, `entity` at most 512. A row for each
/// entity is locked to the end of the transaction, so that two deliveries at once come one after
/// the other.
///
/// Who writes the messages numbers them: the version of the entity, in the payload or in a
/// [header](crate::outbox::Message::with_header). The number alone makes a message take effect once;
/// [`once`](super::once) is not needed beside it, and must not be committed on a gap, or the message
/// is a duplicate when it is delivered again.
///
/// # Errors
///
/// See [`InboxErrorKind`].
///
/// # Cancel safety
///
/// As any statement of sqlx: once dropped, roll the transaction back.
///
/// ```no_run
/// use tower_idempotency::inbox::{self, InOrder};
///
/// # async fn example(pool: sqlx::PgPool, version: i64) -> Result<(), Box<dyn std::error::Error>> {
/// let mut transaction = pool.begin().await?;
/// match inbox::in_order(&mut transaction, "catalogue", "product-7", version).await? {
///     InOrder::Next => { /* the effect, through `transaction` */ }
///     InOrder::Stale => {}
///     InOrder::Gap { expected, found } => {
///         println!("waiting for {expected} before {found}");
///         return Ok(());
///     }
/// }
/// transaction.commit().await?;
/// # Ok(())
/// # }
/// ```
pub async fn in_order(
    connection: &mut PgConnection,
    source: &str,
    entity: &str,
    sequence: i64,
) -> Result<InOrder, InboxError> {
    check(connection, source, entity)?;
    if sequence < 1 {
        return Err(InboxError::new(InboxErrorKind::Sequence));
    }
    if advance(connection, source, entity, sequence).await? {
        return Ok(InOrder::Next);
    }
    if sequence == 1 {
        let begin = sqlx::query(BEGIN).bind(source).bind(entity);
        if begin.execute(&mut *connection).await?.rows_affected() > 0 {
            return Ok(InOrder::Next);
        }
    }
    let select = sqlx::query_scalar(SELECT).bind(source).bind(entity);
    let last: Option<i64> = select.fetch_optional(&mut *connection).await?;
    let last = last.unwrap_or(0);
    if sequence <= last {
        return Ok(InOrder::Stale);
    }
    // Its predecessor may have committed since the first look. The row is locked by now.
    if last == sequence - 1 && advance(connection, source, entity, sequence).await? {
        return Ok(InOrder::Next);
    }
    Ok(InOrder::Gap {
        expected: last + 1,
        found: sequence,
    })
}

async fn advance(
    connection: &mut PgConnection,
    source: &str,
    entity: &str,
    sequence: i64,
) -> Result<bool, InboxError> {
    let advance = sqlx::query(ADVANCE).bind(source).bind(entity);
    let done = advance.bind(sequence).execute(connection).await?;
    Ok(done.rows_affected() > 0)
}

/// Says that the next message about `entity` is number `next`: where a numbering does not begin with
/// 1, or when a person has decided to go on without what is missing.
///
/// # Errors
///
/// As [`in_order`].
pub async fn start_at(
    connection: &mut PgConnection,
    source: &str,
    entity: &str,
    next: i64,
) -> Result<(), InboxError> {
    check(connection, source, entity)?;
    if next < 1 {
        return Err(InboxError::new(InboxErrorKind::Sequence));
    }
    let start = sqlx::query(START_AT).bind(source).bind(entity);
    start.bind(next - 1).execute(connection).await?;
    Ok(())
}

/// Forgets how far `entity` has come, when no more messages about it can come: they would be taken
/// for the first. Nothing else ever deletes the row.
///
/// # Errors
///
/// As [`in_order`].
pub async fn forget(
    connection: &mut PgConnection,
    source: &str,
    entity: &str,
) -> Result<(), InboxError> {
    check(connection, source, entity)?;
    let forget = sqlx::query(FORGET).bind(source).bind(entity);
    forget.execute(connection).await?;
    Ok(())
}

fn check(connection: &PgConnection, source: &str, entity: &str) -> Result<(), InboxError> {
    check_name("source", 255, source)?;
    check_name("entity", 512, entity)?;
    check_transaction(connection)
}
