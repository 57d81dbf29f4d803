//! The base point: 64 connections, answers of a kilobyte, a small table, a disk as it is.

use crate::arena::Entrant;
use crate::load::Ask;
use crate::report::Spread;
use crate::sample::Sample;
use crate::serve::Work;
use crate::suite::{Suite, at_base};
use crate::variants::Variant;

/// How many requests each connection repeats.
const REPEATED: usize = 16;

const RATE: fn(&Sample) -> f64 = |sample| sample.rate;

impl Suite {
    /// S1, S2, and S6 on a small table.
    pub(crate) async fn fresh(&mut self) {
        if !self.wants(&["S1", "S2", "S6"]) {
            return;
        }
        // Those that are compared stand beside each other.
        let variants = [
            Variant::Naive,
            Variant::Leased,
            Variant::AxumIdempotent,
            Variant::LeasedCache,
            Variant::Bare,
            Variant::Naive64,
            Variant::InsertFirst,
            Variant::Transactional,
            Variant::TransactionalCache,
            Variant::LeasedSingle,
            Variant::AxumIdempotentSessions,
        ];
        let table = self.compete("base", &variants.map(at_base)).await;
        let (leased, naive) = (Variant::Leased, Variant::Naive);
        let report = &mut self.report;
        report.ratio("S1-fresh-vs-naive", table.ratios(leased, naive, RATE));
        let peer = table.ratios(leased, Variant::AxumIdempotent, RATE);
        report.ratio("S1-fresh-vs-axum-idempotent", peer);
        report.ratio("S2-cpu-vs-naive", table.ratios(leased, naive, Sample::cpu));
        let beyond = table.of(leased).iter().map(|s| s.log - s.stored);
        report.ratio("S6-wal-beyond-stored-bytes", beyond);
    }

    /// S3.
    pub(crate) async fn business(&mut self) {
        if !self.wants(&["S3"]) {
            return;
        }
        let variants = [
            Variant::Naive,
            Variant::Transactional,
            Variant::BareTransaction,
            Variant::OneTransaction,
            Variant::InsertFirst,
        ];
        let inserting = |variant| Entrant {
            work: Work::Insert,
            ..at_base(variant)
        };
        let table = self.compete("business", &variants.map(inserting)).await;
        let transactional = Variant::Transactional;
        let report = &mut self.report;
        let naive = table.ratios(transactional, Variant::Naive, RATE);
        report.ratio("S3-transactional-vs-naive", naive);
        let bare = table.ratios(transactional, Variant::BareTransaction, Sample::cpu);
        report.ratio("S3-cpu-vs-bare-transaction", bare);
        // What is left to gain.
        let by_hand = Variant::OneTransaction;
        let naive = Spread::of(table.ratios(by_hand, Variant::Naive, RATE)).median;
        report.note("S3-by-hand-vs-naive", naive, "times");
        let bare = table.ratios(by_hand, Variant::BareTransaction, Sample::cpu);
        let bare = Spread::of(bare).median;
        report.note("S3-by-hand-cpu-vs-bare-transaction", bare, "times");
        match self.arena.commits(&inserting(transactional)).await {
            Some(commits) => self.report.ratio("S3-commits-per-operation", [commits]),
            None => println!("note S3-commits-per-operation needs pg_walinspect"),
        }
    }

    /// S4 and S5.
    pub(crate) async fn replays(&mut self) {
        if !self.wants(&["S4", "S5"]) {
            return;
        }
        let variants = [
            Variant::Bare,
            Variant::LeasedCache,
            Variant::Leased,
            Variant::Naive,
            Variant::AxumIdempotent,
            Variant::InsertFirst,
            Variant::Transactional,
        ];
        let repeating = |variant| Entrant {
            ask: Ask::Replays(REPEATED),
            ..at_base(variant)
        };
        let table = self.compete("replay", &variants.map(repeating)).await;
        let report = &mut self.report;
        let cached = table.ratios(Variant::LeasedCache, Variant::Bare, RATE);
        report.ratio("S4-cached-replay-vs-bare", cached);
        let naive = table.ratios(Variant::Leased, Variant::Naive, RATE);
        report.ratio("S5-replay-vs-naive", naive);
    }
}
