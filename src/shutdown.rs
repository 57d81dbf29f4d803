//! How a process ends that first answers what it has begun.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::identity::Identity;
use crate::layer::IdempotencyLayer;
use crate::store::Store;

/// What a [shutdown](IdempotencyLayer::shutdown) left running.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct ShutdownReport {
    /// Operations whose handlers had not ended. Their leases run out, and their policies decide.
    pub unfinished: Vec<Identity>,
}

impl<S: Store, M> IdempotencyLayer<S, M> {
    /// Refuses new keyed requests (503 `shutting-down`) and waits for the running ones, whose
    /// clients may be gone, for at most `grace`. Call it when the server has stopped accepting. Claims that timed
    /// out, and may have been made, are taken back meanwhile, for five more store timeouts at most.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # use std::time::Duration;
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// let report = layer.shutdown(Duration::from_secs(10)).await;
    /// assert!(report.unfinished.is_empty());
    /// # }
    /// ```
    pub async fn shutdown(&self, grace: Duration) -> ShutdownReport {
        let shared = self.shared();
        let core = &shared.core;
        shared.close();
        let began = Instant::now();
        let ended = timeout(grace, core.tasks.wait()).await;
        // While the store is down, none is taken back: that is no reason to stay for all of it.
        let left = grace.saturating_sub(began.elapsed());
        let patience = left.min(shared.store_timeout * 5);
        if timeout(patience, core.withdrawing.wait()).await.is_err() {
            let claims = core.withdrawing.len();
            tracing::warn!(
                claims,
                "shut down before it was sure that claims that nobody heard of are taken back: their leases may have to run out"
            );
        }
        if ended.is_ok() {
            return ShutdownReport::default();
        }
        let unfinished = core.running.identities();
        tracing::warn!(
            unfinished = unfinished.len(),
            "shut down before every request ended"
        );
        ShutdownReport { unfinished }
    }
}
