//! A store that fails on demand, around any other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, RecordSummary,
    Renewed, Resolution, Swept, Token, Within,
};
use tower_idempotency::{Fingerprint, Identity, RecordId, References, Store, StoreError};

/// How one method behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    #[default]
    None,
    /// Fails without doing anything.
    Down,
    /// Never answers.
    Hang,
    /// Does it, and fails all the same, once.
    LoseAcknowledgement,
    /// Does it, and answers late.
    AnswerLate(std::time::Duration),
}

#[derive(Debug, Default)]
struct Switch {
    fault: Mutex<Fault>,
    fired: AtomicUsize,
}

impl Switch {
    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    async fn around<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let fault = *self.fault.lock().unwrap();
        if fault != Fault::None {
            self.fired.fetch_add(1, Ordering::SeqCst);
        }
        match fault {
            Fault::None => call.await,
            Fault::Down => Err(StoreError::unavailable("planted")),
            Fault::Hang => std::future::pending().await,
            Fault::LoseAcknowledgement => {
                self.set(Fault::None);
                let result = call.await;
                result.and_then(|_| Err(StoreError::unavailable("planted")))
            }
            Fault::AnswerLate(by) => {
                let result = call.await;
                tokio::time::sleep(by).await;
                result
            }
        }
    }
}

#[derive(Debug, Clone)]
pub struct Flaky<S> {
    store: S,
    claim: Arc<Switch>,
    complete: Arc<Switch>,
    extend: Arc<Switch>,
    calls: Arc<AtomicUsize>,
}

impl<S: Store> Flaky<S> {
    pub fn new(store: S) -> Self {
        Self {
            store,
            claim: Arc::default(),
            complete: Arc::default(),
            extend: Arc::default(),
            calls: Arc::default(),
        }
    }

    pub fn claims(&self, fault: Fault) {
        self.claim.set(fault);
    }

    pub fn completions(&self, fault: Fault) {
        self.complete.set(fault);
    }

    pub fn extensions(&self, fault: Fault) {
        self.extend.set(fault);
    }

    /// How often a planted fault was met.
    pub fn fired(&self) -> usize {
        let switches = [&self.claim, &self.complete, &self.extend];
        let fired = switches.map(|switch| switch.fired.load(Ordering::SeqCst));
        fired.iter().sum()
    }

    /// How often the store was called at all.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// The store that never fails.
    #[allow(
        dead_code,
        reason = "not every test that includes this file asks for it"
    )]
    pub fn inner(&self) -> &S {
        &self.store
    }

    fn called(&self) -> &S {
        self.calls.fetch_add(1, Ordering::SeqCst);
        &self.store
    }
}

impl<S: Store> Store for Flaky<S> {
    fn is_durable(&self) -> bool {
        self.store.is_durable()
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        self.claim.around(self.called().claim(request)).await
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        let call = self.called().complete(claim, completion);
        self.complete.around(call).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        self.called().release(claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        self.called().hold(claim, references).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        self.extend.around(self.called().extend(leases)).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        self.called().lookup(identity, fingerprint).await
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.called().resolve(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        self.called().list_held(after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        self.called().inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        self.called()
            .find_by_reference(within, kind, id, after, limit)
            .await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.called().delete_expired(limit).await
    }

    async fn wait_for_change(&self, identity: &Identity, limit: std::time::Duration) {
        self.store.wait_for_change(identity, limit).await;
    }
}
