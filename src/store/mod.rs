//! Where records live: the contract every store keeps, and the stores of this crate.

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
mod lent;
mod memory;
pub(crate) mod phases;
#[cfg(feature = "postgres")]
pub mod postgres;
pub(crate) mod progress;
pub(crate) mod protocol;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
mod schema_error;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(crate) mod sql;
#[cfg(feature = "sqlite")]
pub mod sqlite;
pub(crate) mod transaction;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
mod tx_error;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;

use crate::envelope::Envelope;
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::{Identity, RecordId};
use crate::policy::Lost;

pub use error::{StoreError, StoreErrorKind};
pub use memory::MemoryStore;
pub use phases::{
    Abandoned, Connection, MissingPhases, PhaseError, PhasedStore, Phases, SavedError, Step,
};
pub use progress::{PhaseMisuse, Progress};
pub use transaction::{
    Begun, CommitError, Entry, MissingTx, TransactionalStore, Tx, Verdict, Writes,
};

/// Where records live.
///
/// A record is *absent*, *running*, *completed* or *held*. Every method is one atomic step, decides
/// by the store's own clock, and can be called again after any error: the caller may never have
/// seen the acknowledgement of a call that took effect.
///
/// # Contract
///
/// - At most one attempt holds the claim of an identity: the one whose token the record carries.
/// - A write after the claim changes nothing unless the record carries its token.
/// - Identities are compared by their whole digest; another digest under the same id is
///   [`StoreErrorKind::Corrupt`], never a hit.
/// - A held record does not expire and is not swept.
///
/// The rules are tests: run them with the macro `conformance_tests!` (feature `conformance`).
///
/// # Cancel safety
///
/// A future may be dropped at any point. Whether its step was taken is then unknown, as after a
/// lost acknowledgement.
///
/// ```
/// use std::time::Duration;
/// use tower_idempotency::store::{ClaimRequest, Claimed, Completion, Existing, Token};
/// use tower_idempotency::{Envelope, Fingerprint, Identity, Lost, MemoryStore, References, Store};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = MemoryStore::new();
/// let identity = Identity::new("acme", "import", "2026-11-22");
/// let fingerprint = Fingerprint::of_bytes(b"orders.csv");
/// let request = ClaimRequest {
///     identity: identity.clone(),
///     fingerprint: fingerprint.clone(),
///     token: Token::random()?,
///     lost: Lost::Hold,
///     lease: Duration::from_secs(30),
///     ttl: Duration::from_secs(24 * 3600),
/// };
///
/// let Claimed::Acquired(claim) = store.claim(&request).await? else {
///     panic!("somebody was here before");
/// };
/// // What is to happen once, happens here.
/// let completion = Completion {
///     answer: Envelope::new(http::Response::new("3 orders".into())),
///     references: References::default(),
/// };
/// store.complete(&claim, &completion).await?;
///
/// let found = store.lookup(&identity, &fingerprint).await?;
/// assert!(matches!(found, Some(Existing::Completed(_))));
/// # Ok(())
/// # }
/// ```
pub trait Store: Send + Sync + 'static {
    /// Whether a completed call survives the end of the process. A `critical` policy insists on it.
    fn is_durable(&self) -> bool;

    /// Claims the right to run, or says what stands in the way.
    ///
    /// A lost acknowledgement: the same request, sent again, meets its own token and gets the same
    /// claim: acquired, or abandoned.
    fn claim(
        &self,
        request: &ClaimRequest,
    ) -> impl Future<Output = Result<Claimed, StoreError>> + Send;

    /// Stores the answer. Also turns a record that is held under the same token into a completed one,
    /// which keeps its references where the completion has none. Retention of a record that was held,
    /// or whose retention is over, begins anew: its answer would be forgotten at once.
    ///
    /// A lost acknowledgement: the same completion, sent again, finds its own record and succeeds.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::ClaimLost`] when the record is absent or carries another token.
    fn complete(
        &self,
        claim: &Claim,
        completion: &Completion,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Deletes a running or held record, so that the next request runs. One with
    /// [progress](PhasedStore) remains, with its lease over, and the next attempt resumes it.
    ///
    /// A claim that was [`Abandoned`](Claimed::Abandoned) is only given up: its record remains, with
    /// its lease over, and the next request finds the operation abandoned again.
    ///
    /// A lost acknowledgement: an absent record is a success.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::ClaimLost`] when the record carries another token, or is completed.
    fn release(&self, claim: &Claim) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Holds the record for a person, under the same token. One that is held already gets the
    /// references, and keeps its own where there are none.
    ///
    /// A lost acknowledgement: a record that is held under this token is a success.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::ClaimLost`] when the record is absent, completed, or carries another token.
    fn hold(
        &self,
        claim: &Claim,
        references: &References,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Renews leases from now on. The result says of each, in the order given, what became of it;
    /// one record that somebody else has locked must not keep the others from being renewed.
    ///
    /// A lost acknowledgement: renewing again does no harm.
    fn extend(
        &self,
        leases: &[LeaseRenewal],
    ) -> impl Future<Output = Result<Vec<Renewed>, StoreError>> + Send;

    /// What a duplicate would find. `None` when the record is absent, or its retention is over and
    /// nobody runs or holds it.
    fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> impl Future<Output = Result<Option<Existing>, StoreError>> + Send;

    /// Ends a hold: with an answer, which is replayed from now on for as long as the record's
    /// retention was, or by freeing the key.
    ///
    /// `token` is the one [`list_held`](Self::list_held) showed; whatever the held attempt still
    /// does is refused afterwards.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::ClaimLost`] when the record is no longer held under this token: it was
    /// resolved, or its attempt completed after all.
    fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Held records in the order of their ids, at most `limit` and never more than 1,000, beginning
    /// after an id. A page may be short of them; an empty one says that there are no more. A damaged record
    /// must not hide the others: it is listed without what cannot be read, unless that is what
    /// [`resolve`](Self::resolve) needs.
    fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<HeldRecord>, StoreError>> + Send;

    /// What a record is like, for a person who asks what became of a request and what it made. `None`
    /// where [`lookup`](Self::lookup) finds nothing. Changes nothing.
    ///
    /// ```
    /// # use tower_idempotency::{Identity, MemoryStore, Store};
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let store = MemoryStore::new();
    /// // The scope, the operation and the key that the client names.
    /// let identity = Identity::new("acme", "POST /charges", "8e03978e");
    /// if let Some(record) = store.inspect(&identity).await? {
    ///     println!("{:?}, and made {:?}", record.state, record.references.as_slice());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    fn inspect(
        &self,
        identity: &Identity,
    ) -> impl Future<Output = Result<Option<RecordSummary>, StoreError>> + Send;

    /// The records that carry a reference, in the order of their ids, at most `limit` and never more
    /// than 1,000, beginning after an id: which request made this charge?
    ///
    /// A reference lives exactly as long as its record, and is found from the moment the record is
    /// completed or held, or a [phase](Phases) of it is finished. A record whose retention is over is not found, whether it was swept or not;
    /// one that is freed or taken over has lost its references.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Corrupt`] when one of the records cannot be read: leaving it out would say
    /// that nobody made what it made.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::store::{ClaimRequest, Claimed, Completion, Token};
    /// use tower_idempotency::store::{RecordState, Within};
    /// use tower_idempotency::{MemoryStore, References, Store};
    /// # use tower_idempotency::{Envelope, Fingerprint, Identity, Lost};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = MemoryStore::new();
    /// # let request = ClaimRequest {
    /// #     identity: Identity::new("acme", "POST /charges", "8e03978e"),
    /// #     fingerprint: Fingerprint::of_bytes(b"{}"),
    /// #     token: Token::random()?,
    /// #     lost: Lost::Hold,
    /// #     lease: Duration::from_secs(30),
    /// #     ttl: Duration::from_secs(24 * 3600),
    /// # };
    /// # let Claimed::Acquired(claim) = store.claim(&request).await? else { panic!() };
    /// # let mut references = References::default();
    /// # references.push("charge", "ch_1")?;
    /// # let answer = http::Response::builder().status(201).body("{}".into())?;
    /// # store.complete(&claim, &Completion { answer: Envelope::new(answer), references }).await?;
    /// // A handler of tenant `acme` noted `reference("charge", "ch_1")`.
    /// let found = store.find_by_reference(Within::Scope("acme"), "charge", "ch_1", None, 10).await?;
    /// assert_eq!(found[0].identity.key(), "8e03978e");
    /// let created = http::StatusCode::CREATED;
    /// assert_eq!(found[0].state, RecordState::Completed { status: created });
    ///
    /// // Another tenant never sees it; an operator may, who has to say so.
    /// let other = Within::Scope("zenith");
    /// assert!(store.find_by_reference(other, "charge", "ch_1", None, 10).await?.is_empty());
    /// let any = Within::AllScopes;
    /// assert_eq!(store.find_by_reference(any, "charge", "ch_1", None, 10).await?.len(), 1);
    /// # Ok(())
    /// # }
    /// ```
    fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> impl Future<Output = Result<Vec<RecordSummary>, StoreError>> + Send;

    /// Deletes at most `limit` records whose retention is over and that nobody runs, and holds at
    /// most `limit` lost attempts whose policy says so. Fewer than `limit` of
    /// both together end a sweep: what somebody had locked is left to the next one.
    fn delete_expired(&self, limit: u32) -> impl Future<Output = Result<Swept, StoreError>> + Send;

    /// How long a [`Sweeper`](crate::Sweeper) leaves the store alone after a batch that took so long.
    /// The default is as long again: where there is one writer at a time, a sweep without pauses would
    /// keep all others from being it.
    fn pause_after_sweep(&self, batch: Duration) -> Duration {
        batch
    }

    /// Waits until a running record may have changed, for at most about `limit`. It may return at any
    /// time, and the caller looks for itself then: sleeping, which is what the default does, is never
    /// wrong. A store that is told of changes wakes those who wait sooner.
    fn wait_for_change(
        &self,
        identity: &Identity,
        limit: Duration,
    ) -> impl Future<Output = ()> + Send {
        let _ = identity;
        tokio::time::sleep(limit)
    }
}

