use std::fmt;
use std::sync::{Arc, LazyLock};

use http::Uri;
use http::header::{CONTENT_TYPE, HeaderName};
use http::request::Parts;

use crate::canonical;
use crate::digest::Fields;
use crate::error::ConfigError;

use super::{Fingerprint, VERSION};

/// Of the settings that most routes have.
static RAW_CONFIG: LazyLock<u64> = LazyLock::new(|| Fingerprinter::raw().config());

/// How requests are compared: what has to be equal for two requests to be one operation sent twice.
///
/// Always part of it: method, concrete path, query, content type and body. Bodies are compared byte
/// for byte, unless a form below applies to their content type.
///
/// It may be changed at any time, and so may the way a version of this crate computes it: every
/// record also keeps the digest of the raw request (method, path, query, content type, body), which
/// decides when the settings differ. A retry that is the same byte for byte is replayed across such
/// a deploy. One that differs in what only the settings ignored is refused with
/// [`KeyReused`](crate::Code::KeyReused) until the old record has expired, and chosen headers are
/// not compared.
///
/// ```
/// use tower_idempotency::{Fingerprinter, Policy};
///
/// let policy = Policy::high().with_fingerprint(
///     Fingerprinter::canonical_json()
///         .with_sorted_form()
///         .without_member("/client/sent_at")?
///         .with_header("x-api-version")?,
/// );
/// # Ok::<(), tower_idempotency::ConfigError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Fingerprinter {
    json: bool,
    form: bool,
    #[cfg(feature = "multipart")]
    multipart: bool,
    without: Vec<String>,
    custom: Option<Custom>,
    headers: Vec<HeaderName>,
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
            json: true,
            ..Self::default()
        }
    }

    /// Compares bodies by what a closure makes of the request; `None` is compared byte for byte.
    ///
    /// `name` stands for the closure in records: give it another name when it changes.
    ///
    /// ```
    /// # use tower_idempotency::Fingerprinter;
    /// let upper = Fingerprinter::from_fn("upper-case 1", |_parts, body| {
    ///     Some(body.to_ascii_uppercase())
    /// });
    /// ```
    #[must_use]
    pub fn from_fn(
        name: &'static str,
        form: impl Fn(&Parts, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            custom: Some(Custom {
                name,
                form: Arc::new(form),
            }),
            ..Self::default()
        }
    }

    /// Compares `application/x-www-form-urlencoded` bodies by their decoded pairs, sorted by name.
    /// Pairs of one name keep their order, which may mean something. In a body that has a name with
    /// `[]` (`lines[][item]`), so do all pairs whose names are the same before the first bracket.
    #[must_use]
    pub fn with_sorted_form(mut self) -> Self {
        self.form = true;
        self
    }

    /// Compares `multipart/form-data` bodies by their parts, in order: headers, sorted by name, and
    /// content. The boundary, which clients make anew for each try, does not matter. A body that
    /// cannot be read as its content type says is compared byte for byte.
    #[cfg(feature = "multipart")]
    #[must_use]
    pub fn with_multipart(mut self) -> Self {
        self.multipart = true;
        self
    }

    /// Leaves a member of JSON bodies out of the comparison, named by its pointer
    /// ([RFC 6901](https://www.rfc-editor.org/rfc/rfc6901)): a time of sending, a trace id. Compares
    /// the rest as [`canonical_json`](Self::canonical_json) does. An element of an array cannot be
    /// left out, a member of one can: `/items/0/sent_at`.
    ///
    /// # Errors
    ///
    /// `fingerprint` when the pointer does not begin with `/`.
    pub fn without_member(mut self, pointer: &str) -> Result<Self, ConfigError> {
        if !pointer.starts_with('/') {
            let reason = "has a pointer that does not begin with `/`";
            return Err(ConfigError::new("fingerprint", reason));
        }
        self.json = true;
        self.without.push(pointer.to_owned());
        self.without.sort();
        Ok(self)
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
    pub(super) fn config(&self) -> u64 {
        let mut fields = Fields::new("tower-idempotency fingerprint settings 1");
        let kinds = [
            (*self == Self::raw(), "raw"),
            (self.json, "json"),
            (self.form, "form"),
            #[cfg(feature = "multipart")]
            (self.multipart, "multipart"),
        ];
        for (_, kind) in kinds.iter().filter(|(on, _)| *on) {
            fields.push(kind.as_bytes());
        }
        for pointer in &self.without {
            fields.push(b"without").push(pointer.as_bytes());
        }
        if let Some(custom) = &self.custom {
            fields.push(b"custom").push(custom.name.as_bytes());
        }
        for name in &self.headers {
            fields.push(b"header").push(name.as_str().as_bytes());
        }
        let digest = fields.finish();
        u64::from_be_bytes(std::array::from_fn(|i| digest[i]))
    }

    /// `path` and `query` are those the client sent: a nested router strips its prefix from `parts`.
    ///
    /// Of the whole body, and not of its frames as they come: SHA-256 works longer on a byte than
    /// memory takes to fetch it, so that it would be no faster, also for 2 MiB.
    pub(crate) fn fingerprint(&self, parts: &Parts, uri: &Uri, body: &[u8]) -> Fingerprint {
        let request = RequestView { parts, uri };
        let fields = request.fields(body);
        let raw = fields.finish();
        let (config, digest) = match *self == Self::raw() {
            true => (*RAW_CONFIG, raw),
            false => (self.config(), self.digest(&request, body, fields)),
        };
        Fingerprint {
            version: VERSION,
            config,
            digest,
            raw,
        }
    }

    /// `raw` has the body in it already, which is not gone through twice where it is compared as it is.
    fn digest(&self, request: &RequestView<'_>, body: &[u8], raw: Fields) -> [u8; 32] {
        let mut fields = match self.canonical(request, body) {
            Some((kind, form)) => {
                let content_type = request.without_spelling();
                let mut fields = request.fields_as(content_type.as_bytes(), &form);
                fields.push(kind.as_bytes());
                fields
            }
            None => raw,
        };
        for name in &self.headers {
            let values = request.parts.headers.get_all(name);
            fields.push(name.as_str().as_bytes());
            fields.push(&(values.iter().count() as u64).to_be_bytes());
            for value in values {
                fields.push(value.as_bytes());
            }
        }
        fields.finish()
    }

    /// One form for bodies that mean the same, and its name.
    fn canonical(&self, request: &RequestView<'_>, body: &[u8]) -> Option<(&'static str, Vec<u8>)> {
        // What is not text cannot be told apart as text.
        std::str::from_utf8(request.content_type()).ok()?;
        if let Some(custom) = &self.custom {
            return Some(("custom", (custom.form)(request.parts, body)?));
        }
        let kind = request.essence();
        match kind.as_str() {
            "application/x-www-form-urlencoded" if self.form => {
                Some(("form", canonical::form(body)))
            }
            #[cfg(feature = "multipart")]
            "multipart/form-data" if self.multipart => {
                let content_type = std::str::from_utf8(request.content_type()).ok()?;
                Some(("multipart", canonical::multipart(content_type, body)?))
            }
            kind if self.json && (kind == "application/json" || kind.ends_with("+json")) => {
                Some(("json", canonical::json(body, &self.without)?))
            }
            _ => None,
        }
    }
}

