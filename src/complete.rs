use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::time::timeout;

use crate::backoff::Backoff;
use crate::envelope::Envelope;
use crate::error::ConfigError;
use crate::extract::{IdempotencyContext, Standing};
use crate::identity::Identity;
use crate::moment::Moment;
use crate::operation;
use crate::policy::{EXECUTION_LIMIT, Lost};
use crate::running::Running;
use crate::store::phases::Times;
use crate::store::{
    Abandoned, ClaimRequest, Claimed, Completion, PhasedStore, Phases, StoreError, StoreErrorKind,
    Token,
};

type Answered = Result<Envelope, Box<dyn Error + Send + Sync>>;
type Function<S> =
    dyn Fn(Operation<S>) -> Pin<Box<dyn Future<Output = Answered> + Send>> + Send + Sync;

/// Finishes abandoned operations whose clients never come back: a task that the application spawns.
///
/// An operation is abandoned when a [phase](Phases) of it is finished, its lease is over, and its
/// policy lets it be run again ([`Lost::Rerun`]), or its last answer freed its key. A function that
/// is registered for its name takes it to its end, under a claim as a retry would have it, and what
/// it answers is what a client gets that comes back after all. So an operation whose client was told
/// that it failed for now (an answer that frees the key) is finished, too.
///
/// The function has no request: what it needs is what the first phase saved.
///
/// Should an attempt of the completer itself be lost, it is run again like any other abandoned one, also
/// where the policy of the route holds lost attempts: where that must not be, register nothing for
/// operations whose answers free their key.
///
/// One process of a service is enough; several do no harm.
///
/// ```no_run
/// use axum::body::Bytes;
/// use axum::http::Response;
/// use tower_idempotency::postgres::TxError;
/// use tower_idempotency::{Completer, Envelope, PgStore};
///
/// # async fn example(store: PgStore) {
/// let completer = Completer::new(store).register("POST /orders", async |operation| {
///     let phases = operation.phases();
///     let order: i64 = phases.saved("ordered").await?.ok_or("no order")?;
///     // As in the handler, from here on.
///     let _order: i64 = phases.run("ordered", async |_| Ok::<_, TxError>(order)).await?;
///     let answer = Response::builder().status(201).body(Bytes::new())?;
///     Ok(Envelope::new(answer))
/// });
/// tokio::spawn(completer.run());
/// # }
/// ```
pub struct Completer<S> {
    store: Arc<S>,
    functions: HashMap<String, Arc<Function<S>>>,
    running: Arc<Running>,
    interval: Duration,
    lease: Duration,
    limit: Duration,
}

/// An abandoned operation, claimed to be finished.
pub struct Operation<S> {
    context: IdempotencyContext,
    phases: Phases<S>,
}

impl<S> Operation<S> {
    /// Scope, operation and key.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        self.context.identity()
    }

    /// What a handler would have: the attempt, and references to note.
    #[must_use]
    pub fn context(&self) -> &IdempotencyContext {
        &self.context
    }

    /// What is finished, and what is left to do.
    #[must_use]
    pub fn phases(&self) -> &Phases<S> {
        &self.phases
    }
}

impl<S> fmt::Debug for Operation<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operation")
            .field("context", &self.context)
            .finish_non_exhaustive()
    }
}

/// What a round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Finished {
    /// Operations that are answered from now on.
    pub completed: u64,
    /// Operations whose function failed, or that somebody else has taken over; the next round tries
    /// again what is still abandoned.
    pub failed: u64,
}

/// Records one statement lists.
const PAGE: u32 = 100;

impl<S: PhasedStore> Completer<S> {
    /// A completer of `store` that looks every minute.
    #[must_use]
    pub fn new(store: S) -> Self {
        Self {
            store: Arc::new(store),
            functions: HashMap::new(),
            running: Arc::default(),
            interval: Duration::from_secs(60),
            lease: Duration::from_secs(30),
            limit: EXECUTION_LIMIT,
        }
    }

