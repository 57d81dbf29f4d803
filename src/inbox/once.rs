use sqlx::PgConnection;

use super::error::{InboxError, check_name, check_transaction};

/// A message that another transaction is taking in is waited for.
const INSERT: &str = "
insert into idempotency.inbox (source, message_id) values ($1, $2)
on conflict (source, message_id) do nothing";

/// Whether a message is to take effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Once {
    /// It was not taken in before: it takes effect in this transaction.
    First,
    /// Its effect has been committed: acknowledge it.
    Duplicate,
}

/// Takes in the message `message_id` of `source` in the transaction that `connection` is in.
///
/// `source` says whose ids they are and who takes them in: `orders to billing`, where billing and
/// shipping both take in the messages of orders in one database. Under one name, the second of them
/// would find the message taken in, and lose its effect. Both names have at most 255 bytes. Of two
/// deliveries at once the second waits for the first: it is a duplicate if that commits, and the
/// first if that is rolled back. Take the message in first of all, or two deliveries can deadlock
/// over what they write before. In one transaction, the second of two takings is a duplicate, too: its
/// effect is committed with the first, or not at all.
///
/// What sqlx has begun, end through sqlx: after a `commit` that is sent as a statement, what is taken in
/// is committed by itself, without its effect.
///
/// # Errors
///
/// See [`InboxErrorKind`](super::InboxErrorKind). A transaction of isolation level `repeatable read`
/// or `serializable` fails (40001) where the other delivery has committed since it began; delivered
/// again, the message is a duplicate.
///
/// # Cancel safety
///
/// As any statement of sqlx: once dropped, roll the transaction back.
pub async fn once(
    connection: &mut PgConnection,
    source: &str,
    message_id: &str,
) -> Result<Once, InboxError> {
    check_name("source", 255, source)?;
    check_name("message id", 255, message_id)?;
    check_transaction(connection)?;
    let insert = sqlx::query(INSERT).bind(source).bind(message_id);
    Ok(match insert.execute(connection).await?.rows_affected() {
        0 => Once::Duplicate,
        _ => Once::First,
    })
}
