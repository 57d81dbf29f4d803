//! Recovery points: what a leased operation has finished, for the attempt that comes after it.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum_core::extract::FromRequestParts;
use axum_core::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::{HeaderValue, RETRY_AFTER};
use http::request::Parts;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::timeout;

use super::progress::{self, PhaseMisuse, Progress, Unsaved};
use super::{Claim, CommitError, StoreError, StoreErrorKind, TransactionalStore};
use crate::backoff::Backoff;
use crate::extract::{IdempotencyContext, References};
use crate::fingerprint::Fingerprint;
use crate::identity::{Identity, RecordId};
use crate::outcome::Outcome;

/// A transactional store that keeps the progress of leased operations.
///
/// # Contract
///
/// - Progress belongs to the record and outlives the attempt that saved it: a takeover of a lost
///   attempt keeps it, and releasing the claim of a record that has any ends its lease in place of
///   deleting it, whatever becomes of lost attempts.
/// - [`save_phase`](Self::save_phase) commits only while the record is running under the claim's token
///   and its progress is of the version it was made from.
pub trait PhasedStore: TransactionalStore {
    /// Opens a transaction for a phase. The server ends it by itself when it has idled for `limit`.
    fn begin_phase(
        &self,
        claim: &Claim,
        limit: Duration,
    ) -> impl Future<Output = Result<Self::Transaction, StoreError>> + Send;

    /// Writes the progress as the last statement of the transaction, and commits.
    /// [`CommitError::Recorded`] when the record refuses it.
    fn save_phase(
        &self,
        transaction: Self::Transaction,
        claim: &Claim,
        step: &Step,
    ) -> impl Future<Output = Result<(), CommitError>> + Send;

    /// What is saved, once any commit of it that is under way has ended, and the references. `None`
    /// when the record is no longer running under the claim's token.
    fn progress(
        &self,
        claim: &Claim,
    ) -> impl Future<Output = Result<Option<(Progress, References)>, StoreError>> + Send;

    /// Records of these operations that have progress, whose lease is over, and that are to be run
    /// again: in the order of their ids, at most `limit` and never more than 1,000, beginning after
    /// an id. A page may be short of them; an empty one says that there are no more.
    fn list_abandoned(
        &self,
        operations: &[String],
        after: Option<RecordId>,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<Abandoned>, StoreError>> + Send;
}

/// A record that can be resumed, and that nobody resumes.
#[derive(Debug, Clone)]
pub struct Abandoned {
    /// Whose operation.
    pub identity: Identity,
    /// Of which request.
    pub fingerprint: Fingerprint,
    /// How long it is kept, from a claim on.
    pub retention: Duration,
}

/// What a phase writes into the record.
#[derive(Debug, Clone)]
pub struct Step {
    /// What the record has.
    pub before: Progress,
    /// What it is to have.
    pub after: Progress,
    /// What the handler noted so far.
    pub references: References,
}

/// The connection of a store's transactions.
pub type Connection<S> = <<S as TransactionalStore>::Transaction as Deref>::Target;

/// The phases of a leased operation, as an extractor: the database writes between two calls to other
/// services, each committed together with a *recovery point*. An attempt that takes over from a
/// lost one gets back what the finished phases saved, and runs none of them again.
///
/// ```text
/// run("ordered", ..)       one transaction: the order is written, and the recovery point
/// gateway.charge(key, ..)  not in a transaction: the key is the same on each attempt
/// run("charged", ..)       one transaction: the charge is written, and the recovery point
/// ```
///
/// What is between two phases can happen again: call other services with a
/// [`downstream_key`](Self::downstream_key), which is the same on each attempt.
///
/// # Which attempts resume
///
/// Any that runs the handler again: after a lost attempt where the policy says
/// [`Lost::Rerun`](crate::Lost::Rerun), and after an answer that frees the key, which keeps the
/// recovery points and binds the key to the same request. `Lost::Answer` and `Lost::Hold` never
/// run a lost attempt again. A person who releases a held operation lets it resume.
///
/// # Limits
///
/// At most 16 phases, 64 KiB of saved data in all, one phase at a time, each name once. An attempt
/// has to come by the finished phases in the order in which they were finished; one that asks for
/// another phase is refused with [`PhaseMisuse::Diverged`], and nothing is lost. So a deploy
/// may add phases at the end and must not rename, remove or move any while operations are under way.
///
/// # Cancel safety
///
/// A dropped [`run`](Self::run) is rolled back, or, if its commit was under way, found out by the
/// next one.
pub struct Phases<S>(Arc<Attempt<S>>);

struct Attempt<S> {
    store: Arc<S>,
    claim: Claim,
    context: IdempotencyContext,
    times: Times,
    way: Mutex<Way>,
}

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    /// One phase.
    pub(crate) limit: Duration,
    /// Finding out what became of a commit.
    pub(crate) patience: Duration,
}