    /// Finishes the operations of this name: method and route template, or what the policy calls them.
    /// Names of parameters do not matter. An error of the function is logged, and the operation is
    /// tried again in each round from then on: keep an eye on [`Finished::failed`] or on the log.
    ///
    /// A function that needs something of the application's clones it for each operation:
    ///
    /// ```no_run
    /// # use tower_idempotency::{Completer, Envelope, PgStore};
    /// # #[derive(Clone)] struct Bank;
    /// # impl Bank { async fn charge(&self, _key: &str) -> Result<Envelope, std::io::Error> { Ok(Envelope::new(Default::default())) } }
    /// # fn example(completer: Completer<PgStore>, bank: Bank) -> Completer<PgStore> {
    /// completer.register("POST /orders/{id}/checkout", move |operation| {
    ///     let bank = bank.clone();
    ///     async move { Ok(bank.charge(&operation.phases().downstream_key("charge")).await?) }
    /// })
    /// # }
    /// ```
    #[must_use]
    pub fn register<F, Fut>(mut self, operation: impl Into<String>, function: F) -> Self
    where
        F: Fn(Operation<S>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Answered> + Send + 'static,
    {
        let function: Arc<Function<S>> = Arc::new(move |operation| Box::pin(function(operation)));
        let operation = operation.into();
        if let Ok((_, erased)) = operation::of_route(&operation) {
            self.functions.insert(erased, function.clone());
        }
        self.functions.insert(operation, function);
        self
    }

    /// How long to wait when nothing is left to finish. Default: 60 s.
    ///
    /// # Errors
    ///
    /// `interval` of zero.
    pub fn with_interval(mut self, interval: Duration) -> Result<Self, ConfigError> {
        if interval.is_zero() {
            return Err(ConfigError::new("interval", "must be longer than zero"));
        }
        self.interval = interval;
        Ok(self)
    }

    /// How long a function may take. Default: 5 min, as for handlers.
    ///
    /// # Errors
    ///
    /// `execution_limit` of zero.
    pub fn with_execution_limit(mut self, limit: Duration) -> Result<Self, ConfigError> {
        if limit.is_zero() {
            return Err(ConfigError::new(
                "execution_limit",
                "must be longer than zero",
            ));
        }
        self.limit = limit;
        Ok(self)
    }

    /// Finishes operations until dropped. Errors are logged, and the next round tries again.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: the lease of the operation under way runs out.
    pub async fn run(self) {
        loop {
            match self.complete().await {
                Ok(Finished {
                    completed: 0,
                    failed: 0,
                }) => {}
                Ok(Finished { completed, failed }) => {
                    tracing::info!(completed, failed, "finished abandoned operations");
                }
                Err(error) => {
                    let cause: &dyn Error = &error;
                    tracing::warn!(
                        error = cause,
                        source = error.source(),
                        "cannot look for abandoned operations"
                    );
                }
            }
            tokio::time::sleep(self.interval).await;
        }
    }

    /// Tries each abandoned operation once, one after the other.
    ///
    /// # Errors
    ///
    /// The store's, when abandoned operations cannot be listed.
    pub async fn complete(&self) -> Result<Finished, StoreError> {
        let names: Vec<String> = self.functions.keys().cloned().collect();
        let mut finished = Finished::default();
        let mut after = None;
        loop {
            let page = self.store.list_abandoned(&names, after, PAGE).await?;
            let Some(last) = page.last() else {
                return Ok(finished);
            };
            after = Some(last.identity.id());
            for abandoned in page {
                let id = abandoned.identity.id();
                match self.finish(abandoned).await {
                    Ok(()) => finished.completed += 1,
                    Err(error) => {
                        finished.failed += 1;
                        let cause: &dyn Error = &*error;
                        tracing::warn!(%id, error = cause, "abandoned operation is not finished");
                    }
                }
            }
        }
    }

    async fn finish(&self, abandoned: Abandoned) -> Result<(), Box<dyn Error + Send + Sync>> {
        let function = self.functions.get(abandoned.identity.operation());
        let function = function.ok_or("no function is registered for it")?;
        let request = ClaimRequest {
            identity: abandoned.identity,
            fingerprint: abandoned.fingerprint,
            token: Token::random()?,
            lost: Lost::Rerun,
            lease: self.lease,
            ttl: abandoned.retention,
        };
        let sent = Moment::now();
        let claim = match self.store.claim(&request).await? {
            Claimed::Acquired(claim) if claim.attempt > 1 => claim,
            // It was over in the meantime, and is not to be begun anew.
            Claimed::Acquired(claim) | Claimed::Abandoned(claim) => {
                self.store.release(&claim).await?;
                return Err("it is over".into());
            }
            Claimed::Existing(_) => return Err("somebody else is at it".into()),
        };
        let store = &self.store;
        let (identity, fingerprint) = (&request.identity, &request.fingerprint);
        let listed = self.running.list_alone(identity, fingerprint, claim.token);
        let lease = listed.keep(store, &claim, self.lease, sent);
        let standing = Standing::Lease(lease);
        let context = IdempotencyContext::new(claim.identity.clone(), claim.attempt, standing);
        let times = Times {
            limit: self.limit,
            patience: self.lease / 3,
        };
        let operation = Operation {
            context: context.clone(),
            phases: Phases::new(store.clone(), claim.clone(), context.clone(), times),
        };
        let answered = AssertUnwindSafe(async { function(operation).await }).catch_unwind();
        let answer = match timeout(self.limit, answered).await {
            Ok(Ok(Ok(answer))) => answer,
            failed => {
                self.settled(|| store.release(&claim)).await?;
                return match failed {
                    Ok(Ok(Err(error))) => Err(error),
                    Ok(_panic) => Err("the function panicked".into()),
                    Err(elapsed) => Err(elapsed.into()),
                };
            }
        };
        let references = context.references();
        let completion = Completion { answer, references };
        let completed = self.settled(|| store.complete(&claim, &completion)).await;
        drop(listed);
        Ok(completed?)
    }

    /// Calls the store until it is heard, for as long as a lease.
    async fn settled<F>(&self, mut call: impl FnMut() -> F) -> Result<(), StoreError>
    where
        F: Future<Output = Result<(), StoreError>>,
    {
        let give_up = Instant::now() + self.lease;
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));
        loop {
            match call().await {
                Err(error)
                    if error.kind() == StoreErrorKind::Unavailable && Instant::now() < give_up =>
                {
                    backoff.pause().await;
                }
                result => return result,
            }
        }
    }
}

impl<S> fmt::Debug for Completer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completer")
            .field("operations", &self.functions.keys())
            .finish_non_exhaustive()
    }
}

impl<S> Clone for Completer<S> {
    fn clone(&self) -> Self {
        Self {
            store: self.store.clone(),
            functions: self.functions.clone(),
            running: self.running.clone(),
            interval: self.interval,
            lease: self.lease,
            limit: self.limit,
        }
    }
}
