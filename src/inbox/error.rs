use std::error::Error;
use std::fmt;

use sqlx::{Connection as _, PgConnection};

/// Why it cannot be told whether a message was taken in.
#[derive(Debug)]
pub struct InboxError {
    kind: InboxErrorKind,
    source: Option<sqlx::Error>,
}

/// What can be done about an [`InboxError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InboxErrorKind {
    /// The connection is in no transaction that sqlx has begun: the message could be remembered
    /// though its effect is rolled back.
    NotInTransaction,
    /// A name is empty, too long, or has control characters. Nothing was sent to the database.
    Name {
        /// Which one.
        field: &'static str,
        /// The most bytes it may have.
        max: usize,
        /// How many it has.
        len: usize,
    },
    /// A number is less than 1. Nothing was sent to the database.
    Sequence,
    /// The database refused, or did not answer: roll the transaction back, and let the message be
    /// delivered again.
    Database,
}

impl InboxError {
    pub(super) fn new(kind: InboxErrorKind) -> Self {
        Self { kind, source: None }
    }

    /// What can be done about it.
    #[must_use]
    pub fn kind(&self) -> InboxErrorKind {
        self.kind
    }
}

impl From<sqlx::Error> for InboxError {
    fn from(error: sqlx::Error) -> Self {
        Self {
            kind: InboxErrorKind::Database,
            source: Some(error),
        }
    }
}

impl fmt::Display for InboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            InboxErrorKind::NotInTransaction => {
                f.write_str("connection is not in a transaction begun by sqlx")
            }
            InboxErrorKind::Name { field, max, len } => write!(
                f,
                "{field} must be 1 to {max} bytes without control characters, and has {len}"
            ),
            InboxErrorKind::Sequence => f.write_str("sequence must be at least 1"),
            InboxErrorKind::Database => f.write_str("inbox is unavailable"),
        }
    }
}

impl Error for InboxError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|source| source as &dyn Error)
    }
}

pub(super) fn check_transaction(connection: &PgConnection) -> Result<(), InboxError> {
    if connection.is_in_transaction() {
        Ok(())
    } else {
        Err(InboxError::new(InboxErrorKind::NotInTransaction))
    }
}

/// What an index of PostgreSQL has room for, with some to spare: a key of 2,704 bytes.
pub(super) fn check_name(field: &'static str, max: usize, name: &str) -> Result<(), InboxError> {
    let len = name.len();
    let fits = (1..=max).contains(&len) && !name.bytes().any(|byte| byte.is_ascii_control());
    if fits {
        Ok(())
    } else {
        Err(InboxError::new(InboxErrorKind::Name { field, max, len }))
    }
}
