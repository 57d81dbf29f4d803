use std::error::Error;
use std::fmt;

type Source = Box<dyn Error + Send + Sync>;

/// Why a store could not do what it was asked.
///
/// The source is for logs; no client ever sees it.
///
/// ```
/// use tower_idempotency::{StoreError, StoreErrorKind};
///
/// let error = StoreError::unavailable("connection reset");
/// assert_eq!(error.kind(), StoreErrorKind::Unavailable);
/// ```
#[derive(Debug)]
pub struct StoreError {
    kind: StoreErrorKind,
    source: Option<Source>,
}

/// What can be done about a [`StoreError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The store cannot be reached, does not answer, or is overloaded: trying again may help. It is
    /// not known whether the step was taken.
    Unavailable,
    /// The record no longer carries the caller's token: the step was refused.
    ClaimLost,
    /// The record cannot be read, or belongs to another identity. Nothing was changed.
    Corrupt,
}

impl StoreError {
    /// [`StoreErrorKind::Unavailable`], because of `source`.
    pub fn unavailable(source: impl Into<Source>) -> Self {
        Self::new(StoreErrorKind::Unavailable, Some(source.into()))
    }

    /// [`StoreErrorKind::ClaimLost`].
    #[must_use]
    pub fn claim_lost() -> Self {
        Self::new(StoreErrorKind::ClaimLost, None)
    }

    /// [`StoreErrorKind::Corrupt`], because of `source`.
    pub fn corrupt(source: impl Into<Source>) -> Self {
        Self::new(StoreErrorKind::Corrupt, Some(source.into()))
    }

    fn new(kind: StoreErrorKind, source: Option<Source>) -> Self {
        Self { kind, source }
    }

    /// What can be done about it.
    #[must_use]
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            StoreErrorKind::Unavailable => "idempotency store is unavailable",
            StoreErrorKind::ClaimLost => "claim is lost",
            StoreErrorKind::Corrupt => "record cannot be read",
        })
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &dyn Error)
    }
}
