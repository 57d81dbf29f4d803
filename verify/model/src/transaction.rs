//! The transactional protocol: the handler's writes and its answer commit together, or not at all.
//!
//! | here | there |
//! |---|---|
//! | [`Step::Lookup`] | `try_enter` in `run/transact.rs`, before any transaction |
//! | [`Step::Lock`], [`Step::Look`] | `idempotency.enter` in `migrations/postgres/0003_*.sql`, then `begin; savepoint` in `store/postgres/transaction.rs` |
//! | [`Step::Undo`], [`Step::Record`], [`Step::Commit`] | `UNDO`, `RECORD` and `COMMIT` there |
//! | [`Step::Probe`], [`Step::Verdict`] | `confirm` there, as `commit` in `run/transact.rs` asks it |
//! | [`Tx`] | the backend of the server, which outlives the process that opened it |
//!
//! **A step** is one statement with its reply. [`Action::Delay`] is a reply that is not heard: the
//! statement may be executed behind the back of its sender, at any later time, before the server ends the
//! transaction, or never. What a **crash** leaves is the same. **The server ends a transaction**
//! ([`Action::ServerEnds`]) whenever it likes: a connection that broke, a host that vanished
//! (`idle_in_transaction_session_timeout`), a serialization failure, a restart.
//!
//! **A rerun** (`Policy::with_reruns`) is another attempt: it enters anew, with a token of its own, after the
//! first was found to be rolled back. So is the retry of a client. **What waits** for a lock, as a probe
//! does for the row of an open transaction, is tried again until its sender gives up.
//!
//! **Left out.** Retention. Leased attempts of the same identity, and a record that comes between the lookup
//! and the lock is looked up again (`clear`). What `running.rs` answers without the store. A hold, which
//! is a refusal of another name. SQLite, whose transactions run one after the other.

use std::fmt;

use stateright::{Model, Property};

use crate::Bounds;

/// An attempt: its place among the attempts of its key.
pub type Token = u8;

/// What is broken, to see that a property notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Lock and lookup are one statement, whose snapshot is older than the lock.
    OneSnapshot,
    /// There is no lock.
    NoLock,
    /// The lock is taken after the savepoint, and released with it.
    LockInSavepoint,
    /// A refusal rolls everything back, and is recorded in a transaction of its own.
    NoSavepoint,
    /// The record is written before the handler runs.
    RecordFirst,
    /// The record is written without looking for the mark of the attempt.
    NoMark,
    /// A commit that is not acknowledged is taken for one that did not happen.
    NoProbe,
    /// The probe reads, and does not wait for the transaction that is open.
    ProbeReads,
    /// The probe is committed.
    ProbeCommits,
}

/// Where the process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Reads what is committed.
    Lookup,
    /// Tries the lock.
    Lock,
    /// Looks again, under the lock. With [`Fault::OneSnapshot`], what was seen before.
    Look(Option<bool>),
    /// In the handler.
    Run,
    /// `rollback to savepoint`, for an answer that is kept without its writes.
    Undo,
    /// Inserts the record: whether the writes are kept.
    Record(bool),
    /// Commits.
    Commit,
    /// Inserts a row under the same id, to wait for the old transaction, and rolls it back.
    Probe,
    /// Reads the record that was in the way of the probe.
    Verdict,
    /// Answered, or dead.
    Over,
    /// Its request has not come yet.
    Unsent,
}

/// A statement whose sender waits no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Late {
    /// The record; its commit is never sent.
    Record(bool),
    /// The commit.
    Commit,
}

/// An open transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tx {
    locked: bool,
    /// Past the lookup: its handler may run.
    entered: bool,
    wrote: bool,
    /// An uncommitted record: whether it says that the writes are kept.
    record: Option<bool>,
    late: Option<Late>,
}

/// One request, or one rerun of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    step: Step,
    tx: Option<Tx>,
    /// Somebody was told that everything is rolled back.
    said_rolled_back: bool,
    /// The handler has sent a commit of its own.
    ended: bool,
}

/// A committed record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    by: Token,
    kept: bool,
}

/// All that is known of one key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    record: Option<Record>,
    attempts: Vec<Attempt>,
    /// Committed effects; two stands for more.
    effects: u8,
    /// A client was given another answer than the recorded one.
    contradicted: bool,
    /// A handler started although an answer was recorded.
    ran_again: bool,
    /// An answer was recorded while another attempt was at it.
    overlapped: bool,
    /// What was said to be rolled back is committed.
    lied: bool,
}

