//! `Idempotency-Key` in every format: a line of the input is a line of the header.

#![no_main]

use std::cell::LazyCell;

use fuzz::{Answer, Site};
use http::{HeaderMap, HeaderValue, StatusCode};
use libfuzzer_sys::fuzz_target;
use tower_idempotency::{KeyFormat, Policy, Scope};

const MAX: usize = 64;

thread_local! {
    static LENIENT: LazyCell<Site> = const { LazyCell::new(|| site(KeyFormat::Lenient)) };
    static STRICT: LazyCell<Site> = const { LazyCell::new(|| site(KeyFormat::Strict)) };
    static UUID: LazyCell<Site> = const { LazyCell::new(|| site(KeyFormat::Uuid)) };
}

fn policy() -> Policy {
    Policy::high()
        .with_volatile_store(true)
        .with_key_length(1, MAX)
}

fn site(format: KeyFormat) -> Site {
    Site::new(Scope::global(), policy().with_key_format(format))
}

/// The key that the handler was given.
fn key(site: &Site, lines: &[&[u8]]) -> Option<String> {
    let mut headers = HeaderMap::new();
    for line in lines {
        let Ok(line) = HeaderValue::from_bytes(line) else {
            return None;
        };
        headers.append("idempotency-key", line);
    }
    let answer = site.send(headers, b"");
    site.forget();
    match answer {
        Answer::Ran(_, key) => Some(key),
        Answer::Refused(status) => {
            assert_eq!(status, StatusCode::BAD_REQUEST, "of {lines:?}");
            None
        }
        Answer::Replayed => panic!("nobody was here before"),
    }
}

/// RFC 9651, section 4.1.6.
fn quoted(key: &str) -> String {
    format!("\"{}\"", key.replace('\\', "\\\\").replace('"', "\\\""))
}

fuzz_target!(|input: &[u8]| {
    let lines: Vec<_> = input.split(|byte| *byte == b'\n').collect();
    let read = LENIENT.with(|site| key(site, &lines));
    let strict = STRICT.with(|site| key(site, &lines));
    let uuid = UUID.with(|site| key(site, &lines));

    assert!(lines.len() == 1 || read.is_none(), "two lines are {read:?}");
    if let Some(uuid) = &uuid {
        assert_eq!(uuid.len(), 36);
        assert_eq!(read.as_ref(), Some(uuid));
    }
    if let Some(strict) = &strict {
        let read = read.as_ref().expect("the strict form is a lenient one");
        assert!(read.eq_ignore_ascii_case(strict));
    }
    if let Some(read) = read {
        assert!((1..=MAX).contains(&read.len()), "{read:?}");
        assert!(
            read.bytes().all(|byte| matches!(byte, b' '..=b'~')),
            "{read:?}"
        );
        let line = quoted(&read);
        for site in [&LENIENT, &STRICT] {
            let again = site.with(|site| key(site, &[line.as_bytes()]));
            assert_eq!(again.as_ref(), Some(&read), "of {line}");
        }
    }
});
