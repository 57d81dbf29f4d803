mod handle;
mod settings;
mod stats;
mod turn;
mod work;

use std::error::Error;

use super::OutboxError;

pub use handle::RelayHandle;
pub use settings::{Poison, Relay};
pub use stats::RelayStats;

/// The database's errors are logged, since the lease or the next round puts them right.
fn report(error: &OutboxError, what: &'static str) {
    let cause: &dyn Error = error;
    tracing::warn!(error = cause, source = error.source(), "{what}");
}
