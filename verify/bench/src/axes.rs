//! One axis varied, everything else as at the base point.

use crate::arena::Entrant;
use crate::suite::{Suite, at_base};
use crate::variants::Variant;

const COMPARED: [Variant; 4] = [
    Variant::Naive,
    Variant::Leased,
    Variant::InsertFirst,
    Variant::LeasedSingle,
];

impl Suite {
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

    async fn with_connections(&mut self, connections: usize) -> crate::suite::Table {
        let entrants = COMPARED.map(|variant| Entrant {
            connections,
            ..at_base(variant)
        });
        self.compete(&format!("connections-{connections}"), &entrants)
            .await
    }
}