/// A step: of which key, and of which of its attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A request comes in.
    Request(usize, Token),
    /// The statement of this step is executed and answered.
    Call(usize, Token),
    /// The statement is sent, and nothing is heard of it.
    Delay(usize, Token),
    /// It is executed all the same.
    Land(usize, Token),
    /// The handler writes.
    Write(usize, Token),
    /// The handler sends a commit of its own, which it must not.
    HandlerCommits(usize, Token),
    /// The handler ends: its answer and its writes are kept.
    Keep(usize, Token),
    /// The handler ends with a 4xx: its answer is kept, its writes are not.
    Refuse(usize, Token),
    /// The handler ends with a 5xx or a conflict: nothing is kept.
    RollBack(usize, Token),
    /// Nothing is known within `settle_timeout`: `answer-not-recorded`.
    GiveUp(usize, Token),
    /// The process ends.
    Crash(usize, Token),
    /// The server rolls a transaction back.
    ServerEnds(usize, Token),
}

/// The names of the properties.
pub mod property {
    /// At most one effect.
    pub const I1: &str = "I-1 at most one effect for a key";
    /// Both, or none.
    pub const I2: &str = "I-2 an effect if and only if a record says so";
    /// The half of it that a handler cannot break which ends its transaction by itself.
    pub const I2_RECORD: &str = "I-2 no record says so without the effect";
    /// What was recorded.
    pub const I4: &str = "I-4 every answer said to be recorded is the recorded one";
    /// See `heals`.
    pub const I5: &str = "I-5 no key is stuck";
    /// Also for what it does outside of the database.
    pub const ONCE: &str = "a recorded request never runs again";
    /// A duplicate that comes meanwhile does not run.
    pub const OVERLAP: &str = "no answer is recorded while another attempt is at it";
    /// 503 `transaction-conflict` and every rerun rely on it.
    pub const ROLLED_BACK: &str = "what was said to be rolled back is never committed";
    /// To be reached.
    pub const LOST_COMMIT: &str = "sometimes a commit lands whose acknowledgement is missing";
    /// To be reached.
    pub const WAITING: &str = "sometimes a probe has to wait for an open transaction";
    /// To be reached.
    pub const LOCKED: &str = "sometimes a transaction of a dead process keeps the lock";
}

/// The model, and perhaps a fault.
#[derive(Debug, Clone, Copy)]
pub struct Transaction {
    /// How much of it.
    pub bounds: Bounds,
    /// Whether handlers may send a commit of their own.
    pub handler_commits: bool,
    /// What is broken.
    pub fault: Option<Fault>,
}

impl Transaction {
    fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// The statement of this step is executed, and its reply heard.
    fn call(&self, key: &mut Key, me: Token) {
        let record = key.record;
        match key.attempt(me).step {
            Step::Lookup => match record {
                Some(record) => key.answer(me, record.by),
                None => key.attempt(me).step = Step::Lock,
            },
            Step::Lock => self.try_lock(key, me),
            Step::Look(seen) => self.look(key, me, seen),
            Step::Undo => self.undo(key, me),
            Step::Record(kept) => self.write_record(key, me, kept),
            Step::Commit => match key.attempt(me).tx {
                Some(_) => {
                    key.commit(me);
                    key.answer(me, me);
                }
                None => self.unknown(key, me),
            },
            Step::Probe => self.probe(key, me),
            Step::Verdict => match record {
                Some(record) => key.answer(me, record.by),
                None => key.attempt(me).step = Step::Probe,
            },
            Step::Run | Step::Over | Step::Unsent => {}
        }
    }

    fn try_lock(&self, key: &mut Key, me: Token) {
        let seen = self.has(Fault::OneSnapshot).then_some(key.record.is_some());
        let attempt = key.attempt(me);
        let tx = attempt.tx.get_or_insert(Tx::BEGUN);
        if seen.is_some() && !tx.entered {
            // The snapshot is taken; the lock comes a moment later.
            tx.entered = true;
            attempt.step = Step::Look(seen);
            return;
        }
        self.lock(key, me);
    }

