//! How an operation, or a phase, is entered in a transaction that the handler is to write in.

use std::time::Duration;

use sqlx::{Error, PgConnection};
use uuid::Uuid;

use super::types::PgUuid;
use crate::digest::Fields;
use crate::identity::{Identity, RecordId};
use crate::store::{ClaimRequest, Token};

/// Before the handler, as [`Entrance`] binds it. An operation is entered; a phase has its claim, and only marks
/// its transaction. The session also keeps the mark of what is committed by somebody else, which is of use where
/// it is the store's own: a rollback takes it back, and what the store writes last clears it.
macro_rules! mark {
    ($step:literal) => {
        concat!(
            "select ",
            $step,
            "
    set_config('idempotency.attempt', $2, true),
    set_config('idempotency.identity', $1::text, true),
    set_config('idempotency.committed', $2, false),
    case
        when current_setting('statement_timeout') = '0'
            and current_setting('idle_in_transaction_session_timeout') = '0'
            and current_setting('synchronous_commit') <> 'off'
        then set_config('statement_timeout', $3, true)
            || set_config('idle_in_transaction_session_timeout', $3, true)
        else idempotency.limit($3::integer)
    end"
        )
    };
}

const ENTER: &str = mark!("idempotency.enter($1, $4),");

const MARK: &str = mark!("");

/// `raise` of `idempotency.enter`.
pub(super) const LOCKED: &str = "IK001";
pub(super) const RECORDED: &str = "IK002";

/// What is entered, and by whom.
#[derive(Debug, Clone)]
pub(super) struct Entrance {
    id: RecordId,
    /// None for a phase.
    lock: Option<i64>,
    mark: String,
    limit_ms: String,
}

impl Entrance {
    pub(super) fn operation(request: &ClaimRequest, limit: Duration) -> Self {
        Self {
            lock: Some(lock_of(&request.identity)),
            ..Self::phase(&request.identity, request.token, limit)
        }
    }

    pub(super) fn phase(identity: &Identity, token: Token, limit: Duration) -> Self {
        Self {
            id: identity.id(),
            lock: None,
            mark: mark(token),
            limit_ms: limit.as_millis().clamp(1, i32::MAX as u128).to_string(),
        }
    }

    pub(super) fn mark(&self) -> &str {
        &self.mark
    }

    /// In a transaction that is open.
    pub(super) async fn enter(&self, connection: &mut PgConnection) -> Result<(), Error> {
        let query = sqlx::query(self.sql())
            .bind(PgUuid::from(self.id))
            .bind(&self.mark)
            .bind(&self.limit_ms);
        let query = match self.lock {
            Some(lock) => query.bind(lock),
            None => query,
        };
        query.execute(connection).await.map(drop)
    }

    /// The same in a text of several statements, which have no parameters.
    pub(super) fn to_sql(&self) -> String {
        let lock = self.lock.unwrap_or_default();
        self.sql()
            .replace("$1", &format!("'{}'::uuid", self.id))
            .replace("$2", &format!("'{}'", self.mark))
            .replace("$3", &format!("'{}'", self.limit_ms))
            .replace("$4", &lock.to_string())
    }

    fn sql(&self) -> &'static str {
        match self.lock {
            Some(_) => ENTER,
            None => MARK,
        }
    }
}

/// What tells the transaction of an attempt from others. Not its token: it is in the text of a statement,
/// which is logged where it is slow.
pub(super) fn mark(token: Token) -> String {
    let digest = Fields::new("mark").push(token.as_bytes()).finish();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    Uuid::from_bytes(bytes).to_string()
}

/// Not of the id, which is partly the client's to choose.
fn lock_of(identity: &Identity) -> i64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&identity.digest()[16..24]);
    i64::from_be_bytes(bytes)
}
