use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_core::body::Body;
use http::{Request, Response};
use http_body_util::BodyExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tower_service::Service;

use crate::body::Whole;
use crate::error::ConfigError;
use crate::extract::IdempotencyContext;
use crate::fingerprint::Fingerprint;
use crate::headers;
use crate::identity::Identity;
use crate::layer::IdempotencyLayer;
use crate::policy::{Policy, StoreDown};
use crate::rejection::Code;
use crate::run::Exchange;
use crate::scope::Scope;
use crate::shutdown::ShutdownReport;
use crate::store::transaction::Slot;
use crate::store::{PhasedStore, Phases, Store, TransactionalStore, Tx};

/// The same promise outside of HTTP: a job, a backfill, a consumer. One operation runs once, whoever
/// starts it how often, and everybody gets its result.
///
/// The record, the lease and its heartbeat, the limits and the policy are those of a route. The
/// result is stored as JSON.
///
/// ```
/// use tower_idempotency::{Boundary, Fingerprint, Identity, MemoryStore, Policy, Ran};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let boundary = Boundary::new(MemoryStore::new());
/// let import = || {
///     let identity = Identity::new("acme", "import", "2026-11-22");
///     let file = Fingerprint::of_bytes(b"orders.csv");
///     boundary.run(identity, file, Policy::high(), |_context| async {
///         // What is to happen once, happens here.
///         Ok::<u32, std::io::Error>(3)
///     })
/// };
/// assert_eq!(import().await?, Ran::Fresh(3));
/// assert_eq!(import().await?, Ran::Replayed(3));
/// # Ok(())
/// # }
/// ```
pub struct Boundary<S> {
    layer: IdempotencyLayer<S>,
}

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ran<T> {
    /// It ran now, and this is recorded.
    Fresh(T),
    /// It ran before, and this was recorded.
    Replayed(T),
    /// Somebody runs it. With [`Duplicates::Wait`](crate::Duplicates::Wait) this is waited for first.
    InProgress,
    /// The identity was used for something else: the fingerprint is another.
    Mismatch,
    /// It is not known what came of it, and a person has to [resolve](Store::resolve) it.
    Held,
    /// An attempt ended without a result, and the policy says that it is not run again.
    Lost,
}

/// Why an operation has no outcome to tell.
#[derive(Debug)]
#[non_exhaustive]
pub enum RunError<E> {
    /// The job itself failed. On a leased run the policy says what becomes of the key
    /// ([`Policy::with_unknown`]); a transaction is rolled back, and the key is free.
    Failed(E),
    /// The job was not run, or its outcome could not be recorded. [`Code::KeyInvalid`] is an identity
    /// with a NUL in one of its parts. [`Code::TransactionEnded`]: the job has, or may have, committed by
    /// itself, whether it failed or not, and the key is held.
    Refused(Code),
    /// The result cannot be stored as JSON, or what is stored is of another type.
    Result(serde_json::Error),
    /// The policy has settings that cannot work.
    Policy(ConfigError),
}

impl<S: Store> Boundary<S> {
    /// A boundary with limits of its own, for a process that serves no requests.
    #[must_use]
    pub fn new(store: S) -> Self {
        IdempotencyLayer::new(store, Scope::global()).into()
    }

    /// Runs a job unless it was run before: claims, runs it under a lease, and records its result.
    /// What the job does is outside of the record, as on a leased route.
    ///
    /// A job that has begun runs to its end, whether or not this future is polled further.
    ///
    /// # Errors
    ///
    /// The job's own, or what kept it from running.
    pub async fn run<T, E, F, J>(
        &self,
        identity: Identity,
        fingerprint: Fingerprint,
        policy: Policy,
        job: F,
    ) -> Result<Ran<T>, RunError<E>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        E: Send + 'static,
        F: FnOnce(IdempotencyContext) -> J + Send + 'static,
        J: Future<Output = Result<T, E>> + Send + 'static,
    {
        self.run_leased(identity, fingerprint, policy, |request| {
            let Some(context) = request.extensions().get().cloned() else {
                unreachable!("a run has a context");
            };
            job(context)
        })
        .await
    }

    async fn run_leased<T, E, F, J>(
        &self,
        identity: Identity,
        fingerprint: Fingerprint,
        policy: Policy,
        begin: F,
    ) -> Result<Ran<T>, RunError<E>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        E: Send + 'static,
        F: FnOnce(&mut Request<Body>) -> J + Send + 'static,
        J: Future<Output = Result<T, E>> + Send + 'static,
    {
        let mut begin = Some(begin);
        let service = Job(move |request: &mut Request<Body>| match begin.take() {
            Some(begin) => begin(request),
            None => unreachable!("a leased run is made once"),
        });
        let exchange = self.exchange(policy, identity, fingerprint)?;
        let answer = exchange.detach(|exchange, reply| async move {
            let request = Request::new(Body::empty());
            exchange.run_leased(service, request, reply).await;
        });
        read(answer.await).await
    }

