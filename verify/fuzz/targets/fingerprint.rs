//! Bodies that mean the same are one request, and bodies that do not never are.

#![no_main]

use std::cell::LazyCell;
use std::collections::HashSet;

use fuzz::{Answer, Site, choice};
use http::{HeaderMap, HeaderValue, StatusCode};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use tower_idempotency::{Fingerprinter, Policy, Scope};

const JSON: &[u8] = b"application/json";
const FORM: &[u8] = b"application/x-www-form-urlencoded";

thread_local! {
    static SITE: LazyCell<Site> = const { LazyCell::new(|| {
        let by = Fingerprinter::canonical_json()
            .with_sorted_form()
            .with_multipart()
            .without_member("/ignored")
            .expect("the pointer is valid");
        Site::new(Scope::global(), Policy::high().with_volatile_store(true).with_fingerprint(by))
    }) };
}

/// Whether the second request is a retry of the first.
fn same(one: (&[u8], &[u8]), two: (&[u8], &[u8])) -> bool {
    let headers = |kind: &[u8]| {
        let mut headers = HeaderMap::new();
        headers.insert("idempotency-key", HeaderValue::from_static("key"));
        let kind = HeaderValue::from_bytes(kind).unwrap_or(HeaderValue::from_static(""));
        headers.insert("content-type", kind);
        headers
    };
    SITE.with(|site| {
        let first = site.send(headers(one.0), one.1);
        assert!(matches!(first, Answer::Ran(..)), "{first:?}");
        let second = site.send(headers(two.0), two.1);
        site.forget();
        match second {
            Answer::Replayed => true,
            Answer::Refused(StatusCode::CONFLICT) => false,
            other => panic!("neither a retry nor another request: {other:?}"),
        }
    })
}

/// With its members in another order, and spaces between all.
fn reordered(value: &Value, text: &mut String) {
    match value {
        Value::Array(items) => {
            text.push_str("[ ");
            for (n, item) in items.iter().enumerate() {
                text.push_str(if n > 0 { " ,\n" } else { "" });
                reordered(item, text);
            }
            text.push_str("\t]");
        }
        Value::Object(members) => {
            text.push('{');
            for (n, (name, member)) in members.iter().rev().enumerate() {
                text.push_str(if n > 0 { ", " } else { "\r" });
                text.push_str(&Value::from(name.as_str()).to_string());
                text.push_str(" : ");
                reordered(member, text);
            }
            text.push('}');
        }
        scalar => text.push_str(&scalar.to_string()),
    }
}

/// Changes one scalar; which, is chosen.
fn change(value: &mut Value, countdown: &mut usize) -> bool {
    match value {
        Value::Array(items) => items.iter_mut().any(|item| change(item, countdown)),
        Value::Object(members) => members.values_mut().any(|member| change(member, countdown)),
        scalar if *countdown == 0 => {
            *scalar = match &*scalar {
                Value::String(text) => Value::String(format!("{text}x")),
                Value::Bool(is) => Value::Bool(!is),
                Value::Number(number) => Value::from(number.as_i64().map_or(0, |n| n + 1)),
                _ => Value::Bool(true),
            };
            true
        }
        _ => {
            *countdown -= 1;
            false
        }
    }
}

/// How many members, and whether every number is an integer that a double has.
fn measure(value: &Value, members: &mut usize) -> bool {
    match value {
        Value::Array(items) => items.iter().all(|item| measure(item, members)),
        Value::Object(object) => {
            *members += object.len();
            object.values().all(|member| measure(member, members))
        }
        Value::Number(number) => number
            .as_i64()
            .is_some_and(|n| n.abs() < 1_000_000_000_000_000),
        _ => true,
    }
}

/// Colons outside of strings.
fn colons(text: &[u8]) -> usize {
    let (mut in_string, mut is_escaped, mut count) = (false, false, 0);
    for byte in text {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_string => is_escaped = true,
            b'"' => in_string = !in_string,
            b':' if !in_string => count += 1,
            _ => {}
        }
    }
    count
}

