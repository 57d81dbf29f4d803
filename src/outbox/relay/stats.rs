use std::sync::atomic::{AtomicU64, Ordering};

/// What a relay has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RelayStats {
    /// Messages published and marked.
    pub sent: u64,
    /// Attempts that failed and will be repeated.
    pub failed: u64,
    /// Attempts that did not count, since the receiver was unavailable, or the database so slow that
    /// half of the lease was over before they could begin.
    pub unavailable: u64,
    /// Messages given up.
    pub dead: u64,
    /// Writes refused, because another relay had claimed the message meanwhile.
    pub refused: u64,
    /// Messages deleted after their retention.
    pub swept: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) sent: Counter,
    pub(super) failed: Counter,
    pub(super) unavailable: Counter,
    pub(super) dead: Counter,
    pub(super) refused: Counter,
    pub(super) swept: Counter,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(super) fn read(&self) -> RelayStats {
        RelayStats {
            sent: self.sent.get(),
            failed: self.failed.get(),
            unavailable: self.unavailable.get(),
            dead: self.dead.get(),
            refused: self.refused.get(),
            swept: self.swept.get(),
        }
    }
}
