//! The transactional protocol: the handler's writes and its answer commit together, or not at all.
//!
//! | here | there |
//! |---|---|
//! | [`Step::Lookup`] | `Opening::open` in `run/open.rs`, before any transaction |
//! | [`Step::Lock`], [`Step::Look`] | `idempotency.enter` in `migrations/postgres/0003_enter.sql` |
//! | [`Step::Undo`] | `undo` in `store/postgres/transactions.rs`: of the savepoint, or, on connections of the store's own, of all, and then it is entered again |
//! | [`Step::Record`], [`Step::Commit`] | `RECORD` in `store/postgres/transaction.rs`, `COMMIT` in `store/postgres/transactions.rs` |
//! | [`Step::Probe`], [`Step::Verdict`] | `confirm` in `store/postgres/transaction.rs`, as `commit` in `run/transact.rs` asks it |
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
//! is claimed and held as on a leased route while the lock is there, or is a refusal of another name. SQLite, whose transactions run one after the other.

mod key;
pub mod property;

use stateright::{Model, Property};

use crate::Bounds;

pub use key::{Attempt, Key, Record, Tx};

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
    /// A refusal rolls everything back, and is recorded in a transaction of its own, without entering again.
    NotEntered,
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
    /// Tries the lock, for this.
    Lock(Purpose),
    /// Looks again, under the lock. With [`Fault::OneSnapshot`], what was seen before.
    Look(Purpose, Option<bool>),
    /// In the handler.
    Run,
    /// Rolls back what the handler wrote, for an answer that is kept without it.
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

/// Why an operation is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// To run its handler.
    Run,
    /// To record a refusal, after a rollback of all.
    Refuse,
}

/// A statement whose sender waits no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Late {
    /// The record; its commit is never sent.
    Record(bool),
    /// The commit.
    Commit,
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

/// The model, and perhaps a fault.
#[derive(Debug, Clone, Copy)]
pub struct Transaction {
    /// How much of it.
    pub bounds: Bounds,
    /// Whether handlers may send a commit of their own.
    pub handler_commits: bool,
    /// Whether a refusal rolls back to a savepoint, or all, and is entered again.
    pub savepoint: bool,
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
                None => key.attempt(me).step = Step::Lock(Purpose::Run),
            },
            Step::Lock(purpose) => self.try_lock(key, me, purpose),
            Step::Look(purpose, seen) => self.look(key, me, purpose, seen),
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

    fn try_lock(&self, key: &mut Key, me: Token, purpose: Purpose) {
        let seen = self.has(Fault::OneSnapshot).then_some(key.record.is_some());
        let attempt = key.attempt(me);
        let tx = attempt.tx.get_or_insert(Tx::BEGUN);
        if seen.is_some() && !tx.entered {
            // The snapshot is taken; the lock comes a moment later.
            tx.entered = true;
            attempt.step = Step::Look(purpose, seen);
            return;
        }
        self.lock(key, me, purpose);
    }

    /// Whether it has the lock. Otherwise it is answered `request-in-progress`, or `transaction-conflict`.
    fn lock(&self, key: &mut Key, me: Token, purpose: Purpose) -> bool {
        let is_free = self.has(Fault::NoLock) || !key.is_locked();
        let attempt = key.attempt(me);
        if let (true, Some(tx)) = (is_free, &mut attempt.tx) {
            tx.locked = true;
            attempt.step = Step::Look(purpose, None);
        } else {
            attempt.tx = None;
            match purpose {
                Purpose::Run => attempt.end(),
                Purpose::Refuse => attempt.say_rolled_back(),
            }
        }
        is_free
    }

    fn look(&self, key: &mut Key, me: Token, purpose: Purpose, seen: Option<bool>) {
        if seen.is_some() && !self.lock(key, me, purpose) {
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
        match purpose {
            Purpose::Run => {
                attempt.step = Step::Run;
                key.ran_again |= is_recorded;
            }
            Purpose::Refuse => attempt.step = Step::Record(false),
        }
    }

    fn undo(&self, key: &mut Key, me: Token) {
        let attempt = key.attempt(me);
        match &mut attempt.tx {
            Some(tx) if self.savepoint => {
                tx.wrote = false;
                tx.locked &= !self.has(Fault::LockInSavepoint);
                attempt.step = Step::Record(false);
            }
            // Its session knows that it was not ended, and begins another one.
            Some(tx) => {
                *tx = Tx::BEGUN;
                attempt.step = match self.has(Fault::NotEntered) {
                    true => Step::Record(false),
                    false => Step::Lock(Purpose::Refuse),
                };
            }
            None if attempt.ended => attempt.end(),
            None => attempt.say_rolled_back(),
        }
    }

    /// Waits for a record of the same id that is not decided: see `is_blocked`.
    fn write_record(&self, key: &mut Key, me: Token, kept: bool) {
        let record = key.record;
        let attempt = key.attempt(me);
        if attempt.ended && self.has(Fault::NoMark) {
            attempt.tx = Some(Tx::BEGUN);
        }
        let Some(tx) = &mut attempt.tx else {
            return match attempt.ended {
                // 500 `transaction-ended`, and `hold_ended`, which is not here.
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
                    Step::Look(..) | Step::Record(_) | Step::Commit => {
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
        property::of(self)
    }
}
