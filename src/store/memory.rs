use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::protocol::{self, Inserted, MAX_PAGE, Records, Row, State, Takeover};
use super::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, RecordSummary,
    Renewed, Resolution, Store, StoreError, Swept, Token, Within,
};
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::{Identity, RecordId};
use crate::policy::Lost;

const CAPACITY: usize = 100_000;

/// Records in this process's memory, for tests: they end with the process.
///
/// Holds 100,000 records unless told otherwise; a claim beyond that is
/// [`Unavailable`](super::StoreErrorKind::Unavailable) until some expire and are swept.
///
/// ```
/// use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
///
/// let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
/// ```
#[derive(Debug, Clone)]
pub struct MemoryStore {
    table: Arc<Mutex<Table>>,
}

#[derive(Debug)]
struct Table {
    records: HashMap<RecordId, Record>,
    capacity: usize,
    /// How far [`MemoryStore::advance`] moved the clock.
    ahead: Duration,
}

#[derive(Debug)]
struct Record {
    identity: Identity,
    state: State,
    token: Token,
    attempt: u32,
    lost: Lost,
    abandoned: bool,
    fingerprint: Vec<u8>,
    ttl: Duration,
    claimed_at: SystemTime,
    expires_at: SystemTime,
    expires: Instant,
    leased_until: Instant,
    answer: Option<Vec<u8>>,
    references: Option<String>,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(CAPACITY)
    }

    /// An empty store that holds at most `records`.
    ///
    /// ```
    /// let store = tower_idempotency::MemoryStore::with_capacity(1_000);
    /// ```
    #[must_use]
    pub fn with_capacity(records: usize) -> Self {
        Self {
            table: Arc::new(Mutex::new(Table {
                records: HashMap::new(),
                capacity: records,
                ahead: Duration::ZERO,
            })),
        }
    }

    /// Moves this store's clock forward, to see what happens once leases and retention are over.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::MemoryStore;
    /// let store = MemoryStore::new();
    /// store.advance(Duration::from_secs(3600));
    /// ```
    pub fn advance(&self, by: Duration) {
        self.table().ahead += by;
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now() + self.ahead
    }

    fn new_record(&self, request: &ClaimRequest, takeover: Takeover) -> Result<Record, StoreError> {
        let claimed_at = self.wall();
        Ok(Record {
            identity: request.identity.clone(),
            state: State::Running,
            token: request.token,
            attempt: takeover.attempt,
            lost: takeover.lost(request),
            abandoned: takeover.abandoned,
            fingerprint: request.fingerprint.to_bytes(),
            ttl: request.ttl,
            claimed_at,
            expires_at: claimed_at.checked_add(request.ttl).ok_or_else(too_long)?,
            expires: later(self.now(), request.ttl)?,
            leased_until: later(self.now(), request.lease)?,
            answer: None,
            references: None,
        })
    }

    /// The record of a claim, if it is in one of the states and carries its token.
    fn claimed(&mut self, id: RecordId, token: Token, states: &[State]) -> Option<&mut Record> {
        let record = self.records.get_mut(&id)?;
        (record.token == token && states.contains(&record.state)).then_some(record)
    }
}

impl Record {
    fn is_lost(&self, now: Instant) -> bool {
        self.state == State::Running && self.leased_until <= now
    }

    /// As good as absent.
    fn is_over(&self, now: Instant) -> bool {
        let ended = self.state == State::Completed || self.is_lost(now) && self.lost != Lost::Hold;
        self.expires <= now && ended
    }

    fn note(&mut self, references: &References) {
        if let Some(noted) = references.to_json() {
            self.references = Some(noted);
        }
    }

    fn summary(&self) -> Result<RecordSummary, StoreError> {
        Ok(RecordSummary {
            identity: self.identity.clone(),
            state: protocol::state(self.state, self.answer.as_deref())?,
            attempt: self.attempt,
            references: protocol::references(self.references.as_deref())?,
            claimed_at: self.claimed_at,
            expires_at: self.expires_at,
        })
    }
}

fn later(now: Instant, by: Duration) -> Result<Instant, StoreError> {
    now.checked_add(by).ok_or_else(too_long)
}

fn too_long() -> StoreError {
    StoreError::unavailable("memory store cannot count that far")
}