/// The secret of one attempt, made before its claim is sent. It fences every later write.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token([u8; 16]);

impl Token {
    /// A new token, from the operating system's random numbers.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Unavailable`] when the operating system has none to give.
    pub fn random() -> Result<Self, StoreError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(StoreError::unavailable)?;
        Ok(Self(bytes))
    }

    /// The token with these bytes, as a store read it.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes, for a store to write.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// What an attempt asks for.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// Whose operation.
    pub identity: Identity,
    /// Of which request.
    pub fingerprint: Fingerprint,
    /// Made once for the attempt, and sent again with it.
    pub token: Token,
    /// What becomes of it when it is lost; fixed here, whatever the policy says by then.
    pub lost: Lost,
    /// How long it is believed to live without a sign of life.
    pub lease: Duration,
    /// How long the record is kept, from now on.
    pub ttl: Duration,
}

/// What a claim met.
#[derive(Debug, Clone)]
pub enum Claimed {
    /// The right to run.
    Acquired(Claim),
    /// An earlier attempt was lost, and is not to be run again. The claim is taken over to store an
    /// answer that says so.
    Abandoned(Claim),
    /// Somebody was here before.
    Existing(Existing),
}

/// The right to run one operation, and the fence of its writes.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Whose operation.
    pub identity: Identity,
    /// The token the record has to carry.
    pub token: Token,
    /// 1 for the first attempt, one more for each takeover.
    pub attempt: u32,
    /// When the record's retention ends, by the store's clock.
    pub expires_at: SystemTime,
}

