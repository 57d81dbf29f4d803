use std::sync::atomic::{AtomicU64, Ordering};

/// How keyed requests ended, counted since the layer was made.
///
/// Every keyed request is counted once. Requests that pass through are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Stats {
    /// The handler ran under a claim.
    pub executed: u64,
    /// The handler ran without one, because the store was down and the policy is open.
    pub unprotected: u64,
    /// A stored answer was sent again.
    pub replayed: u64,
    /// 409: the key was used with another request.
    pub mismatched: u64,
    /// 409: the first request is running.
    pub in_progress: u64,
    /// 409: the outcome is unknown.
    pub held: u64,
    /// 410: answered before, and not kept.
    pub not_retained: u64,
    /// 500: an earlier attempt was lost.
    pub lost: u64,
    /// The key, its scope or the body was refused.
    pub refused: u64,
    /// 503: the store was down, or this process was full or shutting down, or dropped the task.
    pub unavailable: u64,
    /// 500: the record cannot be read.
    pub unreadable: u64,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Event {
    Executed,
    Unprotected,
    Replayed,
    Mismatched,
    InProgress,
    Held,
    NotRetained,
    Lost,
    Refused,
    Unavailable,
    Unreadable,
}

#[derive(Debug, Default)]
pub(crate) struct Counters([AtomicU64; 11]);

impl Counters {
    pub(crate) fn count(&self, event: Event) {
        self.0[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn stats(&self) -> Stats {
        let read = |event: Event| self.0[event as usize].load(Ordering::Relaxed);
        Stats {
            executed: read(Event::Executed),
            unprotected: read(Event::Unprotected),
            replayed: read(Event::Replayed),
            mismatched: read(Event::Mismatched),
            in_progress: read(Event::InProgress),
            held: read(Event::Held),
            not_retained: read(Event::NotRetained),
            lost: read(Event::Lost),
            refused: read(Event::Refused),
            unavailable: read(Event::Unavailable),
            unreadable: read(Event::Unreadable),
        }
    }
}
