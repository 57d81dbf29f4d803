//! What a store has to answer, by the words of the trait: one plain struct, no database, no clock.

use tower_idempotency::Lost;

pub const KEYS: usize = 2;

/// In minutes, all of them. What passes is never the same as what lasts, so that nothing hangs on
/// how long a test takes.
pub const LEASE: u64 = 100;
pub const RENEWED: u64 = 170;
pub const TTL: u64 = 1000;

/// One request for a claim: of which key, with which body, under which policy and token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Call {
    pub key: usize,
    pub body: usize,
    pub lost: Lost,
    pub token: u64,
}

/// What a store said. References are one at most, and known by their number.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    Acquired { attempt: u32 },
    Abandoned { attempt: u32 },
    Absent,
    InProgress { left: u64 },
    Completed { answer: u8, reference: Option<u8> },
    Mismatch,
    Held,
    Done,
    ClaimLost,
    Renewed(Vec<bool>),
    Swept { deleted: u64, held: u64 },
    Opened,
    Locked,
    Recorded,
    RolledBack,
    Failed(String),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum State {
    Running,
    Completed,
    Held,
}

/// What [`inspect`](tower_idempotency::Store::inspect) shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    pub state: State,
    pub attempt: u32,
    pub reference: Option<u8>,
    pub kept: u64,
}

/// All that can be seen from outside.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// For each key, for each body.
    pub lookups: Vec<[Told; 2]>,
    pub inspections: Vec<Option<Shown>>,
    /// Key, token, attempt and reference.
    pub held: Vec<(usize, u64, u32, Option<u8>)>,
    /// The keys under each reference.
    pub found: [Vec<usize>; 2],
}

#[derive(Debug, Clone)]
struct Record {
    state: State,
    token: u64,
    attempt: u32,
    lost: Lost,
    is_abandoned: bool,
    body: usize,
    claimed_at: u64,
    leased_until: u64,
    expires_at: u64,
    reference: Option<u8>,
    answer: u8,
}

#[derive(Debug, Clone, Default)]
pub struct Reference {
    pub now: u64,
    records: [Option<Record>; KEYS],
    /// Tokens that nobody knows.
    fences: u64,
}

impl Record {
    fn is_lost(&self, now: u64) -> bool {
        self.state == State::Running && self.leased_until <= now
    }

    /// As good as absent.
    fn is_over(&self, now: u64) -> bool {
        let ended = self.state == State::Completed || self.is_lost(now) && self.lost != Lost::Hold;
        self.expires_at <= now && ended
    }

    fn seen(&self, body: usize, now: u64) -> Told {
        match self.state {
            _ if self.body != body => Told::Mismatch,
            State::Held => Told::Held,
            State::Completed => Told::Completed {
                answer: self.answer,
                reference: self.reference,
            },
            State::Running => Told::InProgress {
                left: self.leased_until.saturating_sub(now),
            },
        }
    }

    fn claimed(&self) -> Told {
        let attempt = self.attempt;
        match self.is_abandoned {
            true => Told::Abandoned { attempt },
            false => Told::Acquired { attempt },
        }
    }
}

impl Reference {
    pub fn claim(&mut self, call: Call) -> Told {
        let (attempt, is_abandoned) = match &mut self.records[call.key] {
            Some(own) if own.token == call.token && own.state == State::Running => {
                return own.claimed();
            }
            None => (1, false),
            Some(old) if old.is_over(self.now) => (1, false),
            Some(old) if old.body != call.body || !old.is_lost(self.now) => {
                return old.seen(call.body, self.now);
            }
            Some(old) if old.lost == Lost::Hold => {
                old.state = State::Held;
                return Told::Held;
            }
            Some(old) => (old.attempt + 1, old.lost == Lost::Answer),
        };
        let mut new = self.record(call, State::Running);
        (new.attempt, new.is_abandoned) = (attempt, is_abandoned);
        if is_abandoned {
            new.lost = Lost::Answer;
        }
        let told = new.claimed();
        self.records[call.key] = Some(new);
        told
    }

    fn record(&self, call: Call, state: State) -> Record {
        Record {
            state,
            token: call.token,
            attempt: 1,
            lost: call.lost,
            is_abandoned: false,
            body: call.body,
            claimed_at: self.now,
            leased_until: self.now + LEASE,
            expires_at: self.now + TTL,
            reference: None,
            answer: 0,
        }
    }

    /// The record, if it carries the token.
    fn owned(&mut self, call: Call) -> Option<&mut Record> {
        let record = self.records[call.key].as_mut();
        record.filter(|record| record.token == call.token)
    }

