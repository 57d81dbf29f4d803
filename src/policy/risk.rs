use http::StatusCode;

use super::Policy;
use crate::outcome::Outcome;

/// How bad a second run would be: a preset of every setting of a [`Policy`].
///
/// | class | key | store down | lost attempt | 5xx | panic, 408, execution limit | TTL |
/// |---|---|---|---|---|---|---|
/// | `Critical` | required | closed | held | stored | held | 72 h |
/// | `High` (default) | required | closed | stored 500 | stored | stored | 72 h |
/// | `Medium` | optional | closed | run again | key freed | key freed | 24 h |
/// | `Low` | optional | open | run again | key freed | key freed | 24 h |
///
/// In every class 401, 403, 425 and 429 free the key, and other answers below 500 are stored.
///
/// On a [transactional](crate::IdempotencyLayer::transactional) route nothing is lost or unknown:
/// see there for what is stored, and the store being down is closed in every class.
///
/// ```
/// use tower_idempotency::{Lost, Policy, Risk};
///
/// let policy = Policy::of(Risk::Critical).with_lost(Lost::Answer);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Risk {
    /// Money moves: what is not known is held for a person.
    Critical,
    /// What is not known is answered 500, and not run again.
    High,
    /// What is not known is run again.
    Medium,
    /// As `Medium`, and the store being down stops nobody.
    Low,
}

impl Risk {
    pub(super) fn is_strict(self) -> bool {
        matches!(self, Self::Critical | Self::High)
    }

    pub(super) fn store_down(self) -> StoreDown {
        match self {
            Self::Critical | Self::High | Self::Medium => StoreDown::Refuse,
            Self::Low => StoreDown::RunUnprotected,
        }
    }

    pub(super) fn lost(self) -> Lost {
        match self {
            Self::Critical => Lost::Hold,
            Self::High => Lost::Answer,
            Self::Medium | Self::Low => Lost::Rerun,
        }
    }

    pub(super) fn unknown(self) -> Unknown {
        match self {
            Self::Critical => Unknown::Hold,
            Self::High => Unknown::Store,
            Self::Medium | Self::Low => Unknown::Release,
        }
    }
}

/// What becomes of an operation whose attempt vanished: its lease ran out and it never completed.
///
/// ```
/// use tower_idempotency::{Lost, Policy};
///
/// // The handler is safe to run again: its writes are keyed by the operation, or in phases.
/// let policy = Policy::high().with_lost(Lost::Rerun);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Lost {
    /// The next request runs it again: from the start, or, on a route with
    /// [phases](crate::store::Phases), after the last one that is finished.
    Rerun,
    /// The next request is answered 500 `attempt-lost`, and that answer is stored.
    Answer,
    /// It is held for a person: 409 `outcome-unknown` until it is resolved.
    Hold,
}

/// What happens when the store cannot be asked.
///
/// ```
/// use tower_idempotency::{Policy, StoreDown};
///
/// let policy = Policy::medium().with_store_down(StoreDown::RunUnprotected);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreDown {
    /// 503 `store-unavailable`, the handler is not run ("fail closed").
    Refuse,
    /// The handler runs without protection ("fail open"), and the answer says so in
    /// `Idempotency-Unprotected: true`.
    RunUnprotected,
}

/// What becomes of an attempt that ended without saying what it did: a panic, its execution limit,
/// a 408, a body that broke off, an error of the inner service.
///
/// ```
/// use tower_idempotency::{Policy, Unknown};
///
/// let policy = Policy::high().with_unknown(Unknown::Hold);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unknown {
    /// The error answer is stored and replayed.
    Store,
    /// The key is freed.
    Release,
    /// The key is held for a person.
    Hold,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The handler answered.
    Answered(StatusCode, Option<Outcome>),
    /// It did not, or its answer broke off.
    Unknown,
}

/// What to do with the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disposition {
    Store,
    Release,
    Hold,
}

/// What to do with the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TransactionalDisposition {
    /// Commit the handler's writes, and the answer with them.
    Commit,
    /// Roll the handler's writes back, and commit the answer.
    Refuse,
    /// Roll everything back.
    Undo,
    /// Roll the handler's writes back, and commit that it is held.
    Hold,
    /// Roll everything back, and try again.
    Conflict,
}

