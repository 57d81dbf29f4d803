//! A store of your own, in one file: records in an append-only journal of JSON lines.
//!
//! `cargo run --example custom_store` charges a card, closes the store, opens it again, and sends
//! the same request once more. `cargo test --all-features --example custom_store` runs every rule of
//! a store against it.
//!
//! It is for one process, and as durable as one disk: a step is answered once its lines are synced.
//! Each step syncs on its own, so it is slow; a database is the better choice for a real service.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::Request;
use axum::routing::post;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tower::ServiceExt;
use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completed, Completion, Existing, HeldRecord, LeaseRenewal,
    RecordState, RecordSummary, Renewed, Resolution, Swept, Token, Within,
};
use tower_idempotency::{
    Envelope, Fingerprint, IdempotencyLayer, Identity, Lost, Policy, RecordId, References, Scope,
    Store, StoreError,
};

type BoxError = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), BoxError> {
    let directory = std::env::temp_dir().join(format!("custom-store-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let journal = directory.join("records.jsonl");
    for time in ["first", "after a restart"] {
        // Ends all that was started in it, and so closes the store.
        let runtime = tokio::runtime::Runtime::new()?;
        let answer = runtime.block_on(charge(FileStore::open(&journal, 10_000)?))?;
        println!("{time}: {answer}");
    }
    let lines = fs::read_to_string(&journal)?.lines().count();
    println!("The journal has {lines} lines.");
    Ok(fs::remove_dir_all(&directory)?)
}

/// A whole service, and one request to it.
async fn charge(store: FileStore) -> Result<String, BoxError> {
    // A critical policy insists on a durable store.
    let layer = IdempotencyLayer::new(store, Scope::global()).with_policy(Policy::critical())?;
    // Another run would say another time.
    let handler = || async { format!("charged at {:?}", SystemTime::now()) };
    let app = Router::new().route("/charges", post(handler).route_layer(layer));
    let request = Request::post("/charges").header("idempotency-key", "order-7");
    let answer = app.oneshot(request.body(Body::empty())?).await?;
    let replayed = answer.headers().contains_key("idempotent-replayed");
    let body = to_bytes(answer.into_body(), 1024).await?;
    Ok(format!("{}, replayed: {replayed}", str::from_utf8(&body)?))
}

/// Records in one file of one process. Clones share it.
#[derive(Debug, Clone)]
struct FileStore(Arc<Mutex<Table>>);

/// All records, in the order of their ids, and the journal they are in.
#[derive(Debug)]
struct Table {
    records: BTreeMap<String, Record>,
    /// Claims beyond it are refused. The journal is rewritten when two of three lines are out of
    /// date, so the file is bounded too.
    capacity: usize,
    path: PathBuf,
    journal: File,
    lines: usize,
    /// A write failed: what the file holds is not known until it is read again.
    broken: bool,
    /// How far a test moved the clock, in milliseconds.
    ahead: u64,
    /// Locked as long as the store is open.
    _lock: File,
}

/// Bytes are in hex, times in milliseconds since 1970.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    scope: String,
    operation: String,
    key: String,
    fingerprint: String,
    state: State,
    token: String,
    attempt: u32,
    lost: IfLost,
    /// The claim was only taken over to answer that an earlier attempt was lost.
    abandoned: bool,
    ttl: u64,
    claimed_at: u64,
    leased_until: u64,
    expires_at: u64,
    answer: Option<String>,
    references: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum State {
    Running,
    Completed,
    Held,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum IfLost {
    Rerun,
    Answer,
    Hold,
}

impl FileStore {
    /// Reads the journal at `path`, or begins one.
    fn open(path: &Path, capacity: usize) -> io::Result<Self> {
        let path = &std::path::absolute(path)?;
        // A file of its own: the journal is replaced when it is rewritten.
        let lock = File::create(path.with_extension("lock"))?;
        lock.try_lock()?;
        let mut options = OpenOptions::new();
        let journal = options.create(true).append(true).open(path)?;
        let mut text = fs::read(path)?;
        // A line without an end was cut off in the middle, and nobody was told that it was written.
        let end = text
            .iter()
            .rposition(|b| *b == b'\n')
            .map_or(0, |at| at + 1);
        text.truncate(end);
        journal.set_len(end as u64)?;
        let mut records = BTreeMap::new();
        let mut lines = 0;
        for line in text.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            let (id, record): (String, Option<Record>) = serde_json::from_slice(line)?;
            match record {
                Some(record) => drop(records.insert(id, record)),
                None => drop(records.remove(&id)),
            }
            lines += 1;
        }
        let mut table = Table {
            records,
            capacity,
            path: path.to_owned(),
            journal,
            lines,
            broken: false,
            ahead: 0,
            _lock: lock,
        };
        // Also makes the new file's name durable.
        table.rewrite()?;
        Ok(Self(Arc::new(Mutex::new(table))))
    }

    /// Runs one step alone, where it may block. It is finished even if the caller no longer waits.
    async fn step<T: Send + 'static>(
        &self,
        step: impl FnOnce(&mut Table) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let table = self.0.clone();
        let step = move || step(&mut table.lock().unwrap_or_else(PoisonError::into_inner));
        spawn_blocking(step)
            .await
            .map_err(StoreError::unavailable)?
    }
}

impl Table {
    fn now(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        millis(now.unwrap_or_default()).saturating_add(self.ahead)
    }

    /// Writes the changes, and then believes them. `None` deletes.
    fn write(&mut self, changes: Vec<(String, Option<Record>)>) -> Result<(), StoreError> {
        if self.broken {
            return Err(StoreError::unavailable(
                "a write failed: open the file again",
            ));
        }
        if !changes.is_empty() {
            self.append(&changes).map_err(|error| {
                self.broken = true;
                StoreError::unavailable(error)
            })?;
        }
        for (id, record) in changes {
            match record {
                Some(record) => drop(self.records.insert(id, record)),
                None => drop(self.records.remove(&id)),
            }
        }
        Ok(())
    }

    fn append(&mut self, changes: &[(String, Option<Record>)]) -> io::Result<()> {
        if self.lines > 3 * self.records.len() + 1_000 {
            self.rewrite()?;
        }
        self.journal.write_all(&lines(changes)?)?;
        self.lines += changes.len();
        self.journal.sync_data()
    }

    /// Puts a journal without old lines in the place of this one: all of it or nothing.
    fn rewrite(&mut self) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut options = OpenOptions::new();
        fs::write(&new, lines(&self.records)?)?;
        let journal = options.append(true).open(&new)?;
        journal.sync_all()?;
        fs::rename(&new, &self.path)?;
        // Elsewhere a rename is as durable as the system makes it.
        #[cfg(unix)]
        File::open(self.path.parent().unwrap_or(&self.path))?.sync_all()?;
        (self.journal, self.lines) = (journal, self.records.len());
        Ok(())
    }

    fn put(&mut self, id: String, record: Record) -> Result<(), StoreError> {
        self.write(vec![(id, Some(record))])
    }

    /// A copy of the record that a claim is still the holder of, in one of the states.
    fn fenced(&self, identity: &Identity, token: Token, states: &[State]) -> Option<Record> {
        let record = self.records.get(&id(identity.id()))?;
        let holds = record.token == hex::encode(token.as_bytes());
        (holds && states.contains(&record.state)).then(|| record.clone())
    }

    fn claim(&mut self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        let (now, id) = (self.now(), id(request.identity.id()));
        let full = self.records.len() >= self.capacity;
        let (attempt, abandoned) = match self.records.get(&id) {
            None if full => return Err(StoreError::unavailable("store is full")),
            None => (1, false),
            Some(record) => {
                record.check(&request.identity)?;
                let is_own = record.token == hex::encode(request.token.as_bytes());
                if is_own && record.state == State::Running {
                    return Ok(record.claimed(request));
                }
                let is_of = record.is_of(&request.fingerprint)?;
                match record.lost {
                    _ if record.is_over(now) => (1, false),
                    _ if !record.is_lost(now) || !is_of => {
                        return Ok(Claimed::Existing(record.seen(&request.fingerprint, now)?));
                    }
                    IfLost::Rerun => (record.attempt.saturating_add(1), false),
                    IfLost::Answer => (record.attempt.saturating_add(1), true),
                    IfLost::Hold => {
                        let state = State::Held;
                        let held = Record {
                            state,
                            ..record.clone()
                        };
                        self.put(id, held)?;
                        return Ok(Claimed::Existing(Existing::Held));
                    }
                }
            }
        };
        let record = Record::new(request, now, attempt, abandoned)?;
        let claimed = record.claimed(request);
        self.put(id, record)?;
        Ok(claimed)
    }

    fn release(&mut self, claim: &Claim) -> Result<(), StoreError> {
        let id = id(claim.identity.id());
        match self.fenced(&claim.identity, claim.token, &[State::Running, State::Held]) {
            Some(record) if record.abandoned && record.state == State::Running => {
                let leased_until = self.now();
                self.put(
                    id,
                    Record {
                        leased_until,
                        ..record
                    },
                )
            }
            Some(_) => self.write(vec![(id, None)]),
            None if !self.records.contains_key(&id) => Ok(()),
            None => Err(StoreError::claim_lost()),
        }
    }

    fn complete(&mut self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        let any = [State::Running, State::Held, State::Completed];
        let record = self.fenced(&claim.identity, claim.token, &any);
        let mut record = record.ok_or_else(StoreError::claim_lost)?;
        if record.state == State::Completed {
            return Ok(());
        }
        let now = self.now();
        if record.state == State::Held || record.expires_at <= now {
            record.expires_at = now.saturating_add(record.ttl);
        }
        record.state = State::Completed;
        record.answer = Some(hex::encode(completion.answer.encode()));
        record.note(&completion.references);
        self.put(id(claim.identity.id()), record)
    }

    fn hold(&mut self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        let record = self.fenced(&claim.identity, claim.token, &[State::Running, State::Held]);
        let mut record = record.ok_or_else(StoreError::claim_lost)?;
        record.state = State::Held;
        record.note(references);
        self.put(id(claim.identity.id()), record)
    }

    fn extend(&mut self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        let (now, mut changes, mut renewed) = (self.now(), Vec::new(), Vec::new());
        for LeaseRenewal { claim, lease } in leases {
            let record = self.fenced(&claim.identity, claim.token, &[State::Running]);
            renewed.push(record.as_ref().map_or(Renewed::Lost, |_| Renewed::Kept));
            changes.extend(record.map(|record| {
                let leased_until = now.saturating_add(millis(*lease));
                (
                    id(claim.identity.id()),
                    Some(Record {
                        leased_until,
                        ..record
                    }),
                )
            }));
        }
        self.write(changes)?;
        Ok(renewed)
    }

    fn resolve(
        &mut self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let record = self.fenced(identity, token, &[State::Held]);
        let mut record = record.ok_or_else(StoreError::claim_lost)?;
        if let Resolution::Answer(answer) = resolution {
            record.state = State::Completed;
            record.answer = Some(hex::encode(answer.encode()));
            record.expires_at = self.now().saturating_add(record.ttl);
            // Fences the attempt, which may still be alive.
            record.token = hex::encode(Token::random()?.as_bytes());
            return self.put(id(identity.id()), record);
        }
        self.write(vec![(id(identity.id()), None)])
    }

    fn sweep(&mut self, limit: u32) -> Result<Swept, StoreError> {
        let (now, limit) = (self.now(), limit as usize);
        let records = || self.records.iter();
        let lost = records().filter(|(_, r)| r.is_lost(now) && r.lost == IfLost::Hold);
        let hold = |(id, record): (&String, &Record)| {
            let state = State::Held;
            (
                id.clone(),
                Some(Record {
                    state,
                    ..record.clone()
                }),
            )
        };
        let mut changes: Vec<_> = lost.take(limit).map(hold).collect();
        let held = changes.len();
        let over = records().filter(|(_, record)| record.is_over(now));
        changes.extend(over.take(limit).map(|(id, _)| (id.clone(), None)));
        let deleted = changes.len() - held;
        self.write(changes)?;
        let (deleted, held) = (deleted as u64, held as u64);
        Ok(Swept { deleted, held })
    }
}