fn json(n: u8, body: &[u8]) {
    assert!(same((JSON, body), (JSON, body)));
    let Ok(mut value) = serde_json::from_slice::<Value>(body) else {
        return;
    };
    let mut members = 0;
    let is_exact = measure(&value, &mut members);
    let Ok(canonical) = serde_json_canonicalizer::to_vec(&value) else {
        return;
    };
    // A member that is named twice, or what stands for a number that a double rounds.
    let has_form = members == colons(body) && !canonical.windows(10).any(|w| w == br#"["\u0000"]"#);
    let is_exact = is_exact && !body.iter().any(|byte| b"eE.".contains(byte));
    let mut other = String::new();
    reordered(&value, &mut other);
    if is_exact && has_form {
        assert!(
            same((JSON, body), (JSON, other.as_bytes())),
            "reordered: {other}"
        );
        assert!(same((JSON, body), (JSON, &canonical)), "canonical form");
        if let Value::Object(object) = &mut value {
            let mut ignored = object.clone();
            ignored.insert("ignored".into(), Value::from(n));
            let ignored = Value::Object(ignored).to_string();
            assert!(
                same((JSON, body), (JSON, ignored.as_bytes())),
                "ignored: {ignored}"
            );
            object.remove("ignored");
        }
    }
    if is_exact && change(&mut value, &mut usize::from(n)) {
        let changed = value.to_string();
        assert!(
            !same((JSON, body), (JSON, changed.as_bytes())),
            "changed: {changed}"
        );
    }
}

fn decoded(part: &[u8]) -> Vec<u8> {
    let spaces: Vec<u8> = part
        .iter()
        .map(|b| if *b == b'+' { b' ' } else { *b })
        .collect();
    percent_encoding::percent_decode(&spaces).collect()
}

fn form(n: u8, body: &[u8]) {
    assert!(same((FORM, body), (FORM, body)));
    let pairs: Vec<&[u8]> = body
        .split(|b| *b == b'&')
        .filter(|pair| !pair.is_empty())
        .collect();
    let name = |pair: &[u8]| decoded(pair.split(|b| *b == b'=').next().unwrap_or_default());
    let names: HashSet<_> = pairs.iter().map(|pair| name(pair)).collect();
    let is_list = |name: &Vec<u8>| name.windows(2).any(|two| two == b"[]");
    if names.len() == pairs.len() && !names.iter().any(is_list) {
        let reversed: Vec<_> = pairs.iter().rev().copied().collect();
        let reversed = reversed.join(&b'&');
        assert!(
            same((FORM, body), (FORM, &reversed)),
            "reversed: {reversed:?}"
        );
    }
    if !pairs.is_empty() {
        let mut changed: Vec<_> = pairs.iter().map(|pair| pair.to_vec()).collect();
        let at = usize::from(n) % changed.len();
        changed[at].push(b'x');
        let changed = changed.join(&b'&');
        assert!(
            !same((FORM, body), (FORM, &changed)),
            "changed: {changed:?}"
        );
    }
}

/// The content in two parts, between delimiters of this name.
fn delimited(boundary: &str, n: u8, content: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (one, two) = content.split_at(usize::from(n).min(content.len()));
    let part = |name, content| {
        let head =
            format!("--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        [head.as_bytes(), content, b"\r\n"].concat()
    };
    let end = format!("--{boundary}--\r\n").into_bytes();
    let kind = format!("multipart/form-data; boundary={boundary}").into_bytes();
    (kind, [part("a", one), part("b", two), end].concat())
}

fn multipart(n: u8, content: &[u8]) {
    if content.windows(4).any(|part| part == b"--X-") {
        return;
    }
    let (one, two) = (delimited("X-1", n, content), delimited("X-2", n, content));
    assert!(same((&one.0, &one.1), (&two.0, &two.1)), "another boundary");
    let changed = delimited("X-2", n, &[content, b"x"].concat());
    assert!(!same((&one.0, &one.1), (&changed.0, &changed.1)), "changed");
    let moved = delimited("X-2", n.wrapping_add(1), content);
    if usize::from(n) < content.len() && n < 255 {
        assert!(
            !same((&one.0, &one.1), (&moved.0, &moved.1)),
            "moved to another part"
        );
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = choice(input) else {
        return;
    };
    let Some((n, body)) = choice(rest) else {
        return;
    };
    match kind {
        b'j' => json(n, body),
        b'f' => form(n, body),
        b'm' => multipart(n, body),
        // Any content type, in a line of its own.
        _ => {
            let mut halves = rest.splitn(2, |byte| *byte == b'\n');
            let kind = halves.next().unwrap_or_default();
            let body = halves.next().unwrap_or_default();
            assert!(same((kind, body), (kind, body)));
        }
    }
});
