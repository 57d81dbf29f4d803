//! Random numbers that a printed seed brings back.

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

/// SplitMix64.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// From `FAULTS_SEED`, or a new seed; printed either way.
    ///
    /// # Panics
    ///
    /// When `FAULTS_SEED` is no number: to draw another would reproduce nothing.
    #[must_use]
    pub fn seeded(what: &str) -> Self {
        let given = env::var("FAULTS_SEED").ok();
        let given = given.map(|seed| seed.parse().expect("FAULTS_SEED is a decimal number"));
        let seed = given.unwrap_or_else(|| RandomState::new().hash_one(what));
        println!("{what}: FAULTS_SEED={seed}");
        Self(seed)
    }

    /// From a seed that the caller has printed.
    #[must_use]
    pub fn from_seed(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.draw() % end
    }
}

/// A key that no test has used before.
#[must_use]
pub fn fresh_key() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("key-{count}-{:016x}", RandomState::new().hash_one(count))
}
