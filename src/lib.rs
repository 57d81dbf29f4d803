//! Makes retries of mutating requests safe: one logical operation takes effect once, and every
//! retry gets the first answer, byte for byte.
//!
//! A client sends an `Idempotency-Key` with a `POST` or `PATCH`. The [`IdempotencyLayer`] claims the
//! key in a [`Store`], runs the handler to its end, whether or not the client waits, and records the
//! answer before its first byte leaves. A retry gets the recorded answer. Another request under the
//! same key is refused.
//!
//! ```
//! use axum::{Router, body::Body, http::Request, routing::post};
//! use tower::ServiceExt;
//! use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let idempotency = IdempotencyLayer::new(MemoryStore::new(), Scope::header("x-tenant-id")?);
//! let app = Router::new()
//!     .route("/orders", post(|body: String| async move { format!("ordered: {body}") }))
//!     .route_layer(idempotency);
//!
//! let order = |item: &'static str| {
//!     Request::post("/orders")
//!         .header("x-tenant-id", "acme")
//!         .header("idempotency-key", "8e03978e-40d5-43dd-bc93-6894a57f9324")
//!         .body(Body::from(item))
//! };
//! let first = app.clone().oneshot(order("book")?).await?;
//! assert_eq!(first.status(), 200);
//!
//! let replay = app.clone().oneshot(order("book")?).await?;
//! assert_eq!(replay.headers()["idempotent-replayed"], "true");
//!
//! let refused = app.oneshot(order("pen")?).await?;
//! assert_eq!(refused.status(), 409);
//! # Ok(())
//! # }
//! ```
//!
//! # What is promised
//!
//! Within a record's retention at most one attempt holds the claim of a key; an answer that was
//! recorded is never lost, and its request never run again. On a
//! [transactional](IdempotencyLayer::transactional) route the handler's writes and its answer commit
//! together. On any other, its effects are outside the record: when a process dies in the middle of a handler, nobody can know what it did, and the
//! route's [`Policy`] says whether it is run again, answered with a stored 500, or held for a person.
//! How durable a record is, is up to the database.
//!
//! # Layer order
//!
//! From the outside in: tracing, CORS, compression, rate limits, authentication, **this layer**,
//! timeouts, the handler. The [`Scope`] of a key is the principal that the authentication outside
//! has left in the request. An outer timeout, or a client that hangs up, ends the waiting but not the
//! handler; [`Policy::with_execution_limit`] or an inner timeout ends the handler.
//!
//! Put it on a whole router with `route_layer`: `layer` would also wrap the router's fallback.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `axum` | yes | Operations are named by axum's route templates, and nested routers are told apart. |
//! | `postgres` | yes | `PgStore`: the store of record, shared by every process of a service; `outbox`, `inbox`. |
//! | `sqlite` | no | `SqliteStore`: one file, one host, nothing to install. |
//! | `multipart` | no | `multipart/form-data` bodies are compared by their parts. |
//! | `outbox-http` | no | `outbox`: publishes by `POST`, without TLS. |
//! | `outbox-nats` | no | `outbox`: publishes to NATS JetStream. It brings the crate `time`. |
//! | `outbox-rabbitmq` | no | `outbox`: publishes to RabbitMQ, with confirms. |
//! | `conformance` | no | The rules of a store as tests, for stores of your own. |
//! | `webhook` | no | Receives providers' webhooks: signatures, time stamps, each event once. |
//!
//! [`MemoryStore`], for tests, is always there.
//!
//! # Where to look next
//!
//! - [`IdempotencyLayer`]: what can be set for all routes; [`Policy`] and [`Risk`]: for one.
//! - [`Outcome`] and [`IdempotencyContext`]: what a handler can say, and ask.
//! - [`Boundary`]: the same for jobs and consumers.
//! - [`store::Phases`]: recovery points, for handlers that call other services between their writes.
//! - [`keys`]: who makes them, of what, and for how long they are kept.
//! - `webhook`, with the feature of that name: providers' events, each handled once.
//! - [`problems`]: what each `code` of an answer means.
//! - `outbox` and `inbox`: messages sent and taken in with the writes of one transaction.
//! - [`store`]: choosing a store, held records, stores of your own; [`Sweeper`]: deleting old records;
//!   [`Completer`]: finishing what was abandoned.
//! - The README: running it, from the first request to the pager. `examples/quickstart.rs`: a whole
//!   service in one file.

mod backoff;
mod body;
mod boundary;
mod breaker;
mod cache;
mod canonical;
mod complete;
mod derived;
mod detached;
mod digest;
mod envelope;
mod error;
mod extract;
mod fingerprint;
mod future;
mod headers;
mod identity;
#[cfg(feature = "postgres")]
pub mod inbox;
mod key;
pub mod keys;
mod layer;
mod mode;
mod moment;
mod operation;
#[cfg(feature = "postgres")]
pub mod outbox;
mod outcome;
mod policy;
pub mod problems;
mod rejection;
mod retry_after;
mod run;
mod running;
mod scope;
mod service;
mod shared;
mod shutdown;
mod stats;
pub mod store;
mod sweep;
#[cfg(feature = "webhook")]
pub mod webhook;

pub use boundary::{Boundary, Ran, RunError};
pub use complete::{Completer, Finished, Operation};
pub use derived::DerivedKey;
pub use detached::Detached;
pub use envelope::{Envelope, EnvelopeError};
pub use error::ConfigError;
pub use extract::{IdempotencyContext, MissingContext, ReferenceError, References};
pub use fingerprint::{Fingerprint, Fingerprinter};
pub use future::ResponseFuture;
pub use identity::{Identity, RecordId};
pub use key::KeyFormat;
pub use layer::IdempotencyLayer;
pub use mode::{Leased, Mode, Transactional};
pub use outcome::Outcome;
pub use policy::{Duplicates, Lost, Policy, PolicyHandle, Risk, StoreDown, Unknown};
pub use rejection::{Code, Profile, Rejection};
pub use retry_after::retry_after;
pub use scope::Scope;
pub use service::Idempotency;
pub use shutdown::ShutdownReport;
pub use stats::Stats;
#[cfg(feature = "postgres")]
pub use store::postgres;
#[cfg(feature = "postgres")]
pub use store::postgres::{PgStore, PgStoreBuilder};
#[cfg(feature = "sqlite")]
pub use store::sqlite;
#[cfg(feature = "sqlite")]
pub use store::sqlite::SqliteStore;
pub use store::{
    HeldRecord, MemoryStore, Resolution, Store, StoreError, StoreErrorKind, Swept,
    TransactionalStore,
};
pub use sweep::Sweeper;

/// Compiles the code of the README.
#[cfg(all(doctest, feature = "axum", feature = "postgres", feature = "webhook"))]
#[doc = include_str!("../README.md")]
mod readme {}
