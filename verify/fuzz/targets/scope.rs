//! Scopes that are told by headers: two principals are never one.

#![no_main]

use std::cell::LazyCell;

use fuzz::{Answer, Site};
use http::{HeaderMap, HeaderValue, StatusCode};
use libfuzzer_sys::fuzz_target;
use tower_idempotency::{Policy, Scope};

thread_local! {
    static ONE: LazyCell<Site> = const { LazyCell::new(|| site(header("x-tenant"))) };
    static TWO: LazyCell<Site> = const {
        LazyCell::new(|| site(Scope::all([header("x-tenant"), header("x-user")])))
    };
}

fn header(name: &str) -> Scope {
    Scope::header(name).expect("the name is valid")
}

fn site(scope: Scope) -> Site {
    Site::new(scope, Policy::high().with_volatile_store(true))
}

fn scope(site: &Site, tenant: &[u8], user: &[u8]) -> Option<String> {
    let mut headers = HeaderMap::new();
    headers.insert("idempotency-key", HeaderValue::from_static("key"));
    headers.insert("x-tenant", HeaderValue::from_bytes(tenant).ok()?);
    headers.insert("x-user", HeaderValue::from_bytes(user).ok()?);
    let answer = site.send(headers, b"");
    site.forget();
    match answer {
        Answer::Ran(scope, _) => Some(scope),
        Answer::Refused(status) => {
            assert_eq!(status, StatusCode::FORBIDDEN);
            None
        }
        Answer::Replayed => panic!("nobody was here before"),
    }
}

fuzz_target!(|input: &[u8]| {
    let mut lines = input.splitn(4, |byte| *byte == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    let (one, two) = ((line(), line()), (line(), line()));
    if let Some(scope) = ONE.with(|site| scope(site, one.0, one.1)) {
        assert_eq!(scope.as_bytes(), one.0);
    }
    let first = TWO.with(|site| scope(site, one.0, one.1));
    let second = TWO.with(|site| scope(site, two.0, two.1));
    if let (Some(first), Some(second)) = (first, second) {
        assert_eq!(first == second, one == two, "{one:?} and {two:?}");
    }
});