    /// Whether it has the lock. Otherwise it is answered `request-in-progress`.
    fn lock(&self, key: &mut Key, me: Token) -> bool {
        let is_free = self.has(Fault::NoLock) || !key.is_locked();
        let attempt = key.attempt(me);
        if let (true, Some(tx)) = (is_free, &mut attempt.tx) {
            tx.locked = true;
            attempt.step = Step::Look(None);
        } else {
            attempt.tx = None;
            attempt.end();
        }
        is_free
    }

    fn look(&self, key: &mut Key, me: Token, seen: Option<bool>) {
        if seen.is_some() && !self.lock(key, me) {
            return;
        }
        let is_recorded = key.record.is_some();
        let attempt = key.attempt(me);
        let Some(tx) = &mut attempt.tx else {
            return attempt.say_rolled_back();
        };
        if seen.unwrap_or(is_recorded) {
            attempt.tx = None;
            attempt.step = Step::Lookup;
            return;
        }
        tx.entered = true;
        if self.has(Fault::RecordFirst) {
            tx.record = Some(true);
        }
        attempt.step = Step::Run;
        key.ran_again |= is_recorded;
    }

    fn undo(&self, key: &mut Key, me: Token) {
        let attempt = key.attempt(me);
        match &mut attempt.tx {
            Some(tx) => {
                tx.wrote = false;
                tx.locked &= !self.has(Fault::LockInSavepoint);
                attempt.step = Step::Record(false);
            }
            None if attempt.ended => attempt.end(),
            None => attempt.say_rolled_back(),
        }
        if self.has(Fault::NoSavepoint) {
            key.attempt(me).tx = None;
        }
    }

    /// Waits for a record of the same id that is not decided: see `is_blocked`.
    fn write_record(&self, key: &mut Key, me: Token, kept: bool) {
        let record = key.record;
        let attempt = key.attempt(me);
        let is_alone = attempt.ended && self.has(Fault::NoMark)
            || attempt.tx.is_none() && self.has(Fault::NoSavepoint) && !kept;
        if is_alone {
            attempt.tx = Some(Tx::BEGUN);
        }
        let Some(tx) = &mut attempt.tx else {
            return match attempt.ended {
                // 500 `transaction-ended`.
                true => attempt.end(),
                false => attempt.say_rolled_back(),
            };
        };
        match record {
            Some(record) => {
                attempt.tx = None;
                key.answer(me, record.by);
            }
            None => {
                tx.record = Some(kept);
                attempt.step = Step::Commit;
            }
        }
    }

    /// The commit was sent, or was to be, and nothing is known.
    fn unknown(&self, key: &mut Key, me: Token) {
        if self.has(Fault::NoProbe) {
            key.say_rolled_back(me);
        } else {
            key.attempt(me).step = Step::Probe;
        }
    }

    fn probe(&self, key: &mut Key, me: Token) {
        if key.record.is_some() {
            key.attempt(me).step = Step::Verdict;
            return;
        }
        if self.has(Fault::ProbeCommits) {
            key.record = Some(Record { by: me, kept: true });
        }
        key.say_rolled_back(me);
    }

    /// What waits for a lock on a row.
    fn is_blocked(&self, key: &Key, me: Token) -> bool {
        match key.attempts[usize::from(me)].step {
            Step::Probe => !self.has(Fault::ProbeReads) && key.is_undecided(None),
            Step::Record(_) => key.is_undecided(Some(me)),
            _ => false,
        }
    }

    fn attempt_actions(&self, (k, me): (usize, Token), key: &Key, actions: &mut Vec<Action>) {
        let attempt = &key.attempts[usize::from(me)];
        if let Some(tx) = attempt.tx {
            actions.push(Action::ServerEnds(k, me));
            if tx.late.is_some() && !(tx.record.is_none() && key.is_undecided(Some(me))) {
                actions.push(Action::Land(k, me));
            }
        }
        match attempt.step {
            Step::Over | Step::Unsent => return,
            Step::Run => {
                let wrote = attempt.tx.is_some_and(|tx| tx.wrote);
                actions.extend([Action::Refuse(k, me), Action::RollBack(k, me)]);
                match wrote || attempt.ended {
                    true => actions.push(Action::Keep(k, me)),
                    false => actions.push(Action::Write(k, me)),
                }
                if self.handler_commits && attempt.tx.is_some() {
                    actions.push(Action::HandlerCommits(k, me));
                }
            }
            step => {
                if !self.is_blocked(key, me) {
                    actions.push(Action::Call(k, me));
                }
                match step {
                    Step::Look(_) | Step::Record(_) | Step::Commit => {
                        actions.push(Action::Delay(k, me));
                    }
                    Step::Probe | Step::Verdict => actions.push(Action::GiveUp(k, me)),
                    _ => {}
                }
            }
        }
        actions.push(Action::Crash(k, me));
    }

