//! Answers at once while the store is down, in place of letting every request wait for a timeout.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long nobody asks, before one request may try.
const COOL_DOWN: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Breaker {
    threshold: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    probe_at: Option<Instant>,
}

/// Leave to ask the store. Dropped without [`succeeded`](Self::succeeded), it counts as a failure.
#[derive(Debug)]
pub(crate) struct Admission<'a> {
    breaker: &'a Breaker,
    succeeded: bool,
}

impl Breaker {
    /// Opens after `threshold` failures in a row.
    pub(crate) fn new(threshold: u32) -> Self {
        Self {
            threshold,
            state: Mutex::default(),
        }
    }

    /// `None` while it is open, but for one probe in every cool-down.
    pub(crate) fn admit(&self) -> Option<Admission<'_>> {
        let mut state = self.lock();
        if state.failures >= self.threshold {
            let now = Instant::now();
            if state.probe_at.is_some_and(|at| now < at) {
                return None;
            }
            state.probe_at = Some(now + COOL_DOWN);
        }
        Some(Admission {
            breaker: self,
            succeeded: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission<'_> {
    pub(crate) fn succeeded(mut self) {
        self.succeeded = true;
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        let mut state = self.breaker.lock();
        if self.succeeded {
            *state = State::default();
        } else {
            state.failures = state.failures.saturating_add(1);
            state.probe_at = Some(Instant::now() + COOL_DOWN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_after_failures_in_a_row_and_closes_with_a_success() {
        let breaker = Breaker::new(2);
        drop(breaker.admit());
        assert!(breaker.admit().map(Admission::succeeded).is_some());
        drop(breaker.admit());
        drop(breaker.admit());
        assert!(breaker.admit().is_none());
    }

    #[test]
    fn after_the_cool_down_one_probe_is_admitted() {
        let breaker = Breaker::new(1);
        drop(breaker.admit());
        breaker.lock().probe_at = Some(Instant::now());
        let probe = breaker.admit();
        assert!(breaker.admit().is_none());
        assert!(probe.map(Admission::succeeded).is_some());
        assert!(breaker.admit().is_some());
    }
}
