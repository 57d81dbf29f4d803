//! The `Idempotency-Key` header: what is a key, and which spellings are the same key.

use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};
use sfv::{BareItem, Item, Parser};
use uuid::Uuid;

/// Which spellings of a key a route accepts.
///
/// ```
/// use tower_idempotency::{KeyFormat, Policy};
///
/// let policy = Policy::high().with_key_format(KeyFormat::Uuid);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KeyFormat {
    /// A structured-field string (`"abc"`) is unquoted, anything else is taken as it stands, UUIDs
    /// are lower-cased. No vendor's client sends the quoted form of the draft, so this is the default.
    #[default]
    Lenient,
    /// A structured-field string and nothing else
    /// ([draft-ietf-httpapi-idempotency-key-header-07](https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/07/), section 2.1).
    Strict,
    /// A hyphenated UUID, quoted or not.
    Uuid,
}

/// What a route asks of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyRules {
    pub(crate) header: HeaderName,
    pub(crate) required: bool,
    pub(crate) format: KeyFormat,
    pub(crate) min: usize,
    pub(crate) max: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeyError {
    Missing,
    Invalid(String),
}

impl KeyRules {
    /// The normalised key, or `None` where none was sent and none is required.
    pub(crate) fn read(&self, headers: &HeaderMap) -> Result<Option<String>, KeyError> {
        let mut lines = headers.get_all(&self.header).iter();
        match (lines.next(), lines.next()) {
            (None, _) if self.required => Err(KeyError::Missing),
            (None, _) => Ok(None),
            (Some(line), None) => self.parse(line).map(Some).map_err(KeyError::Invalid),
            (Some(_), Some(_)) => Err(KeyError::Invalid("must be sent on one line".into())),
        }
    }

    fn parse(&self, line: &HeaderValue) -> Result<String, String> {
        let line = line
            .to_str()
            .ok()
            .filter(|text| text.bytes().all(|b| matches!(b, b' '..=b'~')))
            .ok_or("must be printable ASCII")?
            .trim_matches(' ');
        let key = match (quoted(line), self.format) {
            (Some(key), _) => key,
            (None, KeyFormat::Strict) => {
                return Err(
                    "must be a structured-field string: in double quotes, and nothing after it"
                        .into(),
                );
            }
            (None, _) if line.contains(',') => {
                return Err("must not contain a comma outside a quoted string".into());
            }
            (None, _) => line.to_owned(),
        };
        self.check(normalised(key, self.format)?)
    }

    fn check(&self, key: String) -> Result<String, String> {
        if key.trim_matches(' ').is_empty() {
            return Err("must not be empty".into());
        }
        let (len, min, max) = (key.len(), self.min, self.max);
        if len < min {
            return Err(format!("must be at least {min} bytes long, not {len}"));
        }
        if len > max {
            return Err(format!("must be at most {max} bytes long, not {len}"));
        }
        Ok(key)
    }
}

/// The string inside a structured-field string without parameters (RFC 9651, section 3.3.3).
fn quoted(line: &str) -> Option<String> {
    if !line.starts_with('"') {
        return None;
    }
    let item = Parser::new(line).parse::<Item>().ok()?;
    match item.bare_item {
        BareItem::String(text) if item.params.is_empty() => Some(text.as_str().to_owned()),
        _ => None,
    }
}

fn normalised(key: String, format: KeyFormat) -> Result<String, String> {
    let is_uuid = key.len() == 36 && Uuid::try_parse(&key).is_ok();
    match format {
        KeyFormat::Lenient | KeyFormat::Uuid if is_uuid => Ok(key.to_ascii_lowercase()),
        KeyFormat::Uuid => Err("must be a UUID in its hyphenated form".into()),
        KeyFormat::Lenient | KeyFormat::Strict => Ok(key),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn read(format: KeyFormat, lines: &[&[u8]]) -> Result<Option<String>, KeyError> {
        let rules = KeyRules {
            header: HeaderName::from_static("idempotency-key"),
            required: true,
            format,
            min: 1,
            max: 255,
        };
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(&rules.header, HeaderValue::from_bytes(line).unwrap());
        }
        rules.read(&headers)
    }

    fn key(format: KeyFormat, line: &str) -> Option<String> {
        read(format, &[line.as_bytes()]).ok().flatten()
    }

    #[test]
    fn a_quoted_and_a_bare_key_are_one_key() {
        assert_eq!(key(KeyFormat::Lenient, "\"abc\""), Some("abc".into()));
        assert_eq!(key(KeyFormat::Lenient, "abc"), Some("abc".into()));
    }

    #[test]
    fn an_escaped_quote_is_unescaped_and_a_broken_string_is_taken_as_it_stands() {
        assert_eq!(key(KeyFormat::Lenient, r#""a\"b""#), Some("a\"b".into()));
        assert_eq!(key(KeyFormat::Lenient, r#""a"b"#), Some(r#""a"b"#.into()));
    }

    #[test]
    fn strict_refuses_a_bare_key() {
        assert_eq!(key(KeyFormat::Strict, "abc"), None);
        assert_eq!(key(KeyFormat::Strict, "\"abc\""), Some("abc".into()));
    }

    #[test]
    fn a_comma_is_a_key_only_inside_quotes() {
        assert_eq!(key(KeyFormat::Lenient, "a,b"), None);
        assert_eq!(key(KeyFormat::Lenient, "\"a,b\""), Some("a,b".into()));
    }

    #[test]
    fn empty_and_white_space_keys_are_refused() {
        for line in ["", "\"\"", " ", "\"  \""] {
            assert_eq!(key(KeyFormat::Lenient, line), None, "{line:?}");
        }
    }

    #[test]
    fn control_and_non_ascii_bytes_are_refused() {
        for line in [b"a\tb".as_slice(), b"caf\xc3\xa9", b"\x80"] {
            assert!(read(KeyFormat::Lenient, &[line]).is_err());
        }
    }

    #[test]
    fn two_lines_are_refused() {
        assert!(read(KeyFormat::Lenient, &[b"a", b"a"]).is_err());
    }

    #[test]
    fn uuids_are_lower_cased_and_the_uuid_format_refuses_anything_else() {
        let upper = "5B0CBE2A-1D6C-4A37-A1AD-0A7A0A3F2A11";
        assert_eq!(
            key(KeyFormat::Lenient, upper),
            Some(upper.to_ascii_lowercase())
        );
        assert_eq!(
            key(KeyFormat::Uuid, upper),
            Some(upper.to_ascii_lowercase())
        );
        assert_eq!(key(KeyFormat::Uuid, "order-1"), None);
        assert_eq!(key(KeyFormat::Lenient, "ORDER-1"), Some("ORDER-1".into()));
    }

    #[test]
    fn length_counts_after_unquoting() {
        let longest = "k".repeat(255);
        assert!(key(KeyFormat::Lenient, &format!("\"{longest}\"")).is_some());
        assert!(key(KeyFormat::Lenient, &longest).is_some());
        assert!(key(KeyFormat::Lenient, &format!("{longest}k")).is_none());
    }
}