    fn act(&self, key: &mut Key, action: Action) {
        match action {
            Action::Request(_, me) => key.attempt(me).step = Step::Lookup,
            Action::Call(_, me) => self.call(key, me),
            Action::Delay(_, me) => self.delay(key, me),
            Action::Land(_, me) => key.land(me),
            Action::Write(_, me) => match &mut key.attempt(me).tx {
                Some(tx) => tx.wrote = true,
                // The connection is gone: the handler fails, and nothing is kept.
                None => key.say_rolled_back(me),
            },
            Action::HandlerCommits(_, me) => {
                key.commit(me);
                key.attempt(me).ended = true;
            }
            Action::Keep(_, me) => {
                let is_there = key.attempt(me).tx.is_some_and(|tx| tx.record.is_some());
                let next = if is_there {
                    Step::Commit
                } else {
                    Step::Record(true)
                };
                key.attempt(me).step = next;
            }
            Action::Refuse(_, me) => key.attempt(me).step = Step::Undo,
            Action::RollBack(_, me) => {
                let attempt = key.attempt(me);
                attempt.tx = None;
                match attempt.ended {
                    true => attempt.end(),
                    false => attempt.say_rolled_back(),
                }
            }
            Action::GiveUp(_, me) | Action::Crash(_, me) => key.attempt(me).end(),
            Action::ServerEnds(_, me) => key.attempt(me).tx = None,
        }
    }

    fn delay(&self, key: &mut Key, me: Token) {
        let attempt = key.attempt(me);
        let late = match attempt.step {
            Step::Record(kept) => Late::Record(kept),
            Step::Commit => Late::Commit,
            // `begin` is not heard: its transaction is nobody's.
            _ => return attempt.say_rolled_back(),
        };
        if let Some(tx) = &mut attempt.tx {
            tx.late = Some(late);
        }
        self.unknown(key, me);
    }

    /// I-5: with the faults off, whoever is alive ends, the server ends what nobody ends, and one more
    /// request gets an answer.
    fn heals(&self, key: &Key) -> bool {
        if key.record.is_some() {
            return true;
        }
        let mut key = key.clone();
        let probe = key.attempts.len();
        key.attempts.push(Attempt::UNSENT);
        for (index, me) in (0..=probe).zip(0..) {
            if index == probe {
                self.act(&mut key, Action::Request(0, me));
            }
            let mut steps = 0;
            while key.attempts[index].tx.is_some() || key.attempts[index].is_live() {
                let action = key.next_healthy(me, self.is_blocked(&key, me));
                self.act(&mut key, action);
                steps += 1;
                if steps > 40 {
                    return false;
                }
            }
        }
        key.record.is_some()
    }
}

impl Tx {
    const BEGUN: Self = Self {
        locked: false,
        entered: false,
        wrote: false,
        record: None,
        late: None,
    };
}

impl Attempt {
    const UNSENT: Self = Self {
        step: Step::Unsent,
        tx: None,
        said_rolled_back: false,
        ended: false,
    };

    fn is_live(&self) -> bool {
        !matches!(self.step, Step::Unsent | Step::Over)
    }

    /// What is left is the transaction, if the server has it open still.
    fn end(&mut self) {
        self.step = Step::Over;
    }

    /// 503 `transaction-conflict`, a rerun, or an answer of the handler that frees the key.
    fn say_rolled_back(&mut self) {
        self.said_rolled_back = true;
        self.end();
    }
}

impl Action {
    fn key(self) -> usize {
        match self {
            Self::Request(k, _)
            | Self::Call(k, _)
            | Self::Delay(k, _)
            | Self::Land(k, _)
            | Self::Write(k, _)
            | Self::HandlerCommits(k, _)
            | Self::Keep(k, _)
            | Self::Refuse(k, _)
            | Self::RollBack(k, _)
            | Self::GiveUp(k, _)
            | Self::Crash(k, _)
            | Self::ServerEnds(k, _) => k,
        }
    }
}

