use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use axum_core::body::Body;
use http::Response;
use tokio::sync::Semaphore;
use tower_layer::Layer;

use crate::breaker::Breaker;
use crate::cache::ReplayCache;
use crate::detached::{Detached, SpawnHook};
use crate::error::ConfigError;
use crate::mode::{Leased, Transactional};
use crate::policy::{Policy, PolicyHandle};
use crate::rejection::{Rejection, Renderer};
use crate::scope::Scope;
use crate::service::Idempotency;
use crate::shared::Shared;
use crate::stats::Stats;
use crate::store::{Store, TransactionalStore};

/// Makes the routes it covers safe to retry.
///
/// Clones share the store, the limits, the counters and the policies; `with_*` changes a clone's own
/// settings and leaves the others alone, so one layer can be made per service and varied per route.
///
/// Authentication belongs outside of it, timeouts inside, compression outside.
///
/// ```
/// use axum::{Router, routing::{patch, post}};
/// use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
///
/// # fn main() -> Result<(), tower_idempotency::ConfigError> {
/// let idempotency = IdempotencyLayer::new(MemoryStore::new(), Scope::header("x-tenant-id")?);
///
/// let app: Router = Router::new()
///     .route("/orders", post(|| async { "ordered" }).layer(idempotency.clone()))
///     .route(
///         "/profile",
///         patch(|| async { "changed" }).layer(idempotency.clone().with_policy(Policy::low())?),
///     );
/// # let _ = app;
/// # Ok(())
/// # }
/// ```
pub struct IdempotencyLayer<S, M = Leased> {
    shared: Arc<Shared<S>>,
    mode: PhantomData<fn() -> M>,
}

impl<S: Store> IdempotencyLayer<S> {
    /// A layer with [`Policy::default`], for keys that belong to `scope`.
    ///
    /// ```
    /// use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    ///
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::header("x-tenant-id")?);
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn new(store: S, scope: Scope) -> Self {
        Self {
            shared: Arc::new(Shared::new(store, scope)),
            mode: PhantomData,
        }
    }
}

impl<S: TransactionalStore> IdempotencyLayer<S> {
    /// Makes the routes transactional: the layer opens a transaction, the handler writes in it
    /// through the extractor `Tx` of the store ([`postgres::Tx`](crate::postgres::Tx)), and the answer
    /// is stored in it and committed before its first byte leaves. The handler's writes, its messages
    /// and the answer are there together, or none of them is, whatever crashes or hangs up.
    ///
    /// | the handler answers | its writes | the answer | the key |
    /// |---|---|---|---|
    /// | 2xx, 3xx | committed | stored | taken |
    /// | 400, 401, 403, 408, 415, 422, 425, 429 | rolled back | given | free |
    /// | another 4xx | rolled back | stored | taken |
    /// | 5xx, a panic, nothing in time | rolled back | given | free |
    ///
    /// An [`Outcome`](crate::Outcome) in the response overrides the status. There is no lease, and
    /// nothing can be lost: where the process dies, the server rolls back. A handler must not end the
    /// transaction by itself. Duplicates hold no connection while they wait. Effects outside of the
    /// database are not part of the transaction; put them into an outbox, or on a leased route of their own.
    ///
    /// The transaction is `read committed`, and ended by the server when it idles for longer than the
    /// execution limit.
    ///
    /// ```no_run
    /// use axum::{Router, http::StatusCode, routing::post};
    /// use tower_idempotency::postgres::{Tx, TxError};
    /// use tower_idempotency::{IdempotencyLayer, PgStore, Scope};
    ///
    /// async fn charge(mut tx: Tx, amount: String) -> Result<StatusCode, TxError> {
    ///     let insert = sqlx::query("insert into charge (amount) values ($1)").bind(amount);
    ///     insert.execute(&mut *tx).await?;
    ///     Ok(StatusCode::CREATED)
    /// }
    ///
    /// # async fn example(store: PgStore) -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = IdempotencyLayer::new(store, Scope::header("x-tenant-id")?);
    /// let app: Router = Router::new().route("/charges", post(charge).layer(layer.transactional()));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn transactional(self) -> IdempotencyLayer<S, Transactional> {
        IdempotencyLayer {
            shared: self.shared,
            mode: PhantomData,
        }
    }
}

impl<S, M> IdempotencyLayer<S, M> {
    pub(crate) fn shared(&self) -> Arc<Shared<S>> {
        self.shared.clone()
    }

    /// The same, without transactions.
    pub(crate) fn leased(self) -> IdempotencyLayer<S> {
        IdempotencyLayer {
            shared: self.shared,
            mode: PhantomData,
        }
    }
}

