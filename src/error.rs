use std::fmt;

/// A setting that cannot work, found when it is set, never at the first request.
///
/// ```
/// use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};
/// use std::time::Duration;
///
/// let error = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
///     .with_policy(Policy::high().with_ttl(Duration::ZERO))
///     .unwrap_err();
/// assert_eq!(error.field(), "ttl");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    field: &'static str,
    reason: String,
}

impl ConfigError {
    pub(crate) fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self {
            field,
            reason: reason.into(),
        }
    }

    /// The name of the setting, as in its `with_*` setter.
    #[must_use]
    pub fn field(&self) -> &'static str {
        self.field
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` {}", self.field, self.reason)
    }
}

impl std::error::Error for ConfigError {}