/// How far the operation has come, and how far this attempt.
#[derive(Debug, Default)]
struct Way {
    /// `None` until it is read, and after a commit that was not acknowledged.
    saved: Option<Progress>,
    /// Phases this attempt has been through.
    passed: usize,
}

impl Way {
    /// What a finished phase saved, or `None` when it is to be run.
    fn finished(&self, name: &str) -> Result<Option<&str>, PhaseMisuse> {
        let Some(saved) = &self.saved else {
            return Ok(None);
        };
        if saved.names().take(self.passed).any(|passed| passed == name) {
            let name = name.to_owned();
            return Err(PhaseMisuse::Reused { name });
        }
        match saved.get(self.passed) {
            None => Ok(None),
            Some((finished, data)) if finished == name => Ok(Some(data)),
            Some((finished, _)) => Err(PhaseMisuse::Diverged {
                asked: name.to_owned(),
                finished: finished.to_owned(),
            }),
        }
    }
}

impl<S> Phases<S> {
    pub(crate) fn new(
        store: Arc<S>,
        claim: Claim,
        context: IdempotencyContext,
        times: Times,
    ) -> Self {
        Self(Arc::new(Attempt {
            store,
            claim,
            context,
            times,
            way: Mutex::default(),
        }))
    }

    /// The key for a call to another service: as
    /// [`Identity::downstream_key`](crate::Identity::downstream_key).
    #[must_use]
    pub fn downstream_key(&self, name: &str) -> String {
        self.0.claim.identity.downstream_key(name)
    }
}

impl<S: PhasedStore> Phases<S>
where
    S::Transaction: DerefMut,
{
    /// Runs a phase in one transaction of the store's own, and commits its writes together with what
    /// it returned; or returns what it saved, if it is finished. The value comes back by way of its JSON
    /// in either case, so that it is the same on each attempt.
    ///
    /// An error of `work` rolls the phase back. What `work` does outside of the connection is not
    /// part of the phase.
    ///
    /// # Errors
    ///
    /// See [`PhaseError`].
    pub async fn run<T, E>(
        &self,
        name: &str,
        work: impl AsyncFnOnce(&mut Connection<S>) -> Result<T, E>,
    ) -> Result<T, PhaseError<E>>
    where
        T: Serialize + DeserializeOwned,
    {
        let attempt = &*self.0;
        progress::check_name(name)?;
        let mut way = attempt.way.try_lock().map_err(|_| PhaseMisuse::Busy)?;
        let before = attempt.load(&mut way).await?;
        if let Some(data) = way.finished(name)? {
            let value = decode(name, data)?;
            way.passed += 1;
            return Ok(value);
        }
        let store = &attempt.store;
        let begun = store.begin_phase(&attempt.claim, attempt.times.limit);
        let mut transaction = begun.await.map_err(PhaseError::Store)?;
        let worked = match work(&mut *transaction).await {
            Ok(value) => extended(&before, name, &value),
            Err(error) => Err(PhaseError::Work(error)),
        };
        let (after, value) = match worked {
            Ok(worked) => worked,
            Err(error) => {
                let rollback = store.rollback(transaction, attempt.claim.token);
                return Err(match timeout(attempt.times.patience, rollback).await {
                    Ok(Ok(())) => error,
                    Ok(Err(ended)) => ended.into(),
                    Err(silent) => PhaseError::Conflict(StoreError::unavailable(silent)),
                });
            }
        };
        let references = attempt.context.references();
        let step = Step {
            before,
            after,
            references,
        };
        attempt.save(transaction, &step, &mut way).await?;
        way.passed += 1;
        Ok(value)
    }
}

impl<S: PhasedStore> Phases<S> {
    /// What a finished phase saved, or `None` when it is not finished. Unlike [`run`](Self::run) it may
    /// be asked for in any order, and any number of times.
    ///
    /// # Errors
    ///
    /// [`PhaseError::ClaimLost`], [`PhaseError::Data`], [`PhaseError::Store`], or that a phase is running.
    pub async fn saved<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, SavedError> {
        self.read(name).await.map_err(SavedError)
    }

    async fn read<T: DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>, PhaseError<Infallible>> {
        let mut way = self.0.way.try_lock().map_err(|_| PhaseMisuse::Busy)?;
        let saved = self.0.load(&mut way).await?;
        let place = saved.names().position(|finished| finished == name);
        let saved = place.and_then(|place| saved.get(place));
        saved.map(|(_, data)| decode(name, data)).transpose()
    }
}