impl Record {
    fn new(
        request: &ClaimRequest,
        now: u64,
        attempt: u32,
        abandoned: bool,
    ) -> Result<Self, StoreError> {
        let lost = match request.lost {
            // It never runs: what was decided for the lost attempt stays.
            _ if abandoned => IfLost::Answer,
            Lost::Rerun => IfLost::Rerun,
            Lost::Answer => IfLost::Answer,
            Lost::Hold => IfLost::Hold,
            other => return Err(StoreError::unavailable(format!("cannot keep {other:?}"))),
        };
        Ok(Self {
            scope: request.identity.scope().to_owned(),
            operation: request.identity.operation().to_owned(),
            key: request.identity.key().to_owned(),
            fingerprint: hex::encode(request.fingerprint.to_bytes()),
            state: State::Running,
            token: hex::encode(request.token.as_bytes()),
            attempt,
            lost,
            abandoned,
            ttl: millis(request.ttl),
            claimed_at: now,
            leased_until: now.saturating_add(millis(request.lease)),
            expires_at: now.saturating_add(millis(request.ttl)),
            answer: None,
            references: None,
        })
    }

    fn identity(&self) -> Identity {
        Identity::new(&self.scope, &self.operation, &self.key)
    }

    /// Two identities may share an id, however unlikely that is.
    fn check(&self, identity: &Identity) -> Result<(), StoreError> {
        if self.identity().digest() == identity.digest() {
            return Ok(());
        }
        Err(StoreError::corrupt("two identities share one record id"))
    }

