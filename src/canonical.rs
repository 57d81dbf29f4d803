//! One form for JSON documents that mean the same (RFC 8785), and none for those where it could
//! make two meanings one.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// An IEEE 754 double keeps 15 significant decimal digits apart; RFC 8785 writes numbers as doubles.
const EXACT_DIGITS: usize = 15;

/// The canonical form, or `None` for what is not JSON, names a member twice, or holds a number that
/// a double would round: those are compared byte for byte.
pub(crate) fn json(body: &[u8]) -> Option<Vec<u8>> {
    if has_long_number(body) {
        return None;
    }
    let Unique(value) = serde_json::from_slice(body).ok()?;
    serde_json_canonicalizer::to_vec(&value).ok()
}

/// More significant digits in one number than a double keeps apart, or an exponent out of its
/// range. Counts digits outside strings; invalid JSON is left to the parser.
fn has_long_number(body: &[u8]) -> bool {
    let (mut in_string, mut escaped, mut digits) = (false, false, 0);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => (in_string, digits) = (!in_string, 0),
            b'0'..=b'9' if !in_string => digits += 1,
            b'.' => {}
            b'e' | b'E' if !in_string && digits > 0 => return true,
            _ => digits = 0,
        }
        if digits > EXACT_DIGITS {
            return true;
        }
    }
    false
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
mod tests {
    use super::json;

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