    pub fn complete(&mut self, call: Call, answer: u8, reference: Option<u8>) -> Told {
        let now = self.now;
        let Some(record) = self.owned(call) else {
            return Told::ClaimLost;
        };
        if record.state == State::Completed {
            return Told::Done;
        }
        if record.state == State::Held || record.expires_at <= now {
            record.expires_at = now + TTL;
        }
        record.state = State::Completed;
        record.answer = answer;
        record.reference = reference.or(record.reference);
        Told::Done
    }

    pub fn release(&mut self, call: Call) -> Told {
        let (now, is_absent) = (self.now, !self.is_recorded(call.key));
        match self.owned(call) {
            None if is_absent => Told::Done,
            Some(own) if own.state == State::Running && own.is_abandoned => {
                own.leased_until = now;
                Told::Done
            }
            Some(own) if own.state != State::Completed => {
                self.records[call.key] = None;
                Told::Done
            }
            _ => Told::ClaimLost,
        }
    }

    pub fn hold(&mut self, call: Call, reference: Option<u8>) -> Told {
        match self.owned(call) {
            Some(own) if own.state != State::Completed => {
                own.state = State::Held;
                own.reference = reference.or(own.reference);
                Told::Done
            }
            _ => Told::ClaimLost,
        }
    }

    pub fn extend(&mut self, calls: &[Call]) -> Told {
        let until = self.now + RENEWED;
        let renewed = calls.iter().map(|call| {
            let own = self.owned(*call).filter(|own| own.state == State::Running);
            own.map(|own| own.leased_until = until).is_some()
        });
        Told::Renewed(renewed.collect())
    }

    /// With an answer, or by freeing the key.
    pub fn resolve(&mut self, call: Call, answer: Option<u8>) -> Told {
        let (now, fence) = (self.now, u64::MAX - self.fences);
        self.fences += 1;
        match (self.owned(call), answer) {
            (Some(own), Some(answer)) if own.state == State::Held => {
                (own.state, own.answer, own.token) = (State::Completed, answer, fence);
                own.expires_at = now + TTL;
                Told::Done
            }
            (Some(own), None) if own.state == State::Held => {
                self.records[call.key] = None;
                Told::Done
            }
            _ => Told::ClaimLost,
        }
    }

    pub fn sweep(&mut self) -> Told {
        let (now, mut deleted, mut held) = (self.now, 0, 0);
        for slot in &mut self.records {
            match slot {
                Some(record) if record.is_lost(now) && record.lost == Lost::Hold => {
                    record.state = State::Held;
                    held += 1;
                }
                Some(record) if record.is_over(now) => {
                    *slot = None;
                    deleted += 1;
                }
                _ => {}
            }
        }
        Told::Swept { deleted, held }
    }

    /// Of a transaction: the record comes last, and is there at once.
    pub fn commit(&mut self, call: Call, is_held: bool, answer: u8, reference: Option<u8>) -> Told {
        if self.records[call.key].is_some() {
            return Told::Recorded;
        }
        let state = if is_held {
            State::Held
        } else {
            State::Completed
        };
        let record = self.record(call, state);
        self.records[call.key] = Some(Record {
            answer,
            reference,
            ..record
        });
        Told::Done
    }

    pub fn is_recorded(&self, key: usize) -> bool {
        self.records[key].is_some()
    }

    pub fn confirm(&mut self, call: Call) -> Told {
        let is_recorded = self.is_recorded(call.key);
        match self.owned(call) {
            Some(own) if own.state != State::Running => Told::Done,
            _ if is_recorded => Told::Recorded,
            _ => Told::RolledBack,
        }
    }

    pub fn view(&self) -> View {
        let records = || self.records.iter().enumerate();
        let there = || {
            let there = records().filter_map(|(key, record)| Some((key, record.as_ref()?)));
            there.filter(|(_, record)| !record.is_over(self.now))
        };
        let lookup = |key: usize, body| match &self.records[key] {
            Some(record) if !record.is_over(self.now) => record.seen(body, self.now),
            _ => Told::Absent,
        };
        let found = |reference| {
            let found = there().filter(|(_, record)| record.reference == Some(reference));
            found.map(|(key, _)| key).collect()
        };
        let held = there().filter(|(_, record)| record.state == State::Held);
        View {
            lookups: (0..KEYS)
                .map(|key| [lookup(key, 0), lookup(key, 1)])
                .collect(),
            inspections: records()
                .map(|(_, record)| {
                    let record = record.as_ref().filter(|r| !r.is_over(self.now))?;
                    Some(Shown {
                        state: record.state,
                        attempt: record.attempt,
                        reference: record.reference,
                        kept: record.expires_at - record.claimed_at,
                    })
                })
                .collect(),
            held: held
                .map(|(key, r)| (key, r.token, r.attempt, r.reference))
                .collect(),
            found: [found(0), found(1)],
        }
    }
}
