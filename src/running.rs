//! The attempts of this process: kept alive by one heartbeat for all leases of one length in one
//! runtime.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Id};
use tokio::sync::Notify;

use crate::fingerprint::Fingerprint;
use crate::identity::Identity;
use crate::store::{Claim, Existing, LeaseRenewal, Renewed, Store, StoreError, Token};

/// The part of a lease that is not relied on, for clocks that run at different speeds.
const MARGIN: u32 = 10;
/// Beats in one lease, so that two may fail.
const BEATS: u32 = 3;

/// What this process knows of one lease.
#[derive(Debug)]
pub(crate) struct Lease {
    trusted_until: Mutex<Option<Instant>>,
}

impl Lease {
    fn new(confirmed: Instant, length: Duration) -> Self {
        let lease = Self {
            trusted_until: Mutex::new(None),
        };
        lease.confirm(confirmed, length);
        lease
    }

    /// `sent` is when the renewal was sent, which is before the database read its clock.
    fn confirm(&self, sent: Instant, length: Duration) {
        *self.lock() = Some(sent + (length - length / MARGIN));
    }

    fn lose(&self) {
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

#[derive(Debug, Default)]
pub(crate) struct Running {
    attempts: Mutex<Attempts>,
}

#[derive(Debug, Default)]
struct Attempts {
    by_token: HashMap<Token, Attempt>,
    /// The latest attempt of an operation.
    latest: HashMap<Identity, Token>,
    hearts: HashMap<Pulse, Arc<Notify>>,
}

/// Which leases are renewed together. Each length has its own heart: what is too slow for a short
/// lease, or what a long one waits for, must not end the others. So has each runtime: it lives as
/// long as the attempts that run in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Pulse {
    length: Duration,
    runtime: Id,
}

#[derive(Debug)]
struct Attempt {
    identity: Identity,
    fingerprint: Fingerprint,
    claim: ClaimState,
}

#[derive(Debug)]
enum ClaimState {
    Kept(Kept),
    /// Taken over by somebody else, or resolved: the store knows better.
    Lost,
    /// Runs without one, because the store was down.
    Never,
    /// Asks for a transaction: not yet compared with a record.
    Entering,
    /// Runs in a transaction.
    Transaction,
}

/// Who is in the way of an attempt that wants to enter.
#[derive(Debug)]
pub(crate) enum Occupant {
    Running(Existing),
    /// It is not known yet whether it may.
    Entering,
}

#[derive(Debug)]
struct Kept {
    renewal: LeaseRenewal,
    pulse: Pulse,
    lease: Arc<Lease>,
    next_beat: Instant,
}

/// An attempt is listed while it lives.
#[derive(Debug)]
pub(crate) struct Listed {
    running: Arc<Running>,
    token: Token,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.running.lock().remove(self.token);
    }
}

impl Attempts {
    fn insert(&mut self, token: Token, attempt: Attempt) {
        self.latest.insert(attempt.identity.clone(), token);
        self.by_token.insert(token, attempt);
    }

    fn remove(&mut self, token: Token) {
        let Some(attempt) = self.by_token.remove(&token) else {
            return;
        };
        if self.latest.get(&attempt.identity) == Some(&token) {
            self.latest.remove(&attempt.identity);
        }
    }

    /// What a duplicate is answered while this process runs the operation. A run without a claim was
    /// not compared with the record, so another request is for the store to judge, while it is up.
    fn find(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
        store_is_up: bool,
    ) -> Option<Existing> {
        let running = self.by_token.get(self.latest.get(identity)?)?;
        let is_same = fingerprint.matches(&running.fingerprint);
        match running.claim {
            ClaimState::Lost | ClaimState::Entering => None,
            ClaimState::Never if store_is_up && !is_same => None,
            _ if !is_same => Some(Existing::Mismatch),
            _ => Some(Existing::InProgress {
                lease_left: Duration::from_secs(1),
            }),
        }
    }

    fn is_entering(&self, identity: &Identity) -> bool {
        let token = self.latest.get(identity);
        let attempt = token.and_then(|token| self.by_token.get(token));
        attempt.is_some_and(|attempt| matches!(attempt.claim, ClaimState::Entering))
    }

    fn kept(&self, pulse: Pulse) -> impl Iterator<Item = &Kept> {
        let claims = self.by_token.values().map(|attempt| &attempt.claim);
        claims.filter_map(move |claim| match claim {
            ClaimState::Kept(kept) if kept.pulse == pulse => Some(kept),
            _ => None,
        })
    }
}

impl Running {
    /// What a duplicate is answered while this process runs the operation, even when its lease has
    /// run out because the store could not be reached.
    pub(crate) fn find(&self, identity: &Identity, fingerprint: &Fingerprint) -> Option<Existing> {
        self.lock().find(identity, fingerprint, true)
    }

