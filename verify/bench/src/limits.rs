//! What has to hold, and what is aimed at.

/// Whether more of a figure is better, or less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    More,
    Less,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) name: &'static str,
    pub(crate) better: Better,
    /// What must hold.
    pub(crate) floor: f64,
    /// What is aimed at.
    pub(crate) target: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ok,
    /// The floor holds, and the target is not met.
    Short,
    Below,
}

impl Limit {
    pub(crate) fn judge(&self, value: f64) -> Verdict {
        let holds = |limit: f64| match self.better {
            Better::More => value >= limit,
            Better::Less => value <= limit,
        };
        match (holds(self.target), holds(self.floor)) {
            (true, _) => Verdict::Ok,
            (false, true) => Verdict::Short,
            (false, false) => Verdict::Below,
        }
    }
}

impl Verdict {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Short => "short",
            Self::Below => "below",
        }
    }
}

const fn at_least(name: &'static str, floor: f64, target: f64) -> Limit {
    Limit {
        name,
        better: Better::More,
        floor,
        target,
    }
}

const fn at_most(name: &'static str, floor: f64, target: f64) -> Limit {
    Limit {
        name,
        better: Better::Less,
        floor,
        target,
    }
}

const LIMITS: &[Limit] = &[
    at_least("S1-fresh-vs-naive", 5.0, 7.5),
    at_least("S1-fresh-vs-axum-idempotent", 1.0, 1.3),
    at_most("S2-cpu-vs-naive", 0.2, 0.12),
    at_least("S3-transactional-vs-naive", 1.7, 2.0),
    at_most("S3-cpu-vs-bare-transaction", 1.6, 1.3),
    // The server commits something of its own now and then.
    at_most("S3-commits-per-operation", 1.05, 1.02),
    at_least("S4-cached-replay-vs-bare", 0.88, 0.93),
    at_least("S5-replay-vs-naive", 2.3, 2.6),
    at_most("S6-wal-beyond-stored-bytes", 700.0, 500.0),
    at_most("S6-wal-at-5-million-vs-small", 1.3, 1.15),
    at_most("S7-p50-of-1-connection-vs-naive", 1.0, 0.85),
    at_least("S7-8-connections-vs-naive", 1.5, 1.7),
    at_least("S8-slow-flush-vs-insert-first-64", 0.9, 1.0),
    at_most("S8-slow-flush-cpu-vs-insert-first-64", 0.35, 0.25),
    at_least("S9-fresh-at-10-million-vs-empty", 0.8, 0.9),
    at_most("S10-purge-seconds", 4.0, 2.5),
    at_most("S10-purge-p99-vs-idle", 3.0, 2.0),
    at_least("S11-uncovered-vs-bare", 0.95, 0.98),
    at_most("S11-allocations-of-its-own", 0.0, 0.0),
    at_most("S12-memory-of-its-bound-at-1-KB", 2.0, 1.0),
    at_most("S12-memory-of-its-bound-at-16-KB", 2.0, 1.0),
    at_most("S12-cache-of-its-bound", 2.0, 1.0),
];

/// # Panics
///
/// Without a limit of that name.
pub(crate) fn limit(name: &str) -> &'static Limit {
    let found = LIMITS.iter().find(|limit| limit.name == name);
    found.unwrap_or_else(|| panic!("{name} has no limit"))
}