impl Policy {
    pub(crate) fn disposition(&self, ending: Ending) -> Disposition {
        match ending {
            Ending::Answered(_, Some(Outcome::Store | Outcome::Stream)) => Disposition::Store,
            Ending::Answered(_, Some(Outcome::Release | Outcome::Conflict)) => Disposition::Release,
            Ending::Answered(_, Some(Outcome::Hold)) => Disposition::Hold,
            Ending::Answered(status, None) => self.by_status(status),
            Ending::Unknown => self.by_unknown(),
        }
    }

    /// 408 and 5xx do not say that nothing happened; 401, 403, 425 and 429 are said before anything did.
    fn by_status(&self, status: StatusCode) -> Disposition {
        match status.as_u16() {
            401 | 403 | 425 | 429 => Disposition::Release,
            408 => self.by_unknown(),
            500.. if !self.stores_server_errors => Disposition::Release,
            _ => Disposition::Store,
        }
    }

    /// The same for a transactional route, where an attempt leaves nothing behind unless it commits.
    pub(crate) fn transactional_disposition(ending: Ending) -> TransactionalDisposition {
        use TransactionalDisposition as D;
        match ending {
            Ending::Answered(_, Some(Outcome::Store | Outcome::Stream)) => D::Commit,
            Ending::Answered(_, Some(Outcome::Release)) | Ending::Unknown => D::Undo,
            Ending::Answered(_, Some(Outcome::Hold)) => D::Hold,
            Ending::Answered(_, Some(Outcome::Conflict)) => D::Conflict,
            Ending::Answered(status, None) => match status.as_u16() {
                // The client may mend the payload, or come again.
                400 | 401 | 403 | 408 | 415 | 422 | 425 | 429 | 500.. => D::Undo,
                402..500 => D::Refuse,
                _ => D::Commit,
            },
        }
    }

    fn by_unknown(&self) -> Disposition {
        match self.unknown {
            Unknown::Store => Disposition::Store,
            Unknown::Release => Disposition::Release,
            Unknown::Hold => Disposition::Hold,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_status(policy: &Policy, status: u16) -> Disposition {
        let status = StatusCode::from_u16(status).unwrap_or_default();
        policy.disposition(Ending::Answered(status, None))
    }

    #[test]
    fn statuses_follow_the_table_of_each_class() {
        use Disposition::{Hold, Release, Store};
        for (policy, by_408, by_5xx) in [
            (Policy::critical(), Hold, Store),
            (Policy::high(), Store, Store),
            (Policy::medium(), Release, Release),
            (Policy::low(), Release, Release),
        ] {
            for status in [200, 201, 302, 400, 402, 404, 409, 410, 422] {
                assert_eq!(by_status(&policy, status), Store, "{status}");
            }
            for status in [401, 403, 425, 429] {
                assert_eq!(by_status(&policy, status), Release, "{status}");
            }
            assert_eq!(by_status(&policy, 408), by_408);
            assert_eq!(by_status(&policy, 500), by_5xx);
            assert_eq!(by_status(&policy, 503), by_5xx);
        }
    }

    #[test]
    fn the_handlers_word_overrides_the_status() {
        let ok = StatusCode::OK;
        let said = |outcome| Policy::critical().disposition(Ending::Answered(ok, Some(outcome)));
        assert_eq!(said(Outcome::Release), Disposition::Release);
        assert_eq!(said(Outcome::Hold), Disposition::Hold);
        assert_eq!(said(Outcome::Store), Disposition::Store);
        assert_eq!(said(Outcome::Stream), Disposition::Store);
        assert_eq!(said(Outcome::Conflict), Disposition::Release);
    }

    #[test]
    fn a_transaction_commits_or_is_rolled_back_by_status() {
        use TransactionalDisposition::{Commit, Refuse, Undo};
        let by_status = |status| {
            let status = StatusCode::from_u16(status).unwrap_or_default();
            Policy::transactional_disposition(Ending::Answered(status, None))
        };
        for status in [101, 200, 201, 204, 302, 304] {
            assert_eq!(by_status(status), Commit, "{status}");
        }
        for status in [402, 404, 405, 409, 410, 412, 423, 451] {
            assert_eq!(by_status(status), Refuse, "{status}");
        }
        for status in [400, 401, 403, 408, 415, 422, 425, 429, 500, 503] {
            assert_eq!(by_status(status), Undo, "{status}");
        }
    }
}
