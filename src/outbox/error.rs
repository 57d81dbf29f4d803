use std::error::Error;
use std::fmt;

use crate::store::StoreError;

type Source = Box<dyn Error + Send + Sync>;

/// Why a message could not be enqueued, or the outbox not be read or changed.
#[derive(Debug)]
pub struct OutboxError {
    kind: OutboxErrorKind,
    source: Option<Source>,
}

/// What can be done about an [`OutboxError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutboxErrorKind {
    /// The connection is in no transaction that sqlx has begun: the message could be published
    /// though the writes it tells of are rolled back.
    NotInTransaction,
    /// A part of the message is outside its limit. Nothing was sent to the database.
    Invalid {
        /// Which part.
        field: &'static str,
        /// What it has to keep to.
        limit: Limit,
        /// How long it is: bytes, or how many.
        len: usize,
    },
    /// The payload cannot be written as JSON. Nothing was sent to the database.
    Payload,
    /// There is no dead message of this id.
    NotDead,
    /// The database refused, or did not answer. A transaction of the caller's is aborted.
    Database,
}

/// What a part of a message has to keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Limit {
    /// 1 to so many bytes.
    Length(usize),
    /// At most so many.
    Count(usize),
    /// The characters its documentation names.
    Characters,
    /// A name that is not reserved.
    Reserved,
}

impl OutboxError {
    pub(super) fn new(kind: OutboxErrorKind) -> Self {
        Self { kind, source: None }
    }

    pub(super) fn invalid(field: &'static str, limit: Limit, len: usize) -> Self {
        Self::new(OutboxErrorKind::Invalid { field, limit, len })
    }

    pub(super) fn database(source: impl Into<Source>) -> Self {
        Self {
            kind: OutboxErrorKind::Database,
            source: Some(source.into()),
        }
    }

    pub(super) fn payload(source: impl Into<Source>) -> Self {
        Self {
            kind: OutboxErrorKind::Payload,
            source: Some(source.into()),
        }
    }

    /// What can be done about it.
    #[must_use]
    pub fn kind(&self) -> OutboxErrorKind {
        self.kind
    }
}

impl From<sqlx::Error> for OutboxError {
    fn from(error: sqlx::Error) -> Self {
        Self::database(error)
    }
}

impl From<StoreError> for OutboxError {
    fn from(error: StoreError) -> Self {
        Self::database(error)
    }
}

impl fmt::Display for OutboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            OutboxErrorKind::NotInTransaction => {
                f.write_str("connection is not in a transaction begun by sqlx")
            }
            OutboxErrorKind::Invalid { field, limit, len } => match limit {
                Limit::Length(_) | Limit::Count(_) => write!(f, "{field} {limit}, not {len}"),
                Limit::Characters | Limit::Reserved => write!(f, "{field} {limit}"),
            },
            OutboxErrorKind::Payload => f.write_str("payload cannot be written as JSON"),
            OutboxErrorKind::NotDead => f.write_str("no dead message has this id"),
            OutboxErrorKind::Database => f.write_str("outbox is unavailable"),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(max) => write!(f, "must be 1 to {max} bytes"),
            Self::Count(max) => write!(f, "must be at most {max}"),
            Self::Characters => f.write_str("has characters it may not have"),
            Self::Reserved => f.write_str("is reserved"),
        }
    }
}

impl Error for OutboxError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &dyn Error)
    }
}
