//! Connections that go from one transaction to the next. Where all of them are in use, whoever is done with
//! one gives it to whoever has waited longest: a pool would first ask it for a sign of life, and more than
//! once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use sqlx::{Postgres, Transaction};
use tokio::sync::oneshot;

/// So often in a row, until the pool may look how old it is.
const MAX_IN_A_ROW: u32 = 256;

/// In an empty transaction, which the end of the last one has begun.
#[derive(Debug)]
pub(super) struct Chained {
    pub(super) transaction: Transaction<'static, Postgres>,
    /// It was not begun before; its `now()` is not, either.
    pub(super) since: Instant,
}

/// Who waits for a connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Handover(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    queue: VecDeque<oneshot::Sender<Chained>>,
    in_a_row: u32,
}

impl Handover {
    /// The next that nobody has waited for longer.
    pub(super) fn next(&self) -> oneshot::Receiver<Chained> {
        let (given, next) = oneshot::channel();
        let mut waiting = self.lock();
        waiting.queue.retain(|next| !next.is_closed());
        waiting.queue.push_back(given);
        next
    }

    /// Unless somebody waits for it, it is dropped, and returns to its pool.
    pub(super) fn give(&self, mut connection: Chained) {
        let mut waiting = self.lock();
        if waiting.in_a_row >= MAX_IN_A_ROW {
            waiting.in_a_row = 0;
            return;
        }
        while let Some(next) = waiting.queue.pop_front() {
            match next.send(connection) {
                Ok(()) => {
                    waiting.in_a_row += 1;
                    return;
                }
                Err(refused) => connection = refused,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
