//! Recorded answers, kept in memory for a moment. A completed record does not change before its
//! retention is over, unless a person deletes it.

use std::fmt;
use std::mem::size_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use moka::policy::EvictionPolicy;
use moka::sync::Cache;

use crate::envelope::Envelope;
use crate::fingerprint::Fingerprint;
use crate::identity::Identity;
use crate::moment::Moment;
use crate::store::{Completed, Existing};

/// The longest time that an answer is used for: what a person did to the record shows after it.
const MAX_AGE: Duration = Duration::from_secs(10);

/// The part of what is left of the retention that is not relied on, for clocks that run at different
/// speeds.
const MARGIN: u32 = 100;
const LEAST_MARGIN: Duration = Duration::from_millis(100);

/// Identities share epochs: a fill that is dropped because of another identity is merely made later.
const EPOCHS: usize = 1024;

/// What an entry takes beside its answer, in the map and around it.
const OVERHEAD: usize = 512;

pub(crate) struct ReplayCache {
    entries: Cache<[u8; 32], Arc<Entry>>,
    epochs: Box<[Mutex<u64>]>,
}

struct Entry {
    fingerprint: Fingerprint,
    /// Whether it is the record's own. Of one that a lookup took for the same, it is not known what
    /// else is the same to the record.
    is_recorded: bool,
    shown: Arc<Existing>,
    since: Moment,
    life: Duration,
    weight: u32,
}

impl ReplayCache {
    pub(crate) fn new(bytes: usize) -> Self {
        let entries = Cache::builder()
            .max_capacity(bytes as u64)
            .weigher(|_: &[u8; 32], entry: &Arc<Entry>| entry.weight)
            // Most keys are never seen again: what counts is which came last.
            .eviction_policy(EvictionPolicy::lru())
            .time_to_live(MAX_AGE)
            .build();
        Self {
            entries,
            epochs: (0..EPOCHS).map(|_| Mutex::default()).collect(),
        }
    }

    /// What the store would say now.
    pub(crate) fn get(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
        now: Moment,
    ) -> Option<Arc<Existing>> {
        let entry = self.entries.get(identity.digest())?;
        if entry.since.age(now).is_none_or(|age| age >= entry.life) {
            return None;
        }
        if *fingerprint == entry.fingerprint {
            return Some(entry.shown.clone());
        }
        entry
            .is_recorded
            .then(|| match fingerprint.matches(&entry.fingerprint) {
                true => entry.shown.clone(),
                false => Arc::new(Existing::Mismatch),
            })
    }

    /// The record may be another from now on.
    pub(crate) fn invalidate(&self, identity: &Identity) {
        let mut epoch = self.epoch(identity);
        *epoch += 1;
        self.entries.invalidate(identity.digest());
    }

    /// To be called before the record is read, or written.
    pub(crate) fn fill(self: Arc<Self>, identity: &Identity, now: Moment) -> Fill {
        let epoch = *self.epoch(identity);
        Fill {
            identity: identity.clone(),
            epoch,
            since: now,
            cache: self,
        }
    }

    fn epoch(&self, identity: &Identity) -> MutexGuard<'_, u64> {
        let [a, b, ..] = *identity.digest();
        let epoch = &self.epochs[usize::from(u16::from_be_bytes([a, b])) % EPOCHS];
        epoch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ReplayCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayCache").finish_non_exhaustive()
    }
}

/// A record that is being read, or written, and will be kept unless something comes in between.
#[derive(Debug)]
pub(crate) struct Fill {
    cache: Arc<ReplayCache>,
    identity: Identity,
    epoch: u64,
    since: Moment,
}

impl Fill {
    /// The store showed this to a request: `fingerprint` is not the record's own, but the same to it.
    /// What the store decoded holds no more memory than it shows.
    pub(crate) fn read(self, fingerprint: &Fingerprint, shown: &Arc<Existing>) {
        self.keep(fingerprint, false, shown.clone());
    }

    /// This was written, and is confirmed. It is copied: what a handler answers with may be a small
    /// part of a large buffer, which would be kept as long.
    pub(crate) fn written(self, fingerprint: &Fingerprint, shown: &Existing) {
        let Existing::Completed(completed) = shown else {
            return;
        };
        let Ok(answer) = Envelope::decode(&completed.answer.encode()) else {
            return;
        };
        let completed = Completed {
            answer,
            ..Completed::clone(completed)
        };
        let shown = Arc::new(Existing::Completed(Box::new(completed)));
        self.keep(fingerprint, true, shown);
    }

