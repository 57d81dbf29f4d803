//! Messages that take effect once, however often they are delivered.
//!
//! Brokers and webhooks deliver at least once. [`once`] writes down that a message was taken in, in
//! the same transaction as its effect: both commit, or neither does. Acknowledge the message after
//! the commit, a duplicate as well: its effect has been committed.
//!
//! ```no_run
//! use tower_idempotency::inbox::{self, Once};
//!
//! # async fn example(pool: sqlx::PgPool, id: &str) -> Result<(), Box<dyn std::error::Error>> {
//! let mut transaction = pool.begin().await?;
//! if inbox::once(&mut transaction, "orders to billing", id).await? == Once::First {
//!     // The effect, through `transaction`.
//! }
//! transaction.commit().await?;
//! // Now acknowledge.
//! # Ok(())
//! # }
//! ```
//!
//! A message is remembered for as long as the [`InboxSweeper`] lets it be. Without a sweeper, for ever.

mod error;
mod once;
mod order;
mod sweep;

pub use error::{InboxError, InboxErrorKind};
pub use once::{Once, once};
pub use order::{InOrder, forget, in_order, start_at};
pub use sweep::InboxSweeper;
