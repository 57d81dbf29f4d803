//! One heartbeat for all leases of one length in one runtime.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{Attempts, BEATS, ClaimState, Kept, News, Pulse, Running};
use crate::moment::Moment;
use crate::store::{LeaseRenewal, Renewed, Store, StoreError};

impl Attempts {
    fn kept(&self, pulse: Pulse) -> impl Iterator<Item = &Kept> {
        let claims = self.by_token.values().map(|attempt| &attempt.claim);
        claims.filter_map(move |claim| match claim {
            ClaimState::Kept(kept) if kept.pulse == pulse => Some(kept),
            _ => None,
        })
    }
}

impl Running {
    /// When the next lease is to be renewed; `None` ends the heartbeat.
    fn next_beat(&self, pulse: Pulse) -> Option<Instant> {
        let mut attempts = self.lock();
        let next = attempts.kept(pulse).map(|kept| kept.next_beat).min();
        if next.is_none() {
            attempts.hearts.remove(&pulse);
        }
        next
    }

    /// All leases that are due, or will be half a beat from now: one statement for them together.
    fn due(&self, pulse: Pulse, now: Instant) -> Vec<LeaseRenewal> {
        let attempts = self.lock();
        let soon = now + pulse.length / (2 * BEATS);
        let due = attempts.kept(pulse).filter(|kept| kept.next_beat <= soon);
        due.map(|kept| kept.renewal.clone()).collect()
    }

    pub(super) fn renewed(&self, due: &[LeaseRenewal], sent: Moment, outcome: &[Renewed]) {
        let mut attempts = self.lock();
        for (renewal, renewed) in due.iter().zip(outcome) {
            let Some(attempt) = attempts.by_token.get_mut(&renewal.claim.token) else {
                continue;
            };
            let ClaimState::Kept(kept) = &mut attempt.claim else {
                continue;
            };
            match renewed {
                Renewed::Kept => {
                    kept.lease.confirm(sent, renewal.lease);
                    kept.next_beat = sent.monotonic + renewal.lease / BEATS;
                }
                Renewed::Busy => {
                    kept.next_beat = Instant::now() + renewal.lease / (4 * BEATS);
                }
                Renewed::Lost => {
                    tracing::warn!(id = %attempt.identity.id(), "claim was lost while its handler runs");
                    kept.lease.lose();
                    attempt.claim = ClaimState::Lost;
                    attempt.news.send_replace(News::Over);
                }
            }
        }
    }
}

/// The task of the heartbeat. Should it be dropped with its runtime, or panic with its store, the
/// next attempt that is listed starts another.
pub(super) struct Heart {
    running: Arc<Running>,
    pulse: Pulse,
    beats: bool,
}

impl Drop for Heart {
    fn drop(&mut self) {
        if self.beats {
            self.running.lock().hearts.remove(&self.pulse);
        }
    }
}

impl Heart {
    pub(super) fn new(running: Arc<Running>, pulse: Pulse) -> Self {
        Self {
            running,
            pulse,
            beats: true,
        }
    }

    /// Runs while there are leases to renew. One slow or failing round is followed by the next.
    pub(super) async fn beat<S: Store>(mut self, store: S, changed: Arc<Notify>) {
        let (running, pulse) = (self.running.clone(), self.pulse);
        while let Some(next) = running.next_beat(pulse) {
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = changed.notified() => continue,
            }
            let sent = Moment::now();
            let due = running.due(pulse, sent.monotonic);
            if due.is_empty() {
                continue;
            }
            let outcome = renew(&store, &due, pulse.length / BEATS).await;
            let outcome = outcome.unwrap_or_else(|error| {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "cannot renew leases"
                );
                vec![Renewed::Busy; due.len()]
            });
            running.renewed(&due, sent, &outcome);
        }
        // Said under the lock already: another heart may beat by now.
        self.beats = false;
    }
}

async fn renew<S: Store>(
    store: &S,
    due: &[LeaseRenewal],
    limit: Duration,
) -> Result<Vec<Renewed>, StoreError> {
    tokio::time::timeout(limit, store.extend(due))
        .await
        .unwrap_or_else(|elapsed| Err(StoreError::unavailable(elapsed)))
}
