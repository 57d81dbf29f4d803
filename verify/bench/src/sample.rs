//! One slice of time: a load on a variant, and what came of it.

use crate::load::Sent;
use crate::meter::Spent;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// Operations a second.
    pub(crate) rate: f64,
    /// Milliseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Microseconds of the processors for an operation.
    pub(crate) database: f64,
    pub(crate) application: f64,
    /// Bytes of the write-ahead log for an operation.
    pub(crate) log: f64,
    /// Bytes of a record.
    pub(crate) stored: f64,
    /// Requests with another answer than they should have.
    pub(crate) failed: u64,
}

impl Sample {
    /// # Panics
    ///
    /// Where nothing was answered.
    #[expect(clippy::cast_precision_loss, reason = "they are not that many")]
    pub(crate) fn of(operations: u64, spent: Spent, sent: &Sent, stored: f64) -> Self {
        assert!(operations > 0, "nothing was answered");
        let each = |amount: u64| amount as f64 / operations as f64;
        Self {
            rate: operations as f64 / spent.seconds,
            p50: sent.percentile(50),
            p99: sent.percentile(99),
            database: each(spent.database),
            application: each(spent.application),
            log: each(spent.log),
            stored,
            failed: sent.failed,
        }
    }

    /// Of all processors.
    pub(crate) fn cpu(&self) -> f64 {
        self.database + self.application
    }
}

impl Sent {
    /// In milliseconds.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let at = self.latencies.len().saturating_sub(1) * percent / 100;
        f64::from(self.latencies.get(at).copied().unwrap_or_default()) / 1000.0
    }
}
