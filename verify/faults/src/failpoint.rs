//! Named points of a subject at which a test ends it, or makes it wait.
//!
//! `before_claim`, `after_claim`, `before_commit` and `after_commit` are around the calls of the store
//! ([`Failing`]), which is all that the layer does between the steps that a crash can part; where the
//! route is transactional, `before_begin` and `after_begin` are in the place of the first two.
//! `handler_mid` is in the handler, after its write, and `body_chunk` between two pieces of the answer on
//! their way to the socket. So the crate itself needs no such points, and has none.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use tokio::sync::watch;
use tower_idempotency::store::{
    Begun, Claim, ClaimRequest, Claimed, CommitError, Completion, Entry, Existing, HeldRecord,
    LeaseRenewal, RecordSummary, Renewed, Resolution, Swept, Token, Verdict, Within,
};
use tower_idempotency::{
    Fingerprint, Identity, RecordId, References, Store, StoreError, TransactionalStore,
};

use crate::fired::fired;

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Nothing.
    Pass,
    /// It waits until there is another action.
    Pause,
    /// The process ends by SIGABRT.
    Abort,
}

/// The points of a process and their actions. None is armed at first.
#[derive(Debug, Clone)]
pub struct Failpoints(Arc<watch::Sender<HashMap<String, Action>>>);

impl Default for Failpoints {
    fn default() -> Self {
        Self(Arc::new(watch::channel(HashMap::new()).0))
    }
}

/// What is written to standard error when an armed point is reached.
#[must_use]
pub fn marker(name: &str) -> String {
    format!("failpoint reached: {name}\n")
}

impl Failpoints {
    /// From now on, also for what is paused there.
    pub fn arm(&self, name: &str, action: Action) {
        self.0.send_modify(|actions| {
            actions.insert(name.to_owned(), action);
        });
    }

    /// Whether anything happens there.
    #[must_use]
    pub fn is_armed(&self, name: &str) -> bool {
        self.action(name) != Action::Pass
    }

    /// Does what the point is armed for.
    pub async fn reach(&self, name: &str) {
        if !self.is_armed(name) {
            return;
        }
        fired(&format!("failpoint {name}"));
        eprint!("{}", marker(name));
        let mut actions = self.0.subscribe();
        // The sender lives as long as this does.
        let _ = actions
            .wait_for(|actions| actions.get(name) != Some(&Action::Pause))
            .await;
        if self.action(name) == Action::Abort {
            std::process::abort();
        }
    }

    fn action(&self, name: &str) -> Action {
        let actions = self.0.borrow();
        actions.get(name).copied().unwrap_or(Action::Pass)
    }
}

/// A store with points around the writes of an operation.
#[derive(Debug, Clone)]
pub struct Failing<S> {
    store: S,
    failpoints: Failpoints,
}

impl<S> Failing<S> {
    /// Around a store.
    #[must_use]
    pub fn new(store: S, failpoints: Failpoints) -> Self {
        Self { store, failpoints }
    }
}

impl<S: Store> Store for Failing<S> {
    fn is_durable(&self) -> bool {
        self.store.is_durable()
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        self.failpoints.reach("before_claim").await;
        let claimed = self.store.claim(request).await?;
        if matches!(claimed, Claimed::Acquired(_)) {
            self.failpoints.reach("after_claim").await;
        }
        Ok(claimed)
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        self.failpoints.reach("before_commit").await;
        self.store.complete(claim, completion).await?;
        self.failpoints.reach("after_commit").await;
        Ok(())
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        self.store.release(claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        self.store.hold(claim, references).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        self.store.extend(leases).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        self.store.lookup(identity, fingerprint).await
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.store.resolve(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        self.store.list_held(after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        self.store.inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        self.store
            .find_by_reference(within, kind, id, after, limit)
            .await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.store.delete_expired(limit).await
    }

    async fn wait_for_change(&self, identity: &Identity, limit: Duration) {
        self.store.wait_for_change(identity, limit).await;
    }
}

impl<S: TransactionalStore> TransactionalStore for Failing<S> {
    type Transaction = S::Transaction;

    const EXECUTION_LIMIT: Duration = S::EXECUTION_LIMIT;

    async fn begin(
        &self,
        request: &ClaimRequest,
        limit: Duration,
    ) -> Result<Begun<Self::Transaction>, StoreError> {
        self.failpoints.reach("before_begin").await;
        let begun = self.store.begin(request, limit).await?;
        if matches!(begun, Begun::Open(_)) {
            self.failpoints.reach("after_begin").await;
        }
        Ok(begun)
    }

    async fn commit(
        &self,
        transaction: Self::Transaction,
        request: &ClaimRequest,
        entry: &Entry,
    ) -> Result<SystemTime, CommitError> {
        self.failpoints.reach("before_commit").await;
        let expires_at = self.store.commit(transaction, request, entry).await?;
        self.failpoints.reach("after_commit").await;
        Ok(expires_at)
    }

    async fn rollback(
        &self,
        transaction: Self::Transaction,
        token: Token,
    ) -> Result<(), CommitError> {
        self.store.rollback(transaction, token).await
    }

    fn lock_ends_with_writes(&self) -> bool {
        self.store.lock_ends_with_writes()
    }

    async fn confirm(&self, request: &ClaimRequest) -> Result<Verdict, StoreError> {
        self.store.confirm(request).await
    }
}
