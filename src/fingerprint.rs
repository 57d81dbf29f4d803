use http::HeaderMap;
use http::header::{CONTENT_TYPE, HeaderName};

use crate::canonical;
use crate::digest::Fields;
use crate::error::ConfigError;

/// Raised whenever the same request under the same settings would get another digest.
const VERSION: u16 = 1;

/// How requests are compared: what has to be equal for two requests to be one operation sent twice.
///
/// Always part of it: method, concrete path, query, content type and body.
///
/// Changing it, or upgrading to a version of this crate that computes it differently, breaks no
/// retry: every record also keeps the digest of the raw request, which decides when the settings differ.
///
/// ```
/// use tower_idempotency::{Fingerprinter, Policy};
///
/// let policy = Policy::high()
///     .with_fingerprint(Fingerprinter::canonical_json().with_header("x-api-version")?);
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fingerprinter {
    body: BodyForm,
    headers: Vec<HeaderName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum BodyForm {
    #[default]
    Raw,
    Json,
}

impl Fingerprinter {
    /// Compares bodies byte for byte. The default.
    #[must_use]
    pub fn raw() -> Self {
        Self::default()
    }

    /// Compares JSON bodies by their canonical form
    /// ([RFC 8785](https://www.rfc-editor.org/rfc/rfc8785)): the order of members, white space and
    /// the spelling of numbers do not matter. Bodies of another content type, bodies that are not
    /// valid JSON, that name a member twice, or that hold a number of more than 15 digits or with an
    /// exponent are compared byte for byte.
    #[must_use]
    pub fn canonical_json() -> Self {
        Self {
            body: BodyForm::Json,
            headers: Vec::new(),
        }
    }

    /// Makes a request header part of the comparison. None is by default.
    ///
    /// # Errors
    ///
    /// `fingerprint` when the name is not a header name.
    ///
    /// ```
    /// use tower_idempotency::Fingerprinter;
    ///
    /// let by = Fingerprinter::raw().with_header("x-api-version")?;
    /// assert_eq!(by.with_header("no header").unwrap_err().field(), "fingerprint");
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_header(mut self, name: &str) -> Result<Self, ConfigError> {
        let name = HeaderName::try_from(name).map_err(|_| {
            ConfigError::new("fingerprint", format!("names `{name}`, which is no header"))
        })?;
        if !self.headers.contains(&name) {
            self.headers.push(name);
            self.headers.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        }
        Ok(self)
    }

    /// Identifies these settings in a record.
    fn config(&self) -> u64 {
        let mut fields = Fields::new("tower-idempotency fingerprint settings 1");
        fields.push(match self.body {
            BodyForm::Raw => b"raw",
            BodyForm::Json => b"json".as_slice(),
        });
        for name in &self.headers {
            fields.push(name.as_str().as_bytes());
        }
        let digest = fields.finish();
        u64::from_be_bytes(std::array::from_fn(|i| digest[i]))
    }

    pub(crate) fn fingerprint(&self, request: &RequestView<'_>) -> Fingerprint {
        let raw = request.fields(request.body).finish();
        Fingerprint {
            version: VERSION,
            config: self.config(),
            digest: if *self == Self::raw() {
                raw
            } else {
                self.digest(request)
            },
            raw,
        }
    }

    fn digest(&self, request: &RequestView<'_>) -> [u8; 32] {
        let canonical = match self.body {
            BodyForm::Json if request.is_json() => canonical::json(request.body),
            BodyForm::Json | BodyForm::Raw => None,
        };
        let mut fields = request.fields(canonical.as_deref().unwrap_or(request.body));
        fields.push(&[u8::from(canonical.is_some())]);
        for name in &self.headers {
            let values = request.headers.get_all(name);
            fields.push(name.as_str().as_bytes());
            fields.push(&values.iter().count().to_be_bytes());
            for value in values {
                fields.push(value.as_bytes());
            }
        }
        fields.finish()
    }
}

/// The parts of a request that a fingerprint is taken of.
pub(crate) struct RequestView<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    pub(crate) query: Option<&'a str>,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a [u8],
}

impl RequestView<'_> {
    fn content_type(&self) -> &[u8] {
        self.headers
            .get(CONTENT_TYPE)
            .map_or(b"", |value| value.as_bytes())
    }

    fn is_json(&self) -> bool {
        let value = String::from_utf8_lossy(self.content_type()).to_ascii_lowercase();
        let essence = value.split(';').next().unwrap_or_default().trim();
        essence == "application/json" || essence.ends_with("+json")
    }

    fn fields(&self, body: &[u8]) -> Fields {
        let mut fields = Fields::new("tower-idempotency fingerprint 1");
        fields
            .push(self.method.as_bytes())
            .push(self.path.as_bytes())
            .push(&[u8::from(self.query.is_some())])
            .push(self.query.unwrap_or_default().as_bytes())
            .push(self.content_type())
            .push(body);
        fields
    }
}

/// The digest of a request, as it is kept in the record.
///
/// Says whether two requests are the same operation sent twice, and nothing else about them.
///
/// ```
/// use tower_idempotency::Fingerprint;
///
/// let first = Fingerprint::of_bytes(b"orders.csv, 3 lines");
/// let retry = Fingerprint::of_bytes(b"orders.csv, 3 lines");
/// let other = Fingerprint::of_bytes(b"orders.csv, 4 lines");
/// assert!(retry.matches(&first) && !other.matches(&first));
/// assert_eq!(Fingerprint::from_bytes(&first.to_bytes()), Some(first));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    version: u16,
    config: u64,
    digest: [u8; 32],
    raw: [u8; 32],
}