impl Records for MemoryStore {
    async fn insert(&self, request: &ClaimRequest) -> Result<Inserted, StoreError> {
        let mut table = self.table();
        let id = request.identity.id();
        if table.records.contains_key(&id) {
            return Ok(Inserted::Taken);
        }
        if table.records.len() >= table.capacity {
            return Err(StoreError::unavailable("memory store is full"));
        }
        let first = Takeover {
            attempt: 1,
            abandoned: false,
        };
        let record = table.new_record(request, first)?;
        let expires_at = record.expires_at;
        table.records.insert(id, record);
        Ok(Inserted::Until(expires_at))
    }

    async fn select(&self, identity: &Identity) -> Result<Option<Row>, StoreError> {
        let table = self.table();
        let now = table.now();
        Ok(table.records.get(&identity.id()).map(|record| Row {
            digest: record.identity.digest().to_vec(),
            state: record.state,
            token: record.token,
            attempt: record.attempt,
            lost: record.lost,
            abandoned: record.abandoned,
            fingerprint: record.fingerprint.clone(),
            lease_left: record
                .leased_until
                .checked_duration_since(now)
                .filter(|left| !left.is_zero()),
            expired: record.expires <= now,
            expires_at: record.expires_at,
            retention_left: record.expires.saturating_duration_since(now),
            answer: record.answer.clone(),
            references: record.references.clone(),
        }))
    }

    async fn take_over(
        &self,
        request: &ClaimRequest,
        old: Token,
        takeover: Takeover,
    ) -> Result<Option<SystemTime>, StoreError> {
        let mut table = self.table();
        let now = table.now();
        let new = table.new_record(request, takeover)?;
        let states = [State::Running, State::Completed];
        let Some(record) = table.claimed(request.identity.id(), old, &states) else {
            return Ok(None);
        };
        let over = match record.state {
            State::Running => record.leased_until <= now,
            State::Completed | State::Held => record.expires <= now,
        };
        if !over {
            return Ok(None);
        }
        *record = new;
        Ok(Some(record.expires_at))
    }

    async fn hold_lost(&self, identity: &Identity, token: Token) -> Result<bool, StoreError> {
        let mut table = self.table();
        let now = table.now();
        let record = table.claimed(identity.id(), token, &[State::Running]);
        Ok(record
            .filter(|record| record.leased_until <= now)
            .map(|record| record.state = State::Held)
            .is_some())
    }

    async fn update_completed(
        &self,
        claim: &Claim,
        completion: &Completion,
    ) -> Result<bool, StoreError> {
        let mut table = self.table();
        let (now, wall) = (table.now(), table.wall());
        let states = [State::Running, State::Held];
        let Some(record) = table.claimed(claim.identity.id(), claim.token, &states) else {
            return Ok(false);
        };
        if record.state == State::Held || record.expires <= now {
            record.expires = later(now, record.ttl)?;
            record.expires_at = wall.checked_add(record.ttl).ok_or_else(too_long)?;
        }
        record.state = State::Completed;
        record.answer = Some(completion.answer.encode());
        record.note(&completion.references);
        Ok(true)
    }

    async fn delete_claimed(&self, claim: &Claim) -> Result<bool, StoreError> {
        let mut table = self.table();
        let id = claim.identity.id();
        let found = table
            .claimed(id, claim.token, &[State::Running, State::Held])
            .is_some_and(|record| record.state == State::Held || !record.abandoned);
        if found {
            table.records.remove(&id);
        }
        Ok(found)
    }

    async fn give_up(&self, claim: &Claim) -> Result<bool, StoreError> {
        let mut table = self.table();
        let now = table.now();
        let record = table.claimed(claim.identity.id(), claim.token, &[State::Running]);
        Ok(record
            .filter(|record| record.abandoned)
            .map(|record| record.leased_until = now)
            .is_some())
    }

    async fn update_held(
        &self,
        claim: &Claim,
        references: &References,
    ) -> Result<bool, StoreError> {
        let mut table = self.table();
        let states = [State::Running, State::Held];
        let record = table.claimed(claim.identity.id(), claim.token, &states);
        Ok(record
            .map(|record| {
                record.state = State::Held;
                record.note(references);
            })
            .is_some())
    }
}

