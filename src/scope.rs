use std::fmt;
use std::sync::Arc;

use http::request::Parts;

use crate::digest::Fields;
use crate::error::ConfigError;

/// Longest principal that is stored; a longer one is refused like a missing one.
const MAX_LEN: usize = 512;

/// Headers that carry a secret: it would be stored, and a refreshed one would be a new scope.
const CREDENTIALS: [&str; 6] = [
    "authorization",
    "cookie",
    "proxy-authorization",
    "x-api-key",
    "x-auth-token",
    "x-csrf-token",
];

type Resolve = dyn Fn(&Parts) -> Option<String> + Send + Sync;

/// Who is asking: the principal that keys belong to. Two scopes never see each other's records.
///
/// Use the authenticated principal (tenant, account, subject), never a token: a refreshed token
/// would be a new scope, and the retry a second charge. A request whose scope cannot be told is
/// answered 403 `scope-missing`.
///
/// ```
/// use tower_idempotency::Scope;
///
/// #[derive(Clone)]
/// struct Principal { account: String }
///
/// // Set by an authentication layer that is outside the idempotency layer.
/// let scope = Scope::extension::<Principal>(|principal| &principal.account);
/// # let _ = scope;
/// ```
#[derive(Clone)]
pub struct Scope {
    resolve: Arc<Resolve>,
}

impl Scope {
    /// The value of a request header that a trusted proxy sets.
    ///
    /// # Errors
    ///
    /// `scope` when the name is not a header name, or names a credential.
    ///
    /// ```
    /// use tower_idempotency::Scope;
    ///
    /// assert!(Scope::header("x-tenant-id").is_ok());
    /// assert!(Scope::header("authorization").is_err());
    /// ```
    pub fn header(name: &str) -> Result<Self, ConfigError> {
        let name = http::HeaderName::try_from(name)
            .map_err(|_| ConfigError::new("scope", "is not a valid header name"))?;
        if CREDENTIALS.contains(&name.as_str()) {
            return Err(ConfigError::new(
                "scope",
                format!(
                    "is the credential header `{name}`: use the principal it stands for, since a refreshed token would be a new scope"
                ),
            ));
        }
        Ok(Self::from_fn(move |parts| {
            let mut lines = parts.headers.get_all(&name).iter();
            let line = lines.next().filter(|_| lines.next().is_none())?;
            line.to_str().ok().map(str::to_owned)
        }))
    }

