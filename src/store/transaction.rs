//! Stores whose records are written in the transaction of the handler's own writes.

use std::fmt;
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use axum_core::extract::FromRequestParts;
use axum_core::response::{IntoResponse, Response};
use http::StatusCode;
use http::request::Parts;

use super::{ClaimRequest, Completion, Store, StoreError, Token};

/// A store that has transactions: handler's writes and record commit together, or not at all.
///
/// # Contract
///
/// - [`begin`](Self::begin) opens a transaction only where the identity has no record and no other
///   open transaction has entered it; it never waits for one that has.
/// - [`commit`](Self::commit) writes the record last, and only into the transaction that `begin`
///   opened for the same token; a refusal's may be another one, in which the operation was entered
///   again. After an error other than [`CommitError::Unknown`] nothing of the transaction is committed,
///   save what the handler committed by itself ([`CommitError::Ended`]).
/// - [`confirm`](Self::confirm) tells what became of a commit whose acknowledgement is missing, and
///   leaves no record behind.
///
/// # Cancel safety
///
/// A future may be dropped at any point; its transaction is then rolled back, or, where the commit
/// was under way, to be asked for with `confirm`.
pub trait TransactionalStore: Store {
    /// An open transaction. Dropping it rolls it back.
    type Transaction: Send + 'static;

    /// How long a handler may hold a transaction where its policy does not say.
    const EXECUTION_LIMIT: Duration;

    /// Opens a transaction for an attempt. The server ends it by itself when it has idled for
    /// `limit`, for a host that vanished.
    fn begin(
        &self,
        request: &ClaimRequest,
        limit: Duration,
    ) -> impl Future<Output = Result<Begun<Self::Transaction>, StoreError>> + Send;

    /// Writes the record and commits. The end of its retention, by the store's clock.
    fn commit(
        &self,
        transaction: Self::Transaction,
        request: &ClaimRequest,
        entry: &Entry,
    ) -> impl Future<Output = Result<SystemTime, CommitError>> + Send;

    /// Rolls everything back. `token` is that of the attempt.
    ///
    /// # Errors
    ///
    /// [`CommitError::Ended`] where the store knows that the handler has ended the transaction by itself
    /// before, and may have committed it, and [`CommitError::Conflict`] where the connection is lost, so that
    /// it is rolled back without us.
    fn rollback(
        &self,
        transaction: Self::Transaction,
        token: Token,
    ) -> impl Future<Output = Result<(), CommitError>> + Send;

    /// Whether rolling the handler's writes back also ends what keeps others from entering. What is to be held
    /// is then claimed and held beside the transaction, as on a leased route, before that is rolled back.
    fn lock_ends_with_writes(&self) -> bool;

    /// What became of a commit that was not acknowledged. Waits for the old transaction to end.
    fn confirm(
        &self,
        request: &ClaimRequest,
    ) -> impl Future<Output = Result<Verdict, StoreError>> + Send;
}

/// Whether a transaction could be opened.
#[derive(Debug)]
pub enum Begun<T> {
    /// The identity is this attempt's for as long as the transaction is open.
    Open(T),
    /// Another transaction has entered the identity.
    Locked,
    /// The identity has a record.
    Recorded,
}

/// What is written into the record of a transaction.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What becomes of the handler's own writes.
    pub writes: Writes,
    /// Whether the record waits for a person, in place of being answered from.
    pub held: bool,
    /// The answer and the references.
    pub completion: Completion,
}

/// What becomes of the handler's own writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// They commit with the record.
    Keep,
    /// They are rolled back, and only the record commits.
    Undo,
}

/// Why a record was not committed.
#[derive(Debug)]
#[non_exhaustive]
pub enum CommitError {
    /// The handler ended the transaction by itself, and may have committed its writes.
    Ended,
    /// A statement had failed before, or the commit was refused: everything is rolled back.
    Aborted(StoreError),
    /// A serialization failure, a deadlock, a full disk or a lost connection: everything is rolled
    /// back, and another try may succeed.
    Conflict(StoreError),
    /// The identity got a record from elsewhere in the meantime: everything is rolled back.
    Recorded,
    /// The commit was sent and not acknowledged.
    Unknown(StoreError),
}

