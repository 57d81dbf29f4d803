//! One form for bodies that mean the same, and none for those where it could make two meanings one.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// An IEEE 754 double keeps 15 significant decimal digits apart; RFC 8785 writes numbers as doubles.
const EXACT_DIGITS: usize = 15;

/// Stands for a long number; where it is left in the end, there is no canonical form. Nor is there one for a
/// body that says the same by itself.
const LONG: &[u8] = br#"["\u0000long"]"#;

/// The canonical form, or `None` for what is not JSON, names a member twice, or holds a number that
/// a double would round: those are compared byte for byte.
///
/// RFC 8785, after the members that the pointers name are taken out.
pub(crate) fn json(body: &[u8], without: &[String]) -> Option<Vec<u8>> {
    let Unique(mut value) = serde_json::from_slice(&without_long_numbers(body)).ok()?;
    for pointer in without {
        remove(&mut value, pointer);
    }
    exact(&value)
}

/// The canonical forms of members that are there and not null.
pub(crate) fn members(body: &[u8], pointers: &[String]) -> Option<Vec<Vec<u8>>> {
    let Unique(value) = serde_json::from_slice(&without_long_numbers(body)).ok()?;
    let members = pointers.iter().map(|pointer| {
        let member = value.pointer(pointer).filter(|member| !member.is_null())?;
        exact(member)
    });
    members.collect()
}

fn exact(value: &Value) -> Option<Vec<u8>> {
    let form = serde_json_canonicalizer::to_vec(value).ok()?;
    let has_long = form.windows(LONG.len()).any(|part| part == LONG);
    (!has_long).then_some(form)
}

/// RFC 6901: the last token names the member of what the others lead to.
fn remove(value: &mut Value, pointer: &str) {
    let Some((parent, name)) = pointer.rsplit_once('/') else {
        return;
    };
    if let Some(Value::Object(object)) = value.pointer_mut(parent) {
        object.remove(&name.replace("~1", "/").replace("~0", "~"));
    }
}

/// The decoded pairs (WHATWG URL, section 5.1), each length-prefixed, sorted by name, or by what is
/// before its first bracket where a name has `[]`. Bytes that are not UTF-8 stay as they are: a decoder that replaces them makes different bytes one.
pub(crate) fn form(body: &[u8]) -> Vec<u8> {
    let pairs = body.split(|b| *b == b'&').filter(|pair| !pair.is_empty());
    let mut pairs: Vec<_> = pairs
        .map(|pair| {
            let mut halves = pair.splitn(2, |b| *b == b'=');
            let name = halves.next().unwrap_or_default();
            (decoded(name), decoded(halves.next().unwrap_or_default()))
        })
        .collect();
    // `a[][b]`: a nested list, whose items are told apart by the order of their names.
    let has_lists = pairs.iter().any(|(name, _)| is_list(name));
    pairs.sort_by(|a, b| match has_lists {
        true => root(&a.0).cmp(root(&b.0)),
        false => a.0.cmp(&b.0),
    });
    let mut form = Vec::with_capacity(body.len() + 16 * pairs.len());
    for (name, value) in &pairs {
        for part in [name, value] {
            form.extend((part.len() as u64).to_be_bytes());
            form.extend(part);
        }
    }
    form
}

fn is_list(name: &[u8]) -> bool {
    name.windows(2).any(|two| two == b"[]")
}

/// What is before the first bracket.
fn root(name: &[u8]) -> &[u8] {
    name.split(|b| *b == b'[').next().unwrap_or_default()
}

fn decoded(part: &[u8]) -> Vec<u8> {
    let spaces: Vec<u8> = part
        .iter()
        .map(|b| if *b == b'+' { b' ' } else { *b })
        .collect();
    percent_encoding::percent_decode(&spaces).collect()
}

/// A digest of the parts in order: their headers, sorted by name, and contents. `None` for what
/// cannot be read as its content type says.
///
/// Contents go through the digest as they are read, so memory does not grow with them.
#[cfg(feature = "multipart")]
pub(crate) fn multipart(content_type: &str, body: &[u8]) -> Option<Vec<u8>> {
    use futures_util::FutureExt;

    let boundary = multer::parse_boundary(content_type).ok()?;
    let body = bytes::Bytes::copy_from_slice(body);
    let body = futures_util::stream::once(async move { Ok::<_, std::convert::Infallible>(body) });
    // The body is whole: nothing is ever waited for.
    parts(multer::Multipart::new(body, boundary)).now_or_never()?
}

