//! Deliveries of strangers: nothing is accepted but what was signed.

#![no_main]

use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fuzz::choice;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use sha2::Sha256;
use tower_idempotency::webhook::Scheme;

const TIME: u64 = 1_614_265_330;
const ID: &str = "evt_1";

struct Provider {
    scheme: Scheme,
    /// The headers of the signature, the id and the time.
    names: [Option<&'static str>; 3],
    sign: fn(&[u8]) -> String,
}

fn mac(secret: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("any length will do");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().to_vec()
}

fn provider(choice: u8) -> Provider {
    match choice % 3 {
        0 => Provider {
            scheme: Scheme::standard_webhooks("bank")
                .with_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
                .and_then(|scheme| {
                    scheme.with_public_key("whpk_11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=")
                })
                .expect("the keys are valid"),
            names: [
                Some("webhook-signature"),
                Some("webhook-id"),
                Some("webhook-timestamp"),
            ],
            sign: |body| {
                let secret = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
                let head = format!("{ID}.{TIME}.");
                let tag = mac(&secret.expect("it is base64"), &[head.as_bytes(), body]);
                format!("v1,{}", STANDARD.encode(tag))
            },
        },
        1 => Provider {
            scheme: Scheme::stripe("stripe")
                .with_secret("whsec_5WbX5kEWLlfzsGNjH64I8lOOqUB6e8FH")
                .expect("the secret is valid"),
            names: [Some("stripe-signature"), None, None],
            sign: |body| {
                let secret = b"whsec_5WbX5kEWLlfzsGNjH64I8lOOqUB6e8FH";
                let tag = mac(secret, &[format!("{TIME}.").as_bytes(), body]);
                format!("t={TIME},v1={}", hex::encode(tag))
            },
        },
        _ => Provider {
            scheme: Scheme::github("github")
                .with_secret("It's a Secret to Everybody")
                .expect("the secret is valid"),
            names: [Some("x-hub-signature-256"), Some("x-github-delivery"), None],
            sign: |body| {
                let tag = mac(b"It's a Secret to Everybody", &[body]);
                format!("sha256={}", hex::encode(tag))
            },
        },
    }
}

impl Provider {
    /// The event id and time, if the delivery is accepted.
    fn accepts(&self, values: [&[u8]; 3], body: &[u8]) -> Option<(String, Option<u64>)> {
        let mut headers = HeaderMap::new();
        for (name, value) in self.names.iter().zip(values) {
            if let Some(name) = name {
                headers.append(*name, HeaderValue::from_bytes(value).ok()?);
            }
        }
        let now = UNIX_EPOCH + Duration::from_secs(TIME);
        let event = self.scheme.verify(&headers, body, now).ok()?;
        let time = event.timestamp().map(|time| {
            time.duration_since(UNIX_EPOCH)
                .expect("it is later")
                .as_secs()
        });
        Some((event.id().to_owned(), time))
    }
}

// The first byte names the sender, the second what happens to the delivery: it is made up of lines,
// or signed and then changed in one bit.
fuzz_target!(|input: &[u8]| {
    let Some((sender, rest)) = choice(input) else {
        return;
    };
    let Some((how, rest)) = choice(rest) else {
        return;
    };
    let provider = provider(sender);
    if how == b'l' {
        let mut lines = rest.splitn(4, |byte| *byte == b'\n');
        let mut line = || lines.next().unwrap_or_default();
        let (values, body) = ([line(), line(), line()], line());
        // The corpus has none: a signature that fits would have to be found.
        assert_eq!(provider.accepts(values, body), None);
        return;
    }
    let Some((at, rest)) = rest.split_first_chunk::<2>() else {
        return;
    };
    let body = [
        br#"{"id":"evt_1","of":""#,
        hex::encode(rest).as_bytes(),
        br#""}"#,
    ]
    .concat();
    let signature = (provider.sign)(&body);
    let time = TIME.to_string();
    let signed = [signature.as_bytes(), ID.as_bytes(), time.as_bytes(), &body];
    let told = provider.accepts([signed[0], signed[1], signed[2]], &body);
    let (id, told_time) = told.expect("what was signed is accepted");
    assert_eq!(id, ID);
    assert!(told_time.is_none_or(|told| told == TIME));

    let mut changed = signed.map(<[u8]>::to_vec);
    let part = &mut changed[usize::from(how) % 4];
    let bit = usize::from(u16::from_be_bytes(*at)) % (8 * part.len());
    part[bit / 8] ^= 1 << (bit % 8);
    let values = [&changed[0][..], &changed[1], &changed[2]];
    if let Some((id, told_time)) = provider.accepts(values, &changed[3]) {
        // Another spelling of the same signature, or a header that is not signed.
        assert_eq!(changed[3], body, "another body is accepted");
        let has_signed_id = provider.names[2].is_some() || provider.names[1].is_none();
        assert!(!has_signed_id || id == ID, "another id is accepted: {id}");
        assert!(
            told_time.is_none_or(|told| told == TIME),
            "another time is accepted"
        );
    }
});
