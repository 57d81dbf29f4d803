//! What a route asks of keys, how long it keeps answers, and what it does when something is lost.

mod risk;
mod table;
mod validate;

use std::time::Duration;

use http::Method;
use http::header::HeaderName;

use crate::derived::DerivedKey;
use crate::error::ConfigError;
use crate::fingerprint::Fingerprinter;
use crate::key::{KeyFormat, KeyRules};
use crate::rejection::Profile;
use crate::scope::Scope;

pub(crate) use risk::{Disposition, Ending, TransactionalDisposition};
pub use risk::{Lost, Risk, StoreDown, Unknown};
pub use table::PolicyHandle;

const HOUR: Duration = Duration::from_secs(3600);

/// Where nothing else is said, on a route whose attempts hold leases.
pub(crate) const EXECUTION_LIMIT: Duration = Duration::from_secs(300);

/// The rules of one route: a value that a layer carries for its route, or in its table of routes.
///
/// Start from a [`Risk`] class and change single settings. Settings are checked together when the
/// policy is given to a layer.
///
/// ```
/// use std::time::Duration;
/// use tower_idempotency::{Duplicates, Policy};
///
/// let policy = Policy::critical()
///     .with_ttl(Duration::from_secs(7 * 24 * 3600))
///     .with_duplicates(Duplicates::Wait(Duration::from_secs(5)));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    pub(crate) risk: Risk,
    pub(crate) profile: Profile,
    pub(crate) operation: Option<String>,
    pub(crate) scope: Option<Scope>,
    pub(crate) methods: Vec<Method>,
    pub(crate) key: KeyRules,
    pub(crate) derived_key: Option<DerivedKey>,
    pub(crate) fingerprint: Fingerprinter,
    pub(crate) duplicates: Duplicates,
    pub(crate) store_down: StoreDown,
    pub(crate) lost: Lost,
    pub(crate) unknown: Unknown,
    pub(crate) stores_server_errors: bool,
    pub(crate) losable_answers: bool,
    pub(crate) volatile_store: bool,
    pub(crate) shows_expiry: bool,
    pub(crate) hidden_headers: Vec<HeaderName>,
    pub(crate) request_limit: usize,
    pub(crate) response_limit: usize,
    pub(crate) ttl: Duration,
    pub(crate) lease: Duration,
    /// `None`: the default of the kind of route.
    pub(crate) execution_limit: Option<Duration>,
    pub(crate) reruns: u32,
    pub(crate) body_deadline: Duration,
    pub(crate) settle_timeout: Duration,
    pub(crate) replay_cache: bool,
}

/// What a duplicate gets while the first request runs.
///
/// ```
/// use std::time::Duration;
/// use tower_idempotency::{Duplicates, Policy};
///
/// let patient = Policy::high().with_duplicates(Duplicates::Wait(Duration::from_secs(5)));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Duplicates {
    /// 409 `request-in-progress` at once, with `Retry-After`. The default: it holds no connection.
    #[default]
    Reject,
    /// The first answer, waited for up to a limit; then the 409. It looks again after 25 ms and then ever
    /// less often, up to half a second. Where the first request runs in another process on a leased
    /// route, `PgStore` wakes it sooner; on a transactional route there is no record yet that could say
    /// that somebody waits.
    Wait(Duration),
}

impl Policy {
    /// The preset of a risk class.
    ///
    /// ```
    /// use tower_idempotency::{Policy, Risk};
    ///
    /// assert_eq!(Policy::of(Risk::High), Policy::default());
    /// ```
    #[must_use]
    pub fn of(risk: Risk) -> Self {
        let day = 24 * HOUR;
        Self {
            risk,
            profile: Profile::Default,
            operation: None,
            scope: None,
            methods: vec![Method::POST, Method::PATCH],
            key: KeyRules {
                header: HeaderName::from_static("idempotency-key"),
                required: risk.is_strict(),
                format: KeyFormat::Lenient,
                min: 1,
                max: 255,
            },
            derived_key: None,
            fingerprint: Fingerprinter::raw(),
            duplicates: Duplicates::Reject,
            store_down: risk.store_down(),
            lost: risk.lost(),
            unknown: risk.unknown(),
            stores_server_errors: risk.is_strict(),
            losable_answers: !risk.is_strict(),
            volatile_store: false,
            shows_expiry: false,
            hidden_headers: Vec::new(),
            request_limit: 2 << 20,
            response_limit: 1 << 20,
            ttl: if risk.is_strict() { 3 * day } else { day },
            lease: Duration::from_secs(30),
            execution_limit: None,
            reruns: 0,
            body_deadline: Duration::from_secs(10),
            settle_timeout: Duration::from_secs(5),
            replay_cache: false,
        }
    }

