//! The database: one row for a key, and the statements that change it.

use super::{Fault, Key, Lease};

/// The secret of an attempt: here its place among the attempts of its key.
pub type Token = u8;

/// The fence of a person who resolves a held record.
pub const PERSON: Token = u8::MAX;

/// `policy::Lost`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lost {
    /// The next attempt runs.
    Rerun,
    /// The next attempt only answers that this one was lost.
    Answer,
    /// A person decides.
    Hold,
}

/// `state` in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// Under a lease.
    Running,
    /// With the answer of this attempt, or of a person.
    Completed(Token),
    /// For a person.
    Held,
}

/// A row of `idempotency.record`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Row {
    pub(super) state: State,
    pub(super) token: Token,
    pub(super) lost: Lost,
    pub(super) abandoned: bool,
    /// The lease is over by the clock of the database.
    pub(super) over: bool,
    pub(super) progress: bool,
}

impl Row {
    pub(super) fn is_lost(&self) -> bool {
        self.state == State::Running && self.over
    }

    /// It runs under this token, and its lease is not over.
    pub(super) fn is_kept_by(&self, token: Token) -> bool {
        self.token == token && self.state == State::Running && !self.over
    }
}

/// One SQL statement; its parameters are bound when it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Statement {
    /// `INSERT`.
    Insert,
    /// The second half of [`Fault::ReadBack`]: whether the snapshot was empty.
    InsertAt(bool),
    /// `SELECT` of a claim.
    Select,
    /// `TAKE_OVER`: from whom, and whether only to answer.
    TakeOver(Token, bool),
    /// `HOLD_LOST` of a claim.
    HoldLost(Token),
    /// `EXTEND` before the handler starts.
    Renew,
    /// `EXTEND` of the heartbeat.
    Extend,
    /// `SAVE` and the commit of a phase.
    Save,
    /// `UPDATE_COMPLETED`.
    Complete,
    /// `SELECT` of a completion that changed nothing.
    CompleteLook,
    /// `DELETE_CLAIMED`.
    Delete,
    /// `GIVE_UP`.
    GiveUp,
    /// `SELECT` of a release that changed nothing.
    ReleaseLook,
    /// `UPDATE_HELD`.
    Hold,
    /// `SELECT` of `look_again`, for a client whose attempt was refused.
    Lookup,
}

impl Statement {
    /// Of `protocol::claim`, which is called from its insert again.
    pub(super) fn is_claim(self) -> bool {
        use Statement::{HoldLost, Insert, InsertAt, Select, TakeOver};
        matches!(
            self,
            Insert | InsertAt(_) | Select | TakeOver(..) | HoldLost(_)
        )
    }

    /// Or holds what the sweep may hold at any time: [`Action::Sweep`](super::Action::Sweep).
    pub(super) fn only_reads(self) -> bool {
        use Statement::{CompleteLook, HoldLost, InsertAt, Lookup, ReleaseLook, Select};
        matches!(
            self,
            Select | CompleteLook | ReleaseLook | Lookup | HoldLost(_) | InsertAt(_)
        )
    }

    pub(super) fn rename(&mut self, rename: impl Fn(&mut Token)) {
        if let Self::TakeOver(old, _) | Self::HoldLost(old) = self {
            rename(old);
        }
    }

    /// A write after the claim: I-6 is about these.
    pub(super) fn is_fenced(self) -> bool {
        use Statement::{Complete, Delete, Extend, GiveUp, Hold, Renew, Save};
        matches!(
            self,
            Renew | Extend | Save | Complete | Delete | GiveUp | Hold
        )
    }
}

/// What a statement says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// Rows affected: one, or none.
    Changed(bool),
    /// No such row.
    Absent,
    /// The record is this claim's: to run, or abandoned.
    Mine(bool),
    /// Somebody runs it.
    InProgress,
    /// A person decides.
    Held,
    /// The stored answer.
    Answer(Token),
    /// It was lost, and is to be taken over or held.
    Lost(Statement),
    /// Zero rows from an insert that reads back.
    Nothing,
}

impl Lease {
    /// What the database does about a statement of `me`, in one step.
    pub(super) fn execute(&self, key: &mut Key, me: Token, statement: Statement) -> Reply {
        use Statement as S;
        let is_anothers = key.row.is_some_and(|row| row.token != me);
        let changed = match statement {
            S::Select => return self.step_for(key, me),
            S::CompleteLook | S::ReleaseLook | S::Lookup => return look(key),
            S::InsertAt(was_empty) => match self.insert(key, me) {
                false if was_empty => return Reply::Nothing,
                inserted => inserted,
            },
            S::Insert => self.insert(key, me),
            S::TakeOver(old, abandoned) => self.take_over(key, me, old, abandoned),
            S::HoldLost(old) => key.update(|row| {
                let may = row.token == old && row.is_lost();
                may.then(|| row.state = State::Held)
            }),
            S::Renew | S::Extend => self.extend(key, me),
            S::Save => self.save_phase(key, me),
            S::Complete => self.update_completed(key, me),
            S::Delete => self.delete_claimed(key, me),
            S::GiveUp => give_up(key, me),
            S::Hold => key.update(|row| {
                let may = row.token == me && !matches!(row.state, State::Completed(_));
                may.then(|| row.state = State::Held)
            }),
        };
        key.stale_write |= changed && is_anothers && statement.is_fenced();
        Reply::Changed(changed)
    }

