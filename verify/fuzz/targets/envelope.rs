//! Stored answers: what cannot be read is refused, and what was changed is never replayed.

#![no_main]

use bytes::Bytes;
use fuzz::choice;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, Response, StatusCode};
use libfuzzer_sys::fuzz_target;
use tower_idempotency::Envelope;

/// What can be read is written and read again.
fn round_trips(bytes: &[u8]) {
    if let Ok(envelope) = Envelope::decode(bytes) {
        let again = Envelope::decode(&envelope.encode()).expect("what was written is read");
        assert_eq!(again, envelope);
    }
}

/// `status`, then lines of `name: value`, an empty line, and the body.
fn answer(text: &[u8]) -> Option<Envelope> {
    let (status, rest) = text.split_first_chunk::<2>()?;
    let status = StatusCode::from_u16(u16::from_be_bytes(*status) % 1000).ok()?;
    let mut headers = HeaderMap::new();
    let mut lines = rest.split(|byte| *byte == b'\n');
    for line in lines.by_ref().take_while(|line| !line.is_empty()) {
        let at = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..at]).ok()?;
        headers.append(name, HeaderValue::from_bytes(&line[at + 1..]).ok()?);
    }
    let body: Vec<_> = lines.collect();
    let mut answer = Response::new(Bytes::from(body.join(&b'\n')));
    *answer.status_mut() = status;
    if rest.first() == Some(&b'\n') {
        return Some(Envelope::tombstone(status, &headers));
    }
    *answer.headers_mut() = headers;
    Some(Envelope::new(answer))
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = choice(input) else {
        return;
    };
    match kind {
        b'a' => {
            let Some(envelope) = answer(rest) else { return };
            let bytes = envelope.encode();
            assert_eq!(Envelope::decode(&bytes).as_ref(), Ok(&envelope));
            for bit in 0..8 * bytes.len().min(64) {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert!(
                    Envelope::decode(&changed).is_err(),
                    "bit {bit} of {bytes:?}"
                );
            }
            for len in 0..bytes.len() {
                assert!(
                    Envelope::decode(&bytes[..len]).is_err(),
                    "{len} bytes of {bytes:?}"
                );
            }
        }
        // With the right checksum, so that the rest is read as well.
        b'c' => {
            let mut bytes = rest.to_vec();
            bytes.extend(crc32fast::hash(rest).to_be_bytes());
            round_trips(&bytes);
        }
        _ => round_trips(rest),
    }
});
