//! What others are told, written in the transaction in which it becomes true.

use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use tower_idempotency::outbox::{self, Message};

use crate::error::ApiError;

/// What happened is said by the topic of the message: `charge.created`, `charge.refunded`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Event {
    pub(crate) account: String,
    pub(crate) charge: String,
    pub(crate) amount: i64,
    pub(crate) currency: String,
}

/// If the transaction commits, the relay sends it; if not, it never was. Events of one charge are sent
/// in the order of their commits, since the charge is what they are about.
pub(crate) async fn tell(
    db: &mut PgConnection,
    topic: &str,
    event: &Event,
) -> Result<(), ApiError> {
    let message = Message::new(topic, event).with_aggregate("charge", &event.charge);
    outbox::enqueue(db, message).await?;
    Ok(())
}