    /// [`Risk::Critical`]: money moves, and a second run is worse than none.
    #[must_use]
    pub fn critical() -> Self {
        Self::of(Risk::Critical)
    }

    /// [`Risk::High`], the default: effects that must not happen twice.
    #[must_use]
    pub fn high() -> Self {
        Self::of(Risk::High)
    }

    /// [`Risk::Medium`]: effects that may rarely happen twice.
    #[must_use]
    pub fn medium() -> Self {
        Self::of(Risk::Medium)
    }

    /// [`Risk::Low`]: effects that may happen twice, and must not be refused.
    #[must_use]
    pub fn low() -> Self {
        Self::of(Risk::Low)
    }

    /// The dialect of the route's clients. Default: [`Profile::Default`]. Sets the key format, too: for
    /// another one, call [`with_key_format`](Self::with_key_format) after it.
    #[must_use]
    pub fn with_profile(mut self, profile: Profile) -> Self {
        self.key.format = match profile {
            Profile::Ietf { .. } => KeyFormat::Strict,
            Profile::Default | Profile::Stripe => KeyFormat::Lenient,
        };
        self.profile = profile;
        self
    }

    /// Names the operation. Default: method and route template (`POST /orders/{}`), or the concrete
    /// path where no template is known. A name survives a change of the template. Routes of one name
    /// share their keys: one that was used on the first is refused on the second, since the path is
    /// part of the [fingerprint](Fingerprinter).
    ///
    /// ```
    /// # use tower_idempotency::Policy;
    /// // What was charged by `/v1/charges` is not charged again by `/v2/charges`.
    /// let policy = Policy::critical().with_operation("charge");
    /// ```
    #[must_use]
    pub fn with_operation(mut self, name: impl Into<String>) -> Self {
        self.operation = Some(name.into());
        self
    }

    /// Who asks, on this route. Default: the layer's scope.
    ///
    /// ```
    /// # use tower_idempotency::{Policy, Scope};
    /// let policy = Policy::high().with_scope(Scope::header("x-merchant")?);
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn with_scope(mut self, scope: Scope) -> Self {
        self.scope = Some(scope);
        self
    }