impl Key {
    fn new(attempts: usize) -> Self {
        Self {
            record: None,
            attempts: vec![Attempt::UNSENT; attempts],
            effects: 0,
            contradicted: false,
            ran_again: false,
            overlapped: false,
            lied: false,
        }
    }

    fn attempt(&mut self, me: Token) -> &mut Attempt {
        &mut self.attempts[usize::from(me)]
    }

    fn is_locked(&self) -> bool {
        let mut open = self.attempts.iter().filter_map(|attempt| attempt.tx);
        open.any(|tx| tx.locked)
    }

    /// Whether an open transaction, but this one, has a record that is not committed.
    fn is_undecided(&self, me: Option<Token>) -> bool {
        let mut others = self.attempts.iter().zip(0..);
        others.any(|(attempt, other)| {
            Some(other) != me && attempt.tx.is_some_and(|tx| tx.record.is_some())
        })
    }

    fn commit(&mut self, me: Token) {
        let attempt = self.attempt(me);
        let Some(tx) = attempt.tx.take() else {
            return;
        };
        let said_rolled_back = attempt.said_rolled_back;
        if tx.wrote {
            self.effects = (self.effects + 1).min(2);
        }
        if let Some(kept) = tx.record {
            self.record = Some(Record { by: me, kept });
            let mut others = self.attempts.iter();
            self.overlapped |= others.any(|attempt| attempt.tx.is_some_and(|tx| tx.entered));
        }
        self.lied |= said_rolled_back;
    }

    fn land(&mut self, me: Token) {
        let is_recorded = self.record.is_some();
        let Some(tx) = &mut self.attempt(me).tx else {
            return;
        };
        match tx.late.take() {
            Some(Late::Record(kept)) => tx.record = (!is_recorded).then_some(kept),
            Some(Late::Commit) => self.commit(me),
            None => {}
        }
    }

    /// A client is given an answer that is said to be recorded.
    fn answer(&mut self, me: Token, by: Token) {
        self.contradicted |= self.record.map(|record| record.by) != Some(by);
        self.attempt(me).end();
    }

    fn say_rolled_back(&mut self, me: Token) {
        let is_committed = self.record.is_some_and(|record| record.by == me);
        self.lied |= is_committed;
        self.attempt(me).say_rolled_back();
    }

    /// The next step of an attempt, without a fault.
    fn next_healthy(&self, me: Token, is_blocked: bool) -> Action {
        let attempt = &self.attempts[usize::from(me)];
        let wrote = attempt.tx.is_some_and(|tx| tx.wrote);
        match attempt.step {
            Step::Over | Step::Unsent => Action::ServerEnds(0, me),
            Step::Run if wrote || attempt.ended => Action::Keep(0, me),
            Step::Run => Action::Write(0, me),
            // What it waits for is its own transaction, which the server ends, or that of the next.
            _ if is_blocked && attempt.tx.is_some() => Action::ServerEnds(0, me),
            _ if is_blocked => Action::GiveUp(0, me),
            _ => Action::Call(0, me),
        }
    }

    fn is_effect_recorded(&self) -> bool {
        let says_so = self.record.is_some_and(|record| record.kept);
        (self.effects > 0) == says_so
    }

    /// Of attempts that differ in nothing else, which is the first says nothing.
    fn rename_attempts(&mut self) {
        for attempt in &mut self.attempts {
            if attempt.step == Step::Over && attempt.tx.is_none() {
                attempt.said_rolled_back = false;
                attempt.ended = false;
            }
        }
        let by = self.record.map(|record| record.by);
        let mut order: Vec<(Attempt, bool)> = Vec::with_capacity(4);
        for (attempt, me) in self.attempts.iter().zip(0..) {
            order.push((*attempt, by == Some(me)));
        }
        order.sort_unstable();
        for (place, (me, (attempt, is_by))) in self.attempts.iter_mut().zip((0..).zip(order)) {
            *place = attempt;
            if let (true, Some(record)) = (is_by, &mut self.record) {
                record.by = me;
            }
        }
    }
}

