use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue, header};

/// What a cache takes a number of seconds for that is larger than it can hold (RFC 9111, 1.2.2).
const MOST: u64 = 1 << 31;

/// How long an answer asks its client to wait, of its `Retry-After` (RFC 9110, 10.2.3): a number of
/// seconds, or a date, which is zero once it has passed. `None` where it says nothing, or nothing
/// that can be understood. At most 2^31 s: put a limit of your own on it.
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use http::{HeaderMap, HeaderValue};
/// use tower_idempotency::retry_after;
///
/// let mut headers = HeaderMap::new();
/// headers.insert("retry-after", HeaderValue::from_static("120"));
/// let pause = retry_after(&headers, SystemTime::now());
/// assert_eq!(pause, Some(Duration::from_secs(120)));
///
/// headers.insert("retry-after", HeaderValue::from_static("Thu, 01 Jan 1970 00:02:00 GMT"));
/// let pause = retry_after(&headers, SystemTime::UNIX_EPOCH);
/// assert_eq!(pause, Some(Duration::from_secs(120)));
///
/// headers.insert("retry-after", HeaderValue::from_static("soon"));
/// assert_eq!(retry_after(&headers, SystemTime::now()), None);
/// ```
#[must_use]
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let mut values = headers.get_all(header::RETRY_AFTER).iter();
    let value = values.next()?;
    // Two of them contradict each other.
    if values.next().is_some() {
        return None;
    }
    seconds(value).or_else(|| until(value, now))
}

fn seconds(value: &HeaderValue) -> Option<Duration> {
    let digits = value.as_bytes();
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = value.to_str().ok()?.parse().unwrap_or(MOST);
    Some(Duration::from_secs(seconds.min(MOST)))
}

fn until(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let date = httpdate::parse_http_date(value.to_str().ok()?).ok()?;
    let left = date.duration_since(now).unwrap_or_default();
    Some(left.min(Duration::from_secs(MOST)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn read(values: &[&str]) -> Option<u64> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::RETRY_AFTER, value.parse().unwrap());
        }
        // Sun, 06 Nov 1994 08:49:37 GMT, the date of RFC 9110.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        retry_after(&headers, now).map(|pause| pause.as_secs())
    }

    #[test]
    fn seconds_are_read_however_many() {
        assert_eq!(read(&["0"]), Some(0));
        assert_eq!(read(&["120"]), Some(120));
        assert_eq!(read(&["0000000000000000000000000000007"]), Some(7));
        assert_eq!(read(&["99999999999999999999999999"]), Some(MOST));
    }

    #[test]
    fn dates_are_read_in_the_three_forms_of_http() {
        assert_eq!(read(&["Sun, 06 Nov 1994 08:50:37 GMT"]), Some(60));
        assert_eq!(read(&["Sunday, 06-Nov-94 08:50:37 GMT"]), Some(60));
        assert_eq!(read(&["Sun Nov  6 08:50:37 1994"]), Some(60));
        assert_eq!(read(&["Sun, 06 Nov 1994 08:49:36 GMT"]), Some(0));
        assert_eq!(read(&["Fri, 31 Dec 9999 23:59:59 GMT"]), Some(MOST));
    }

    #[test]
    fn anything_else_says_nothing() {
        for value in ["", "soon", "-1", "+5", "1.5", "0x10", "5 s", "5, 6", "٣"] {
            assert_eq!(read(&[value]), None, "{value}");
        }
        assert_eq!(read(&[]), None);
        assert_eq!(read(&["5", "6"]), None);
    }
}
