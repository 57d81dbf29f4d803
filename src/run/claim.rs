use std::error::Error;
use std::time::{Duration, SystemTime};

use axum_core::body::Body;
use http::Response;

use super::follow::{Ask, Asked, Entered};
use super::{Exchange, Reply};
use crate::backoff::Backoff;
use crate::moment::Moment;
use crate::policy::StoreDown;
use crate::rejection::{Code, Rejection};
use crate::running::Listed;
use crate::store::{
    Claim, ClaimRequest, Claimed, LeaseRenewal, Renewed, Store, StoreError, StoreErrorKind, Token,
};

/// How an operation enters.
pub(super) enum Entry {
    /// Run the handler.
    Claimed(Grant, Listed),
    /// Answer that the earlier attempt was lost.
    Abandoned(Grant, Listed),
    /// Run the handler without a record.
    Unprotected(Listed),
    /// Do not run it.
    Answer(Response<Body>),
}

/// A claim that was acquired.
pub(super) struct Grant {
    pub(super) claim: Claim,
    /// When the claim was sent: its record is no older.
    pub(super) sent: Moment,
    /// When the lease was last asked for.
    pub(super) leased: Moment,
    /// What was sent before and not heard of may still be under way, and make a record of a key that was
    /// freed.
    pub(super) unheard: bool,
}

/// Asks for a claim.
struct Claiming<'a, S> {
    exchange: &'a Exchange<S>,
    request: ClaimRequest,
    sent: Moment,
    /// What was sent before may still be under way, or have made a record that nobody wants.
    unheard: bool,
}

enum Right {
    Claimed(Grant),
    Abandoned(Grant),
}

impl<S: Store> Ask for Claiming<'_, S> {
    type Right = Right;

    async fn ask(&mut self) -> Result<Asked<Right>, StoreError> {
        // What an earlier claim left, which was under way, has been there since any time after.
        if !self.unheard {
            self.sent = Moment::now();
        }
        let (claimed, leased) = self.claim_in_time().await?;
        let (sent, unheard) = (self.sent, self.unheard);
        let grant = |claim| Grant {
            claim,
            sent,
            leased,
            unheard,
        };
        Ok(match claimed {
            Claimed::Acquired(claim) => Asked::Granted(Right::Claimed(grant(claim))),
            Claimed::Abandoned(claim) => Asked::Granted(Right::Abandoned(grant(claim))),
            Claimed::Existing(existing) => Asked::Existing(existing),
        })
    }
}

impl<S: Store> Claiming<'_, S> {
    /// What the claim met, and when the lease was asked for that its record may have: a claim that
    /// meets its own token renews nothing. A lease that is lost before it is known is asked for again.
    async fn claim_in_time(&mut self) -> Result<(Claimed, Moment), StoreError> {
        let exchange = self.exchange;
        for _ in 0..3 {
            let claimed = exchange.try_claim(&self.request, &mut self.unheard).await?;
            let Claimed::Acquired(claim) = &claimed else {
                return Ok((claimed, self.sent));
            };
            let before = std::mem::replace(&mut self.unheard, true);
            if let Some(leased) = exchange.fresh(claim, self.sent).await? {
                self.unheard = before;
                return Ok((claimed, leased));
            }
        }
        let reason = "leases are over before they are known";
        Err(StoreError::unavailable(reason))
    }
}

impl<S: Store> Exchange<S> {
    /// # Cancel safety
    ///
    /// Runs in the detached task. If the process ends after the claim was sent, the lease runs out.
    pub(super) async fn claim<E>(&self, reply: &mut Reply<E>) -> Entry {
        let Ok(token) = Token::random() else {
            return Entry::Answer(self.reject(Rejection::new(Code::StoreUnavailable)));
        };
        let mut claiming = Claiming {
            exchange: self,
            request: self.claim_request(token),
            sent: Moment::now(),
            unheard: false,
        };
        let entered = self.enter(token, &mut claiming, reply).await;
        if claiming.unheard && !matches!(entered, Entered::Granted(..)) {
            self.withdraw(claiming.request.claim(0, SystemTime::UNIX_EPOCH));
        }
        match entered {
            Entered::Granted(Right::Claimed(grant), listed) => Entry::Claimed(grant, listed),
            Entered::Granted(Right::Abandoned(grant), listed) => Entry::Abandoned(grant, listed),
            Entered::Existing(existing) => Entry::Answer(self.answer_existing(&existing)),
            Entered::Down(error) => self.store_down(&claiming.request, &error),
        }
    }

