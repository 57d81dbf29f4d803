//! Makes retries of mutating requests safe: one logical operation takes effect once, and every
//! retry gets the first answer, byte for byte.

mod backoff;
mod body;
mod breaker;
mod canonical;
mod detached;
mod digest;
mod envelope;
mod error;
mod extract;
mod fingerprint;
mod future;
mod headers;
mod identity;
mod key;
mod layer;
mod operation;
mod outcome;
mod policy;
pub mod problems;
mod rejection;
mod run;
mod running;
mod scope;
mod service;
mod stats;
pub mod store;
mod sweep;

pub use detached::Detached;
pub use envelope::{Envelope, EnvelopeError};
pub use error::ConfigError;
pub use extract::{IdempotencyContext, MissingContext, ReferenceError, References};
pub use fingerprint::{Fingerprint, Fingerprinter};
pub use future::ResponseFuture;
pub use identity::{Identity, RecordId};
pub use key::KeyFormat;
pub use layer::{IdempotencyLayer, ShutdownReport};
pub use outcome::Outcome;
pub use policy::{Duplicates, Lost, Policy, PolicyHandle, Risk, StoreDown, Unknown};
pub use rejection::{Code, Rejection};
pub use scope::Scope;
pub use service::Idempotency;
pub use stats::Stats;
#[cfg(feature = "postgres")]
pub use store::postgres::{PgStore, PgStoreBuilder};
#[cfg(feature = "sqlite")]
pub use store::sqlite::SqliteStore;
pub use store::{MemoryStore, Store, StoreError, StoreErrorKind};
pub use sweep::Sweeper;
