//! What the headers of a delivery say, before any of it is believed.
//!
//! Every function here is total: any bytes are an answer, and never a panic.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Each is compared with each secret, so a sender must not choose how many there are.
pub(crate) const MAX_SIGNATURES: usize = 8;

/// What a sender says it has computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Signature {
    Hmac([u8; 32]),
    Ed25519([u8; 64]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// None of a kind that is known here.
    Missing,
    /// More than [`MAX_SIGNATURES`].
    TooMany,
    /// No time of signing, or several.
    Timestamp,
}

/// `v1,<base64> v1a,<base64>`: the header of Standard Webhooks. Other versions are ignored.
pub(crate) fn standard(header: &[u8]) -> Result<Vec<Signature>, Fault> {
    let entries = header.split(|byte| *byte == b' ');
    collect(entries.filter_map(|entry| match split_once(entry, b',')? {
        (b"v1", text) => Some(base64(text).map(Signature::Hmac)),
        (b"v1a", text) => Some(base64(text).map(Signature::Ed25519)),
        _ => None,
    }))
}

/// `t=<seconds>,v1=<hex>,v1=<hex>`: the header of Stripe, with the time as it was written. Other
/// schemes, as `v0` of test events, are ignored.
pub(crate) fn stripe(header: &[u8]) -> Result<(&[u8], Vec<Signature>), Fault> {
    let items = || {
        let items = header.split(|byte| *byte == b',');
        items.filter_map(|item| split_once(item, b'='))
    };
    let signatures = collect(items().filter_map(|(name, value)| {
        let is_known = name == b"v1";
        is_known.then(|| hex(value).map(Signature::Hmac))
    }))?;
    let mut times = items().filter(|(name, _)| *name == b"t");
    match (times.next(), times.next()) {
        (Some((_, time)), None) => Ok((time, signatures)),
        _ => Err(Fault::Timestamp),
    }
}

/// `sha256=<hex>`: the header of GitHub.
pub(crate) fn github(header: &[u8]) -> Result<Vec<Signature>, Fault> {
    let value = header.strip_prefix(b"sha256=").ok_or(Fault::Missing)?;
    collect(std::iter::once(hex(value).map(Signature::Hmac)))
}

/// Seconds since 1970: 1 to 12 digits, which excludes milliseconds.
pub(crate) fn timestamp(text: &[u8]) -> Option<u64> {
    let is_number = (1..=12).contains(&text.len()) && text.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(text).ok().filter(|_| is_number)?;
    text.parse().ok()
}

/// Malformed ones match nothing, but they count.
fn collect(entries: impl Iterator<Item = Option<Signature>>) -> Result<Vec<Signature>, Fault> {
    let entries: Vec<_> = entries.take(MAX_SIGNATURES + 1).collect();
    match entries.len() {
        0 => Err(Fault::Missing),
        count if count > MAX_SIGNATURES => Err(Fault::TooMany),
        _ => Ok(entries.into_iter().flatten().collect()),
    }
}

fn split_once(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let position = bytes.iter().position(|byte| *byte == at)?;
    Some((&bytes[..position], &bytes[position + 1..]))
}

/// Padded and canonical: one signature has one spelling.
fn base64<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

/// In lower case: one signature has one spelling.
fn hex(text: &[u8]) -> Option<[u8; 32]> {
    let is_lower = !text.iter().any(u8::is_ascii_uppercase);
    let mut bytes = [0; 32];
    let decoded = hex::decode_to_slice(text, &mut bytes).ok();
    decoded.filter(|()| is_lower).map(|()| bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";

    #[test]
    fn versions_that_are_not_known_are_not_signatures() {
        assert_eq!(standard(b"v2,AAAA v1b,AAAA"), Err(Fault::Missing));
        assert_eq!(stripe(b"t=1,v0=00"), Err(Fault::Missing));
        assert_eq!(github(b"sha1=00"), Err(Fault::Missing));
        assert_eq!(standard(b""), Err(Fault::Missing));
    }

    #[test]
    fn a_malformed_signature_leaves_the_others() {
        let header = format!("t=1,v1=zz,v1={HEX},v1={}", HEX.to_uppercase());
        let (time, signatures) = stripe(header.as_bytes()).unwrap();
        assert_eq!((time, signatures.len()), (&b"1"[..], 1));
    }

    #[test]
    fn more_signatures_than_the_bound_are_refused_and_malformed_ones_count() {
        assert!(standard("v1,x ".repeat(MAX_SIGNATURES).as_bytes()).is_ok());
        let many = "v1,x ".repeat(MAX_SIGNATURES + 1);
        assert_eq!(standard(many.as_bytes()), Err(Fault::TooMany));
    }

    #[test]
    fn a_time_is_told_once() {
        let one = format!("v1={HEX}");
        assert_eq!(stripe(one.as_bytes()), Err(Fault::Timestamp));
        let two = format!("t=1,t=2,v1={HEX}");
        assert_eq!(stripe(two.as_bytes()), Err(Fault::Timestamp));
    }

    #[test]
    fn a_time_is_a_number_of_seconds() {
        assert_eq!(timestamp(b"1614265330"), Some(1_614_265_330));
        for wrong in [
            "",
            "-1",
            "+1",
            "1.5",
            " 1",
            "1e3",
            "1614265330000",
            "\u{661}",
        ] {
            assert_eq!(timestamp(wrong.as_bytes()), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(header in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = (standard(&header), github(&header), timestamp(&header));
            let _ = stripe(&header);
        }

        #[test]
        fn any_text_that_is_nearly_a_header_is_an_answer(header in "((t|v0|v1|v1a|sha256)[=,][0-9a-zA-Z+/=]{0,90}[, ]){0,12}") {
            let header = header.as_bytes();
            for found in [standard(header), stripe(header).map(|(_, found)| found)] {
                prop_assert!(found.is_err() || found.unwrap().len() <= MAX_SIGNATURES);
            }
        }
    }
}
