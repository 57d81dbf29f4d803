//! The attempts of this process: of those that ask for the same, one goes first and the others follow
//! it; and the leases of those that run are kept alive.

mod follow;
mod heart;
mod lease;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Id};
use tokio::sync::{Notify, watch};

use crate::fingerprint::Fingerprint;
use crate::identity::Identity;
use crate::moment::Moment;
use crate::store::{Claim, Existing, LeaseRenewal, Store, Token};

pub(crate) use follow::{Leader, News, Said};
use heart::Heart;
pub(crate) use lease::Lease;

/// Beats in one lease, so that two may fail.
const BEATS: u32 = 3;

#[derive(Debug, Default)]
pub(crate) struct Running {
    attempts: Mutex<Attempts>,
}

#[derive(Debug, Default)]
struct Attempts {
    by_token: HashMap<Token, Attempt>,
    /// Who asks the store about an operation on behalf of all.
    asking: HashMap<Identity, Token>,
    /// The latest attempt of an operation that runs.
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
    /// Dropped with the attempt, which tells those that follow it that it is over.
    news: watch::Sender<News>,
    wanted: Arc<Notify>,
}

#[derive(Debug)]
enum ClaimState {
    /// Not yet compared with a record.
    Asking,
    Kept(Kept),
    /// Taken over by somebody else, or resolved: the store knows better.
    Lost,
    /// Runs without one, because the store was down.
    Never,
    /// Runs in a transaction.
    Transaction,
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
    wanted: Arc<Notify>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        // Whoever follows it is woken when the lock is free again.
        let attempt = self.running.lock().remove(self.token);
        drop(attempt);
    }
}

impl Attempts {
    fn insert(&mut self, token: Token, attempt: Attempt) {
        if !matches!(attempt.claim, ClaimState::Asking) {
            self.latest.insert(attempt.identity.clone(), token);
        }
        self.by_token.insert(token, attempt);
    }

    fn remove(&mut self, token: Token) -> Option<Attempt> {
        let attempt = self.by_token.remove(&token)?;
        for first in [&mut self.asking, &mut self.latest] {
            if first.get(&attempt.identity) == Some(&token) {
                first.remove(&attempt.identity);
            }
        }
        Some(attempt)
    }

    /// From now on it runs, and says so to those that follow it.
    fn run(&mut self, token: Token, claim: ClaimState) {
        let Some(attempt) = self.by_token.get_mut(&token) else {
            return;
        };
        attempt.claim = claim;
        attempt.news.send_replace(News::Running);
        let identity = attempt.identity.clone();
        if self.asking.get(&identity) == Some(&token) {
            self.asking.remove(&identity);
        }
        self.latest.insert(identity, token);
    }

    fn latest(&self, identity: &Identity) -> Option<&Attempt> {
        self.by_token.get(self.latest.get(identity)?)
    }

    /// The attempt that runs in place of such a request. A run without a claim was not compared with
    /// the record, so another request is for the store to judge.
    fn in_place_of(&self, identity: &Identity, fingerprint: &Fingerprint) -> Option<&Attempt> {
        self.latest(identity).filter(|attempt| match attempt.claim {
            ClaimState::Lost => false,
            ClaimState::Never => fingerprint.matches(&attempt.fingerprint),
            _ => true,
        })
    }

    /// Whom a request has to follow.
    fn leader(&self, identity: &Identity, fingerprint: &Fingerprint) -> Option<Leader> {
        let running = self.in_place_of(identity, fingerprint);
        let asking = || self.by_token.get(self.asking.get(identity)?);
        let attempt = running.or_else(asking)?;
        if *fingerprint == attempt.fingerprint {
            attempt.want();
        }
        Some(Leader::new(attempt))
    }

    /// What a duplicate is answered while the store is down.
    fn find(&self, identity: &Identity, fingerprint: &Fingerprint) -> Option<Existing> {
        let running = self.latest(identity)?;
        match running.claim {
            ClaimState::Lost => None,
            _ if !fingerprint.matches(&running.fingerprint) => Some(Existing::Mismatch),
            _ => Some(IN_PROGRESS),
        }
    }
}

/// Nobody can say for how long.
pub(crate) const IN_PROGRESS: Existing = Existing::InProgress {
    lease_left: Duration::from_secs(1),
};

impl Running {
    /// Lists an attempt that is about to ask the store, as the first of its operation.
    ///
    /// # Errors
    ///
    /// Another one of this process came first.
    pub(crate) fn lead(
        self: &Arc<Self>,
        identity: &Identity,
        fingerprint: &Fingerprint,
        token: Token,
    ) -> Result<Listed, Leader> {
        let mut attempts = self.lock();
        if let Some(leader) = attempts.leader(identity, fingerprint) {
            return Err(leader);
        }
        attempts.asking.insert(identity.clone(), token);
        Ok(self.list(&mut attempts, identity, fingerprint, token, None))
    }