    fn is_of(&self, fingerprint: &Fingerprint) -> Result<bool, StoreError> {
        let stored = Fingerprint::from_bytes(&bytes(&self.fingerprint)?);
        let stored = stored.ok_or_else(|| StoreError::corrupt("fingerprint"))?;
        Ok(fingerprint.matches(&stored))
    }

    fn is_lost(&self, now: u64) -> bool {
        self.state == State::Running && self.leased_until <= now
    }

    /// As good as absent.
    fn is_over(&self, now: u64) -> bool {
        let ended =
            self.state == State::Completed || self.is_lost(now) && self.lost != IfLost::Hold;
        self.expires_at <= now && ended
    }

    fn claimed(&self, request: &ClaimRequest) -> Claimed {
        let claim = request.claim(self.attempt, time(self.expires_at));
        if self.abandoned {
            return Claimed::Abandoned(claim);
        }
        Claimed::Acquired(claim)
    }

    fn seen(&self, fingerprint: &Fingerprint, now: u64) -> Result<Existing, StoreError> {
        if !self.is_of(fingerprint)? {
            return Ok(Existing::Mismatch);
        }
        let lease_left = Duration::from_millis(self.leased_until.saturating_sub(now));
        match (self.state, &self.answer) {
            (State::Running, _) => Ok(Existing::InProgress { lease_left }),
            (State::Held, _) => Ok(Existing::Held),
            (State::Completed, None) => Err(StoreError::corrupt("no answer")),
            (State::Completed, Some(answer)) => Ok(Existing::Completed(Box::new(Completed {
                answer: Envelope::decode(&bytes(answer)?).map_err(StoreError::corrupt)?,
                references: self.references()?,
                expires_at: time(self.expires_at),
                retention_left: Duration::from_millis(self.expires_at.saturating_sub(now)),
            }))),
        }
    }