/// The progress with one more phase, and what a later attempt will read of it.
fn extended<T, E>(before: &Progress, name: &str, value: &T) -> Result<(Progress, T), PhaseError<E>>
where
    T: Serialize + DeserializeOwned,
{
    let after = before.with(name, value).map_err(|unsaved| match unsaved {
        Unsaved::Misuse(misuse) => PhaseError::Misuse(misuse),
        Unsaved::Data(source) => data_error(name, source),
    })?;
    let (_, data) = after.get(before.names().count()).unwrap_or_default();
    let value = decode(name, data)?;
    Ok((after, value))
}

fn decode<T: DeserializeOwned, E>(name: &str, data: &str) -> Result<T, PhaseError<E>> {
    serde_json::from_str(data).map_err(|source| data_error(name, source))
}

fn data_error<E>(name: &str, source: serde_json::Error) -> PhaseError<E> {
    let phase = name.to_owned();
    PhaseError::Data { phase, source }
}

impl<S: PhasedStore> Attempt<S> {
    async fn load<E>(&self, way: &mut MutexGuard<'_, Way>) -> Result<Progress, PhaseError<E>> {
        if let Some(saved) = &way.saved {
            return Ok(saved.clone());
        }
        let read = self.store.progress(&self.claim).await;
        let (saved, references) = read
            .map_err(PhaseError::Store)?
            .ok_or(PhaseError::ClaimLost)?;
        self.context.restore(references);
        way.saved = Some(saved.clone());
        Ok(saved)
    }

    /// Commits. Where that is not acknowledged the record is asked, so that what is committed is never
    /// run again.
    async fn save<E>(
        &self,
        transaction: S::Transaction,
        step: &Step,
        way: &mut MutexGuard<'_, Way>,
    ) -> Result<(), PhaseError<E>> {
        // Unknown from here on, should this be dropped.
        way.saved = None;
        let saved = self.store.save_phase(transaction, &self.claim, step).await;
        match saved {
            Ok(()) => {
                way.saved = Some(step.after.clone());
                return Ok(());
            }
            Err(CommitError::Recorded | CommitError::Unknown(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let (now, _) = self.settled().await?.ok_or(PhaseError::ClaimLost)?;
        if now.to_json() == step.after.to_json() {
            way.saved = Some(now);
            return Ok(());
        }
        let reason = "the commit was not acknowledged, and is rolled back";
        Err(PhaseError::Conflict(StoreError::unavailable(reason)))
    }

    /// What the record says, asked until it answers.
    async fn settled<E>(&self) -> Result<Option<(Progress, References)>, PhaseError<E>> {
        let give_up = Instant::now() + self.times.patience;
        let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_millis(250));
        loop {
            match self.store.progress(&self.claim).await {
                Err(error)
                    if error.kind() == StoreErrorKind::Unavailable && Instant::now() < give_up =>
                {
                    backoff.pause().await;
                }
                read => return read.map_err(PhaseError::Store),
            }
        }
    }
}

impl<S> Clone for Phases<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> fmt::Debug for Phases<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Phases")
            .field("identity", &self.0.claim.identity)
            .finish_non_exhaustive()
    }
}

impl<S: Send + Sync + 'static, A: Send + Sync> FromRequestParts<A> for Phases<S> {
    type Rejection = MissingPhases;

    async fn from_request_parts(parts: &mut Parts, _: &A) -> Result<Self, MissingPhases> {
        parts.extensions.get().cloned().ok_or(MissingPhases)
    }
}

/// A handler asked for [`Phases`] where there is no claim to save them under. Answered 500.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingPhases;

impl fmt::Display for MissingPhases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "no phases: put a leased layer of the same store on this route, require a key, and refuse requests while the store is down",
        )
    }
}

impl std::error::Error for MissingPhases {}

impl IntoResponse for MissingPhases {
    fn into_response(self) -> Response {
        tracing::error!("{self}");
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    }
}

/// Why a phase is not finished. `E` is the error of its work.
///
/// As the answer of a handler: that of `E`; 503 with `Retry-After` where trying again may help; else
/// 500. Where the work failed since its connection is lost, that is a [`Conflict`](Self::Conflict), not an
/// answer of `E`. Every answer but that of `E`, [`Ended`](Self::Ended), [`Aborted`](Self::Aborted) and
/// [`Misuse`](Self::Misuse) frees the key, so that the next attempt resumes after the last
/// finished phase; of misuse, [`PhaseMisuse::Diverged`] does, too.
#[derive(Debug)]
#[non_exhaustive]
pub enum PhaseError<E> {
    /// The work failed: the phase is rolled back.
    Work(E),
    /// Another attempt has taken over, or a person resolved the operation: the phase is rolled back. If
    /// this was found out after a commit whose acknowledgement is missing, the phase may have been
    /// finished before, and the other attempt goes on after it.
    ClaimLost,
    /// A phase that cannot be: it is rolled back, or was not begun.
    Misuse(PhaseMisuse),
    /// What a phase returned cannot be written as JSON, or what it saved cannot be read as this type: a
    /// new phase is rolled back, and a finished one stays as it is.
    Data {
        /// Its name.
        phase: String,
        /// Why.
        source: serde_json::Error,
    },
    /// Another transaction was in the way, or the connection is lost: the phase is rolled back, and may be
    /// tried again.
    Conflict(StoreError),
    /// A statement had failed before, or a constraint does at the end: the phase is rolled back.
    Aborted(StoreError),
    /// The work ended the transaction by itself, and may have committed: there is no recovery point, and the
    /// key is held for a person.
    Ended,
    /// The store cannot be reached. A phase whose commit was under way is found out about by the next
    /// one of this operation.
    Store(StoreError),
}