#[cfg(feature = "multipart")]
async fn parts(mut multipart: multer::Multipart<'_>) -> Option<Vec<u8>> {
    let mut digest = crate::digest::Fields::new("tower-idempotency multipart 1");
    while let Some(mut field) = multipart.next_field().await.ok()? {
        // As they stand: what this parser makes nothing of, the handler's may.
        let mut headers: Vec<_> = field.headers().iter().collect();
        headers.sort_by_key(|(name, _)| name.as_str());
        digest.push(&headers.len().to_be_bytes());
        for (name, value) in headers {
            digest.push(name.as_str().as_bytes()).push(value.as_bytes());
        }
        let mut content = crate::digest::Fields::new("tower-idempotency part 1");
        while let Some(chunk) = field.chunk().await.ok()? {
            content.extend(&chunk);
        }
        digest.push(&content.finish());
    }
    Some(digest.finish().to_vec())
}

/// The body with [`LONG`] in place of each number outside strings that has more significant digits
/// than a double keeps apart, or an exponent. Invalid JSON is left to the parser.
fn without_long_numbers(body: &[u8]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(body.len());
    let (mut in_string, mut at) = (false, 0);
    while let Some(&byte) = body.get(at) {
        let is_number = !in_string && (byte == b'-' || byte.is_ascii_digit());
        let len = match byte {
            b'\\' if in_string => 2.min(body.len() - at),
            _ if is_number => number_len(&body[at..]),
            _ => 1,
        };
        in_string ^= byte == b'"';
        let token = &body[at..at + len];
        kept.extend(if is_number && is_long(token) {
            LONG
        } else {
            token
        });
        at += len;
    }
    kept
}

fn number_len(text: &[u8]) -> usize {
    let is_part = |b: &u8| b.is_ascii_digit() || b"+-.eE".contains(b);
    let end = text.iter().position(|b| !is_part(b));
    end.unwrap_or(text.len())
}

fn is_long(number: &[u8]) -> bool {
    let digits = number.iter().filter(|b| b.is_ascii_digit()).count();
    let has_exponent = number.iter().any(|b| b"eE".contains(b));
    (digits > EXACT_DIGITS || has_exponent)
        && serde_json::from_slice::<serde::de::IgnoredAny>(number).is_ok()
}

