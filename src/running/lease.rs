use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The part of a lease that is not relied on, for clocks that run at different speeds.
const MARGIN: u32 = 10;

/// What this process knows of one lease.
#[derive(Debug)]
pub(crate) struct Lease {
    trusted_until: Mutex<Option<Instant>>,
}

impl Lease {
    pub(super) fn new(confirmed: Instant, length: Duration) -> Self {
        let lease = Self {
            trusted_until: Mutex::new(None),
        };
        lease.confirm(confirmed, length);
        lease
    }

    /// `sent` is when the renewal was sent, which is before the database read its clock.
    pub(super) fn confirm(&self, sent: Instant, length: Duration) {
        *self.lock() = Some(sent + (length - length / MARGIN));
    }

    pub(super) fn lose(&self) {
        *self.lock() = None;
    }

    pub(crate) fn is_current(&self) -> bool {
        self.lock().is_some_and(|until| Instant::now() < until)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.trusted_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
