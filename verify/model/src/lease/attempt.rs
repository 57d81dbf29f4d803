//! The process: one request, from its claim to its answer.

use super::record::{Reply, Row, State, Statement, Token};
use super::{Class, Fault, Handler, Key, Lease};

/// Where an attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// A statement is on its way to the database, or is about to be.
    Send(Statement),
    /// The claim is acquired, and the acknowledgement is on its way.
    Claimed,
    /// Somebody else runs it: it is answered, or asked again after a while (`Duplicates::Wait`).
    InProgress,
    /// In the handler.
    Run,
    /// Ended, or dead with its process.
    Over,
    /// Its request has not come yet.
    Unsent,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    pub(super) step: Step,
    /// The call was made more than once: an earlier one may be under way.
    pub(super) unheard: bool,
    /// `is_current` may say yes; before the handler starts, it would if it started now.
    pub(super) trusted: bool,
    /// Of [`Fault::TrustsReply`] alone: a beat's reply is under way.
    pub(super) beaten: bool,
    /// The handler has made its effect, or its phase is finished.
    pub(super) effect: bool,
    /// The claim is given up, and is being taken back.
    pub(super) withdrawn: bool,
    /// A statement whose sender waits for it no more, and which may still arrive.
    pub(super) late: Option<Statement>,
}

/// How a handler ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Write {
    /// Its answer is stored.
    Complete,
    /// It frees the key.
    Release,
    /// Its outcome is unknown, and it is held.
    Hold,
}

impl Attempt {
    pub(super) const UNSENT: Self = Self {
        step: Step::Unsent,
        unheard: false,
        trusted: false,
        beaten: false,
        effect: false,
        withdrawn: false,
        late: None,
    };

    pub(super) fn send(&mut self, statement: Statement) {
        self.step = Step::Send(statement);
    }

    /// What nobody will ask for again is forgotten.
    pub(super) fn end(&mut self) {
        *self = Self {
            step: Step::Over,
            late: self.late,
            ..Self::UNSENT
        };
    }

    pub(super) fn is_live(&self) -> bool {
        !matches!(self.step, Step::Unsent | Step::Over)
    }

    pub(super) fn runs(&self) -> bool {
        matches!(self.step, Step::Run | Step::Send(Statement::Save))
    }

    /// Its lease is kept: until its handler has ended and its answer is recorded.
    fn is_listed(&self) -> bool {
        let settles = self.step == Step::Send(Statement::Complete);
        self.runs() || settles
    }

    /// `withdraw` in `run/claim.rs`.
    fn withdraw(&mut self) {
        self.end();
        self.withdrawn = true;
        self.send(Statement::Delete);
    }

    /// `answer_existing`; a claim that may be under way is withdrawn.
    pub(super) fn answer_existing(&mut self) {
        if self.unheard {
            self.withdraw();
        } else {
            self.end();
        }
    }

    /// The sender hears of an error, or waited for too long, while the statement may be under way. A
    /// claim is made again from its insert (`until_timeout`), or given up; a settlement is repeated
    /// until it is heard (`write` in `run/settle.rs`).
    pub(super) fn delay(&mut self, statement: Statement, gives_up: bool) {
        use Statement as S;
        self.late = Some(match statement {
            S::Renew => S::Extend,
            statement => statement,
        });
        if gives_up {
            return self.withdraw();
        }
        self.unheard |= statement.is_claim() || statement == S::Delete;
        self.send(match statement {
            S::GiveUp => S::Delete,
            statement if statement.is_claim() => S::Insert,
            statement => statement,
        });
    }

    /// Nobody asks whether it is current any more.
    pub(super) fn settle(&mut self, write: Write) {
        *self = Self {
            late: self.late,
            ..Self::UNSENT
        };
        self.send(match write {
            Write::Complete => Statement::Complete,
            Write::Release => Statement::Delete,
            Write::Hold => Statement::Hold,
        });
    }
}

impl Lease {
    /// How a handler may end, by `Policy::disposition`.
    pub(super) fn endings(&self, attempt: &Attempt) -> impl Iterator<Item = Write> {
        // Nothing happened; or the class says to run it again; or what happened is in the progress.
        let may_release =
            !attempt.effect || self.class == Class::Medium || self.handler == Handler::Phase;
        let may_hold = self.class == Class::Critical;
        let release = may_release.then_some(Write::Release);
        let hold = may_hold.then_some(Write::Hold);
        [Some(Write::Complete), release, hold].into_iter().flatten()
    }

    /// A statement is executed, and its reply heard.
    pub(super) fn call(&self, key: &mut Key, me: Token, statement: Statement) {
        if statement == Statement::Insert && self.has(Fault::ReadBack) {
            let was_empty = key.row.is_none();
            return key.attempt(me).send(Statement::InsertAt(was_empty));
        }
        let reply = self.execute(key, me, statement);
        if statement.is_claim() || statement == Statement::Renew {
            hear_claim(key, me, statement, reply);
        } else {
            hear_settlement(key, me, statement, reply);
        }
    }

