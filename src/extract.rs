use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use axum_core::extract::{FromRequestParts, OptionalFromRequestParts};
use axum_core::response::{IntoResponse, Response};
use http::StatusCode;
use http::request::Parts;

use crate::identity::Identity;
use crate::running::Lease;

/// References one operation may leave, and bytes that a kind or an id may have.
const MAX_REFERENCES: usize = 16;
const MAX_REFERENCE_LEN: usize = 255;

/// What a handler can learn of the operation it runs for, and leave behind in its record.
///
/// As an extractor it is refused with 500 where no layer covers the route; extract
/// `Option<IdempotencyContext>` on routes whose key is optional.
///
/// ```
/// use axum::http::StatusCode;
/// use tower_idempotency::{IdempotencyContext, ReferenceError};
///
/// async fn charge(context: IdempotencyContext) -> Result<StatusCode, StatusCode> {
///     let charge = format!("ch_{}", context.identity().id());
///     // Kept in the record with the answer, also when the answer itself cannot be kept.
///     context.reference("charge", &charge).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
///     Ok(StatusCode::CREATED)
/// }
/// ```
#[derive(Clone)]
pub struct IdempotencyContext {
    identity: Identity,
    attempt: u32,
    claim: Standing,
    references: Arc<Mutex<References>>,
}

/// What keeps others from running the same operation.
#[derive(Clone)]
pub(crate) enum Standing {
    Lease(Arc<Lease>),
    /// Nobody can commit the operation beside this transaction.
    Transaction,
    Nothing,
}

impl IdempotencyContext {
    pub(crate) fn new(identity: Identity, attempt: u32, claim: Standing) -> Self {
        Self {
            identity,
            attempt,
            claim,
            references: Arc::default(),
        }
    }

    /// Scope, operation and key. Good to derive keys for calls to other services from.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// 1 for the first attempt, one more for each that took over from a lost one.
    ///
    /// The count begins anew when the key is freed: by an attempt whose answer frees it, or by one that
    /// took over and was given up before its handler began, because the store did not answer in time.
    /// More than 1 says that an earlier attempt may have done something; 1 does not say that none has.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Whether the claim is still known to be held: the last confirmed lease has not run out by
    /// this process's clock, and nobody is known to have taken over. Ask before an effect that cannot be
    /// undone. A takeover because the store's clock was set forward is known at the next heartbeat.
    ///
    /// On a route that failed open there is no claim, and this is `false`; on a transactional one it
    /// is `true`, since no other attempt can commit.
    ///
    /// ```
    /// use axum::http::StatusCode;
    /// use tower_idempotency::IdempotencyContext;
    ///
    /// async fn launch(context: IdempotencyContext) -> StatusCode {
    ///     if !context.is_current() {
    ///         return StatusCode::SERVICE_UNAVAILABLE;
    ///     }
    ///     // What cannot be undone.
    ///     StatusCode::ACCEPTED
    /// }
    /// ```
    #[must_use]
    pub fn is_current(&self) -> bool {
        match &self.claim {
            Standing::Lease(lease) => lease.is_current(),
            Standing::Transaction => true,
            Standing::Nothing => false,
        }
    }

    /// Notes in the record what this operation made: `reference("charge", "ch_1")`. It is written
    /// when the handler has ended, with the answer, a tombstone or a hold, and shown by
    /// [`inspect`](crate::Store::inspect), [`list_held`](crate::Store::list_held) and the body of a
    /// 410. A process that dies before leaves none, save those that a
    /// [phase](crate::store::Phases) committed after they were noted.
    ///
    /// [`find_by_reference`](crate::Store::find_by_reference) goes the other way: which request made
    /// this charge?
    ///
    /// # Errors
    ///
    /// More than 16 references, or a kind or id that is empty, longer than 255 bytes, or holds a NUL.
    pub fn reference(&self, kind: &str, id: &str) -> Result<(), ReferenceError> {
        self.lock().push(kind, id)
    }

    /// Puts what an earlier attempt noted in front.
    pub(crate) fn restore(&self, saved: References) {
        let mut references = self.lock();
        let noted = std::mem::replace(&mut *references, saved);
        for (kind, id) in noted.as_slice() {
            if let Err(error) = references.push(kind, id) {
                let cause: &dyn std::error::Error = &error;
                tracing::warn!(id = %self.identity.id(), kind, error = cause, "reference is not kept");
            }
        }
    }