/// A record as a duplicate sees it.
#[derive(Debug, Clone)]
pub enum Existing {
    /// The first request is running.
    InProgress {
        /// How long its lease lasts if it shows no further sign of life.
        lease_left: Duration,
    },
    /// It was answered.
    Completed(Box<Completed>),
    /// The record is of another request.
    Mismatch,
    /// It is not known what came of it.
    Held,
}

/// A completed record.
#[derive(Debug, Clone)]
pub struct Completed {
    /// The answer, or its tombstone.
    pub answer: Envelope,
    /// What the handler noted.
    pub references: References,
    /// When the record's retention ends, by the store's clock.
    pub expires_at: SystemTime,
    /// How long it was to its end when the record was read, by the store's clock: no clock of a caller
    /// can say that.
    pub retention_left: Duration,
}

/// What an attempt leaves behind.
#[derive(Debug, Clone)]
pub struct Completion {
    /// The answer, or its tombstone.
    pub answer: Envelope,
    /// What the handler noted.
    pub references: References,
}

/// A lease to be renewed.
#[derive(Debug, Clone)]
pub struct LeaseRenewal {
    /// Of which claim.
    pub claim: Claim,
    /// For how long from now.
    pub lease: Duration,
}

/// What became of a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewed {
    /// The lease is renewed.
    Kept,
    /// The record is no longer running under this token.
    Lost,
    /// Somebody has locked the record; try again.
    Busy,
}

