use std::fmt;

use sqlx::migrate::MigrateError;

/// The schema could not be created or upgraded; nothing was changed.
#[derive(Debug)]
pub struct SchemaError(pub(super) MigrateError);

impl From<sqlx::Error> for SchemaError {
    fn from(error: sqlx::Error) -> Self {
        Self(MigrateError::Execute(error))
    }
}

impl fmt::Display for SchemaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            MigrateError::VersionMissing(version) => write!(
                f,
                "the schema has migration {version}, which this version of the crate does not know: run the newer version"
            ),
            _ => f.write_str("cannot create or upgrade the idempotency schema"),
        }
    }
}

impl std::error::Error for SchemaError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}