    fn note(&mut self, references: &References) {
        if let Some(noted) = references.to_json() {
            self.references = Some(noted);
        }
    }

    fn references(&self) -> Result<References, StoreError> {
        let references = References::from_json(self.references.as_deref());
        references.ok_or_else(|| StoreError::corrupt("references"))
    }

    fn summary(&self) -> Result<RecordSummary, StoreError> {
        let state = match (self.state, &self.answer) {
            (State::Running, _) => RecordState::Running,
            (State::Held, _) => RecordState::Held,
            (State::Completed, None) => return Err(StoreError::corrupt("no answer")),
            (State::Completed, Some(answer)) => {
                let answer = Envelope::decode(&bytes(answer)?).map_err(StoreError::corrupt)?;
                let status = answer.status();
                RecordState::Completed { status }
            }
        };
        Ok(RecordSummary {
            identity: self.identity(),
            state,
            attempt: self.attempt,
            references: self.references()?,
            claimed_at: time(self.claimed_at),
            expires_at: time(self.expires_at),
        })
    }

    fn held(&self) -> Result<HeldRecord, StoreError> {
        let token = bytes(&self.token)?.try_into();
        Ok(HeldRecord {
            identity: self.identity(),
            token: Token::from_bytes(token.map_err(|_| StoreError::corrupt("token"))?),
            attempt: self.attempt,
            references: self.references()?,
            claimed_at: time(self.claimed_at),
        })
    }
}

