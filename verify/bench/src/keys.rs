//! Idempotency keys: UUIDs, random ones and such that are ordered in time.

use std::hash::{BuildHasher as _, RandomState};
use std::time::SystemTime;

use faults::random::Random;

use crate::load::Ask;

/// Which UUIDs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V4,
    V7,
}

/// The keys of one connection, in their order.
#[derive(Debug)]
pub(crate) struct Keys {
    random: Random,
    version: Version,
    kept: Vec<[u8; 36]>,
    most: usize,
    next: usize,
    has_keys: bool,
}

impl Keys {
    pub(crate) fn new(ask: Ask) -> Self {
        let (version, most) = match ask {
            Ask::Fresh(version) => (version, 0),
            Ask::Replays(most) => (Version::V4, most),
            Ask::Get => (Version::V4, 0),
        };
        Self {
            random: Random::from_seed(RandomState::new().hash_one(())),
            version,
            kept: Vec::new(),
            most,
            next: 0,
            has_keys: !matches!(ask, Ask::Get),
        }
    }

    /// How many of them come again and again.
    pub(crate) fn repeated(&self) -> usize {
        self.most
    }

    pub(crate) fn next(&mut self) -> Option<[u8; 36]> {
        if !self.has_keys {
            return None;
        }
        if self.most == 0 {
            return Some(self.fresh());
        }
        if self.kept.len() < self.most {
            let key = self.fresh();
            self.kept.push(key);
            return Some(key);
        }
        self.next = (self.next + 1) % self.most;
        Some(self.kept[self.next])
    }

    pub(crate) fn fresh(&mut self) -> [u8; 36] {
        let (high, low) = (self.random.draw(), self.random.draw());
        let (high, version) = match self.version {
            Version::V4 => (high, 0x4000),
            Version::V7 => (milliseconds() << 16 | high & 0xffff, 0x7000),
        };
        let high = high & !0xf000 | version;
        text(high, low >> 2 | 1 << 63)
    }
}

fn milliseconds() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or_default()
}

/// A UUID of 128 bits.
pub(crate) fn text(high: u64, low: u64) -> [u8; 36] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bytes = (u128::from(high) << 64 | u128::from(low)).to_be_bytes();
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (index, byte) in bytes.into_iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = DIGITS[usize::from(byte >> 4)];
        text[at + 1] = DIGITS[usize::from(byte & 15)];
        at += 2;
    }
    text
}
