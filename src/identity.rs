use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use uuid::{Uuid, Variant};

use crate::digest::Fields;
use crate::error::ConfigError;
use crate::operation;

/// Who asks (scope), for what (operation), under which key: the identity of one logical operation.
///
/// Cheap to clone. `Debug` shows the record's id alone; scope and key are for the store.
///
/// ```
/// use tower_idempotency::Identity;
///
/// let a = Identity::new("acme", "POST /charges", "8e03978e");
/// let b = Identity::new("acme", "POST /refunds", "8e03978e");
/// assert_ne!(a.id(), b.id());
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Identity(Arc<Parts>);

#[derive(PartialEq, Eq)]
struct Parts {
    id: RecordId,
    digest: [u8; 32],
    scope: String,
    operation: String,
    key: String,
}

/// By the id alone, since each request is looked up several times: it is made of the digest, so that others
/// hash differently, and where two collide, all parts are compared.
impl Hash for Parts {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

impl Identity {
    /// The identity of `(scope, operation, key)`.
    #[must_use]
    pub fn new(
        scope: impl Into<String>,
        operation: impl Into<String>,
        key: impl Into<String>,
    ) -> Self {
        let (scope, operation, key) = (scope.into(), operation.into(), key.into());
        let digest = Fields::new("tower-idempotency identity 1")
            .push(scope.as_bytes())
            .push(operation.as_bytes())
            .push(key.as_bytes())
            .finish();
        Self(Arc::new(Parts {
            id: RecordId::of(&digest, &key),
            digest,
            scope,
            operation,
            key,
        }))
    }

    /// The same identity under an id of the caller's choosing, to show what a collision does.
    #[cfg(any(test, feature = "conformance"))]
    #[must_use]
    pub fn with_id(&self, id: RecordId) -> Self {
        Self(Arc::new(Parts {
            id,
            digest: self.0.digest,
            scope: self.0.scope.clone(),
            operation: self.0.operation.clone(),
            key: self.0.key.clone(),
        }))
    }

    /// The primary key of the record: 16 bytes, ordered in time when the key is a UUIDv7.
    #[must_use]
    pub fn id(&self) -> RecordId {
        self.0.id
    }

    /// SHA-256 over the length-prefixed parts. A store compares it on every hit, since two
    /// identities may share an id, however unlikely that is.
    #[must_use]
    pub fn digest(&self) -> &[u8; 32] {
        &self.0.digest
    }

    /// Who asks.
    #[must_use]
    pub fn scope(&self) -> &str {
        &self.0.scope
    }

    /// What is asked.
    #[must_use]
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// The key to send to another service for the part of this operation that is called `name`: the
    /// same on each attempt, another for another operation or name. It is a UUID
    /// ([RFC 9562, version 8](https://www.rfc-editor.org/rfc/rfc9562#section-5.8)) made of a digest,
    /// and shows neither scope nor key.
    ///
    /// ```
    /// use tower_idempotency::Identity;
    ///
    /// let order = Identity::new("acme", "POST /orders", "8e03978e");
    /// let key = order.downstream_key("charge");
    /// assert_eq!(key, "16d27ffc-036c-86c1-9536-62e73d5acc54");
    /// assert_ne!(key, order.downstream_key("refund"));
    /// ```
    #[must_use]
    pub fn downstream_key(&self, name: &str) -> String {
        let digest = Fields::new("tower-idempotency downstream key 1")
            .push(&self.0.digest)
            .push(name.as_bytes())
            .finish();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        uuid::Builder::from_custom_bytes(bytes)
            .into_uuid()
            .to_string()
    }

    /// The identity that a request to a route of axum has: as [`new`](Self::new), with the method and
    /// template of the route, whose names of parameters do not matter.
    ///
    /// ```
    /// use tower_idempotency::Identity;
    ///
    /// let cancelled = Identity::of_route("acme", "POST /orders/{id}/cancel", "8e03978e")?;
    /// assert_eq!(cancelled.operation(), "POST /orders/{}/cancel");
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `route` that is not a method and a template.
    pub fn of_route(
        scope: impl Into<String>,
        route: &str,
        key: impl Into<String>,
    ) -> Result<Self, ConfigError> {
        let (_, operation) = operation::of_route(route)?;
        Ok(Self::new(scope, operation, key))
    }

    /// The key as it was normalised.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.0.key
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("id", &self.0.id)
            .field("operation", &self.0.operation)
            .finish_non_exhaustive()
    }
}

/// The 16-byte primary key of a record.
///
/// Displayed as a UUID, which is how PostgreSQL shows it; it says nothing about scope or key, but
/// for the time that a UUIDv7 key carries.
///
/// ```
/// use tower_idempotency::{Identity, RecordId};
///
/// // The time of a UUIDv7 key leads the id.
/// let key = "019c0a3e-5a80-7cc3-98c4-dc0c0c07398f";
/// let id = Identity::new("acme", "POST /orders", key).id();
/// assert!(id.to_string().starts_with("019c0a3e-5a80-"));
/// assert_eq!(RecordId::from_bytes(*id.as_bytes()), id);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordId(pub(crate) [u8; 16]);

impl RecordId {
    /// The id with these bytes, as a store read it.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes, for a store to write.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// A random id makes every insert touch another page of the index; the time of a UUIDv7 key in
    /// front keeps neighbours in time together, whatever the number of tenants.
    fn of(digest: &[u8; 32], key: &str) -> Self {
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        if let Some(time) = uuid_v7_time(key) {
            id[..6].copy_from_slice(&time);
        }
        Self(id)
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// RFC 9562, section 5.7: the first 48 bits are milliseconds since the epoch.
fn uuid_v7_time(key: &str) -> Option<[u8; 6]> {
    let uuid = Uuid::try_parse(key).ok().filter(|_| key.len() == 36)?;
    let is_v7 = uuid.get_version_num() == 7 && uuid.get_variant() == Variant::RFC4122;
    let bytes = uuid.into_bytes();
    is_v7.then(|| [bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_makes_another_identity() {
        let base = Identity::new("s", "o", "k");
        for other in [("t", "o", "k"), ("s", "p", "k"), ("s", "o", "l")] {
            let other = Identity::new(other.0, other.1, other.2);
            assert_ne!(base.id(), other.id());
            assert_ne!(base.digest(), other.digest());
        }
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(
            Identity::new("a", "bc", "k").digest(),
            Identity::new("ab", "c", "k").digest()
        );
    }

    #[test]
    fn ids_of_uuid_v7_keys_are_ordered_in_time_across_scopes() {
        let older = Identity::new("z", "o", "01890a5d-ac96-774b-bcce-b302099a8057");
        let newer = Identity::new("a", "o", "01890a5d-ac97-774b-bcce-b302099a8057");
        assert!(older.id() < newer.id());
    }

    #[test]
    fn other_keys_get_ids_from_the_digest_alone() {
        let identity = Identity::new("a", "o", "5b0cbe2a-1d6c-4a37-a1ad-0a7a0a3f2a11");
        assert_eq!(identity.id().as_bytes()[..], identity.digest()[..16]);
    }

    #[test]
    fn debug_shows_neither_scope_nor_key() {
        let shown = format!("{:?}", Identity::new("tenant-7", "POST /x", "secret-key"));
        assert!(!shown.contains("tenant-7") && !shown.contains("secret-key"));
    }
}