    /// What was noted so far.
    pub(crate) fn references(&self) -> References {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, References> {
        self.references
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for IdempotencyContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyContext")
            .field("identity", &self.identity)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyContext {
    type Rejection = MissingContext;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, MissingContext> {
        parts.extensions.get().cloned().ok_or(MissingContext)
    }
}

impl<S: Send + Sync> OptionalFromRequestParts<S> for IdempotencyContext {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
        Ok(parts.extensions.get().cloned())
    }
}

/// No idempotency layer covers the route, or its key is optional and was not sent.
///
/// ```
/// use axum::{Router, body::Body, http::Request, routing::post};
/// use tower::ServiceExt;
/// use tower_idempotency::IdempotencyContext;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // The layer was forgotten.
/// let app: Router = Router::new().route("/orders", post(|_: IdempotencyContext| async {}));
/// let answer = app.oneshot(Request::post("/orders").body(Body::empty())?).await?;
/// assert_eq!(answer.status(), 500);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingContext;

impl fmt::Display for MissingContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "no idempotency context: put the layer on this route, or extract an Option where the key is optional",
        )
    }
}

impl std::error::Error for MissingContext {}

impl IntoResponse for MissingContext {
    fn into_response(self) -> Response {
        tracing::error!("{self}");
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    }
}

/// Pairs of kind and id that a handler left in the record, in the order they were left.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct References(Vec<(String, String)>);

impl References {
    /// Adds a pair; the same pair twice is kept once.
    ///
    /// # Errors
    ///
    /// As [`IdempotencyContext::reference`].
    ///
    /// ```
    /// use tower_idempotency::References;
    ///
    /// let mut references = References::default();
    /// references.push("charge", "ch_1")?;
    /// assert_eq!(references.as_slice(), [("charge".to_owned(), "ch_1".to_owned())]);
    /// assert!(references.push("charge", "").is_err());
    /// # Ok::<(), tower_idempotency::ReferenceError>(())
    /// ```
    pub fn push(&mut self, kind: &str, id: &str) -> Result<(), ReferenceError> {
        for (field, value) in [("kind", kind), ("id", id)] {
            let fits = (1..=MAX_REFERENCE_LEN).contains(&value.len()) && !value.contains('\0');
            if !fits {
                return Err(ReferenceError::Invalid {
                    field,
                    len: value.len(),
                });
            }
        }
        if self.contains(kind, id) {
            return Ok(());
        }
        if self.0.len() == MAX_REFERENCES {
            return Err(ReferenceError::TooMany);
        }
        self.0.push((kind.to_owned(), id.to_owned()));
        Ok(())
    }

    /// The pairs, as `(kind, id)`.
    #[must_use]
    pub fn as_slice(&self) -> &[(String, String)] {
        &self.0
    }

    /// Whether this pair is among them.
    ///
    /// ```
    /// # use tower_idempotency::References;
    /// let mut references = References::default();
    /// references.push("charge", "ch_1")?;
    /// assert!(references.contains("charge", "ch_1"));
    /// assert!(!references.contains("refund", "ch_1"));
    /// # Ok::<(), tower_idempotency::ReferenceError>(())
    /// ```
    #[must_use]
    pub fn contains(&self, kind: &str, id: &str) -> bool {
        self.0.iter().any(|(k, i)| k == kind && i == id)
    }

    /// The JSON a store keeps, an array of `[kind, id]`, or `None` when there are none.
    #[must_use]
    pub fn to_json(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| serde_json::json!(self.0).to_string())
    }

    /// Reads what [`to_json`](Self::to_json) wrote.
    #[must_use]
    pub fn from_json(json: Option<&str>) -> Option<Self> {
        match json {
            None => Some(Self::default()),
            Some(json) => serde_json::from_str(json).ok().map(Self),
        }
    }
}

/// A reference that cannot be kept.
///
/// ```
/// use tower_idempotency::{ReferenceError, References};
///
/// let error = References::default().push("charge", "").unwrap_err();
/// assert_eq!(error, ReferenceError::Invalid { field: "id", len: 0 });
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReferenceError {
    /// The operation has 16 already.
    TooMany,
    /// Empty, longer than 255 bytes, or with a NUL.
    Invalid {
        /// `kind` or `id`.
        field: &'static str,
        /// Its length in bytes.
        len: usize,
    },
}

impl fmt::Display for ReferenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany => write!(f, "more than {MAX_REFERENCES} references"),
            Self::Invalid { field, len } => write!(
                f,
                "`{field}` must be 1 to {MAX_REFERENCE_LEN} bytes without NUL, not {len} bytes"
            ),
        }
    }
}

impl std::error::Error for ReferenceError {}