impl<E> PhaseError<E> {
    /// Whether the same handler may come to an end later.
    fn frees_key(&self) -> bool {
        match self {
            Self::ClaimLost | Self::Data { .. } | Self::Conflict(_) | Self::Store(_) => true,
            Self::Misuse(misuse) => matches!(misuse, PhaseMisuse::Diverged { .. }),
            Self::Work(_) | Self::Aborted(_) | Self::Ended => false,
        }
    }
}

impl<E> From<CommitError> for PhaseError<E> {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Ended => Self::Ended,
            CommitError::Aborted(error) => Self::Aborted(error),
            CommitError::Conflict(error) => Self::Conflict(error),
            CommitError::Recorded => Self::ClaimLost,
            CommitError::Unknown(error) => Self::Store(error),
        }
    }
}

impl<E> From<PhaseMisuse> for PhaseError<E> {
    fn from(misuse: PhaseMisuse) -> Self {
        Self::Misuse(misuse)
    }
}

impl<E> fmt::Display for PhaseError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Work(_) => f.write_str("the work of a phase failed"),
            Self::ClaimLost => f.write_str("another attempt has taken over"),
            Self::Misuse(misuse) => misuse.fmt(f),
            Self::Data { phase, .. } => {
                write!(f, "what phase `{phase}` saves is not of the expected type")
            }
            Self::Conflict(_) => f.write_str("another transaction was in the way of a phase"),
            Self::Aborted(_) => f.write_str("a phase could not be committed"),
            Self::Ended => f.write_str("a phase ended its transaction by itself"),
            Self::Store(_) => f.write_str("the progress of the operation cannot be read or saved"),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for PhaseError<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Work(error) => Some(error),
            Self::Data { source, .. } => Some(source),
            Self::Conflict(error) | Self::Aborted(error) | Self::Store(error) => Some(error),
            Self::ClaimLost | Self::Misuse(_) | Self::Ended => None,
        }
    }
}

/// Why what a phase [saved](Phases::saved) cannot be told: a [`PhaseError`] without work, as which it
/// answers, and which `?` makes of it.
#[derive(Debug)]
pub struct SavedError(PhaseError<Infallible>);

impl<E> From<SavedError> for PhaseError<E> {
    fn from(error: SavedError) -> Self {
        match error.0 {
            PhaseError::Work(never) => match never {},
            PhaseError::ClaimLost => Self::ClaimLost,
            PhaseError::Misuse(misuse) => Self::Misuse(misuse),
            PhaseError::Data { phase, source } => Self::Data { phase, source },
            PhaseError::Conflict(error) => Self::Conflict(error),
            PhaseError::Aborted(error) => Self::Aborted(error),
            PhaseError::Ended => Self::Ended,
            PhaseError::Store(error) => Self::Store(error),
        }
    }
}

impl fmt::Display for SavedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for SavedError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl IntoResponse for SavedError {
    fn into_response(self) -> Response {
        PhaseError::<Infallible>::from(self).into_response()
    }
}

impl<E: IntoResponse> IntoResponse for PhaseError<E> {
    fn into_response(self) -> Response {
        let (frees_key, ended) = (self.frees_key(), matches!(self, Self::Ended));
        let status = match &self {
            Self::ClaimLost | Self::Conflict(_) | Self::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        tracing::error!(error = %self, source = self.cause(), "phase is not finished");
        if let Self::Work(error) = self {
            return error.into_response();
        }
        let mut response = status.into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            let second = HeaderValue::from_static("1");
            response.headers_mut().insert(RETRY_AFTER, second);
        }
        if frees_key {
            response.extensions_mut().insert(Outcome::Release);
        } else if ended {
            response.extensions_mut().insert(Outcome::Hold);
        }
        response
    }
}

impl<E> PhaseError<E> {
    fn cause(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Data { source, .. } => Some(source),
            Self::Conflict(error) | Self::Aborted(error) | Self::Store(error) => {
                std::error::Error::source(error)
            }
            _ => None,
        }
    }
}
