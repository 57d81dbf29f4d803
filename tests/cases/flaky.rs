//! A store that fails on demand, around any other, and counts what it is asked.

#![allow(
    dead_code,
    reason = "not every test that includes this file asks for everything"
)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::Semaphore;
use tower_idempotency::store::{
    Begun, Claim, ClaimRequest, Claimed, CommitError, Completion, Entry, Existing, HeldRecord,
    LeaseRenewal, RecordSummary, Renewed, Resolution, Swept, Token, Verdict, Within,
};
use tower_idempotency::{
    Fingerprint, Identity, RecordId, References, Store, StoreError, TransactionalStore,
};

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
    AnswerLate(Duration),
    /// Waits until it is let go, and does it.
    Wait,
}

#[derive(Debug)]
struct Switch {
    fault: Mutex<Fault>,
    fired: AtomicUsize,
    called: AtomicUsize,
    waiting: Semaphore,
    gate: Semaphore,
}

impl Default for Switch {
    fn default() -> Self {
        Self {
            fault: Mutex::default(),
            fired: AtomicUsize::default(),
            called: AtomicUsize::default(),
            waiting: Semaphore::new(0),
            gate: Semaphore::new(0),
        }
    }
}

impl Switch {
    fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    async fn around<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.called.fetch_add(1, Ordering::SeqCst);
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
            Fault::Wait => {
                self.waiting.add_permits(1);
                self.gate.acquire().await.unwrap().forget();
                call.await
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
    lookup: Arc<Switch>,
    begin: Arc<Switch>,
    commits: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
}

impl<S: Store> Flaky<S> {
    pub fn new(store: S) -> Self {
        Self {
            store,
            claim: Arc::default(),
            complete: Arc::default(),
            extend: Arc::default(),
            lookup: Arc::default(),
            begin: Arc::default(),
            commits: Arc::default(),
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

    pub fn lookups(&self, fault: Fault) {
        self.lookup.set(fault);
    }

    pub fn beginnings(&self, fault: Fault) {
        self.begin.set(fault);
    }

    /// Until a claim waits, which is let go by [`let_claim_go`](Self::let_claim_go).
    pub async fn claim_waits(&self) {
        self.claim.waiting.acquire().await.unwrap().forget();
    }

    pub fn let_claim_go(&self) {
        self.claim.gate.add_permits(1);
    }

    /// The same of a beginning of a transaction.
    pub async fn beginning_waits(&self) {
        self.begin.waiting.acquire().await.unwrap().forget();
    }

    pub fn let_beginning_go(&self) {
        self.begin.gate.add_permits(1);
    }

    pub fn let_lookup_go(&self) {
        self.lookup.gate.add_permits(1);
    }

    /// How often the store was asked for a claim, and how often to complete one.
    pub fn claimed_and_completed(&self) -> (usize, usize) {
        let called = |switch: &Switch| switch.called.load(Ordering::SeqCst);
        (called(&self.claim), called(&self.complete))
    }

    /// Lookups, beginnings of transactions, and commits.
    pub fn looked_up_begun_and_committed(&self) -> (usize, usize, usize) {
        let called = |switch: &Switch| switch.called.load(Ordering::SeqCst);
        let commits = self.commits.load(Ordering::SeqCst);
        (called(&self.lookup), called(&self.begin), commits)
    }

    /// How often a planted fault was met.
    pub fn fired(&self) -> usize {
        let switches = [
            &self.claim,
            &self.complete,
            &self.extend,
            &self.lookup,
            &self.begin,
        ];
        let fired = switches.map(|switch| switch.fired.load(Ordering::SeqCst));
        fired.iter().sum()
    }

    /// How often the store was called at all.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// The store that never fails.
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
        let call = self.called().lookup(identity, fingerprint);
        self.lookup.around(call).await
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

impl<S: TransactionalStore> TransactionalStore for Flaky<S> {
    type Transaction = S::Transaction;

    const EXECUTION_LIMIT: Duration = S::EXECUTION_LIMIT;

    async fn begin(
        &self,
        request: &ClaimRequest,
        limit: Duration,
    ) -> Result<Begun<S::Transaction>, StoreError> {
        self.begin.around(self.called().begin(request, limit)).await
    }

    async fn commit(
        &self,
        transaction: S::Transaction,
        request: &ClaimRequest,
        entry: &Entry,
    ) -> Result<SystemTime, CommitError> {
        self.commits.fetch_add(1, Ordering::SeqCst);
        self.called().commit(transaction, request, entry).await
    }

    async fn rollback(&self, transaction: S::Transaction, token: Token) -> Result<(), CommitError> {
        self.called().rollback(transaction, token).await
    }

    fn lock_ends_with_writes(&self) -> bool {
        self.store.lock_ends_with_writes()
    }

    async fn confirm(&self, request: &ClaimRequest) -> Result<Verdict, StoreError> {
        self.called().confirm(request).await
    }
}
