//! One axis varied, everything else as at the base point.

use std::path::{Path, PathBuf};
use std::time::Duration;

use faults::random::fresh_key;

use crate::arena::{Entrant, Pace};
use crate::load::Ask;
use crate::sample::Sample;
use crate::suite::{Suite, Table, at_base};
use crate::variants::Variant;

const COMPARED: [Variant; 4] = [
    Variant::Naive,
    Variant::Leased,
    Variant::InsertFirst,
    Variant::LeasedSingle,
];

/// What is added to each flush.
const DELAY: Duration = Duration::from_millis(2);

impl Suite {
    /// Answers of other sizes.
    pub(crate) async fn bodies(&mut self) {
        if self.is_short() || !self.options.only.is_empty() {
            return;
        }
        for kilobytes in [16, 256] {
            let entrants = COMPARED.map(|variant| Entrant {
                answer: kilobytes << 10,
                ..at_base(variant)
            });
            self.compete(&format!("body-{kilobytes}"), &entrants).await;
        }
    }

    /// S8.
    pub(crate) async fn slow_flush(&mut self) {
        let shim = self.options.shim.clone();
        let Some(shim) = shim.filter(|_| self.wants(&["S8"])) else {
            return;
        };
        let shim = Shim::of(&shim);
        let quick = self.arena.commit_time().await;
        self.arena.slow_down(Some((&shim.0, DELAY))).await;
        let slow = self.arena.commit_time().await;
        assert!(slow >= DELAY, "the shim has no effect: {slow:?}");
        self.report
            .note("S8-commit", quick.as_secs_f64() * 1000.0, "ms");
        self.report
            .note("S8-slow-commit", slow.as_secs_f64() * 1000.0, "ms");
        let variants = [
            Variant::InsertFirst64,
            Variant::Leased,
            Variant::Naive,
            Variant::Naive64,
            Variant::LeasedSingle,
        ];
        let table = self.compete("slow-flush", &variants.map(at_base)).await;
        if !self.is_short() {
            let many = [Variant::InsertFirst64, Variant::Leased].map(|variant| Entrant {
                connections: 256,
                ..at_base(variant)
            });
            self.compete("slow-flush-256", &many).await;
        }
        self.arena.slow_down(None).await;
        let (leased, first) = (Variant::Leased, Variant::InsertFirst64);
        let report = &mut self.report;
        let rate = table.ratios(leased, first, |sample| sample.rate);
        report.ratio("S8-slow-flush-vs-insert-first-64", rate);
        let cpu = table.ratios(leased, first, Sample::cpu);
        report.ratio("S8-slow-flush-cpu-vs-insert-first-64", cpu);
    }

    /// S11: many short turns, since little is to be told apart.
    pub(crate) async fn uncovered(&mut self) {
        if !self.wants(&["S11"]) {
            return;
        }
        let pace = self.arena.pace;
        self.arena.pace = Pace {
            repetitions: pace.repetitions * 3,
            measured: pace.measured / 2,
            ..pace
        };
        let entrants = [Variant::Bare, Variant::Leased].map(|variant| Entrant {
            ask: Ask::Get,
            ..at_base(variant)
        });
        let table = self.compete("get", &entrants).await;
        self.arena.pace = pace;
        let rate = table.ratios(Variant::Leased, Variant::Bare, |sample| sample.rate);
        self.report.ratio("S11-uncovered-vs-bare", rate);
    }

    /// S7.
    pub(crate) async fn connections(&mut self) {
        if !self.wants(&["S7"]) {
            return;
        }
        let (leased, naive) = (Variant::Leased, Variant::Naive);
        let one = self.with_connections(1).await;
        let p50 = one.ratios(leased, naive, |sample| sample.p50);
        self.report.ratio("S7-p50-of-1-connection-vs-naive", p50);
        let eight = self.with_connections(8).await;
        let rate = eight.ratios(leased, naive, |sample| sample.rate);
        self.report.ratio("S7-8-connections-vs-naive", rate);
        if !self.is_short() {
            self.with_connections(256).await;
        }
    }

    async fn with_connections(&mut self, connections: usize) -> Table {
        let entrants = COMPARED.map(|variant| Entrant {
            connections,
            ..at_base(variant)
        });
        self.compete(&format!("connections-{connections}"), &entrants)
            .await
    }
}

/// A copy of the shim where the user that the server runs as can read it.
#[derive(Debug)]
struct Shim(PathBuf);

impl Shim {
    fn of(original: &Path) -> Self {
        let copy = std::env::temp_dir().join(format!("bench-{}.so", fresh_key()));
        std::fs::copy(original, &copy).expect("the temporary directory is writable");
        Self(copy)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
