//! Signatures that others have made.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use tower_idempotency::webhook::WebhookEvent;
use tower_idempotency::{Code, Rejection};

use crate::sender::Provider;

const TIME: u64 = 1_614_265_330;

fn verify(
    provider: Provider,
    headers: &[(&'static str, &'static str)],
    body: &str,
) -> Result<WebhookEvent, Rejection> {
    let pairs = headers.iter().map(|(name, value)| {
        let value = HeaderValue::from_static(value);
        (HeaderName::from_static(name), value)
    });
    let headers: HeaderMap = pairs.collect();
    let now = UNIX_EPOCH + Duration::from_secs(TIME);
    provider.keyed().verify(&headers, body.as_bytes(), now)
}

/// What is said of a signature of [`TIME`] at another time.
fn at(now: SystemTime) -> Result<(), Code> {
    let header = "t=1614265330,v1=cf42810b72c1d8f9fec5ced737cfd5267937d51acfa01e82364eca2f72310c06";
    let headers = HeaderMap::from_iter([(
        HeaderName::from_static("stripe-signature"),
        HeaderValue::from_static(header),
    )]);
    let body = br#"{"id":"evt_1","object":"event"}"#;
    let verified = Provider::Stripe.keyed().verify(&headers, body, now);
    verified.map(|_| ()).map_err(|rejection| rejection.code())
}

#[test]
fn the_tolerance_is_five_minutes_to_the_second_before_and_after() {
    let seconds = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
    assert_eq!(at(seconds(TIME + 300)), Ok(()));
    assert_eq!(at(seconds(TIME + 301)), Err(Code::TimestampTooOld));
    assert_eq!(at(seconds(TIME - 300)), Ok(()));
    assert_eq!(at(seconds(TIME - 301)), Err(Code::TimestampInFuture));
}

#[test]
fn a_clock_before_1970_finds_every_signature_in_the_future() {
    let before = UNIX_EPOCH - Duration::from_secs(TIME);
    assert_eq!(at(before), Err(Code::TimestampInFuture));
}

fn standard(provider: Provider, signature: &'static str, body: &str) -> Result<WebhookEvent, Code> {
    let headers = [
        ("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek"),
        ("webhook-timestamp", "1614265330"),
        ("webhook-signature", signature),
    ];
    verify(provider, &headers, body).map_err(|rejection| rejection.code())
}

/// From the tests of the libraries of Standard Webhooks.
#[test]
fn the_published_vector_of_standard_webhooks_verifies() {
    let signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
    let event = standard(Provider::Standard, signature, r#"{"test": 2432232314}"#).unwrap();
    assert_eq!(event.id(), "msg_p5jXN8AQM9LWM0D4loKWxJek");
    assert_eq!(event.source(), "bank");
    let time = UNIX_EPOCH + Duration::from_secs(TIME);
    assert_eq!(event.timestamp(), Some(time));
    let other = standard(Provider::Standard, signature, r#"{"test": 2432232315}"#);
    assert_eq!(other, Err(Code::SignatureInvalid));
}

/// Signed by libsodium with the first key of RFC 8032, section 7.1.
#[test]
fn an_ed25519_signature_of_another_library_verifies() {
    let signature = "v1a,fldxM4gAKugP6nnt1hdz3sgGfZ6d99nzrMFnZOELIxbzEHoVmAb2ADpkJK7zgPePmPsle0zV9jSeGlHFG2NVAw==";
    assert!(standard(Provider::Asymmetric, signature, r#"{"test": 2432232314}"#).is_ok());
    let other = standard(Provider::Asymmetric, signature, r#"{"test": 2432232315}"#);
    assert_eq!(other, Err(Code::SignatureInvalid));
}

/// Signed by `generate_signature_header` of Stripe's library for Python, 16.1.0.
#[test]
fn a_signature_of_stripes_own_library_verifies() {
    let header = "t=1614265330,v1=cf42810b72c1d8f9fec5ced737cfd5267937d51acfa01e82364eca2f72310c06";
    let body = r#"{"id":"evt_1","object":"event"}"#;
    let event = verify(Provider::Stripe, &[("stripe-signature", header)], body).unwrap();
    assert_eq!(event.id(), "evt_1");
}

/// From GitHub's documentation of its webhooks.
#[test]
fn the_published_vector_of_github_verifies() {
    let headers = [
        ("x-github-delivery", "72d3162e-cc78-11e3-81ab-4c9367dc0958"),
        (
            "x-hub-signature-256",
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
        ),
    ];
    let event = verify(Provider::GitHub, &headers, "Hello, World!").unwrap();
    assert_eq!(event.id(), "72d3162e-cc78-11e3-81ab-4c9367dc0958");
    assert_eq!(event.timestamp(), None);
    assert!(verify(Provider::GitHub, &headers, "Hello, world!").is_err());
}