    /// Lists a claimed attempt, and keeps its lease alive from now on, for as long as the runtime lives
    /// in which this is called. `sent` is when the claim was sent.
    pub(crate) fn keep<S: Store + Clone>(
        self: &Arc<Self>,
        store: &S,
        claim: &Claim,
        fingerprint: &Fingerprint,
        length: Duration,
        sent: Instant,
    ) -> (Listed, Arc<Lease>) {
        let lease = Arc::new(Lease::new(sent, length));
        let runtime = Handle::current().id();
        let pulse = Pulse { length, runtime };
        let attempt = Attempt {
            identity: claim.identity.clone(),
            fingerprint: fingerprint.clone(),
            claim: ClaimState::Kept(Kept {
                renewal: LeaseRenewal {
                    claim: claim.clone(),
                    lease: length,
                },
                pulse,
                lease: lease.clone(),
                next_beat: sent + length / BEATS,
            }),
        };
        let mut attempts = self.lock();
        attempts.insert(claim.token, attempt);
        if let Some(changed) = attempts.hearts.get(&pulse) {
            changed.notify_one();
        } else {
            let changed = Arc::new(Notify::new());
            attempts.hearts.insert(pulse, changed.clone());
            // A runtime that is going down drops the task at once, and its heart takes the lock.
            drop(attempts);
            let heart = Heart::new(self.clone(), pulse);
            tokio::spawn(heart.beat(store.clone(), changed));
        }
        (self.listed(claim.token), lease)
    }

    /// Lists an attempt that runs although the store is down, unless this process runs the same
    /// operation already.
    pub(crate) fn list_unprotected(
        self: &Arc<Self>,
        identity: &Identity,
        fingerprint: &Fingerprint,
        token: Token,
    ) -> Result<Listed, Existing> {
        let mut attempts = self.lock();
        if let Some(existing) = attempts.find(identity, fingerprint, false) {
            return Err(existing);
        }
        let attempt = Attempt {
            identity: identity.clone(),
            fingerprint: fingerprint.clone(),
            claim: ClaimState::Never,
        };
        attempts.insert(token, attempt);
        drop(attempts);
        Ok(self.listed(token))
    }

    /// Lists an attempt that asks for a transaction, unless this process runs the operation already.
    pub(crate) fn enter(
        self: &Arc<Self>,
        identity: &Identity,
        fingerprint: &Fingerprint,
        token: Token,
    ) -> Result<Listed, Occupant> {
        let mut attempts = self.lock();
        if let Some(existing) = attempts.find(identity, fingerprint, true) {
            return Err(Occupant::Running(existing));
        }
        if attempts.is_entering(identity) {
            return Err(Occupant::Entering);
        }
        let attempt = Attempt {
            identity: identity.clone(),
            fingerprint: fingerprint.clone(),
            claim: ClaimState::Entering,
        };
        attempts.insert(token, attempt);
        drop(attempts);
        Ok(self.listed(token))
    }

    /// Whether an attempt of this process asks for a transaction.
    pub(crate) fn is_entering(&self, identity: &Identity) -> bool {
        self.lock().is_entering(identity)
    }

    /// The attempt has its transaction, and no record is of another request.
    pub(crate) fn confirm(&self, token: Token) {
        if let Some(attempt) = self.lock().by_token.get_mut(&token) {
            attempt.claim = ClaimState::Transaction;
        }
    }

    /// What is running, by the ids of records.
    pub(crate) fn identities(&self) -> Vec<Identity> {
        let attempts = self.lock();
        let running = attempts.by_token.values();
        running.map(|attempt| attempt.identity.clone()).collect()
    }

    fn listed(self: &Arc<Self>, token: Token) -> Listed {
        Listed {
            running: self.clone(),
            token,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Attempts> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }

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

    fn renewed(&self, due: &[LeaseRenewal], sent: Instant, outcome: &[Renewed]) {
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
                    kept.next_beat = sent + renewal.lease / BEATS;
                }
                Renewed::Busy => {
                    kept.next_beat = Instant::now() + renewal.lease / (4 * BEATS);
                }
                Renewed::Lost => {
                    tracing::warn!(id = %attempt.identity.id(), "claim was lost while its handler runs");
                    kept.lease.lose();
                    attempt.claim = ClaimState::Lost;
                }
            }
        }
    }
}

/// The task of the heartbeat. Should it be dropped with its runtime, or panic with its store, the
/// next attempt that is listed starts another.
struct Heart {
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
    fn new(running: Arc<Running>, pulse: Pulse) -> Self {
        Self {
            running,
            pulse,
            beats: true,
        }
    }

    /// Runs while there are leases to renew. One slow or failing round is followed by the next.
    async fn beat<S: Store>(mut self, store: S, changed: Arc<Notify>) {
        let (running, pulse) = (self.running.clone(), self.pulse);
        while let Some(next) = running.next_beat(pulse) {
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = changed.notified() => continue,
            }
            let sent = Instant::now();
            let due = running.due(pulse, sent);
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