    fn exchange<E>(
        &self,
        policy: Policy,
        identity: Identity,
        fingerprint: Fingerprint,
    ) -> Result<Exchange<S>, RunError<E>> {
        // Text of PostgreSQL cannot hold it: the store would seem to be down, to this job alone.
        let parts = [identity.scope(), identity.operation(), identity.key()];
        if parts.iter().any(|part| part.contains('\0')) {
            return Err(RunError::Refused(Code::KeyInvalid));
        }
        let shared = self.layer.shared();
        let is_durable = shared.core.store.is_durable();
        policy.validate(is_durable).map_err(RunError::Policy)?;
        Ok(Exchange::new(shared, policy, identity, fingerprint))
    }

    /// As [`IdempotencyLayer::shutdown`].
    pub async fn shutdown(&self, grace: Duration) -> ShutdownReport {
        self.layer.shutdown(grace).await
    }
}

impl<S: TransactionalStore> Boundary<S> {
    /// Runs a job unless it was run before: its writes through the transaction and its result commit
    /// together, or not at all, as on a [transactional](IdempotencyLayer::transactional) route. The
    /// job is dropped with its transaction; what outlives it is refused.
    ///
    /// # Errors
    ///
    /// The job's own, or what kept it from running or from being committed.
    ///
    /// ```no_run
    /// use tower_idempotency::{Boundary, Fingerprint, Identity, PgStore, Policy, Ran};
    ///
    /// # async fn example(store: PgStore) -> Result<(), Box<dyn std::error::Error>> {
    /// let boundary = Boundary::new(store);
    /// let identity = Identity::new("acme", "close-books", "2026-10");
    /// let month = Fingerprint::of_bytes(b"2026-10");
    /// let policy = Policy::high().with_reruns(3);
    /// let ran = boundary.run_in_transaction(identity, month, policy, async |_context, mut tx| {
    ///     let closed = sqlx::query("update book set closed = true where month = '2026-10'");
    ///     Ok::<u64, sqlx::Error>(closed.execute(&mut *tx).await?.rows_affected())
    /// });
    /// # let _: Ran<u64> = ran.await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn run_in_transaction<T, E, F, J>(
        &self,
        identity: Identity,
        fingerprint: Fingerprint,
        policy: Policy,
        job: F,
    ) -> Result<Ran<T>, RunError<E>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        E: Send + 'static,
        F: Fn(IdempotencyContext, Tx<S::Transaction>) -> J + Clone + Send + 'static,
        J: Future<Output = Result<T, E>> + Send + 'static,
    {
        let service = Job(move |request: &mut Request<Body>| {
            let extensions = request.extensions_mut();
            let slot = extensions.remove::<Slot<S::Transaction>>();
            let tx = slot.and_then(|slot| slot.lend().ok());
            let (Some(context), Some(tx)) = (extensions.get().cloned(), tx) else {
                unreachable!("a transactional run has a context and a transaction");
            };
            job(context, tx)
        });
        let exchange = self.exchange(policy, identity, fingerprint)?;
        let answer = exchange.detach(|exchange, reply| async move {
            let (parts, ()) = Request::new(()).into_parts();
            exchange
                .run_transaction(service, parts, Whole::default(), reply)
                .await;
        });
        read(answer.await).await
    }
}

