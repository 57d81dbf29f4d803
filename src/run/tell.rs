//! What duplicates are told of an attempt that has ended, without asking the store.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Exchange;
use super::settle::Write;
use crate::cache::Fill;
use crate::moment::Moment;
use crate::running::{Listed, Said};
use crate::store::{Claim, Completed, Completion, Existing, Store};

impl<S: Store> Exchange<S> {
    /// The record is written: duplicates that wait are told what a lookup would find, where this is
    /// known without one.
    pub(super) fn tell(&self, listed: Listed, shown: Option<Said>, fill: Option<Fill>) {
        let Some(shown) = shown else {
            return drop(listed);
        };
        if let Some(fill) = fill {
            fill.written(&self.fingerprint, &shown.existing);
        }
        listed.recorded(shown);
    }

    /// What a lookup will find once this is written, unless the record was held in between, as one
    /// whose lease is over may have been. A later attempt without references leaves those of an
    /// earlier one.
    pub(super) fn shown(&self, claim: &Claim, sent: Moment, write: &Write) -> Option<Said> {
        let Write::Complete(completion) = write else {
            return None;
        };
        let is_all = claim.attempt == 1 || !completion.references.as_slice().is_empty();
        is_all.then(|| self.completed(completion, claim.expires_at, sent))
    }

    /// A record as a duplicate will see it. Its retention did not begin before `sent`; where the clock was set
    /// back since, nothing is known of what is left.
    pub(super) fn completed(
        &self,
        completion: &Completion,
        expires_at: SystemTime,
        sent: Moment,
    ) -> Said {
        let now = Moment::now();
        let age = sent.age(now);
        let completed = Completed {
            answer: completion.answer.clone(),
            references: completion.references.clone(),
            expires_at,
            retention_left: age.map_or(Duration::ZERO, |age| self.policy.ttl.saturating_sub(age)),
        };
        Said {
            existing: Arc::new(Existing::Completed(Box::new(completed))),
            asked: now.monotonic,
        }
    }
}
