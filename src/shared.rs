//! What a layer, its clones and their services have in common.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use axum_core::body::Body;
use http::Response;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

use crate::breaker::Breaker;
use crate::cache::ReplayCache;
use crate::detached::{Detached, SpawnHook};
use crate::policy::{Policy, PolicyHandle};
use crate::rejection::{Code, Rejection, Renderer};
use crate::running::Running;
use crate::scope::Scope;
use crate::stats::{Counters, Event, Stats};
use crate::store::Store;

/// What every service of a layer reads.
pub(crate) struct Shared<S> {
    pub(crate) core: Arc<Core<S>>,
    pub(crate) policies: PolicyHandle,
    pub(crate) scope: Scope,
    pub(crate) renderer: Renderer,
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) breaker: Arc<Breaker>,
    pub(crate) store_timeout: Duration,
    pub(crate) request_timeout: Duration,
    pub(crate) hook: SpawnHook,
}

/// What all layers made from one [`new`](crate::IdempotencyLayer::new) have in common.
pub(crate) struct Core<S> {
    pub(crate) store: Arc<S>,
    pub(crate) running: Arc<Running>,
    /// Claims given up that are still to be taken back.
    pub(crate) withdrawals: Arc<Semaphore>,
    pub(crate) replays: ArcSwap<ReplayCache>,
    counters: Counters,
    pub(crate) tasks: TaskTracker,
    /// What takes back claims that may have been made.
    pub(crate) withdrawing: TaskTracker,
    is_closing: AtomicBool,
}

impl<S: Store> Shared<S> {
    pub(crate) fn new(store: S, scope: Scope) -> Self {
        let policies = PolicyHandle::new(Policy::default(), store.is_durable());
        let core = Core {
            store: Arc::new(store),
            running: Arc::default(),
            withdrawals: Arc::new(Semaphore::new(1024)),
            replays: ArcSwap::from_pointee(ReplayCache::new(32 << 20)),
            counters: Counters::default(),
            tasks: TaskTracker::new(),
            withdrawing: TaskTracker::new(),
            is_closing: AtomicBool::new(false),
        };
        Self {
            core: Arc::new(core),
            policies,
            scope,
            renderer: Renderer::default(),
            permits: Arc::new(Semaphore::new(1024)),
            breaker: Arc::new(Breaker::new(5)),
            store_timeout: Duration::from_secs(2),
            request_timeout: Duration::from_secs(30),
            hook: SpawnHook::default(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        self.core.counters.stats()
    }

    /// What is entered from now on is refused.
    pub(crate) fn close(&self) {
        self.core.is_closing.store(true, Ordering::SeqCst);
        self.core.tasks.close();
        self.core.withdrawing.close();
    }

    /// Counts the rejection and makes an answer of it, in the dialect of the policy.
    pub(crate) fn reject(&self, policy: &Policy, rejection: Rejection) -> Response<Body> {
        self.core.counters.count(event(rejection.code()));
        tracing::debug!(
            code = rejection.code().as_str(),
            "answered in place of the handler"
        );
        self.render(policy, rejection)
    }

    /// Makes an answer of a rejection of a request that is counted already.
    pub(crate) fn render(&self, policy: &Policy, rejection: Rejection) -> Response<Body> {
        self.renderer
            .render(&rejection.with_profile(&policy.profile))
    }

    pub(crate) fn count(&self, event: Event) {
        self.core.counters.count(event);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.core.is_closing.load(Ordering::SeqCst)
    }

    /// Leave to begin something that a shutdown waits for, unless it has begun. The token is taken
    /// first: a shutdown sees it, or is seen.
    pub(crate) fn enter(&self) -> Option<TaskTrackerToken> {
        let token = self.core.tasks.token();
        (!self.is_closing()).then_some(token)
    }

    /// Runs a future to its end, whoever waits for it, within the current span.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let task = self.hook.apply(Detached::new(future));
        tokio::spawn(task.in_current_span());
    }
}

impl<S> Clone for Shared<S> {
    fn clone(&self) -> Self {
        Self {
            core: self.core.clone(),
            policies: self.policies.clone(),
            scope: self.scope.clone(),
            renderer: self.renderer.clone(),
            permits: self.permits.clone(),
            breaker: self.breaker.clone(),
            store_timeout: self.store_timeout,
            request_timeout: self.request_timeout,
            hook: self.hook.clone(),
        }
    }
}

fn event(code: Code) -> Event {
    match code {
        Code::KeyReused => Event::Mismatched,
        Code::RequestInProgress => Event::InProgress,
        Code::OutcomeUnknown => Event::Held,
        Code::ResponseNotRetained => Event::NotRetained,
        Code::AttemptLost => Event::Lost,
        Code::StoreUnavailable
        | Code::Overloaded
        | Code::ShuttingDown
        | Code::AnswerNotRecorded => Event::Unavailable,
        Code::RecordUnreadable => Event::Unreadable,
        _ => Event::Refused,
    }
}
