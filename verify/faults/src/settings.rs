//! What a subject is told: one JSON object, its only argument.

use std::env;

use serde::{Deserialize, Serialize};

/// Settings of a subject. Times are milliseconds; `None` is the crate's own default.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// `postgres://..`, or `sqlite:PATH`: where the records are.
    pub store: String,
    /// The same: where the handler writes.
    pub ledger: String,
    /// `critical`, `high`, `medium` or `low`.
    pub risk: String,
    /// Whether the handler writes in one transaction with its record, and so into `store`.
    pub transactional: bool,
    /// The most transactions of handlers that are open at once, on PostgreSQL.
    pub max_transactions: Option<u32>,
    /// How often a transaction that met a conflict is run again.
    pub reruns: u32,
    /// Whether `store` leads to PgBouncer.
    pub pgbouncer: bool,
    /// Whether the records are written on the connections of the application.
    pub shared_pool: bool,
    /// Whether statements of concurrent requests travel together.
    pub group_commit: bool,
    /// Whether answers are replayed from memory, too.
    pub replay_cache: bool,
    /// Whether to create the schema first; a store that never answers would keep it from starting.
    pub migrate: bool,
    /// Threads that run its tasks.
    pub workers: Option<usize>,
    /// A `TimeoutLayer` that answers 408, outside of the layer.
    pub timeout_outside: Option<u64>,
    /// The same, between the layer and the handler.
    pub timeout_inside: Option<u64>,
    /// Retention of an answer.
    pub ttl: Option<u64>,
    /// Whether answers say when their retention ends.
    pub shows_expiry: bool,
    /// Lease of a claim.
    pub lease: Option<u64>,
    /// Execution limit of the handler.
    pub execution_limit: Option<u64>,
    /// How long one step may wait for the store.
    pub store_timeout: Option<u64>,
    /// How long an answer is held back until it is recorded.
    pub settle_timeout: Option<u64>,
    /// How long an answer's body may take.
    pub body_deadline: Option<u64>,
    /// How long a duplicate waits for the first answer.
    pub wait: Option<u64>,
    /// Interval of the sweeper; without one, nobody sweeps.
    pub sweep: Option<u64>,
    /// How long a shutdown waits for running requests.
    pub grace: u64,
}

impl Settings {
    /// Records and ledger in one database, and the defaults of a risk class. `FAULTS_GROUP_COMMIT=off` and
    /// `FAULTS_REPLAY_CACHE=on` change what tests do not say.
    #[must_use]
    pub fn new(store: &str, risk: &str) -> Self {
        Self {
            store: store.into(),
            ledger: store.into(),
            risk: risk.into(),
            transactional: false,
            max_transactions: None,
            reruns: 0,
            pgbouncer: false,
            shared_pool: false,
            group_commit: env::var("FAULTS_GROUP_COMMIT").as_deref() != Ok("off"),
            replay_cache: env::var("FAULTS_REPLAY_CACHE").as_deref() == Ok("on"),
            migrate: true,
            workers: None,
            timeout_outside: None,
            timeout_inside: None,
            ttl: None,
            shows_expiry: false,
            lease: None,
            execution_limit: None,
            store_timeout: None,
            settle_timeout: None,
            body_deadline: None,
            wait: None,
            sweep: None,
            grace: 5000,
        }
    }

    /// Changes some of them.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }
}
