use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::stats::{Counters, RelayStats};

/// What the handle and the task say to each other.
#[derive(Debug, Clone, Default)]
pub(super) struct Signals {
    pub(super) stop: CancellationToken,
    pub(super) wake: Arc<Notify>,
    pub(super) counters: Arc<Counters>,
}

/// A [`Relay`](super::Relay) that runs in a task of its own.
#[derive(Debug)]
pub struct RelayHandle {
    signals: Signals,
    task: JoinHandle<()>,
}

impl RelayHandle {
    pub(super) fn new(signals: Signals, task: JoinHandle<()>) -> Self {
        Self { signals, task }
    }

    /// Looks for messages at once: for a process that has just committed one. Costs the database
    /// nothing more than a poll.
    pub fn wake(&self) {
        self.signals.wake.notify_one();
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> RelayStats {
        self.signals.counters.read()
    }

    /// Sends no more claims, and waits for what was claimed to be published for at most `grace`. False when
    /// something was left: it is published again, by another relay, when its lease is over.
    ///
    /// # Cancel safety
    ///
    /// Once dropped, the relay still ends when what is being published has come to its end.
    pub async fn shutdown(mut self, grace: Duration) -> bool {
        self.signals.stop.cancel();
        let ended = tokio::time::timeout(grace, &mut self.task).await;
        if ended.is_err() {
            self.task.abort();
        }
        ended.is_ok()
    }
}