    /// The methods that are covered. Default: `POST` and `PATCH`, which HTTP does not make
    /// idempotent. An empty list takes the route out.
    ///
    /// ```
    /// use axum::http::Method;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
    ///
    /// let policy = Policy::high().with_methods([Method::POST, Method::PUT, Method::DELETE]);
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// assert!(layer.clone().with_policy(policy).is_ok());
    /// // A GET has no effect to protect.
    /// let error = layer.with_policy(Policy::high().with_methods([Method::GET])).unwrap_err();
    /// assert_eq!(error.field(), "methods");
    /// ```
    #[must_use]
    pub fn with_methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.methods = methods.into_iter().collect();
        self
    }

    /// The header that carries the key. Default: `Idempotency-Key`.
    ///
    /// # Errors
    ///
    /// `key_header` when the name is not a header name.
    ///
    /// ```
    /// # use tower_idempotency::Policy;
    /// let policy = Policy::high().with_key_header("x-request-key")?;
    /// assert!(policy.with_key_header("not a header").is_err());
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_key_header(mut self, name: &str) -> Result<Self, ConfigError> {
        self.key.header = HeaderName::try_from(name)
            .map_err(|_| ConfigError::new("key_header", "is not a valid header name"))?;
        Ok(self)
    }

    /// Whether a request without a key is refused (400) or passes through unprotected. Default: by
    /// [`Risk`].
    ///
    /// ```
    /// # use tower_idempotency::Policy;
    /// let policy = Policy::high().with_required_key(false);
    /// ```
    #[must_use]
    pub fn with_required_key(mut self, required: bool) -> Self {
        self.key.required = required;
        self
    }

    /// Makes a key of the request itself, which then needs none of its client. Default: none.
    #[must_use]
    pub fn with_derived_key(mut self, key: DerivedKey) -> Self {
        self.derived_key = Some(key);
        self
    }

    /// Which spellings of a key are accepted. Default: [`KeyFormat::Lenient`].
    #[must_use]
    pub fn with_key_format(mut self, format: KeyFormat) -> Self {
        self.key.format = format;
        self
    }

    /// The shortest and the longest key in bytes, counted after unquoting. Default: 1 to 255.
    ///
    /// ```
    /// # use tower_idempotency::Policy;
    /// let policy = Policy::high().with_key_length(16, 64);
    /// ```
    #[must_use]
    pub fn with_key_length(mut self, min: usize, max: usize) -> Self {
        (self.key.min, self.key.max) = (min, max);
        self
    }

    /// How requests are compared. Default: [`Fingerprinter::raw`].
    #[must_use]
    pub fn with_fingerprint(mut self, fingerprint: Fingerprinter) -> Self {
        self.fingerprint = fingerprint;
        self
    }

    /// What a duplicate gets while the first request runs. Default: [`Duplicates::Reject`].
    #[must_use]
    pub fn with_duplicates(mut self, duplicates: Duplicates) -> Self {
        self.duplicates = duplicates;
        self
    }

    /// What happens when the store cannot be asked. Default: by [`Risk`].
    #[must_use]
    pub fn with_store_down(mut self, store_down: StoreDown) -> Self {
        self.store_down = store_down;
        self
    }

    /// What happens to an operation whose attempt vanished. Default: by [`Risk`].
    #[must_use]
    pub fn with_lost(mut self, lost: Lost) -> Self {
        self.lost = lost;
        self
    }

    /// What happens after a panic, an execution limit, a 408 or a body that broke off. Default: by
    /// [`Risk`].
    #[must_use]
    pub fn with_unknown(mut self, unknown: Unknown) -> Self {
        self.unknown = unknown;
        self
    }

    /// Whether a 5xx of the handler is the answer (`true`), or frees the key (`false`). Default: by
    /// [`Risk`].
    #[must_use]
    pub fn with_stored_server_errors(mut self, stored: bool) -> Self {
        self.stores_server_errors = stored;
        self
    }

    /// Whether an answer may go out although it could not be recorded within the settle timeout. It
    /// can then be lost, and a retry after a crash may run again. Default: by [`Risk`].
    #[must_use]
    pub fn with_losable_answers(mut self, losable: bool) -> Self {
        self.losable_answers = losable;
        self
    }

    /// Allows a `critical` policy on a store that can forget. Default: it is a [`ConfigError`].
    #[must_use]
    pub fn with_volatile_store(mut self, allowed: bool) -> Self {
        self.volatile_store = allowed;
        self
    }

    /// Shows in `Idempotency-Expires` until when the answer is replayed. Default: it is not shown.
    #[must_use]
    pub fn with_expiry_header(mut self, shown: bool) -> Self {
        self.shows_expiry = shown;
        self
    }

    /// Headers of the answer that retries do not get. Never replayed in any case: hop-by-hop
    /// headers, `Date`, `Age`, `Set-Cookie` and trace headers.
    ///
    /// # Errors
    ///
    /// `hidden_headers` when a name is not a header name.
    ///
    /// ```
    /// # use tower_idempotency::Policy;
    /// let policy = Policy::high().with_hidden_headers(["x-ratelimit-remaining"])?;
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_hidden_headers<'a>(
        mut self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, ConfigError> {
        let names = names.into_iter().map(HeaderName::try_from);
        self.hidden_headers = names
            .collect::<Result<_, _>>()
            .map_err(|_| ConfigError::new("hidden_headers", "has a name that is no header name"))?;
        Ok(self)
    }

    /// The largest request body in bytes; a larger one is answered 413 before anything is claimed.
    /// Default: 2 MiB, as axum's own limit.
    ///
    /// A [`Fingerprinter`](crate::Fingerprinter) that compares meaning takes up to some twenty times the
    /// body for a moment, and works on the thread that serves the connection: choose a limit that
    /// fits the route.
    #[must_use]
    pub fn with_request_limit(mut self, bytes: usize) -> Self {
        self.request_limit = bytes;
        self
    }

    /// The largest answer that is kept, in bytes. A larger one reaches its own client in full, and
    /// retries get 410. Default: 1 MiB.
    #[must_use]
    pub fn with_response_limit(mut self, bytes: usize) -> Self {
        self.response_limit = bytes;
        self
    }

    /// How long an answer is kept, counted from the claim. Default: by [`Risk`]. Longer than your
    /// clients go on retrying.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::Policy;
    /// let policy = Policy::high().with_ttl(Duration::from_secs(30 * 24 * 3600));
    /// ```
    #[must_use]
    pub fn with_ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How long a silent attempt is believed to live. A living one keeps its lease by heartbeats, so
    /// this is how long a retry waits after a crash. Default: 30 s.
    ///
    /// Timed by the store's clock. When that is set forward, an attempt that runs can be taken for lost
    /// until its next heartbeat, a third of a lease later at most; when it is set back, one that is
    /// lost is found out later by as much.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long the handler may take, its answer included. Default: 5 min; on a
    /// [transactional](crate::IdempotencyLayer::transactional) route 60 s on PostgreSQL and 5 s on
    /// SQLite, since its transaction holds locks all the while.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
    /// let hour = Duration::from_secs(3600);
    /// let policy = Policy::high().with_execution_limit(hour);
    /// # let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    /// assert!(layer.clone().with_policy(policy.clone()).is_ok());
    /// // A running record must not expire.
    /// assert_eq!(layer.with_policy(policy.with_ttl(hour)).unwrap_err().field(), "ttl");
    /// ```
    #[must_use]
    pub fn with_execution_limit(mut self, limit: Duration) -> Self {
        self.execution_limit = Some(limit);
        self
    }

    /// How often a transactional route is run again, from the buffered request, after a conflict of
    /// transactions or a transaction that a failed statement aborted; at most 10. Then it is answered
    /// 503 `transaction-conflict`, or 500 `transaction-aborted`. Everything of a run that is repeated was
    /// rolled back; effects outside of the transaction were not. Default: 0.
    ///
    /// ```
    /// # use tower_idempotency::Policy;
    /// let policy = Policy::high().with_reruns(3);
    /// ```
    #[must_use]
    pub fn with_reruns(mut self, reruns: u32) -> Self {
        self.reruns = reruns;
        self
    }

    /// How long a body may take to be complete once its head is there; a slower one is passed
    /// through and not kept. Default: 10 s.
    #[must_use]
    pub fn with_body_deadline(mut self, deadline: Duration) -> Self {
        self.body_deadline = deadline;
        self
    }

    /// How long an answer is held back until it is recorded. Default: 5 s.
    #[must_use]
    pub fn with_settle_timeout(mut self, timeout: Duration) -> Self {
        self.settle_timeout = timeout;
        self
    }

    /// Whether this process may replay a recorded answer from its memory, without asking the store, for
    /// at most ten seconds and never beyond its retention. Default: `false`, since a record that an
    /// operator deletes by hand, or that is lost with a primary that had no synchronous standby, is replayed
    /// for up to ten seconds more. All that this crate does to a record is seen at once: what is completed
    /// stays as it is until it expires.
    ///
    /// It serves retries that come soon, also while the store is down. What it may take is set by
    /// [`IdempotencyLayer::with_replay_cache_size`](crate::IdempotencyLayer::with_replay_cache_size).
    ///
    /// ```
    /// use axum::{Router, body::Body, http::Request, routing::post};
    /// use tower::ServiceExt;
    /// use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
    ///     .with_policy(Policy::high().with_replay_cache(true))?;
    /// let app = Router::new().route("/orders", post(|| async {}).layer(layer));
    /// let order = || Request::post("/orders").header("idempotency-key", "order-1").body(Body::empty());
    /// app.clone().oneshot(order()?).await?;
    /// // The store is not asked.
    /// let replay = app.oneshot(order()?).await?;
    /// assert_eq!(replay.headers()["idempotent-replayed"], "true");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_replay_cache(mut self, cached: bool) -> Self {
        self.replay_cache = cached;
        self
    }

    pub(crate) fn covers(&self, method: &Method) -> bool {
        self.methods.contains(method)
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::high()
    }
}