    /// No handler starts on a lease that is half over, since the acknowledgement took so long: it is
    /// renewed first. When it was last confirmed, or `None` if it is lost.
    async fn fresh(&self, claim: &Claim, sent: Moment) -> Result<Option<Moment>, StoreError> {
        let lease = self.policy.lease;
        let is_recent = |sent: Moment| {
            let age = sent.age(Moment::now());
            age.is_some_and(|age| age < lease / 2)
        };
        if is_recent(sent) {
            return Ok(Some(sent));
        }
        let renewal = LeaseRenewal {
            claim: claim.clone(),
            lease,
        };
        let sent = Moment::now();
        let store = &self.shared.core.store;
        let renewed = self.until_timeout(|| store.extend(std::slice::from_ref(&renewal)));
        let renewed = renewed.await?;
        Ok((renewed == [Renewed::Kept] && is_recent(sent)).then_some(sent))
    }

    pub(super) fn claim_request(&self, token: Token) -> ClaimRequest {
        ClaimRequest {
            identity: self.identity.clone(),
            fingerprint: self.fingerprint.clone(),
            token,
            lost: self.policy.lost,
            lease: self.policy.lease,
            ttl: self.policy.ttl,
        }
    }

    /// Sends the claim, again after an error, until the store timeout. A claim whose acknowledgement
    /// was lost meets its own token, unless it is `unheard` and still under way: whoever ends without it is
    /// to [withdraw](Self::withdraw) it.
    pub(super) async fn try_claim(
        &self,
        request: &ClaimRequest,
        unheard: &mut bool,
    ) -> Result<Claimed, StoreError> {
        let store = &self.shared.core.store;
        let mut sent = 0_usize;
        let claim = || {
            sent += 1;
            store.claim(request)
        };
        let result = self.guarded(claim).await;
        let is_unknown = |error: &StoreError| error.kind() == StoreErrorKind::Unavailable;
        let heard = !result.as_ref().is_err_and(is_unknown);
        *unheard |= sent > usize::from(heard);
        result
    }

    /// Calls the store unless it has failed too often in a row.
    pub(super) async fn guarded<T, F>(&self, call: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let breaker = self.shared.breaker.clone();
        let admission = breaker
            .admit()
            .ok_or_else(|| StoreError::unavailable("breaker is open after failures in a row"))?;
        let result = self.until_timeout(call).await;
        match &result {
            Err(error) if error.kind() == StoreErrorKind::Unavailable => {}
            _ => admission.succeeded(),
        }
        result
    }

    /// Calls the store until it answers, or the store timeout is over.
    pub(super) async fn until_timeout<T, F>(
        &self,
        mut call: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let deadline = tokio::time::Instant::now() + self.shared.store_timeout;
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(250));
        loop {
            let error = match tokio::time::timeout_at(deadline, call()).await {
                Err(elapsed) => return Err(StoreError::unavailable(elapsed)),
                Ok(Err(error)) if error.kind() == StoreErrorKind::Unavailable => error,
                Ok(result) => return result,
            };
            let pause = tokio::time::Instant::now() + backoff.next_pause();
            if pause >= deadline {
                return Err(error);
            }
            tokio::time::sleep_until(pause).await;
        }
    }

    fn store_down(&self, request: &ClaimRequest, error: &StoreError) -> Entry {
        let (id, operation) = (self.identity.id(), self.identity.operation());
        let cause: &dyn Error = error;
        if error.kind() == StoreErrorKind::Corrupt {
            tracing::error!(%id, operation, error = cause, source = error.source(), "record cannot be read");
            return Entry::Answer(self.reject(Rejection::new(Code::RecordUnreadable)));
        }
        tracing::warn!(%id, operation, error = cause, source = error.source(), "cannot claim");
        if self.policy.store_down == StoreDown::Refuse {
            return Entry::Answer(self.reject(Rejection::new(Code::StoreUnavailable)));
        }
        let running = &self.shared.core.running;
        match running.list_unprotected(&self.identity, &self.fingerprint, request.token) {
            Ok(listed) => Entry::Unprotected(listed),
            Err(existing) => Entry::Answer(self.answer_existing(&existing)),
        }
    }

    /// A claim whose caller gave up may have been made all the same: it is released until the store
    /// confirms, and once more a while later, for a statement that was still under way.
    pub(super) fn withdraw(&self, claim: Claim) {
        let core = self.shared.core.clone();
        let timeout = self.shared.store_timeout;
        let Ok(permit) = core.withdrawals.clone().try_acquire_owned() else {
            tracing::warn!(id = %claim.identity.id(), "too many claims to withdraw: its lease will run out");
            return;
        };
        let tasks = core.withdrawing.clone();
        tasks.spawn(async move {
            for round in 0..2 {
                if round > 0 {
                    tokio::time::sleep(timeout * 3).await;
                }
                let mut backoff = Backoff::new(timeout / 20, timeout * 2);
                loop {
                    backoff.pause().await;
                    let released = tokio::time::timeout(timeout, core.store.release(&claim)).await;
                    match released {
                        Ok(Err(error)) if error.kind() == StoreErrorKind::Unavailable => {}
                        Ok(_) => break,
                        Err(_elapsed) => {}
                    }
                }
            }
            drop(permit);
        });
    }
}