    /// A value that an outer layer left in the request's extensions.
    ///
    /// ```
    /// # use tower_idempotency::Scope;
    /// #[derive(Clone)]
    /// struct Tenant(String);
    /// let scope = Scope::extension::<Tenant>(|tenant| &tenant.0);
    /// ```
    #[must_use]
    pub fn extension<T>(read: impl Fn(&T) -> &str + Send + Sync + 'static) -> Self
    where
        T: Clone + Send + Sync + 'static,
    {
        Self::from_fn(move |parts| {
            parts
                .extensions
                .get::<T>()
                .map(|value| read(value).to_owned())
        })
    }

    /// Whatever a closure finds in the request's head; `None` is answered 403.
    ///
    /// ```
    /// # use tower_idempotency::Scope;
    /// let scope = Scope::from_fn(|parts| {
    ///     let host = parts.headers.get("host")?.to_str().ok()?;
    ///     host.split_once('.').map(|(tenant, _)| tenant.to_owned())
    /// });
    /// ```
    #[must_use]
    pub fn from_fn(resolve: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        Self {
            resolve: Arc::new(resolve),
        }
    }

    /// Several scopes as one; missing when any of them is.
    ///
    /// ```
    /// # use tower_idempotency::Scope;
    /// let scope = Scope::all([Scope::fixed("payments"), Scope::header("x-tenant-id")?]);
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn all(scopes: impl IntoIterator<Item = Self>) -> Self {
        let scopes: Vec<_> = scopes.into_iter().collect();
        Self::from_fn(move |parts| {
            let values: Option<Vec<_>> = scopes.iter().map(|scope| scope.resolve(parts)).collect();
            let prefixed = values?
                .into_iter()
                .map(|value| format!("{}:{value}", value.len()));
            Some(prefixed.collect::<Vec<_>>().join(" "))
        })
    }

    /// One name for every request. Part of [`Scope::all`], it keeps services apart that share a store.
    ///
    /// ```
    /// # use tower_idempotency::Scope;
    /// let scope = Scope::all([Scope::fixed("payments"), Scope::header("x-tenant-id")?]);
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn fixed(name: &'static str) -> Self {
        Self::from_fn(move |_| Some(name.to_owned()))
    }

    /// One scope for every caller: any client that guesses a key gets the stored answer. For
    /// services with a single client.
    #[must_use]
    pub fn global() -> Self {
        Self::fixed("global")
    }

    /// Stores a digest in place of the value, for a principal that is itself a secret.
    ///
    /// ```
    /// # use tower_idempotency::Scope;
    /// let scope = Scope::header("x-account-number")?.digested();
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    #[must_use]
    pub fn digested(self) -> Self {
        Self::from_fn(move |parts| {
            let value = self.resolve(parts)?;
            let digest = Fields::new("tower-idempotency scope 1")
                .push(value.as_bytes())
                .finish();
            Some(hex::encode(digest))
        })
    }

    pub(crate) fn resolve(&self, parts: &Parts) -> Option<String> {
        (self.resolve)(parts)
            .filter(|scope| !scope.is_empty() && scope.len() <= MAX_LEN && !scope.contains('\0'))
    }
}

/// Two scopes are equal when one is a clone of the other.
impl PartialEq for Scope {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.resolve, &other.resolve)
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope").finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn parts(headers: &[(&'static str, &'static str)]) -> Parts {
        let mut request = http::Request::new(());
        for (name, value) in headers {
            request.headers_mut().append(*name, value.parse().unwrap());
        }
        request.into_parts().0
    }

    #[test]
    fn an_absent_empty_or_doubled_header_is_no_scope() {
        let scope = Scope::header("x-tenant").unwrap();
        assert_eq!(scope.resolve(&parts(&[])), None);
        assert_eq!(scope.resolve(&parts(&[("x-tenant", "")])), None);
        assert_eq!(
            scope.resolve(&parts(&[("x-tenant", "a"), ("x-tenant", "b")])),
            None
        );
        assert_eq!(
            scope.resolve(&parts(&[("x-tenant", "a")])),
            Some("a".into())
        );
    }

    #[test]
    fn credential_headers_are_refused_in_any_case() {
        for name in ["Authorization", "cookie", "X-Api-Key"] {
            assert_eq!(Scope::header(name).unwrap_err().field(), "scope");
        }
    }

    #[test]
    fn parts_of_a_composite_scope_do_not_run_into_each_other() {
        let scope = Scope::all([Scope::header("a").unwrap(), Scope::header("b").unwrap()]);
        let one = scope.resolve(&parts(&[("a", "x 1:y"), ("b", "z")]));
        let two = scope.resolve(&parts(&[("a", "x"), ("b", "y 1:z")]));
        assert!(one.is_some() && two.is_some());
        assert_ne!(one, two);
        assert_eq!(scope.resolve(&parts(&[("a", "x")])), None);
    }

    #[test]
    fn a_digested_scope_does_not_show_its_value() {
        let scope = Scope::header("a").unwrap().digested();
        let shown = scope.resolve(&parts(&[("a", "4111")])).unwrap();
        assert!(!shown.contains("4111") && shown.len() == 64);
    }

    #[test]
    fn values_that_cannot_be_stored_are_no_scope() {
        assert_eq!(
            Scope::from_fn(|_| Some("a\0b".into())).resolve(&parts(&[])),
            None
        );
        assert_eq!(
            Scope::from_fn(|_| Some("a".repeat(513))).resolve(&parts(&[])),
            None
        );
    }
}