/// How a hold ends.
///
/// ```
/// use std::time::Duration;
/// use tower_idempotency::store::{ClaimRequest, Claimed, Resolution, Token};
/// use tower_idempotency::{Fingerprint, Identity, Lost, MemoryStore, References, Store};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let identity = Identity::new("acme", "import", "2026-11-22");
/// # let fingerprint = Fingerprint::of_bytes(b"orders.csv");
/// # let request = ClaimRequest {
/// #     identity: identity.clone(),
/// #     fingerprint: fingerprint.clone(),
/// #     token: Token::random()?,
/// #     lost: Lost::Hold,
/// #     lease: Duration::from_secs(30),
/// #     ttl: Duration::from_secs(24 * 3600),
/// # };
/// let store = MemoryStore::new();
/// let Claimed::Acquired(claim) = store.claim(&request).await? else {
///     panic!("somebody was here before");
/// };
/// store.hold(&claim, &References::default()).await?;
///
/// for held in store.list_held(None, 100).await? {
///     store.resolve(&held.identity, held.token, &Resolution::Release).await?;
/// }
/// assert!(store.lookup(&identity, &fingerprint).await?.is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub enum Resolution {
    /// Retries get this answer.
    Answer(Envelope),
    /// The key is free, and a retry runs.
    Release,
}

/// A record that waits for a person.
#[derive(Debug, Clone)]
pub struct HeldRecord {
    /// Whose operation.
    pub identity: Identity,
    /// To be given to [`resolve`](Store::resolve).
    pub token: Token,
    /// Which attempt was lost.
    pub attempt: u32,
    /// What its handler noted before.
    pub references: References,
    /// When it was claimed, by the store's clock.
    pub claimed_at: SystemTime,
}

/// A record as a person may see it: nothing of the request or the answer but the status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordSummary {
    /// Whose operation.
    pub identity: Identity,
    /// What came of it.
    pub state: RecordState,
    /// 1 for the first attempt, one more for each takeover.
    pub attempt: u32,
    /// What its handler noted; while it is running, what it had noted when its last
    /// [phase](Phases) was finished.
    pub references: References,
    /// When it was claimed, by the store's clock.
    pub claimed_at: SystemTime,
    /// When its retention ends, by the store's clock. A held record outlives it.
    pub expires_at: SystemTime,
}

/// What came of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordState {
    /// It was claimed, and there is no answer yet. Its lease may be over.
    Running,
    /// It was answered, or has a tombstone.
    Completed {
        /// Of the answer.
        status: StatusCode,
    },
    /// It waits for a person.
    Held,
}

/// Whose records are looked for.
///
/// ```
/// use tower_idempotency::store::Within;
///
/// assert_eq!(Within::Scope("acme").scope(), Some("acme"));
/// assert_eq!(Within::AllScopes.scope(), None);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Within<'a> {
    /// Those of one scope, as [`Identity::scope`] has it.
    Scope(&'a str),
    /// Those of everybody: for an operator, and never on behalf of a client.
    AllScopes,
}

impl<'a> Within<'a> {
    /// The one scope, or `None` for all.
    #[must_use]
    pub const fn scope(self) -> Option<&'a str> {
        match self {
            Self::Scope(scope) => Some(scope),
            Self::AllScopes => None,
        }
    }
}

/// What a sweep did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Records deleted.
    pub deleted: u64,
    /// Lost attempts that are held from now on.
    pub held: u64,
}

impl ClaimRequest {
    /// The claim this request makes, were it acquired: for releasing it unseen.
    #[must_use]
    pub fn claim(&self, attempt: u32, expires_at: SystemTime) -> Claim {
        Claim {
            identity: self.identity.clone(),
            token: self.token,
            attempt,
            expires_at,
        }
    }
}

impl<S: Store> Store for Arc<S> {
    fn is_durable(&self) -> bool {
        S::is_durable(self)
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        S::claim(self, request).await
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        S::complete(self, claim, completion).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        S::release(self, claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        S::hold(self, claim, references).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        S::extend(self, leases).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        S::lookup(self, identity, fingerprint).await
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        S::resolve(self, identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        S::list_held(self, after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        S::inspect(self, identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        S::find_by_reference(self, within, kind, id, after, limit).await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        S::delete_expired(self, limit).await
    }

    fn pause_after_sweep(&self, batch: Duration) -> Duration {
        S::pause_after_sweep(self, batch)
    }

    async fn wait_for_change(&self, identity: &Identity, limit: Duration) {
        S::wait_for_change(self, identity, limit).await;
    }
}