    /// `claim_in_time` and `fresh` in `run/claim.rs`: no handler starts on a lease that is over.
    pub(super) fn start(&self, key: &mut Key, me: Token) {
        let is_recorded = key.recorded.is_some();
        let attempt = key.attempt(me);
        if attempt.trusted || self.has(Fault::StartsLate) {
            attempt.step = Step::Run;
            attempt.unheard = false;
            key.ran_again |= is_recorded;
        } else {
            attempt.trusted = true;
            attempt.send(Statement::Renew);
        }
    }

    /// The claim is sent again, under the same token. What it meets may be the record of an earlier
    /// one that was still under way.
    pub(super) fn claim_again(&self, attempt: &mut Attempt) {
        if !attempt.unheard || self.has(Fault::TrustsLastClaim) {
            attempt.trusted = true;
        }
        attempt.send(Statement::Insert);
    }

    /// A beat that changes nothing is left out: that of a lease which goes on and is trusted, and that of
    /// a lost claim, which was not trusted before it was lost.
    pub(super) fn beats(&self, key: &Key, me: Token) -> bool {
        let attempt = &key.attempts[usize::from(me)];
        let is_refused = |row: Row| row.token != me || row.state != State::Running;
        let is_kept = attempt.trusted || !attempt.runs();
        attempt.is_listed()
            && key.row.is_some_and(|row| {
                let changes_nothing = is_refused(row) || is_kept && row.is_kept_by(me);
                let errs = self.has(Fault::BeatRevives) || self.has(Fault::TrustsReply);
                errs || !changes_nothing
            })
    }

    /// `Heart::beat` and `Running::renewed` in `running.rs`.
    pub(super) fn beat(&self, key: &mut Key, me: Token) {
        let Reply::Changed(kept) = self.execute(key, me, Statement::Extend) else {
            return;
        };
        let attempt = key.attempt(me);
        if !attempt.runs() {
            return;
        }
        if self.has(Fault::TrustsReply) {
            attempt.beaten = kept;
        } else {
            attempt.trusted = kept;
        }
    }
}

/// `protocol::claim`.
fn hear_claim(key: &mut Key, me: Token, statement: Statement, reply: Reply) {
    use Statement as S;
    let attempt = key.attempt(me);
    match (statement, reply) {
        (S::Renew | S::Insert | S::InsertAt(_), Reply::Changed(true) | Reply::Nothing)
        | (S::Select, Reply::Mine(false))
        | (S::TakeOver(_, false), Reply::Changed(true)) => attempt.step = Step::Claimed,
        // `answer_lost` in `run/settle.rs`.
        (S::Select, Reply::Mine(true)) | (S::TakeOver(_, true), Reply::Changed(true)) => {
            attempt.settle(Write::Complete);
        }
        (S::Renew, _) => {
            attempt.trusted = false;
            attempt.send(S::Insert);
        }
        (S::Insert | S::InsertAt(_), _) => attempt.send(S::Select),
        (S::Select, Reply::Lost(next)) => attempt.send(next),
        (S::Select, Reply::InProgress) => attempt.step = Step::InProgress,
        (S::Select, Reply::Answer(answer)) => {
            attempt.answer_existing();
            key.answer(answer);
        }
        (S::Select, Reply::Held) => attempt.answer_existing(),
        _ => attempt.send(S::Insert),
    }
}

/// `protocol::{complete, release, hold}`, and `settle` in `run/settle.rs`.
fn hear_settlement(key: &mut Key, me: Token, statement: Statement, reply: Reply) {
    use Statement as S;
    let attempt = key.attempt(me);
    match (statement, reply) {
        // `Phases::run`.
        (S::Save, Reply::Changed(saved)) => {
            attempt.step = Step::Run;
            attempt.effect = saved;
        }
        (S::Complete, Reply::Changed(true)) => {
            attempt.end();
            key.answer(me);
        }
        (S::Complete, _) => attempt.send(S::CompleteLook),
        (S::CompleteLook | S::Lookup, Reply::Answer(answer)) => {
            attempt.end();
            key.answer(answer);
        }
        (S::Delete, Reply::Changed(false)) => attempt.send(S::GiveUp),
        (S::GiveUp, Reply::Changed(false)) => attempt.send(S::ReleaseLook),
        (S::Hold, Reply::Changed(false)) => attempt.send(S::Lookup),
        (S::ReleaseLook, Reply::Absent) => attempt.end(),
        (S::ReleaseLook, _) if !attempt.withdrawn && !attempt.unheard => attempt.send(S::Lookup),
        _ => attempt.end(),
    }
}
