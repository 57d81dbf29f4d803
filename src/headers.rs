//! Which headers of the first answer a retry gets too.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// On replays, and on replays alone.
pub(crate) const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// On answers that were given without a record, because the store was down.
pub(crate) const UNPROTECTED: HeaderName = HeaderName::from_static("idempotency-unprotected");
/// Until when an answer is replayed, where the policy shows it.
pub(crate) const EXPIRES: HeaderName = HeaderName::from_static("idempotency-expires");

/// Belongs to one exchange or one moment: the connection (RFC 9110, section 7.6.1), the clock, the
/// session, the trace.
const NOT_REPLAYED: [HeaderName; 20] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::DATE,
    header::AGE,
    header::SET_COOKIE,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("baggage"),
    HeaderName::from_static("b3"),
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static("x-correlation-id"),
    HeaderName::from_static("server-timing"),
    HeaderName::from_static("alt-svc"),
    EXPIRES,
];

/// Our own words are never taken from a handler.
pub(crate) fn strip_markers(headers: &mut HeaderMap) {
    for name in [REPLAYED, UNPROTECTED, EXPIRES] {
        headers.remove(name);
    }
}

/// The headers of an answer with a body of `len` bytes that are stored, in their order.
pub(crate) fn replayable(
    headers: &HeaderMap,
    len: usize,
    also_dropped: &[HeaderName],
) -> HeaderMap {
    let named = named_by_connection(headers);
    let len = HeaderValue::from(len);
    let keep = |name: &HeaderName, value: &HeaderValue| {
        let lies = name == header::CONTENT_LENGTH && *value != len;
        let listed = NOT_REPLAYED.contains(name) || also_dropped.contains(name);
        !lies && !listed && !named.contains(name) && !name.as_str().starts_with("x-b3-")
    };
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers.iter().filter(|(name, value)| keep(name, value)) {
        kept.append(name, value.clone());
    }
    kept
}

/// Names that `Connection` declares to be for this hop only.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let lines = headers.get_all(header::CONNECTION).iter();
    let names = lines.filter_map(|line| line.to_str().ok());
    names
        .flat_map(|line| line.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn kept(pairs: &[(&'static str, &'static str)], len: usize) -> Vec<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        let kept = replayable(&headers, len, &[HeaderName::from_static("x-mine")]);
        kept.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn a_header_named_by_connection_is_not_replayed() {
        assert_eq!(
            kept(
                &[
                    ("connection", "close, X-Hop"),
                    ("x-hop", "1"),
                    ("etag", "e")
                ],
                0
            ),
            ["etag"]
        );
    }

    #[test]
    fn a_content_length_that_is_not_the_bodys_is_not_replayed() {
        assert_eq!(kept(&[("content-length", "3")], 3), ["content-length"]);
        assert!(kept(&[("content-length", "4")], 3).is_empty());
    }

    #[test]
    fn headers_named_by_the_policy_and_b3_headers_are_not_replayed() {
        assert!(kept(&[("x-mine", "1"), ("x-b3-traceid", "1")], 0).is_empty());
    }
}
