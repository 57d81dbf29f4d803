use std::fmt;
use std::sync::Arc;

use http::request::Parts;

use crate::canonical;
use crate::digest::Fields;
use crate::error::ConfigError;

type Derive = dyn Fn(&Parts, &[u8]) -> Option<String> + Send + Sync;

/// A key that the request itself tells: merchant, order and intent; the id of a provider's event.
///
/// It protects from clients that send no key, and from those that make a new one for each try. When
/// the client sends a key all the same, both together are the key, so it can only tell more
/// operations apart.
///
/// Only a digest of it is kept.
///
/// ```
/// use tower_idempotency::{DerivedKey, Policy};
///
/// // {"merchant": "m_1", "order": "o_7", "intent": "capture", ...}
/// let capture = Policy::critical()
///     .with_derived_key(DerivedKey::json_members(["/merchant", "/order", "/intent"])?);
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
#[derive(Clone)]
pub struct DerivedKey {
    derive: Arc<Derive>,
    pub(crate) is_alone: bool,
}

impl DerivedKey {
    /// Whatever a closure finds in the head and the body; `None` where the request tells no key.
    ///
    /// ```
    /// use tower_idempotency::{DerivedKey, Policy};
    ///
    /// let by_event = DerivedKey::from_fn(|parts, _body| {
    ///     let event = parts.headers.get("x-event-id")?.to_str().ok()?;
    ///     Some(event.to_owned())
    /// });
    /// let policy = Policy::high().with_derived_key(by_event);
    /// ```
    #[must_use]
    pub fn from_fn(
        derive: impl Fn(&Parts, &[u8]) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            derive: Arc::new(derive),
            is_alone: false,
        }
    }

    /// Members of a JSON body, named by their pointers
    /// ([RFC 6901](https://www.rfc-editor.org/rfc/rfc6901)). A request in which one is absent or
    /// null tells no key; neither does one in which one is, or holds, a number of more than 15 digits
    /// or with an exponent, nor a body that names a member twice.
    ///
    /// # Errors
    ///
    /// `derived_key` when there is no pointer, or one does not begin with `/`.
    pub fn json_members<'a>(
        pointers: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, ConfigError> {
        let pointers: Vec<_> = pointers.into_iter().map(str::to_owned).collect();
        if pointers.is_empty() || pointers.iter().any(|pointer| !pointer.starts_with('/')) {
            let reason = "must have pointers, each of which begins with `/`";
            return Err(ConfigError::new("derived_key", reason));
        }
        Ok(Self::from_fn(move |_, body| {
            let values = canonical::members(body, &pointers)?;
            let mut fields = Fields::new("tower-idempotency members 1");
            for value in values {
                fields.push(&value);
            }
            Some(hex::encode(fields.finish()))
        }))
    }

    /// Does not look at a key that the client sends. Where a sender vouches for its body alone, a
    /// header that anybody can add must not make another operation of the same body.
    ///
    /// ```
    /// use tower_idempotency::DerivedKey;
    ///
    /// let by_event = DerivedKey::json_members(["/event/id"])?.alone();
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.is_alone = true;
        self
    }

    /// The key of a request, together with the one its client sent. A tab, which no client's key has
    /// ([RFC 9110](https://www.rfc-editor.org/rfc/rfc9110), and ours are printable), keeps them apart.
    pub(crate) fn key(&self, parts: &Parts, body: &[u8], sent: Option<&str>) -> Option<String> {
        let Some(derived) = (self.derive)(parts, body) else {
            return sent.map(str::to_owned);
        };
        Some(key_of(&derived, sent.unwrap_or_default()))
    }
}

/// The key of what a request tells, and what its client sent.
pub(crate) fn key_of(derived: &str, sent: &str) -> String {
    let digest = Fields::new("tower-idempotency derived key 1")
        .push(derived.as_bytes())
        .finish();
    format!("{sent}\tderived {}", hex::encode(digest))
}

/// Two are equal when one is a clone of the other.
impl PartialEq for DerivedKey {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.derive, &other.derive) && self.is_alone == other.is_alone
    }
}

impl fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DerivedKey").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn key(body: &str, sent: Option<&str>) -> Option<String> {
        let (parts, ()) = http::Request::new(()).into_parts();
        let members = DerivedKey::json_members(["/merchant", "/order/id"]).unwrap();
        members.key(&parts, body.as_bytes(), sent)
    }

    #[test]
    fn the_chosen_members_are_the_key_and_others_are_not() {
        let base = key(r#"{"merchant":"m","order":{"id":7},"note":1}"#, None);
        assert!(base.is_some());
        assert_eq!(
            base,
            key(r#"{"order":{"id":7.0},"merchant":"m","note":2}"#, None)
        );
        assert_ne!(base, key(r#"{"merchant":"m","order":{"id":8}}"#, None));
        assert_ne!(base, key(r#"{"merchant":"m","order":{"id":"7"}}"#, None));
    }

    #[test]
    fn a_member_that_is_absent_or_null_is_no_key() {
        assert_eq!(key(r#"{"merchant":"m"}"#, None), None);
        assert_eq!(key(r#"{"merchant":null,"order":{"id":7}}"#, None), None);
        assert_eq!(key("not json", None), None);
        assert_eq!(key("not json", Some("sent")), Some("sent".into()));
    }

    #[test]
    fn a_key_that_was_sent_tells_operations_apart() {
        let body = r#"{"merchant":"m","order":{"id":7}}"#;
        let (none, one, two) = (key(body, None), key(body, Some("1")), key(body, Some("2")));
        assert!(none != one && one != two && two != none);
    }

    #[test]
    fn the_key_shows_nothing_of_what_it_is_made_from() {
        let key = key(r#"{"merchant":"secret-merchant","order":{"id":7}}"#, None).unwrap();
        assert!(!key.contains("secret"));
    }

    #[test]
    fn pointers_that_are_none_are_refused() {
        let error = DerivedKey::json_members(["merchant"]).unwrap_err();
        assert_eq!(error.field(), "derived_key");
        assert!(DerivedKey::json_members([]).is_err());
    }
}