    fn insert(&self, key: &mut Key, me: Token) -> bool {
        let is_free = key.row.is_none();
        key.row.get_or_insert(Row {
            state: State::Running,
            token: me,
            lost: self.lost(),
            abandoned: false,
            over: false,
            progress: false,
        });
        is_free
    }

    /// `Row::step_for`.
    fn step_for(&self, key: &mut Key, me: Token) -> Reply {
        let Some(row) = key.row else {
            return Reply::Absent;
        };
        match row.state {
            State::Completed(answer) => return Reply::Answer(answer),
            State::Held => return Reply::Held,
            State::Running => {}
        }
        if row.token == me && !self.has(Fault::ForgetsToken) {
            return Reply::Mine(row.abandoned);
        }
        if !row.over {
            key.in_own_way |= row.token == me;
            return Reply::InProgress;
        }
        Reply::Lost(match row.lost {
            Lost::Hold => Statement::HoldLost(row.token),
            lost => Statement::TakeOver(row.token, lost == Lost::Answer),
        })
    }

    fn take_over(&self, key: &mut Key, me: Token, old: Token, abandoned: bool) -> bool {
        let ignores_lease = self.has(Fault::TakesOverRenewed);
        let lost = if abandoned { Lost::Answer } else { self.lost() };
        key.update(|row| {
            let is_over = row.over || ignores_lease;
            let may = row.token == old && row.state == State::Running && is_over;
            may.then(|| {
                *row = Row {
                    token: me,
                    lost,
                    abandoned,
                    over: false,
                    ..*row
                }
            })
        })
    }

    fn extend(&self, key: &mut Key, me: Token) -> bool {
        let revives = self.has(Fault::BeatRevives);
        key.update(|row| {
            let may = (row.token == me || revives) && row.state == State::Running;
            may.then(|| {
                row.token = me;
                row.over = false;
            })
        })
    }

    /// The writes of the phase are in the ledger if the record took the progress, and only then.
    fn save_phase(&self, key: &mut Key, me: Token) -> bool {
        let unfenced = self.has(Fault::PhaseUnfenced);
        let mut is_new = false;
        let saved = key.update(|row| {
            let may = unfenced || row.token == me && row.state == State::Running;
            may.then(|| {
                is_new = !row.progress || unfenced;
                row.progress = true;
            })
        });
        if is_new {
            key.effect();
        }
        saved
    }

    fn update_completed(&self, key: &mut Key, me: Token) -> bool {
        let unfenced = self.has(Fault::CompleteUnfenced);
        let completed = key.update(|row| {
            let is_open = !matches!(row.state, State::Completed(_));
            let may = unfenced || row.token == me && is_open;
            may.then(|| {
                row.state = State::Completed(me);
                row.progress = false;
            })
        });
        if completed {
            key.record(me);
        }
        completed
    }

    fn delete_claimed(&self, key: &mut Key, me: Token) -> bool {
        let may = key.row.is_some_and(|row| {
            let is_deletable = match row.state {
                State::Running => !row.abandoned || self.has(Fault::ReleaseAbandoned),
                State::Held => true,
                State::Completed(_) => false,
            };
            self.has(Fault::ReleaseUnfenced) || row.token == me && !row.progress && is_deletable
        });
        if may {
            key.row = None;
        }
        may
    }
}

fn give_up(key: &mut Key, me: Token) -> bool {
    key.update(|row| {
        let may = match row.state {
            State::Running => row.abandoned || row.progress,
            State::Held => row.progress,
            State::Completed(_) => false,
        };
        (row.token == me && may).then(|| {
            row.state = State::Running;
            row.over = true;
            if !row.abandoned {
                row.lost = Lost::Rerun;
            }
        })
    })
}

fn look(key: &Key) -> Reply {
    match key.row.map(|row| row.state) {
        None => Reply::Absent,
        Some(State::Completed(answer)) => Reply::Answer(answer),
        Some(State::Held) => Reply::Held,
        Some(State::Running) => Reply::InProgress,
    }
}

/// `RESOLVE_ANSWER`, `RESOLVE_RELEASE` and `RESOLVE_RESUME` in `store/postgres/held.rs`.
pub(super) fn resolve(key: &mut Key, with_answer: bool) {
    let Some(row) = &mut key.row else {
        return;
    };
    match (with_answer, row.progress) {
        (true, _) => {
            row.state = State::Completed(PERSON);
            row.token = PERSON;
            row.progress = false;
            key.record(PERSON);
        }
        (false, true) => {
            row.state = State::Running;
            row.token = PERSON;
            row.lost = Lost::Rerun;
            row.over = true;
        }
        (false, false) => key.row = None,
    }
}