impl Fingerprint {
    /// The fingerprint of a request to be sent again unchanged: for calls of a [`Store`](crate::Store) outside HTTP.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let raw = Fields::new("tower-idempotency fingerprint 1")
            .push(bytes)
            .finish();
        Self {
            version: VERSION,
            config: Fingerprinter::raw().config(),
            digest: raw,
            raw,
        }
    }

    /// Whether both were taken of the same request, as far as they can be compared: by the
    /// configured digest if it was made the same way, else by the raw one.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        if (self.version, self.config) == (other.version, other.config) {
            self.digest == other.digest
        } else {
            self.raw == other.raw
        }
    }

    /// The bytes a store keeps: version, settings, digest, and the raw digest where it differs.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(74);
        bytes.extend(self.version.to_be_bytes());
        bytes.extend(self.config.to_be_bytes());
        bytes.extend(self.digest);
        if self.raw != self.digest {
            bytes.extend(self.raw);
        }
        bytes
    }

    /// The fingerprint that [`to_bytes`](Self::to_bytes) wrote, or `None` for anything else.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk()?;
        let (config, rest) = rest.split_first_chunk()?;
        let (digest, rest) = rest.split_first_chunk()?;
        let raw = match rest {
            [] => *digest,
            rest => rest.try_into().ok()?,
        };
        Some(Self {
            version: u16::from_be_bytes(*version),
            config: u64::from_be_bytes(*config),
            digest: *digest,
            raw,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    fn taken(
        by: &Fingerprinter,
        path: &str,
        query: Option<&str>,
        headers: &HeaderMap,
        body: &str,
    ) -> Fingerprint {
        by.fingerprint(&RequestView {
            method: "POST",
            path,
            query,
            headers,
            body: body.as_bytes(),
        })
    }

    #[test]
    fn path_query_content_type_and_body_are_part_of_it() {
        let json = headers(&[("content-type", "application/json")]);
        let raw = Fingerprinter::raw();
        let base = taken(&raw, "/p/1", Some("a=1"), &json, "{}");
        for other in [
            taken(&raw, "/p/2", Some("a=1"), &json, "{}"),
            taken(&raw, "/p/1", Some("a=2"), &json, "{}"),
            taken(&raw, "/p/1", None, &json, "{}"),
            taken(&raw, "/p/1", Some("a=1"), &headers(&[]), "{}"),
            taken(&raw, "/p/1", Some("a=1"), &json, "{ }"),
        ] {
            assert!(!base.matches(&other));
        }
    }

    #[test]
    fn an_empty_query_differs_from_none() {
        let raw = Fingerprinter::raw();
        let none = taken(&raw, "/", None, &headers(&[]), "");
        assert!(!none.matches(&taken(&raw, "/", Some(""), &headers(&[]), "")));
    }

    #[test]
    fn chosen_headers_count_and_others_do_not() {
        let by = Fingerprinter::raw().with_header("x-version").unwrap();
        let one = taken(
            &by,
            "/",
            None,
            &headers(&[("x-version", "1"), ("x-y", "1")]),
            "",
        );
        let two = taken(
            &by,
            "/",
            None,
            &headers(&[("x-version", "1"), ("x-y", "2")]),
            "",
        );
        let three = taken(&by, "/", None, &headers(&[("x-version", "2")]), "");
        assert!(one.matches(&two));
        assert!(!one.matches(&three));
    }

    #[test]
    fn canonical_json_applies_to_json_content_types_only() {
        let by = Fingerprinter::canonical_json();
        for (kind, equal) in [
            ("application/json", true),
            ("application/json; charset=utf-8", true),
            ("application/merge-patch+json", true),
            ("text/plain", false),
        ] {
            let headers = headers(&[("content-type", kind)]);
            let one = taken(&by, "/", None, &headers, r#"{"a":1.0,"b":2}"#);
            let two = taken(&by, "/", None, &headers, r#"{ "b": 2, "a": 1 }"#);
            assert_eq!(one.matches(&two), equal, "{kind}");
        }
    }

    #[test]
    fn under_other_settings_the_raw_digest_decides() {
        let json = headers(&[("content-type", "application/json")]);
        let before = taken(&Fingerprinter::raw(), "/", None, &json, r#"{"a":1}"#);
        let same = taken(
            &Fingerprinter::canonical_json(),
            "/",
            None,
            &json,
            r#"{"a":1}"#,
        );
        let other = taken(
            &Fingerprinter::canonical_json(),
            "/",
            None,
            &json,
            r#"{"a":2}"#,
        );
        assert!(same.matches(&before));
        assert!(!other.matches(&before));
    }

    #[test]
    fn bytes_round_trip_and_cut_bytes_are_refused() {
        let json = headers(&[("content-type", "application/json")]);
        for by in [Fingerprinter::raw(), Fingerprinter::canonical_json()] {
            let taken = taken(&by, "/", None, &json, r#"{"a": 1}"#);
            let bytes = taken.to_bytes();
            assert_eq!(Fingerprint::from_bytes(&bytes), Some(taken));
            assert_eq!(Fingerprint::from_bytes(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn the_digest_of_version_1_never_changes() {
        let taken = taken(&Fingerprinter::raw(), "/orders", None, &headers(&[]), "{}");
        assert_eq!(
            hex::encode(taken.to_bytes()),
            "0001f480fc9f7ff6b7d798b347c37ff5502cd2c8ae\
             7cf8c1cc658731fe7076b10bab06b0e2c6dd4fc1c4"
        );
    }
}
