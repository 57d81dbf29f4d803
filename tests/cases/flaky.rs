//! A store that fails on demand, around any other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, Renewed,
    Resolution, Swept, Token,
};
use tower_idempotency::{Fingerprint, Identity, RecordId, References, Store, StoreError};

/// How one method behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Fault {
    None,
    /// Fails without doing anything.
    Down,
    /// Never answers.
    Hang,
    /// Does it, and fails all the same, once.
    LoseAcknowledgement,
}

#[derive(Debug, Default)]
struct Switch {
    fault: AtomicUsize,
    fired: AtomicUsize,
}

impl Switch {
    fn set(&self, fault: Fault) {
        self.fault.store(fault as usize, Ordering::SeqCst);
    }

    async fn around<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let fault = self.fault.load(Ordering::SeqCst);
        if fault != Fault::None as usize {
            self.fired.fetch_add(1, Ordering::SeqCst);
        }
        if fault == Fault::Down as usize {
            return Err(StoreError::unavailable("planted"));
        }
        if fault == Fault::Hang as usize {
            std::future::pending::<()>().await;
        }
        let result = call.await;
        if fault == Fault::LoseAcknowledgement as usize {
            self.set(Fault::None);
            return Err(StoreError::unavailable("planted"));
        }
        result
    }
}

#[derive(Debug, Clone)]
pub struct Flaky<S> {
    store: S,
    claim: Arc<Switch>,
    complete: Arc<Switch>,
    calls: Arc<AtomicUsize>,
}

impl<S: Store> Flaky<S> {
    pub fn new(store: S) -> Self {
        Self {
            store,
            claim: Arc::default(),
            complete: Arc::default(),
            calls: Arc::default(),
        }
    }

    pub fn claims(&self, fault: Fault) {
        self.claim.set(fault);
    }

    pub fn completions(&self, fault: Fault) {
        self.complete.set(fault);
    }

    /// How often a planted fault was met.
    pub fn fired(&self) -> usize {
        self.claim.fired.load(Ordering::SeqCst) + self.complete.fired.load(Ordering::SeqCst)
    }

    /// How often the store was called at all.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
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
        self.called().extend(leases).await
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

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.called().delete_expired(limit).await
    }
}