    /// Lists an attempt that asks the store for itself, and that nobody follows before it runs.
    pub(crate) fn list_alone(
        self: &Arc<Self>,
        identity: &Identity,
        fingerprint: &Fingerprint,
        token: Token,
    ) -> Listed {
        self.list(&mut self.lock(), identity, fingerprint, token, None)
    }

    /// Lists an attempt that runs although the store is down.
    ///
    /// # Errors
    ///
    /// What a duplicate is answered where this process runs the same operation already, even when its
    /// lease has run out because the store could not be reached.
    pub(crate) fn list_unprotected(
        self: &Arc<Self>,
        identity: &Identity,
        fingerprint: &Fingerprint,
        token: Token,
    ) -> Result<Listed, Existing> {
        let mut attempts = self.lock();
        if let Some(existing) = attempts.find(identity, fingerprint) {
            return Err(existing);
        }
        let never = Some(ClaimState::Never);
        Ok(self.list(&mut attempts, identity, fingerprint, token, never))
    }

    fn list(
        self: &Arc<Self>,
        attempts: &mut Attempts,
        identity: &Identity,
        fingerprint: &Fingerprint,
        token: Token,
        runs: Option<ClaimState>,
    ) -> Listed {
        let wanted = Arc::new(Notify::new());
        let news = match runs {
            Some(_) => News::Running,
            None => News::Asking,
        };
        let attempt = Attempt {
            identity: identity.clone(),
            fingerprint: fingerprint.clone(),
            claim: runs.unwrap_or(ClaimState::Asking),
            news: watch::Sender::new(news),
            wanted: wanted.clone(),
        };
        attempts.insert(token, attempt);
        Listed {
            running: self.clone(),
            token,
            wanted,
        }
    }