impl fmt::Display for CommitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ended => "the handler ended its transaction by itself, and may have committed",
            Self::Aborted(_) => "the handler's transaction could not be committed",
            Self::Conflict(_) => "the transaction is rolled back, and may succeed another time",
            Self::Recorded => "the operation got a record from elsewhere",
            Self::Unknown(_) => "it is not known whether the transaction is committed",
        })
    }
}

impl std::error::Error for CommitError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Aborted(error) | Self::Conflict(error) | Self::Unknown(error) => {
                std::error::Error::source(error)
            }
            Self::Ended | Self::Recorded => None,
        }
    }
}

/// What became of a commit that was not acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is committed, until this end of its retention.
    Committed(SystemTime),
    /// It is rolled back.
    RolledBack,
    /// It is rolled back, and another attempt has left a record.
    Recorded,
}

/// The transaction of a transactional route, as an extractor: what is written through it commits
/// together with the answer, or not at all.
///
/// It dereferences to the connection. It cannot be committed: the layer does that with the
/// answer, after the handler has dropped it. A handler that fails can return an error; a 5xx and
/// most 4xx roll everything back.
///
/// A `Tx` that outlives its handler, in a task it was moved to, is a 500 and nothing is committed.
/// A second one for the same request is refused with 500 while the first is there.
pub struct Tx<T> {
    transaction: Option<T>,
    slot: Slot<T>,
}

/// Where a transaction is while its handler runs.
pub(crate) struct Slot<T>(Arc<Mutex<State<T>>>);

enum State<T> {
    Free(T),
    Taken,
    /// The layer has taken it back, or given up waiting for it.
    Closed,
}

impl<T> Slot<T> {
    pub(crate) fn new(transaction: T) -> Self {
        Self(Arc::new(Mutex::new(State::Free(transaction))))
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lend(&self) -> Result<Tx<T>, MissingTx> {
        Ok(Tx {
            transaction: Some(self.take()?),
            slot: self.clone(),
        })
    }

    fn take(&self) -> Result<T, MissingTx> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Free(transaction) => Ok(transaction),
            State::Taken => Err(MissingTx::Taken),
            State::Closed => {
                *state = State::Closed;
                Err(MissingTx::Over)
            }
        }
    }

    fn give_back(&self, transaction: T) {
        let mut state = self.lock();
        if matches!(*state, State::Taken) {
            *state = State::Free(transaction);
        }
    }

    /// Takes the transaction back for good. `None` when somebody still has it: it is rolled back
    /// when they drop it.
    pub(crate) fn close(&self) -> Option<T> {
        match std::mem::replace(&mut *self.lock(), State::Closed) {
            State::Free(transaction) => Some(transaction),
            State::Taken | State::Closed => None,
        }
    }
}

impl<T> Clone for Slot<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Drop for Tx<T> {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.slot.give_back(transaction);
        }
    }
}

impl<T: Deref> Deref for Tx<T> {
    type Target = T::Target;

    #[expect(clippy::expect_used, reason = "it is taken only by `drop`")]
    fn deref(&self) -> &Self::Target {
        self.transaction.as_ref().expect("transaction is there")
    }
}

impl<T: DerefMut> DerefMut for Tx<T> {
    #[expect(clippy::expect_used, reason = "it is taken only by `drop`")]
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.transaction.as_mut().expect("transaction is there")
    }
}

impl<T> fmt::Debug for Tx<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx").finish_non_exhaustive()
    }
}

impl<T: Send + 'static, S: Send + Sync> FromRequestParts<S> for Tx<T> {
    type Rejection = MissingTx;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MissingTx> {
        let slot: &Slot<T> = parts.extensions.get().ok_or(MissingTx::NotTransactional)?;
        slot.lend()
    }
}

/// A handler asked for a [`Tx`] that is not there. Answered 500, and nothing is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MissingTx {
    /// No transactional layer of this store covers the request, or it passed through without a key.
    NotTransactional,
    /// The handler, or a layer outside of it, has the transaction already.
    Taken,
    /// The handler has ended already.
    Over,
}

impl fmt::Display for MissingTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotTransactional => {
                "no transaction: put a `transactional()` layer of the same store on this route, and require a key"
            }
            Self::Taken => "the transaction is taken already: extract `Tx` once",
            Self::Over => "the transaction is over: the handler has ended",
        })
    }
}

impl std::error::Error for MissingTx {}

impl IntoResponse for MissingTx {
    fn into_response(self) -> Response {
        tracing::error!("{self}");
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    }
}