    fn keep(self, fingerprint: &Fingerprint, is_recorded: bool, shown: Arc<Existing>) {
        let Existing::Completed(completed) = &*shown else {
            return;
        };
        let left = completed.retention_left;
        let margin = (left / MARGIN).max(LEAST_MARGIN);
        let life = left.saturating_sub(margin).min(MAX_AGE);
        if life.is_zero() {
            return;
        }
        let entry = Entry {
            fingerprint: fingerprint.clone(),
            is_recorded,
            weight: weight(completed),
            shown,
            since: self.since,
            life,
        };
        let epoch = self.cache.epoch(&self.identity);
        if *epoch == self.epoch {
            let key = *self.identity.digest();
            self.cache.entries.insert(key, Arc::new(entry));
        }
    }
}

fn weight(completed: &Completed) -> u32 {
    let answer = &completed.answer;
    let headers = answer.headers().iter().map(|(name, value)| {
        size_of::<(http::HeaderName, http::HeaderValue)>() + name.as_str().len() + value.len()
    });
    let references = completed.references.as_slice().iter();
    let references =
        references.map(|(kind, id)| size_of::<(String, String)>() + kind.len() + id.len());
    let body = answer.body().map_or(0, |body| body.len());
    let bytes = OVERHEAD + headers.chain(references).sum::<usize>() + body;
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::time::SystemTime;

    use bytes::Bytes;
    use http::Response;

    use super::*;
    use crate::extract::References;

    const HOUR: Duration = Duration::from_secs(3600);
    const SECOND: Duration = Duration::from_secs(1);

    fn identity(scope: &str) -> Identity {
        Identity::new(scope, "POST /orders", "key")
    }

    fn fingerprint() -> Fingerprint {
        Fingerprint::of_bytes(b"tea")
    }

    fn shown(retention_left: Duration) -> Arc<Existing> {
        Arc::new(Existing::Completed(Box::new(Completed {
            answer: Envelope::new(Response::new(Bytes::from_static(b"made"))),
            references: References::default(),
            expires_at: SystemTime::UNIX_EPOCH,
            retention_left,
        })))
    }

    fn cache() -> Arc<ReplayCache> {
        Arc::new(ReplayCache::new(1 << 20))
    }

    fn later(moment: Moment, by: Duration) -> Moment {
        Moment {
            monotonic: moment.monotonic + by,
            wall: moment.wall + by,
        }
    }

    /// A cache whose entry was written, or read, with this much of its retention left.
    fn filled(left: Duration, written: bool) -> (Arc<ReplayCache>, Moment) {
        let (cache, now) = (cache(), Moment::now());
        let fill = cache.clone().fill(&identity("a"), now);
        match written {
            true => fill.written(&fingerprint(), &shown(left)),
            false => fill.read(&fingerprint(), &shown(left)),
        }
        (cache, now)
    }

    fn hits(cache: &ReplayCache, now: Moment) -> bool {
        cache.get(&identity("a"), &fingerprint(), now).is_some()
    }

    #[test]
    fn an_entry_ends_after_ten_seconds() {
        let (cache, now) = filled(HOUR, true);
        assert!(hits(&cache, later(now, SECOND * 9)));
        assert!(!hits(&cache, later(now, SECOND * 10)));
    }

    #[test]
    fn an_entry_ends_a_margin_before_its_retention() {
        let (cache, now) = filled(SECOND, true);
        assert!(hits(&cache, later(now, Duration::from_millis(899))));
        assert!(!hits(&cache, later(now, Duration::from_millis(900))));
    }

    #[test]
    fn what_is_nearly_over_makes_no_entry() {
        let (cache, now) = filled(LEAST_MARGIN, true);
        assert!(!hits(&cache, now));
    }

    #[test]
    fn an_entry_ends_when_the_wall_clock_says_so_alone() {
        let (cache, now) = filled(HOUR, true);
        let wall = now.wall + SECOND * 10;
        assert!(!hits(&cache, Moment { wall, ..now }));
    }

    #[test]
    fn an_entry_ends_when_the_monotonic_clock_says_so_alone() {
        let (cache, now) = filled(HOUR, true);
        let monotonic = now.monotonic + SECOND * 10;
        assert!(!hits(&cache, Moment { monotonic, ..now }));
    }

    #[test]
    fn a_wall_clock_that_was_set_back_ends_an_entry() {
        let (cache, now) = filled(HOUR, true);
        let now = later(now, SECOND * 2);
        for back in [SECOND, HOUR] {
            let wall = now.wall - back;
            assert!(!hits(&cache, Moment { wall, ..now }));
        }
    }

    #[test]
    fn another_request_is_a_mismatch_where_the_record_s_fingerprint_is_known() {
        let (cache, now) = filled(HOUR, true);
        let other = Fingerprint::of_bytes(b"coffee");
        let found = cache.get(&identity("a"), &other, now).unwrap();
        assert!(matches!(*found, Existing::Mismatch));
    }

    #[test]
    fn another_request_is_for_the_store_to_judge_where_it_is_not() {
        let (cache, now) = filled(HOUR, false);
        let other = Fingerprint::of_bytes(b"coffee");
        assert!(cache.get(&identity("a"), &other, now).is_none());
        assert!(hits(&cache, now));
    }

    #[test]
    fn scopes_never_meet() {
        let (cache, now) = filled(HOUR, true);
        let found = cache.get(&identity("b"), &fingerprint(), now);
        assert!(found.is_none());
        // Not even where they share an id.
        let twin = identity("b").with_id(identity("a").id());
        assert!(cache.get(&twin, &fingerprint(), now).is_none());
    }

    #[test]
    fn an_invalidated_identity_is_forgotten() {
        let (cache, now) = filled(HOUR, true);
        cache.invalidate(&identity("a"));
        assert!(!hits(&cache, now));
    }

    #[test]
    fn a_fill_that_an_invalidation_overtook_is_dropped() {
        let (cache, now) = (cache(), Moment::now());
        let fill = cache.clone().fill(&identity("a"), now);
        cache.invalidate(&identity("a"));
        fill.read(&fingerprint(), &shown(HOUR));
        assert!(!hits(&cache, now));
    }

    #[test]
    fn what_is_not_completed_is_not_kept() {
        let (cache, now) = (cache(), Moment::now());
        for existing in [
            crate::running::IN_PROGRESS,
            Existing::Held,
            Existing::Mismatch,
        ] {
            let fill = cache.clone().fill(&identity("a"), now);
            fill.read(&fingerprint(), &Arc::new(existing));
            assert!(!hits(&cache, now));
        }
    }

    #[test]
    fn an_answer_is_weighed_with_its_headers_and_what_it_takes_to_keep_it() {
        let mut answer = Response::new(Bytes::from(vec![0; 1000]));
        let value = http::HeaderValue::from_static("0123456789");
        answer.headers_mut().insert("location", value);
        let completed = Completed {
            answer: Envelope::new(answer),
            references: References::default(),
            expires_at: SystemTime::UNIX_EPOCH,
            retention_left: HOUR,
        };
        assert!(weight(&completed) as usize > 1000 + 18 + OVERHEAD);
    }

    #[test]
    fn more_than_its_size_is_never_kept_for_long() {
        let cache = Arc::new(ReplayCache::new(10 * 1024));
        for number in 0..1000 {
            let identity = Identity::new("a", "POST /orders", number.to_string());
            let fill = cache.clone().fill(&identity, Moment::now());
            fill.written(&fingerprint(), &shown(HOUR));
        }
        cache.entries.run_pending_tasks();
        let kept = cache.entries.weighted_size();
        assert!(kept > 0 && kept <= 10 * 1024, "{kept}");
    }

    #[test]
    fn an_entry_keeps_no_more_of_a_buffer_than_it_shows() {
        let whole = Bytes::from(vec![7; 1 << 20]);
        let slice = Envelope::new(Response::new(whole.slice(10..20)));
        let (cache, now) = (cache(), Moment::now());
        let fill = cache.clone().fill(&identity("a"), now);
        let completed = Completed {
            answer: slice,
            references: References::default(),
            expires_at: SystemTime::UNIX_EPOCH,
            retention_left: HOUR,
        };
        fill.written(&fingerprint(), &Existing::Completed(Box::new(completed)));
        assert!(hits(&cache, now));
        // Nobody else has it any more.
        assert!(whole.try_into_mut().is_ok());
    }
}
