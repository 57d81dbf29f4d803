//! Of the requests of this process that ask for the same, one asks the store. The others follow it, and
//! are answered from what it is told, as far as that says something of them, too.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::{Exchange, Reply};
use crate::backoff::Backoff;
use crate::policy::Duplicates;
use crate::running::{IN_PROGRESS, Leader, Listed, News, Said};
use crate::store::{Existing, Store, StoreError, Token};

/// How a kind of route asks the store for the right to run.
pub(super) trait Ask: Send {
    type Right: Send;

    fn ask(&mut self) -> impl Future<Output = Result<Asked<Self::Right>, StoreError>> + Send;
}

/// What the store answered.
pub(super) enum Asked<R> {
    Granted(R),
    Existing(Existing),
}

/// What a request is to do.
pub(super) enum Entered<R> {
    /// Run, listed as running.
    Granted(R, Listed),
    /// Say what is there.
    Existing(Arc<Existing>),
    /// The store did not answer.
    Down(StoreError),
}

/// What came of following another request.
enum Followed {
    Existing(Arc<Existing>),
    /// Whom to follow next is to be seen.
    Again,
    /// Nobody: this one asks for itself.
    Alone,
}

/// How long a request waits for others.
struct Waits {
    arrived: Instant,
    is_patient: bool,
    give_up: Instant,
    backoff: Backoff,
    /// How long the store may take to answer others, until this one asks it by itself.
    timeout: Duration,
    ask_by: Option<Instant>,
}

impl Waits {
    fn new(duplicates: Duplicates, timeout: Duration) -> Self {
        let patience = match duplicates {
            Duplicates::Wait(limit) => limit,
            Duplicates::Reject => Duration::ZERO,
        };
        let arrived = Instant::now();
        Self {
            arrived,
            is_patient: !patience.is_zero(),
            give_up: arrived + patience,
            backoff: Backoff::new(Duration::from_millis(25), Duration::from_millis(500)),
            timeout,
            ask_by: None,
        }
    }

    /// The store has answered somebody: it is up.
    fn heard(&mut self) {
        self.ask_by = None;
    }

    /// How long to follow one that asks, and what to do then. However many ask one after the other
    /// without learning anything of this request, it is a single timeout in all.
    fn unheard(&mut self) -> (Instant, Followed) {
        let ask_by = *self
            .ask_by
            .get_or_insert_with(|| Instant::now() + self.timeout);
        if self.is_patient && self.give_up < ask_by {
            (self.give_up, in_progress())
        } else {
            (ask_by, Followed::Alone)
        }
    }

    /// How long to wait before the store is asked again, or `None` when the patience is over.
    fn pause(&mut self) -> Option<Duration> {
        let left = self.give_up.checked_duration_since(Instant::now())?;
        (!left.is_zero()).then(|| self.backoff.next_pause().min(left))
    }
}

fn in_progress() -> Followed {
    Followed::Existing(Arc::new(IN_PROGRESS))
}

impl<S: Store> Exchange<S> {
    /// Asks the store, unless another request of this process does. Waits where the policy says so,
    /// but not when the client is gone: the answer will be in the record.
    ///
    /// # Cancel safety
    ///
    /// Runs in the detached task. Were it dropped, those that follow it would look for another.
    pub(super) async fn enter<A: Ask, E>(
        &self,
        token: Token,
        ask: &mut A,
        reply: &mut Reply<E>,
    ) -> Entered<A::Right> {
        let mut waits = Waits::new(self.policy.duplicates, self.shared.store_timeout);
        loop {
            let listed = match self.lead(token, &mut waits, reply).await {
                Ok(listed) => listed,
                Err(existing) => return Entered::Existing(existing),
            };
            if let Some(entered) = self.ask(listed, ask, &mut waits, reply).await {
                return entered;
            }
        }
    }