impl<S: Store, M> IdempotencyLayer<S, M> {
    /// The policy of every route that [`with_route`](Self::with_route) does not name. Default:
    /// [`Policy::high`].
    ///
    /// # Errors
    ///
    /// Settings that cannot work.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// // Other routes keep the policy of `layer`.
    /// let relaxed = layer.clone().with_policy(Policy::medium())?;
    /// // What can forget cannot keep a `critical` promise.
    /// assert_eq!(layer.with_policy(Policy::critical()).unwrap_err().field(), "store");
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_policy(self, policy: Policy) -> Result<Self, ConfigError> {
        let policies = self.shared.policies.forked();
        policies.replace_default(policy)?;
        Ok(self.with(|shared| shared.policies = policies))
    }

    /// The policy of one route, for a layer that covers a whole router: `POST /orders/{id}/cancel`.
    /// Names of parameters do not matter. The template is the whole path, also for a router that is
    /// nested; a route named again gets the later policy.
    ///
    /// # Errors
    ///
    /// Settings that cannot work, a route that is not a method and a template, or a policy that does
    /// not cover the method.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
    ///     .with_route("PATCH /profile", Policy::low())?
    ///     // Takes the route out.
    ///     .with_route("POST /login", Policy::low().with_methods([]))?;
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_route(self, route: &str, policy: Policy) -> Result<Self, ConfigError> {
        let policies = self.shared.policies.forked();
        policies.replace_route(route, policy)?;
        Ok(self.with(|shared| shared.policies = policies))
    }

    /// Who asks. Default: the scope given to [`new`](Self::new).
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// // Webhooks have no tenant, but a sender.
    /// let webhooks = layer.clone().with_scope(Scope::fixed("bank"));
    /// ```
    #[must_use]
    pub fn with_scope(self, scope: Scope) -> Self {
        self.with(|shared| shared.scope = scope)
    }

    /// Makes answers of the layer's own errors, in place of the [profile](crate::Profile) of the route's
    /// policy. Default: [`Rejection::to_response`].
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
    ///     .with_renderer(|rejection| rejection.to_problem("https://docs.example.com/errors/"));
    /// ```
    #[must_use]
    pub fn with_renderer(
        self,
        render: impl Fn(&Rejection) -> Response<Body> + Send + Sync + 'static,
    ) -> Self {
        self.with(|shared| shared.renderer = Renderer::new(render))
    }

    /// The most keyed requests that run or wait at once; more are answered 503 `overloaded`.
    /// Default: 1,024 for all clones of this layer together.
    ///
    /// A request takes its place once its body has arrived, so that clients who send slowly take none
    /// away from others. Bodies on their way are bounded by the connections the server accepts, times
    /// [`Policy::with_request_limit`]; none is read while every place is taken, unless only the body
    /// can tell whether there is a key.
    ///
    /// # Errors
    ///
    /// `max_running` of zero, or more than a semaphore can count.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// assert!(layer.clone().with_max_running(200).is_ok());
    /// assert_eq!(layer.with_max_running(0).unwrap_err().field(), "max_running");
    /// ```
    pub fn with_max_running(self, max: usize) -> Result<Self, ConfigError> {
        if max == 0 || max > Semaphore::MAX_PERMITS {
            let reason = format!("must be 1 to {}, not {max}", Semaphore::MAX_PERMITS);
            return Err(ConfigError::new("max_running", reason));
        }
        Ok(self.with(|shared| shared.permits = Arc::new(Semaphore::new(max))))
    }

    /// How long one step may wait for the store, retries of a broken connection included. A duplicate
    /// waits for what another request of this process is told, for as long in all, and then asks for
    /// itself. Default: 2 s.
    ///
    /// # Errors
    ///
    /// `store_timeout` of zero.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// let layer = layer.with_store_timeout(Duration::from_millis(500))?;
    /// assert!(layer.with_store_timeout(Duration::ZERO).is_err());
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_store_timeout(self, timeout: Duration) -> Result<Self, ConfigError> {
        let timeout = longer_than_zero("store_timeout", timeout)?;
        Ok(self.with(|shared| shared.store_timeout = timeout))
    }

    /// How long a request's body may take to arrive. Default: 30 s.
    ///
    /// # Errors
    ///
    /// `request_timeout` of zero.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// let layer = layer.with_request_timeout(Duration::from_secs(5))?;
    /// assert!(layer.with_request_timeout(Duration::ZERO).is_err());
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_request_timeout(self, timeout: Duration) -> Result<Self, ConfigError> {
        let timeout = longer_than_zero("request_timeout", timeout)?;
        Ok(self.with(|shared| shared.request_timeout = timeout))
    }