/// A JSON value in which no object names a member twice.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Self)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("number out of range"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((name, Unique(value))) = members.next_entry::<String, Unique>()? {
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("member named twice"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod properties;

#[cfg(test)]
mod tests {
    use super::form;

    fn json(body: &[u8]) -> Option<Vec<u8>> {
        super::json(body, &[])
    }

    #[test]
    fn members_that_are_left_out_do_not_matter_and_others_do() {
        let without = [
            "/sent_at".to_owned(),
            "/a~1b/c~0d".to_owned(),
            "/none/x".to_owned(),
        ];
        let form = |body: &str| super::json(body.as_bytes(), &without);
        let base = form(r#"{"sent_at": 1, "a/b": {"c~d": 2, "e": 3}}"#);
        assert_eq!(base, form(r#"{"a/b": {"e": 3}}"#));
        assert_ne!(base, form(r#"{"a/b": {"e": 4}}"#));
        assert_ne!(base, form(r#"{"a/b": {"e": 3}, "c~d": 2}"#));
    }

    /// What stands for a long number is nothing that a body says by chance.
    #[test]
    fn a_text_of_a_nul_has_a_form() {
        assert_eq!(json(br#"["\u0000"]"#), json(br#"[ "\u0000" ]"#));
        assert!(json(br#"["\u0000"]"#).is_some());
        assert_eq!(json(br#"["\u0000long"]"#), None);
    }

    #[test]
    fn pairs_of_a_form_are_compared_decoded_and_sorted_by_name() {
        assert_eq!(form(b"b=2&a=1+1"), form(b"a=1%201&b=%32"));
        assert_eq!(form(b"a=1&&b="), form(b"a=1&b"));
        assert_ne!(form(b"a=1&a=2"), form(b"a=2&a=1"));
        assert_ne!(form(b"a=1&b=2"), form(b"a=12&b="));
        assert_ne!(form(b"a=%ff"), form(b"a=%fe"));
        assert_ne!(form(b"a=%26b=1"), form(b"a=&b=1"));
    }

    #[test]
    fn pairs_of_nested_lists_keep_their_order_across_names() {
        // For Rack, PHP and their like: two lines against one and a half.
        let one = form(b"line[][item]=a&line[][count]=1&line[][item]=b");
        let two = form(b"line[][item]=a&line[][item]=b&line[][count]=1");
        assert_ne!(one, two);
        assert_ne!(form(b"a[]=1&a[0]=2"), form(b"a[0]=2&a[]=1"));
        assert_ne!(form(b"a%5B%5D=1&a[0]=2"), form(b"a[0]=2&a%5B%5D=1"));
        assert_eq!(form(b"b=1&a[]=1&a[]=2"), form(b"a[]=1&a[]=2&b=1"));
        assert_eq!(form(b"a[x]=1&a[y]=2"), form(b"a[y]=2&a[x]=1"));
    }

    #[cfg(feature = "multipart")]
    mod multipart {
        fn form(boundary: &str, file: &str, name: &str) -> Option<Vec<u8>> {
            let body = format!(
                "--{boundary}\r\ncontent-disposition: form-data; name=\"note\"\r\n\r\nhello\r\n\
                 --{boundary}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\
                 content-type: text/plain\r\n\r\n{file}\r\n--{boundary}--\r\n"
            );
            let content_type = format!("multipart/form-data; boundary={boundary}");
            super::super::multipart(&content_type, body.as_bytes())
        }

        #[test]
        fn the_boundary_does_not_matter_and_every_part_does() {
            let base = form("one", "bytes", "a.txt");
            assert!(base.is_some());
            assert_eq!(base, form("two", "bytes", "a.txt"));
            assert_ne!(base, form("one", "other", "a.txt"));
            assert_ne!(base, form("one", "bytes", "b.txt"));
        }

        #[test]
        fn what_cannot_be_read_has_no_form() {
            let cut = b"--x\r\ncontent-disposition: form-data; name=\"a\"\r\n\r\nhalf";
            let read = |kind: &str, body: &[u8]| super::super::multipart(kind, body);
            assert_eq!(read("multipart/form-data; boundary=x", cut), None);
            assert_eq!(read("multipart/form-data", cut), None);
        }
    }

    #[test]
    fn order_white_space_and_spelling_of_numbers_do_not_matter() {
        let one = json(br#"{"b": 1.0, "a": [true, "x"]}"#);
        let two = json(br#"{"a":[true,"\u0078"],"b":1}"#);
        assert!(one.is_some());
        assert_eq!(one, two);
    }

    #[test]
    fn other_values_have_another_form() {
        assert_ne!(json(br#"{"a":1}"#), json(br#"{"a":2}"#));
        assert_ne!(json(br#"{"a":"1"}"#), json(br#"{"a":1}"#));
        assert_ne!(json(b"[1,2]"), json(b"[2,1]"));
    }

    #[test]
    fn numbers_that_a_double_would_round_have_no_form() {
        assert_eq!(json(b"[10000000000000001]"), None);
        assert_eq!(json(b"[0.10000000000000001]"), None);
        assert_eq!(json(b"[1e400]"), None);
        assert!(json(b"[999999999999999]").is_some());
        assert!(json(br#"["4111111111111111111"]"#).is_some());
    }

    #[test]
    fn a_long_number_in_what_is_left_out_does_not_matter() {
        let without = ["/sent_at".to_owned()];
        let form = |body: &str| super::json(body.as_bytes(), &without);
        let base = form(r#"{"a": 1}"#);
        assert!(base.is_some());
        for number in [
            "1732305000123456789",
            "-1.732305000123456789",
            "1e9",
            "1E+400",
        ] {
            assert_eq!(base, form(&format!(r#"{{"sent_at": {number}, "a": 1.0}}"#)));
            let beside = format!(r#"{{"sent_at": 1, "a": {number}}}"#);
            assert_eq!(form(&beside), None, "{beside}");
        }
        for wrong in ["01732305000123456789", "1e", "--1e5", "{1e5: 1}", "1e5\"\""] {
            let body = format!(r#"{{"sent_at": {wrong}, "a": 1}}"#);
            assert_eq!(form(&body), None, "{body}");
        }
    }

    #[test]
    fn a_long_number_beside_the_chosen_members_does_not_matter() {
        let pointers = ["/id".to_owned()];
        let members = |body: &str| super::members(body.as_bytes(), &pointers);
        let base = members(r#"{"id": "e_1"}"#);
        assert!(base.is_some());
        assert_eq!(
            base,
            members(r#"{"created": 1732305000123456789, "id": "e_1"}"#)
        );
        assert_eq!(members(r#"{"id": 1732305000123456789}"#), None);
        assert_eq!(members(r#"{"id": {"n": [1e3]}}"#), None);
    }

    #[test]
    fn a_member_named_twice_has_no_form() {
        assert_eq!(json(br#"{"a":1,"a":2}"#), None);
        assert_eq!(json(br#"[{"a":{"b":1,"b":1}}]"#), None);
    }

    #[test]
    fn what_is_not_json_has_no_form() {
        assert_eq!(json(b""), None);
        assert_eq!(json(b"{\"a\":1} x"), None);
    }
}