impl<S: PhasedStore> Boundary<S> {
    /// Runs a job unless it was run before, as [`run`](Self::run) does; what it writes in
    /// [phases](Phases) is not run again by the attempt that takes over when this one is lost.
    ///
    /// # Errors
    ///
    /// The job's own, or what kept it from running.
    ///
    /// ```no_run
    /// use tower_idempotency::postgres::{PhaseError, Phases};
    /// use tower_idempotency::{Boundary, Fingerprint, Identity, Lost, PgStore, Policy, Ran};
    ///
    /// # async fn example(store: PgStore) -> Result<(), Box<dyn std::error::Error>> {
    /// let boundary = Boundary::new(store);
    /// let identity = Identity::new("acme", "payout", "2026-10");
    /// let month = Fingerprint::of_bytes(b"2026-10");
    /// let policy = Policy::high().with_lost(Lost::Rerun);
    /// let job = |_context, phases: Phases| async move {
    ///     let key = phases.downstream_key("transfer");
    ///     // The bank is called here, with the key.
    ///     phases
    ///         .run("transferred", async |db| {
    ///             let insert = sqlx::query("insert into payout (key) values ($1)");
    ///             insert.bind(key.to_string()).execute(db).await?;
    ///             Ok::<_, sqlx::Error>(())
    ///         })
    ///         .await
    /// };
    /// let ran = boundary.run_in_phases(identity, month, policy, job);
    /// # let _: Ran<()> = ran.await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn run_in_phases<T, E, F, J>(
        &self,
        identity: Identity,
        fingerprint: Fingerprint,
        policy: Policy,
        job: F,
    ) -> Result<Ran<T>, RunError<E>>
    where
        T: Serialize + DeserializeOwned + Send + 'static,
        E: Send + 'static,
        F: FnOnce(IdempotencyContext, Phases<S>) -> J + Send + 'static,
        J: Future<Output = Result<T, E>> + Send + 'static,
    {
        // A run that fails open has no claim, and so no phases.
        let policy = policy.with_store_down(StoreDown::Refuse);
        self.run_leased(identity, fingerprint, policy, |request| {
            let extensions = request.extensions();
            let (context, phases) = (extensions.get().cloned(), extensions.get().cloned());
            let (Some(context), Some(phases)) = (context, phases) else {
                unreachable!("a run with a claim has a context and phases");
            };
            job(context, phases)
        })
        .await
    }
}

/// A job as the service of one request.
#[derive(Clone)]
struct Job<F>(F);

/// How a job fails.
enum JobError<E> {
    Failed(E),
    Result(serde_json::Error),
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, JobError<E>>> + Send>>;

impl<T, E, F, J> Service<Request<Body>> for Job<F>
where
    T: Serialize,
    F: FnMut(&mut Request<Body>) -> J,
    J: Future<Output = Result<T, E>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = JobError<E>;
    type Future = Answer<E>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), JobError<E>>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let job = (self.0)(&mut request);
        Box::pin(async move {
            let result = job.await.map_err(JobError::Failed)?;
            let json = serde_json::to_vec(&result).map_err(JobError::Result)?;
            Ok(Response::new(Body::from(json)))
        })
    }
}

/// What the answer of an exchange says of the operation.
async fn read<T: DeserializeOwned, E>(
    answer: Result<Response<Body>, JobError<E>>,
) -> Result<Ran<T>, RunError<E>> {
    let (parts, body) = match answer {
        Ok(answer) => answer.into_parts(),
        Err(JobError::Failed(error)) => return Err(RunError::Failed(error)),
        Err(JobError::Result(error)) => return Err(RunError::Result(error)),
    };
    match parts.extensions.get() {
        Some(Code::RequestInProgress) => return Ok(Ran::InProgress),
        Some(Code::KeyReused) => return Ok(Ran::Mismatch),
        Some(Code::OutcomeUnknown) => return Ok(Ran::Held),
        Some(Code::AttemptLost) => return Ok(Ran::Lost),
        Some(code) => return Err(RunError::Refused(*code)),
        None => {}
    }
    if !parts.status.is_success() {
        return Ok(Ran::Lost);
    }
    let body = body.collect().await;
    let bytes = body.map_err(|_| RunError::Refused(Code::ResponseFailed))?;
    let result = serde_json::from_slice(&bytes.to_bytes()).map_err(RunError::Result)?;
    Ok(match parts.headers.contains_key(headers::REPLAYED) {
        true => Ran::Replayed(result),
        false => Ran::Fresh(result),
    })
}

/// A boundary for jobs of a service that has routes, too: they share the store, the limits, the
/// counters and the shutdown of the layer.
impl<S, M> From<IdempotencyLayer<S, M>> for Boundary<S> {
    fn from(layer: IdempotencyLayer<S, M>) -> Self {
        Self {
            layer: layer.leased(),
        }
    }
}

impl<S> Clone for Boundary<S> {
    fn clone(&self) -> Self {
        Self {
            layer: self.layer.clone(),
        }
    }
}

impl<S> fmt::Debug for Boundary<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Boundary").finish_non_exhaustive()
    }
}

impl<E> fmt::Display for RunError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(_) => f.write_str("the job failed"),
            Self::Refused(code) => write!(f, "not run, or not recorded: {code}"),
            Self::Result(_) => f.write_str("the result cannot be stored, or read, as JSON"),
            Self::Policy(_) => f.write_str("the policy cannot work"),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for RunError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failed(error) => Some(error),
            Self::Result(error) => Some(error),
            Self::Policy(error) => Some(error),
            Self::Refused(_) => None,
        }
    }
}