    /// After how many claims in a row that the store did not answer, requests no longer wait for it;
    /// then one in every second tries. Default: 5.
    ///
    /// # Errors
    ///
    /// `breaker` of zero.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// let layer = layer.with_breaker(20)?;
    /// assert!(layer.with_breaker(0).is_err());
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_breaker(self, failures: u32) -> Result<Self, ConfigError> {
        if failures == 0 {
            return Err(ConfigError::new("breaker", "must be at least 1"));
        }
        Ok(self.with(|shared| shared.breaker = Arc::new(Breaker::new(failures))))
    }

    /// The most bytes that answers may take which routes replay from memory
    /// ([`Policy::with_replay_cache`]), with what it takes to find them; those that were used least
    /// recently make room. Default: 32 MiB. One cache serves this layer and all its clones, also those
    /// made before: it is replaced by an empty one.
    ///
    /// # Errors
    ///
    /// `replay_cache_size` of zero: the policy says whether there is a cache.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
    ///     .with_policy(Policy::high().with_replay_cache(true))?
    ///     .with_replay_cache_size(256 << 20)?;
    /// assert!(layer.with_replay_cache_size(0).is_err());
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_replay_cache_size(self, bytes: usize) -> Result<Self, ConfigError> {
        if bytes == 0 {
            return Err(ConfigError::new("replay_cache_size", "must be at least 1"));
        }
        let cache = Arc::new(ReplayCache::new(bytes));
        self.shared.core.replays.store(cache);
        Ok(self)
    }

    /// Wraps the task of every keyed request, to carry task-locals into it. The current `tracing`
    /// span is carried in any case. Called where the request is.
    ///
    /// ```
    /// # use tower_idempotency::{Detached, IdempotencyLayer, MemoryStore, Scope};
    /// tokio::task_local! { static LOCALE: String; }
    ///
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
    ///     .with_spawn_hook(|task| match LOCALE.try_with(String::clone) {
    ///         Ok(locale) => Detached::new(LOCALE.scope(locale, task)),
    ///         Err(_) => task,
    ///     });
    /// ```
    #[must_use]
    pub fn with_spawn_hook(
        self,
        hook: impl Fn(Detached) -> Detached + Send + Sync + 'static,
    ) -> Self {
        self.with(|shared| shared.hook = SpawnHook::new(hook))
    }

    /// The handle through which this layer, its clones and its services read their policies.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// let policies = layer.policies();
    /// // Later, while requests are running:
    /// policies.replace_default(Policy::medium())?;
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn policies(&self) -> PolicyHandle {
        self.shared.policies.clone()
    }

    /// How keyed requests ended so far.
    ///
    /// ```
    /// use axum::{Router, body::Body, http::Request, routing::post};
    /// use tower::ServiceExt;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// let app = Router::new().route("/orders", post(|| async {}).layer(layer.clone()));
    /// for _ in 0..3 {
    ///     let order = Request::post("/orders").header("idempotency-key", "order-1");
    ///     app.clone().oneshot(order.body(Body::empty())?).await?;
    /// }
    /// let stats = layer.stats();
    /// assert_eq!((stats.executed, stats.replayed), (1, 2));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    fn with(self, change: impl FnOnce(&mut Shared<S>)) -> Self {
        let mut shared = Shared::clone(&self.shared);
        change(&mut shared);
        Self {
            shared: Arc::new(shared),
            mode: PhantomData,
        }
    }
}

/// Longer is a mistake, and further on, clocks overflow.
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn longer_than_zero(
    field: &'static str,
    timeout: Duration,
) -> Result<Duration, ConfigError> {
    if timeout.is_zero() {
        return Err(ConfigError::new(field, "must be longer than zero"));
    }
    if timeout > MAX_TIMEOUT {
        let reason = format!("must be at most a day, not {} s", timeout.as_secs());
        return Err(ConfigError::new(field, reason));
    }
    Ok(timeout)
}

impl<S, M> fmt::Debug for IdempotencyLayer<S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyLayer")
            .field("policies", &self.shared.policies)
            .finish_non_exhaustive()
    }
}

impl<S, M> Clone for IdempotencyLayer<S, M> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            mode: PhantomData,
        }
    }
}

impl<S, M, I> Layer<I> for IdempotencyLayer<S, M> {
    type Service = Idempotency<I, S, M>;

    fn layer(&self, inner: I) -> Self::Service {
        Idempotency::new(inner, self.shared.clone())
    }
}