    /// What is running, by the ids of records.
    pub(crate) fn identities(&self) -> Vec<Identity> {
        let attempts = self.lock();
        let listed = attempts.by_token.values();
        let running = listed.filter(|attempt| !matches!(attempt.claim, ClaimState::Asking));
        running.map(|attempt| attempt.identity.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Attempts> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listed {
    /// It has claimed its record: keeps the lease alive from now on, for as long as the runtime lives
    /// in which this is called. `sent` is when the claim was sent.
    pub(crate) fn keep<S: Store + Clone>(
        &self,
        store: &S,
        claim: &Claim,
        length: Duration,
        sent: Moment,
    ) -> Arc<Lease> {
        let lease = Arc::new(Lease::new(sent, length));
        let runtime = Handle::current().id();
        let pulse = Pulse { length, runtime };
        let kept = Kept {
            renewal: LeaseRenewal {
                claim: claim.clone(),
                lease: length,
            },
            pulse,
            lease: lease.clone(),
            next_beat: sent.monotonic + length / BEATS,
        };
        let mut attempts = self.running.lock();
        attempts.run(self.token, ClaimState::Kept(kept));
        if let Some(changed) = attempts.hearts.get(&pulse) {
            changed.notify_one();
            return lease;
        }
        let changed = Arc::new(Notify::new());
        attempts.hearts.insert(pulse, changed.clone());
        // A runtime that is going down drops the task at once, and its heart takes the lock.
        drop(attempts);
        let heart = Heart::new(self.running.clone(), pulse);
        tokio::spawn(heart.beat(store.clone(), changed));
        lease
    }

    /// It has its transaction, and no record is of another request.
    pub(crate) fn confirm(&self) {
        let mut attempts = self.running.lock();
        attempts.run(self.token, ClaimState::Transaction);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::policy::Lost;
    use crate::store::{ClaimRequest, MemoryStore, Renewed};

    const LEASE: Duration = Duration::from_secs(30);

    fn identity() -> Identity {
        Identity::new("acme", "POST /orders", "key")
    }

    fn tea() -> Fingerprint {
        Fingerprint::of_bytes(b"tea")
    }

    fn coffee() -> Fingerprint {
        Fingerprint::of_bytes(b"coffee")
    }

    fn lead(running: &Arc<Running>, fingerprint: &Fingerprint) -> Result<Listed, Leader> {
        running.lead(&identity(), fingerprint, Token::random().unwrap())
    }

    fn claim(listed: &Listed) -> Claim {
        let request = ClaimRequest {
            identity: identity(),
            fingerprint: tea(),
            token: listed.token,
            lost: Lost::Rerun,
            lease: LEASE,
            ttl: LEASE,
        };
        request.claim(1, SystemTime::UNIX_EPOCH)
    }

    fn keep(listed: &Listed) -> Arc<Lease> {
        let store = Arc::new(MemoryStore::new());
        listed.keep(&store, &claim(listed), LEASE, Moment::now())
    }

    fn said(existing: Existing) -> Said {
        Said {
            existing: Arc::new(existing),
            asked: Instant::now(),
        }
    }

    fn is_empty(running: &Running) -> bool {
        let attempts = running.lock();
        attempts.by_token.is_empty() && attempts.asking.is_empty() && attempts.latest.is_empty()
    }

    #[tokio::test]
    async fn nothing_is_listed_when_attempts_are_gone() {
        let running = Arc::<Running>::default();
        drop(lead(&running, &tea()).unwrap());
        assert!(is_empty(&running));
        let listed = lead(&running, &tea()).unwrap();
        keep(&listed);
        assert!(!is_empty(&running));
        listed.recorded(said(IN_PROGRESS));
        assert!(is_empty(&running));
        lead(&running, &tea()).unwrap().failed();
        lead(&running, &tea()).unwrap().told(said(Existing::Held));
        drop(running.list_alone(&identity(), &tea(), Token::random().unwrap()));
        assert!(is_empty(&running));
    }

    #[tokio::test]
    async fn of_two_one_follows() {
        let running = Arc::<Running>::default();
        let first = lead(&running, &tea()).unwrap();
        let mut leader = lead(&running, &coffee()).unwrap_err();
        assert!(matches!(leader.news(), News::Asking));
        keep(&first);
        assert!(leader.changed().await);
        assert!(matches!(leader.news(), News::Running));
        drop(first);
        assert!(!leader.changed().await);
        assert!(lead(&running, &coffee()).is_ok());
    }

    #[tokio::test]
    async fn what_an_attempt_ended_with_is_heard_after_it_is_gone() {
        let running = Arc::<Running>::default();
        let first = lead(&running, &tea()).unwrap();
        let mut leader = lead(&running, &tea()).unwrap_err();
        first.told(said(Existing::Held));
        assert!(leader.changed().await);
        assert!(matches!(leader.news(), News::Told(_)));
    }

    #[tokio::test]
    async fn a_lost_lease_is_told_and_not_followed_further() {
        let running = Arc::<Running>::default();
        let first = lead(&running, &tea()).unwrap();
        keep(&first);
        let mut leader = lead(&running, &tea()).unwrap_err();
        assert!(matches!(leader.news(), News::Running));
        let renewal = LeaseRenewal {
            claim: claim(&first),
            lease: LEASE,
        };
        running.renewed(&[renewal], Moment::now(), &[Renewed::Lost]);
        assert!(leader.changed().await);
        assert!(matches!(leader.news(), News::Over));
        assert!(lead(&running, &tea()).is_ok());
    }

    #[test]
    fn who_runs_unprotected_is_followed_by_the_same_request_alone() {
        let running = Arc::<Running>::default();
        let token = Token::random().unwrap();
        let unprotected = running.list_unprotected(&identity(), &tea(), token);
        let other = lead(&running, &coffee()).unwrap();
        assert!(matches!(
            lead(&running, &tea()).unwrap_err().news(),
            News::Running
        ));
        // Not even one that asks hides it from others whose claims failed.
        other.failed();
        let second = running.list_unprotected(&identity(), &tea(), Token::random().unwrap());
        assert!(matches!(second, Err(Existing::InProgress { .. })));
        drop(unprotected);
        assert!(is_empty(&running));
    }

    #[tokio::test]
    async fn a_newcomer_makes_one_that_waits_ask_again() {
        let running = Arc::<Running>::default();
        let first = lead(&running, &tea()).unwrap();
        first.elsewhere(Instant::now());
        // Another request would not be told by it.
        let mut other = lead(&running, &coffee()).unwrap_err();
        assert!(matches!(other.news(), News::Elsewhere(_)));
        let mut same = lead(&running, &tea()).unwrap_err();
        assert!(matches!(same.news(), News::Asking));
        first.wanted().await;
        assert!(first.asks_again());
    }

    #[tokio::test]
    async fn who_was_passed_by_asks_no_more() {
        let running = Arc::<Running>::default();
        let first = lead(&running, &tea()).unwrap();
        first.elsewhere(Instant::now());
        let passing = running.list_alone(&identity(), &tea(), Token::random().unwrap());
        assert!(!passing.asks_again());
        assert!(first.asks_again());
        keep(&passing);
        assert!(!first.asks_again());
    }
}