impl Store for FileStore {
    fn is_durable(&self) -> bool {
        true
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        let request = request.clone();
        self.step(move |table| table.claim(&request)).await
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        let (claim, completion) = (claim.clone(), completion.clone());
        self.step(move |table| table.complete(&claim, &completion))
            .await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        let claim = claim.clone();
        self.step(move |table| table.release(&claim)).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        let (claim, references) = (claim.clone(), references.clone());
        self.step(move |table| table.hold(&claim, &references))
            .await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        let leases = leases.to_vec();
        self.step(move |table| table.extend(&leases)).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        let (identity, fingerprint) = (identity.clone(), fingerprint.clone());
        let step = move |table: &mut Table| {
            let now = table.now();
            let Some(record) = table.records.get(&id(identity.id())) else {
                return Ok(None);
            };
            record.check(&identity)?;
            let is_there = !record.is_over(now);
            is_there.then(|| record.seen(&fingerprint, now)).transpose()
        };
        self.step(step).await
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        let (identity, resolution) = (identity.clone(), resolution.clone());
        let step = move |table: &mut Table| table.resolve(&identity, token, &resolution);
        self.step(step).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        let limit = limit.min(1_000) as usize;
        let step = move |table: &mut Table| {
            let records = table.records.iter();
            let held = records.filter(|(_, record)| record.state == State::Held);
            let page = held.filter(|(key, _)| after.is_none_or(|after| **key > id(after)));
            page.take(limit).map(|(_, record)| record.held()).collect()
        };
        self.step(step).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        let identity = identity.clone();
        let step = move |table: &mut Table| {
            let Some(record) = table.records.get(&id(identity.id())) else {
                return Ok(None);
            };
            record.check(&identity)?;
            let is_there = !record.is_over(table.now());
            is_there.then(|| record.summary()).transpose()
        };
        self.step(step).await
    }

    /// Looks through all records, as a journal has no index. A database has one: use it.
    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        let scope = within.scope().map(str::to_owned);
        let (kind, id) = (kind.to_owned(), id.to_owned());
        let limit = limit.min(1_000) as usize;
        let step = move |table: &mut Table| {
            let (now, after) = (table.now(), after.map(self::id));
            let mut found = Vec::new();
            for (key, record) in &table.records {
                let is_within = scope.as_ref().is_none_or(|scope| *scope == record.scope);
                let is_next = after.as_ref().is_none_or(|after| key > after);
                if found.len() == limit || !is_within || !is_next || record.is_over(now) {
                    continue;
                }
                if record.references()?.contains(&kind, &id) {
                    found.push(record.summary()?);
                }
            }
            Ok(found)
        };
        self.step(step).await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.step(move |table| table.sweep(limit)).await
    }
}

/// Hex keeps the order of the bytes.
fn id(id: RecordId) -> String {
    hex::encode(id.as_bytes())
}

fn bytes(text: &str) -> Result<Vec<u8>, StoreError> {
    hex::decode(text).map_err(StoreError::corrupt)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn time(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis)
}

/// One line each: `["id", record]`, or `["id", null]` for one that was deleted.
fn lines<T: Serialize>(changes: impl IntoIterator<Item = T>) -> io::Result<Vec<u8>> {
    let mut lines = Vec::new();
    for change in changes {
        serde_json::to_writer(&mut lines, &change)?;
        lines.push(b'\n');
    }
    Ok(lines)
}

#[cfg(test)]
#[path = "custom_store/tests.rs"]
mod tests;
