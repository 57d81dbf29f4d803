//! `Retry-After`: four bytes of the present, and then a line of the input is a line of the header.

#![no_main]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, header};
use libfuzzer_sys::fuzz_target;
use tower_idempotency::retry_after;

const MOST: Duration = Duration::from_secs(1 << 31);

fn read(lines: &[&[u8]], now: SystemTime) -> Option<Duration> {
    let mut headers = HeaderMap::new();
    for line in lines {
        headers.append(header::RETRY_AFTER, HeaderValue::from_bytes(line).ok()?);
    }
    retry_after(&headers, now)
}

fuzz_target!(|input: &[u8]| {
    let Some((now, input)) = input.split_first_chunk() else {
        return;
    };
    let now = UNIX_EPOCH + Duration::from_secs(u32::from_be_bytes(*now).into());
    let lines: Vec<_> = input.split(|byte| *byte == b'\n').collect();
    let Some(pause) = read(&lines, now) else {
        // What counts as a number is one.
        let is_number = !input.is_empty() && input.iter().all(u8::is_ascii_digit);
        assert!(!is_number, "{input:?} is a number");
        return;
    };
    assert!(lines.len() == 1, "two lines are {pause:?}");
    assert!(pause <= MOST, "{pause:?} is more than anybody waits");
    let seconds = pause.as_secs().to_string();
    assert_eq!(read(&[seconds.as_bytes()], now), Some(pause), "of {input:?}");
    let is_date = input.iter().any(|byte| !byte.is_ascii_digit());
    if is_date && pause < MOST {
        // It is a moment, which comes nearer.
        let later = now + pause;
        assert_eq!(read(&lines, later), Some(Duration::ZERO), "of {input:?}");
    }
});
