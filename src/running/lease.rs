use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::moment::Moment;

/// The part of a lease that is not relied on, for clocks that run at different speeds.
const MARGIN: u32 = 10;

/// What this process knows of one lease.
#[derive(Debug)]
pub(crate) struct Lease {
    trusted: Mutex<Option<Trusted>>,
}

#[derive(Debug)]
struct Trusted {
    since: Moment,
    length: Duration,
}

impl Lease {
    pub(super) fn new(confirmed: Moment, length: Duration) -> Self {
        let lease = Self {
            trusted: Mutex::new(None),
        };
        lease.confirm(confirmed, length);
        lease
    }

    /// `sent` is when the renewal was sent, which is before the database read its clock.
    pub(super) fn confirm(&self, sent: Moment, length: Duration) {
        *self.lock() = Some(Trusted {
            since: sent,
            length: length - length / MARGIN,
        });
    }

    pub(super) fn lose(&self) {
        *self.lock() = None;
    }

    pub(crate) fn is_current(&self) -> bool {
        self.is_current_at(Moment::now())
    }

    fn is_current_at(&self, now: Moment) -> bool {
        let trusted = self.lock();
        trusted.as_ref().is_some_and(|trusted| {
            let age = trusted.since.age(now);
            age.is_some_and(|age| age < trusted.length)
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Trusted>> {
        self.trusted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(30);

    #[test]
    fn a_lease_ends_by_either_clock() {
        let now = Moment::now();
        let lease = Lease::new(now, LENGTH);
        assert!(lease.is_current_at(now));
        let wall = now.wall + LENGTH;
        let monotonic = now.monotonic + LENGTH;
        // The machine was suspended; the clocks go together; the wall clock was set back.
        assert!(!lease.is_current_at(Moment { wall, ..now }));
        assert!(!lease.is_current_at(Moment { monotonic, wall }));
        assert!(!lease.is_current_at(Moment { monotonic, ..now }));
        lease.confirm(Moment { monotonic, wall }, LENGTH);
        assert!(lease.is_current_at(Moment { monotonic, wall }));
    }
}