type Form = dyn Fn(&Parts, &[u8]) -> Option<Vec<u8>> + Send + Sync;

/// A closure, equal to its clones.
#[derive(Clone)]
struct Custom {
    name: &'static str,
    form: Arc<Form>,
}

impl PartialEq for Custom {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.form, &other.form)
    }
}

impl fmt::Debug for Custom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Custom").field(&self.name).finish()
    }
}

/// The head of a request, with the URI that the client sent.
struct RequestView<'a> {
    parts: &'a Parts,
    uri: &'a Uri,
}

impl RequestView<'_> {
    fn content_type(&self) -> &[u8] {
        let value = self.parts.headers.get(CONTENT_TYPE);
        value.map_or(b"", |value| value.as_bytes())
    }

    /// The media type without parameters.
    fn essence(&self) -> String {
        let value = String::from_utf8_lossy(self.content_type()).to_ascii_lowercase();
        let essence = value.split(';').next().unwrap_or_default();
        essence.trim().to_owned()
    }

    /// The media type with the parameters that may mean something: not the boundary, which only
    /// spells the body, nor the charset that bodies have anyway.
    fn without_spelling(&self) -> String {
        let value = String::from_utf8_lossy(self.content_type());
        let essence = self.essence();
        let is_multipart = essence.starts_with("multipart/");
        let spells = |parameter: &str| match parameter {
            "" | "charset=utf-8" | "charset=\"utf-8\"" => true,
            parameter => is_multipart && parameter.starts_with("boundary="),
        };
        let parameters = value.split(';').skip(1).map(str::trim);
        let meant = parameters.filter(|parameter| !spells(&parameter.to_ascii_lowercase()));
        std::iter::once(essence.as_str())
            .chain(meant)
            .collect::<Vec<_>>()
            .join(";")
    }

    fn fields(&self, body: &[u8]) -> Fields {
        self.fields_as(self.content_type(), body)
    }

    fn fields_as(&self, content_type: &[u8], body: &[u8]) -> Fields {
        let query = self.uri.query();
        let mut fields = Fields::new("tower-idempotency fingerprint 1");
        fields
            .push(self.parts.method.as_str().as_bytes())
            .push(self.uri.path().as_bytes())
            .push(&[u8::from(query.is_some())])
            .push(query.unwrap_or_default().as_bytes())
            .push(content_type)
            .push(body);
        fields
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
pub(super) mod tests {
    use super::*;

    pub(in crate::fingerprint) type Headers = [(&'static str, &'static str)];

    pub(in crate::fingerprint) const JSON: &Headers = &[("content-type", "application/json")];

    pub(in crate::fingerprint) fn taken(
        by: &Fingerprinter,
        path: &str,
        query: Option<&str>,
        headers: &Headers,
        body: &str,
    ) -> Fingerprint {
        let mut request = http::Request::post("/stripped");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let query = query.map(|query| format!("?{query}")).unwrap_or_default();
        let uri: Uri = format!("{path}{query}").parse().unwrap();
        by.fingerprint(&parts, &uri, body.as_bytes())
    }

    #[test]
    fn path_query_content_type_and_body_are_part_of_it() {
        let json = JSON;
        let raw = Fingerprinter::raw();
        let base = taken(&raw, "/p/1", Some("a=1"), json, "{}");
        for other in [
            taken(&raw, "/p/2", Some("a=1"), json, "{}"),
            taken(&raw, "/p/1", Some("a=2"), json, "{}"),
            taken(&raw, "/p/1", None, json, "{}"),
            taken(&raw, "/p/1", Some("a=1"), &[], "{}"),
            taken(&raw, "/p/1", Some("a=1"), json, "{ }"),
        ] {
            assert!(!base.matches(&other));
        }
    }

    #[test]
    fn an_empty_query_differs_from_none() {
        let raw = Fingerprinter::raw();
        let none = taken(&raw, "/", None, &[], "");
        assert!(!none.matches(&taken(&raw, "/", Some(""), &[], "")));
    }

    #[test]
    fn chosen_headers_count_and_others_do_not() {
        let by = Fingerprinter::raw().with_header("x-version").unwrap();
        let one = taken(&by, "/", None, &[("x-version", "1"), ("x-y", "1")], "");
        let two = taken(&by, "/", None, &[("x-version", "1"), ("x-y", "2")], "");
        let three = taken(&by, "/", None, &[("x-version", "2")], "");
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
            let headers = &[("content-type", kind)];
            let one = taken(&by, "/", None, headers, r#"{"a":1.0,"b":2}"#);
            let two = taken(&by, "/", None, headers, r#"{ "b": 2, "a": 1 }"#);
            assert_eq!(one.matches(&two), equal, "{kind}");
        }
    }

    #[test]
    fn the_digest_of_version_1_never_changes() {
        let taken = taken(&Fingerprinter::raw(), "/orders", None, &[], "{}");
        assert_eq!(
            hex::encode(taken.to_bytes()),
            "0001f480fc9f7ff6b7d798b347c37ff5502cd2c8ae\
             7cf8c1cc658731fe7076b10bab06b0e2c6dd4fc1c4"
        );
    }
}
