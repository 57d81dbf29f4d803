//! One bit is enough.

use std::time::{Duration, UNIX_EPOCH};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;

use crate::common::fired::fired;
use crate::sender::{ALL, Delivery, Provider};

/// The parts of a delivery that its signature covers, and the signature.
fn parts(provider: Provider, delivery: &Delivery) -> Vec<(Option<&'static str>, Vec<u8>)> {
    let signature = delivery.header(&delivery.signature()).into_bytes();
    let mut parts = vec![
        (None, delivery.body.to_vec()),
        (Some(provider.signature_header()), signature),
    ];
    if matches!(provider, Provider::Standard | Provider::Asymmetric) {
        parts.push((Some("webhook-id"), delivery.id.clone().into_bytes()));
        parts.push((
            Some("webhook-timestamp"),
            delivery.time.to_string().into_bytes(),
        ));
    }
    parts
}

/// `None` where the bytes are none that a header can have.
fn verifies(
    provider: Provider,
    delivery: &Delivery,
    parts: &[(Option<&'static str>, Vec<u8>)],
) -> Option<bool> {
    let mut headers = HeaderMap::new();
    headers.insert("x-github-delivery", HeaderValue::from_static("unsigned"));
    let mut body = &[][..];
    for (name, bytes) in parts {
        match name {
            None => body = bytes,
            Some(name) => {
                let value = HeaderValue::from_bytes(bytes).ok()?;
                headers.insert(HeaderName::from_static(name), value);
            }
        }
    }
    fired("delivery");
    let now = UNIX_EPOCH + Duration::from_secs(delivery.time);
    Some(provider.keyed().verify(&headers, body, now).is_ok())
}

fn delivery(provider: Provider, body: &[u8]) -> Delivery {
    // Stripe's event tells its id in its body.
    let body = match provider {
        Provider::Stripe => format!(r#"{{"id":"evt_1","data":"{}"}}"#, hex::encode(body)).into(),
        _ => body.to_vec(),
    };
    provider.delivery().body(body)
}

#[test]
fn h03_a_bit_flipped_anywhere_in_the_headers_never_verifies() {
    for provider in ALL {
        let delivery = delivery(provider, b"body");
        let parts = parts(provider, &delivery);
        assert_eq!(
            verifies(provider, &delivery, &parts),
            Some(true),
            "{provider:?}"
        );
        for part in 1..parts.len() {
            for bit in 0..parts[part].1.len() * 8 {
                let mut flipped = parts.clone();
                flipped[part].1[bit / 8] ^= 1 << (bit % 8);
                let verified = verifies(provider, &delivery, &flipped);
                assert_ne!(verified, Some(true), "{provider:?} {:?}", flipped[part]);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn h03_a_bit_flipped_anywhere_in_the_body_never_verifies(
        body in prop::collection::vec(any::<u8>(), 1..200),
        at: prop::sample::Index,
    ) {
        for provider in ALL {
            let delivery = delivery(provider, &body);
            let mut parts = parts(provider, &delivery);
            prop_assert_eq!(verifies(provider, &delivery, &parts), Some(true));
            let bit = at.index(parts[0].1.len() * 8);
            parts[0].1[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(verifies(provider, &delivery, &parts), Some(false));
        }
    }

    #[test]
    fn headers_of_any_bytes_are_an_answer(
        signature in prop::collection::vec(any::<u8>(), 0..200),
        id in prop::collection::vec(any::<u8>(), 0..40),
        time in prop::collection::vec(any::<u8>(), 0..20),
        body in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        for provider in ALL {
            let delivery = provider.delivery();
            let parts = [
                (None, body.clone()),
                (Some(provider.signature_header()), signature.clone()),
                (Some("webhook-id"), id.clone()),
                (Some("webhook-timestamp"), time.clone()),
            ];
            prop_assert_ne!(verifies(provider, &delivery, &parts), Some(true));
        }
    }
}