/// Where each attempt is, whether its transaction is open and what it would commit, and the record.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (attempt, me) in self.attempts.iter().zip(0_u8..) {
            write!(f, "{me} {:?}", attempt.step)?;
            if let Some(tx) = attempt.tx {
                let locked = if tx.locked { " locked" } else { "" };
                let wrote = if tx.wrote { " wrote" } else { "" };
                let record = tx.record.map_or("", |_| " record");
                write!(f, " (open{locked}{wrote}{record})")?;
            }
            if let Some(late) = attempt.tx.and_then(|tx| tx.late) {
                write!(f, " late {late:?}")?;
            }
            write!(f, ", ")?;
        }
        match self.record {
            None => write!(f, "no record"),
            Some(record) => write!(f, "record of {}", record.by),
        }
    }
}

impl Model for Transaction {
    type State = Vec<Key>;
    type Action = Action;

    fn init_states(&self) -> Vec<Self::State> {
        vec![vec![Key::new(self.bounds.attempts); self.bounds.keys]]
    }

    fn actions(&self, state: &Self::State, actions: &mut Vec<Action>) {
        let attempts = state.iter().flat_map(|key| &key.attempts);
        let live = attempts.filter(|attempt| attempt.is_live()).count();
        for (k, key) in state.iter().enumerate() {
            let mut unsent = key.attempts.iter().zip(0..);
            let next = unsent.find(|(attempt, _)| attempt.step == Step::Unsent);
            if let (Some((_, me)), true) = (next, live < self.bounds.workers) {
                actions.push(Action::Request(k, me));
            }
            for (me, _) in (0..).zip(&key.attempts) {
                self.attempt_actions((k, me), key, actions);
            }
        }
    }

    fn next_state(&self, state: &Self::State, action: Action) -> Option<Self::State> {
        let mut keys = state.clone();
        let key = &mut keys[action.key()];
        self.act(key, action);
        key.rename_attempts();
        keys.sort_unstable();
        Some(keys)
    }

    fn format_step(&self, state: &Self::State, action: Action) -> Option<String> {
        let next = self.next_state(state, action)?;
        Some(format!("{action:?} -> {next:?}"))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        use property::{
            I1, I2, I2_RECORD, I4, I5, LOCKED, LOST_COMMIT, ONCE, OVERLAP, ROLLED_BACK, WAITING,
        };
        let mut properties = vec![
            Property::always(I2_RECORD, |_, s: &Vec<Key>| {
                s.iter()
                    .all(|key| key.effects > 0 || key.is_effect_recorded())
            }),
            Property::always(I4, |_, s: &Vec<Key>| !s.iter().any(|key| key.contradicted)),
            Property::always(I5, |m: &Self, s: &Vec<Key>| {
                s.iter().all(|key| m.heals(key))
            }),
            Property::always(ONCE, |_, s: &Vec<Key>| !s.iter().any(|key| key.ran_again)),
            Property::always(OVERLAP, |_, s: &Vec<Key>| {
                !s.iter().any(|key| key.overlapped)
            }),
            Property::always(ROLLED_BACK, |_, s: &Vec<Key>| !s.iter().any(|key| key.lied)),
            Property::sometimes(LOST_COMMIT, |_, s: &Vec<Key>| {
                let found = |attempt: &Attempt| attempt.step == Step::Verdict;
                s.iter().any(|key| key.attempts.iter().any(found))
            }),
            Property::sometimes(WAITING, |m, s: &Vec<Key>| {
                s.iter().any(|key| {
                    let mut attempts = key.attempts.iter().zip(0..);
                    attempts.any(|(a, me)| a.step == Step::Probe && m.is_blocked(key, me))
                })
            }),
            Property::sometimes(LOCKED, |_, s: &Vec<Key>| {
                let is_left = |attempt: &Attempt| {
                    attempt.step == Step::Over && attempt.tx.is_some_and(|tx| tx.locked)
                };
                s.iter().any(|key| key.attempts.iter().any(is_left))
            }),
        ];
        // What a handler commits by itself stays, and it may do so on each attempt.
        if !self.handler_commits {
            properties.push(Property::always(I1, |_, s: &Vec<Key>| {
                s.iter().all(|key| key.effects < 2)
            }));
            properties.push(Property::always(I2, |_, s: &Vec<Key>| {
                s.iter().all(Key::is_effect_recorded)
            }));
        }
        properties
    }
}