    /// Follows others until there is nobody to follow.
    async fn lead<E>(
        &self,
        token: Token,
        waits: &mut Waits,
        reply: &mut Reply<E>,
    ) -> Result<Listed, Arc<Existing>> {
        let running = &self.shared.core.running;
        loop {
            let leader = match running.lead(&self.identity, &self.fingerprint, token) {
                Ok(listed) => return Ok(listed),
                Err(leader) => leader,
            };
            match self.follow(leader, waits, reply).await {
                Followed::Again => {}
                Followed::Alone => {
                    return Ok(running.list_alone(&self.identity, &self.fingerprint, token));
                }
                Followed::Existing(existing) => {
                    let runs = matches!(*existing, Existing::InProgress { .. });
                    let pause = waits.pause().filter(|_| runs);
                    let Some(pause) = pause else {
                        return Err(existing);
                    };
                    if !self.rest(pause, reply).await {
                        return Err(existing);
                    }
                }
            }
        }
    }

    /// A mismatch is answered only where the record is known to have another fingerprint.
    async fn follow<E>(
        &self,
        mut leader: Leader,
        waits: &mut Waits,
        reply: &mut Reply<E>,
    ) -> Followed {
        let is_equal = self.fingerprint == leader.fingerprint;
        let is_same = self.fingerprint.matches(&leader.fingerprint);
        let mismatch = || Followed::Existing(Arc::new(Existing::Mismatch));
        loop {
            let news = leader.news();
            if matches!(news, News::Elsewhere(_) | News::Running) {
                waits.heard();
            }
            let (until, then) = match news {
                News::Asking => waits.unheard(),
                News::Elsewhere(_) if !is_equal => return Followed::Alone,
                News::Running | News::Recorded(_) if !is_same => return mismatch(),
                News::Elsewhere(asked) if asked < waits.arrived => return Followed::Again,
                News::Elsewhere(_) | News::Running => (waits.give_up, in_progress()),
                News::Told(said) if is_equal && said.holds_for(waits.arrived) => {
                    return Followed::Existing(said.existing);
                }
                News::Recorded(said) if said.holds_for(waits.arrived) => {
                    return Followed::Existing(said.existing);
                }
                News::Failed => return Followed::Alone,
                News::Told(_) | News::Recorded(_) | News::Over => return Followed::Again,
            };
            tokio::select! {
                biased;
                changed = leader.changed() => if !changed {
                    return Followed::Again;
                },
                () = tokio::time::sleep_until(until.into()) => return then,
                () = reply.closed() => return in_progress(),
            }
        }
    }

    /// Asks the store on behalf of all that follow. `None`: another one is to be followed.
    async fn ask<A: Ask, E>(
        &self,
        listed: Listed,
        ask: &mut A,
        waits: &mut Waits,
        reply: &mut Reply<E>,
    ) -> Option<Entered<A::Right>> {
        loop {
            let (fill, asked) = (self.fill(), Instant::now());
            let existing = match ask.ask().await {
                Ok(Asked::Granted(right)) => {
                    self.shared.core.replays.load().invalidate(&self.identity);
                    return Some(Entered::Granted(right, listed));
                }
                Ok(Asked::Existing(existing)) => Arc::new(existing),
                Err(error) => {
                    listed.failed();
                    return Some(Entered::Down(error));
                }
            };
            waits.heard();
            if let Some(fill) = fill {
                fill.read(&self.fingerprint, &existing);
            }
            let runs = matches!(*existing, Existing::InProgress { .. });
            let Some(pause) = waits.pause().filter(|_| runs) else {
                listed.told(Said {
                    existing: existing.clone(),
                    asked,
                });
                return Some(Entered::Existing(existing));
            };
            listed.elsewhere(asked);
            let waited = tokio::select! {
                waited = self.rest(pause, reply) => waited,
                () = listed.wanted() => true,
            };
            if !waited {
                return Some(Entered::Existing(existing));
            }
            if !listed.asks_again() {
                return None;
            }
        }
    }

    /// Waits a while for a record that runs in another process; `false` when the client is gone.
    async fn rest<E>(&self, pause: Duration, reply: &mut Reply<E>) -> bool {
        let store = &self.shared.core.store;
        tokio::select! {
            () = reply.closed() => false,
            _ = timeout(pause, store.wait_for_change(&self.identity, pause)) => true,
        }
    }
}
