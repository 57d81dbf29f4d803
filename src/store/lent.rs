//! A connection in use, and what becomes of it after a statement.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Database, Error};
use tokio::time::timeout;

use super::StoreError;

/// How long a connection may take to be given back.
pub(crate) const RETURN_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection of a pool. Unless its statement ended well it is closed, and not handed to the
/// next: after an error, or when the caller was cancelled, the statement may still be under way.
#[derive(Debug)]
pub(crate) struct Lent<DB: Database>(Option<PoolConnection<DB>>);

impl<DB: Database> Lent<DB> {
    pub(crate) fn new(connection: PoolConnection<DB>) -> Self {
        Self(Some(connection))
    }

    /// Gives the connection back, for another statement. sqlx asks it for a sign of life first, and would
    /// wait for ever where its host is gone: the pool would be short of it for as long.
    pub(crate) fn keep(mut self) {
        if let Some(mut connection) = self.0.take() {
            tokio::spawn(timeout(RETURN_TIMEOUT, connection.return_to_pool()));
        }
    }

    /// Maps the result, and gives the connection back if it is a good one.
    pub(crate) fn finish<T>(self, result: Result<T, Error>) -> Result<T, StoreError> {
        if result.is_ok() {
            self.keep();
        }
        result.map_err(error)
    }
}

impl<DB: Database> Drop for Lent<DB> {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

impl<DB: Database> Deref for Lent<DB> {
    type Target = DB::Connection;

    #[expect(
        clippy::expect_used,
        reason = "it is taken only where `self` is consumed"
    )]
    fn deref(&self) -> &Self::Target {
        self.0
            .as_ref()
            .expect("connection is there until it is given back")
    }
}

impl<DB: Database> DerefMut for Lent<DB> {
    #[expect(
        clippy::expect_used,
        reason = "it is taken only where `self` is consumed"
    )]
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.0
            .as_mut()
            .expect("connection is there until it is given back")
    }
}

/// A value that cannot be decoded is the record's fault; everything else may pass.
pub(crate) fn error(error: Error) -> StoreError {
    match error {
        Error::ColumnDecode { .. } | Error::Decode(_) => StoreError::corrupt(error),
        _ => StoreError::unavailable(error),
    }
}