impl Store for MemoryStore {
    fn is_durable(&self) -> bool {
        false
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        protocol::claim(self, request).await
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        protocol::complete(self, claim, completion).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        protocol::release(self, claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        protocol::hold(self, claim, references).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        protocol::lookup(self, identity, fingerprint).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        let mut table = self.table();
        let now = table.now();
        let renewals = leases.iter().map(|renewal| {
            let claim = &renewal.claim;
            match table.claimed(claim.identity.id(), claim.token, &[State::Running]) {
                Some(record) => {
                    record.leased_until = later(now, renewal.lease)?;
                    Ok(Renewed::Kept)
                }
                None => Ok(Renewed::Lost),
            }
        });
        renewals.collect()
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let fence = Token::random()?;
        let mut table = self.table();
        let (now, wall) = (table.now(), table.wall());
        let record = table
            .claimed(identity.id(), token, &[State::Held])
            .ok_or_else(StoreError::claim_lost)?;
        match resolution {
            Resolution::Answer(answer) => {
                record.expires = later(now, record.ttl)?;
                record.expires_at = wall.checked_add(record.ttl).ok_or_else(too_long)?;
                record.state = State::Completed;
                record.token = fence;
                record.answer = Some(answer.encode());
            }
            Resolution::Release => {
                table.records.remove(&identity.id());
            }
        }
        Ok(())
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        let table = self.table();
        let mut held: Vec<_> = table
            .records
            .values()
            .filter(|record| record.state == State::Held)
            .filter(|record| after.is_none_or(|after| record.identity.id() > after))
            .collect();
        held.sort_by_key(|record| record.identity.id());
        let page = held.into_iter().take(limit.min(MAX_PAGE) as usize);
        page.map(|record| {
            Ok(HeldRecord {
                identity: record.identity.clone(),
                token: record.token,
                attempt: record.attempt,
                references: protocol::references(record.references.as_deref())?,
                claimed_at: record.claimed_at,
            })
        })
        .collect()
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        let table = self.table();
        let record = table.records.get(&identity.id());
        let found = record.filter(|record| !record.is_over(table.now()));
        protocol::inspected(found.map(Record::summary).transpose()?, identity)
    }

    /// Reads every record: this store is for tests.
    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        let table = self.table();
        let mut found = Vec::new();
        for record in table.records.values() {
            let is_within = within.scope().is_none_or(|s| s == record.identity.scope());
            let is_after = after.is_none_or(|after| record.identity.id() > after);
            if is_within && is_after && !record.is_over(table.now()) {
                found.push(record.summary()?);
            }
        }
        found.retain(|record| record.references.contains(kind, id));
        found.sort_by_key(|record| record.identity.id());
        found.truncate(limit.min(MAX_PAGE) as usize);
        Ok(found)
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        let mut table = self.table();
        let now = table.now();
        let lost = table.records.values_mut();
        let lost = lost.filter(|r| r.is_lost(now) && r.lost == Lost::Hold);
        let held = lost
            .take(limit as usize)
            .map(|record| record.state = State::Held)
            .count() as u64;
        let expired = table.records.iter().filter(|(_, r)| r.is_over(now));
        let expired: Vec<_> = expired.map(|(id, _)| *id).take(limit as usize).collect();
        for id in &expired {
            table.records.remove(id);
        }
        Ok(Swept {
            deleted: expired.len() as u64,
            held,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn request(token: u8, lost: Lost) -> ClaimRequest {
        ClaimRequest {
            identity: Identity::new("s", "o", "k"),
            fingerprint: Fingerprint::of_bytes(b"request"),
            token: Token::from_bytes([token; 16]),
            lost,
            lease: Duration::from_secs(30),
            ttl: Duration::from_secs(3600),
        }
    }

    #[tokio::test]
    async fn a_takeover_that_only_answers_keeps_what_the_lost_attempt_began_with() {
        let store = MemoryStore::new();
        store.claim(&request(1, Lost::Answer)).await.unwrap();
        for token in [2, 3] {
            store.advance(Duration::from_secs(31));
            let claimed = store.claim(&request(token, Lost::Rerun)).await.unwrap();
            assert!(matches!(claimed, Claimed::Abandoned(_)), "{claimed:?}");
        }
    }

    #[tokio::test]
    async fn a_full_store_refuses_claims_until_records_are_swept() {
        let store = MemoryStore::with_capacity(1);
        store.claim(&request(1, Lost::Rerun)).await.unwrap();
        let other = ClaimRequest {
            identity: Identity::new("s", "o", "other"),
            ..request(2, Lost::Rerun)
        };
        assert!(store.claim(&other).await.is_err());
        store.advance(Duration::from_secs(3601));
        assert_eq!(store.delete_expired(10).await.unwrap().deleted, 1);
        assert!(store.claim(&other).await.is_ok());
    }
}
