//! The leased protocol: claim (commit), run, complete (commit).
//!
//! | here | there |
//! |---|---|
//! | [`Statement`], `Lease::execute` | the statements in `store/postgres/{claim,settle,heartbeat,phases}.rs` |
//! | `step_for` | `Row::step_for` in `store/protocol.rs` |
//! | `hear_claim`, `start`, `claim_again` | `protocol::claim`; `claim`, `claim_in_time`, `fresh` in `run/claim.rs` |
//! | `hear_settlement` | `protocol::{complete, release, hold}`; `write`, `refused` in `run/settle.rs` |
//! | `beat`, [`Attempt`]'s `trusted` | `Heart::beat`, `Lease::is_current` in `running.rs` |
//! | [`Action::Sweep`], [`Action::Resolve`] | `store/postgres/sweep.rs`, `store/postgres/held.rs` |
//!
//! **A step** is one SQL statement, one effect of a handler, or one thing that goes wrong. A reply that
//! only leads to the next statement arrives with its own: whether the one is late or the other is the
//! same. **A lost acknowledgement** is [`Action::Delay`], after which the sender does what it does
//! about errors, and [`Action::Land`], when the statement is executed behind its back, at any later time
//! or never. It may be followed by a [`Action::Crash`], too.
//!
//! **Time** has no length. A lease is over when [`Action::LeaseOver`] says so, at any moment. What is
//! trusted locally counts from before the statement was sent, and ends a margin earlier: so the same
//! step ends the trust that comes of this lease. A process that is **paused** is one whose next step
//! comes late, as any may.
//!
//! **Left out.** Retention: no record expires. Fingerprints, and two identities of one id. `running.rs`
//! answers some duplicates without the store, and a locked row is passed over: both are refusals that
//! change nothing. The rounds of a claim and the repetitions of a settlement have no end here. One
//! heartbeat renews many leases there, and one here. A phase loads its progress and saves it in one step.
//! The second round of a withdrawal, and `is_settled`, since a statement takes effect in one step. Answers
//! of `medium` and `low` that could not be recorded in time, and `low` without a store. Of one attempt, one
//! statement is under way behind its back at a time. Asking `is_current` and acting on it is one step: what
//! is paused between the two acts late, which no layer can help. A person frees a key where the ledger has
//! no effect of it.
//!
//! **Not visited twice.** Steps that change nothing: a beat of a lease that is kept, and, where nothing
//! is broken, a late statement that will be refused whenever it arrives.

mod attempt;
mod key;
pub mod property;
mod record;

use stateright::{Model, Property};

use crate::Bounds;

pub use attempt::{Attempt, Step, Write};
pub use key::Key;
pub use record::{Lost, PERSON, Row, State, Statement, Token};

/// The risk class: what becomes of an attempt that is lost, and which answers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Hold it for a person.
    Critical,
    /// Answer a stored 500.
    High,
    /// Run it again.
    Medium,
}

/// How the handler makes its effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    /// Outside of the database, after asking `IdempotencyContext::is_current`.
    Asks,
    /// Outside of the database, without asking.
    Acts,
    /// In a phase, which commits with the record's progress.
    Phase,
}

/// What is broken, to see that a property notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `update_completed` does not compare the token.
    CompleteUnfenced,
    /// `delete_claimed` compares neither token nor state.
    ReleaseUnfenced,
    /// `delete_claimed` also deletes what is abandoned.
    ReleaseAbandoned,
    /// A phase is saved without comparing the token and the progress.
    PhaseUnfenced,
    /// The claim inserts and reads back in one statement, of one snapshot; who sees nothing runs.
    ReadBack,
    /// A claim does not know the record of its own, whose acknowledgement was lost.
    ForgetsToken,
    /// `take_over` does not look whether the lease is over still.
    TakesOverRenewed,
    /// A heartbeat takes the record back.
    BeatRevives,
    /// Trust counts from the reply to a renewal, and not from when it was sent.
    TrustsReply,
    /// Trust counts from when the claim was sent last, though an earlier one may have been under way.
    TrustsLastClaim,
    /// The handler starts on whatever lease the acknowledgement brings.
    StartsLate,
}

/// A step: of which key, and of which of its attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A request comes in.
    Request(usize, Token),
    /// A statement is executed and answered.
    Call(usize, Token),
    /// The sender of a statement hears of an error. It calls again, or gives up and withdraws.
    Delay(usize, Token, bool),
    /// A statement that nobody waits for is executed.
    Land(usize, Token),
    /// The claim is acknowledged.
    Start(usize, Token),
    /// The claim of a waiting duplicate is sent again.
    ClaimAgain(usize, Token),
    /// A duplicate is answered `request-in-progress`.
    Refuse(usize, Token),
    /// The handler makes its effect.
    Effect(usize, Token),
    /// The handler ends.
    End(usize, Token, Write),
    /// A heartbeat is executed and answered.
    Beat(usize, Token),
    /// The reply of a beat arrives: with [`Fault::TrustsReply`] alone.
    BeatHeard(usize, Token),
    /// A heartbeat is under way for longer than it is waited for.
    BeatDelay(usize, Token),
    /// The process ends.
    Crash(usize, Token),
    /// A lease runs out.
    LeaseOver(usize),
    /// The sweep holds a lost attempt.
    Sweep(usize),
    /// A person resolves a held record: with an answer, or by freeing the key.
    Resolve(usize, bool),
}

/// The model: a class, a handler, and perhaps a fault.
#[derive(Debug, Clone, Copy)]
pub struct Lease {
    /// How much of it.
    pub bounds: Bounds,
    /// The risk class of the route.
    pub class: Class,
    /// How its handler works.
    pub handler: Handler,
    /// What is broken.
    pub fault: Option<Fault>,
}

impl Lease {
    fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    fn lost(&self) -> Lost {
        match self.class {
            Class::Critical => Lost::Hold,
            Class::High => Lost::Answer,
            Class::Medium => Lost::Rerun,
        }
    }

    fn attempt_actions(
        &self,
        (k, me): (usize, Token),
        key: &Key,
        is_full: bool,
        actions: &mut Vec<Action>,
    ) {
        let attempt = &key.attempts[usize::from(me)];
        let may_delay = attempt.late.is_none() && !is_full;
        if attempt.late.is_some() {
            actions.push(Action::Land(k, me));
        }
        match attempt.step {
            Step::Unsent | Step::Over => return,
            Step::Send(statement) => {
                actions.push(Action::Call(k, me));
                let is_claim = statement.is_claim() || statement == Statement::Renew;
                let writes = !statement.only_reads();
                if may_delay && writes {
                    actions.push(Action::Delay(k, me, false));
                }
                if may_delay && writes && is_claim {
                    actions.push(Action::Delay(k, me, true));
                }
            }
            Step::Claimed => actions.push(Action::Start(k, me)),
            Step::InProgress => {
                actions.extend([Action::ClaimAgain(k, me), Action::Refuse(k, me)]);
            }
            Step::Run => {
                let may = attempt.trusted || self.handler != Handler::Asks;
                if may && !attempt.effect {
                    actions.push(Action::Effect(k, me));
                }
                let endings = self.endings(attempt);
                actions.extend(endings.map(|write| Action::End(k, me, write)));
            }
        }
        actions.push(Action::Crash(k, me));
        if attempt.beaten {
            actions.push(Action::BeatHeard(k, me));
        } else if self.beats(key, me) {
            actions.push(Action::Beat(k, me));
            if may_delay {
                actions.push(Action::BeatDelay(k, me));
            }
        }
    }

    fn record_actions(k: usize, key: &Key, actions: &mut Vec<Action>) {
        let Some(row) = key.row else {
            return;
        };
        match row.state {
            State::Running if !row.over => actions.push(Action::LeaseOver(k)),
            State::Running if row.lost == Lost::Hold => actions.push(Action::Sweep(k)),
            State::Held => {
                actions.push(Action::Resolve(k, true));
                // By a person who knows that nothing happened, or that what did is in the progress.
                if key.effects == 0 || row.progress {
                    actions.push(Action::Resolve(k, false));
                }
            }
            State::Running | State::Completed(_) => {}
        }
    }

    fn act(&self, key: &mut Key, action: Action) {
        match action {
            Action::LeaseOver(_) => key.lease_over(),
            Action::Sweep(_) => {
                key.update(|row| {
                    row.state = State::Held;
                    Some(())
                });
            }
            Action::Resolve(_, with_answer) => record::resolve(key, with_answer),
            Action::Request(_, me) => self.claim_again(key.attempt(me)),
            Action::Call(_, me) => {
                if let Step::Send(statement) = key.attempt(me).step {
                    self.call(key, me, statement);
                }
            }
            Action::Delay(_, me, gives_up) => {
                if let Step::Send(statement) = key.attempt(me).step {
                    key.attempt(me).delay(statement, gives_up);
                }
            }
            Action::Land(_, me) => {
                if let Some(statement) = key.attempt(me).late.take() {
                    self.execute(key, me, statement);
                }
            }
            Action::Start(_, me) => self.start(key, me),
            Action::ClaimAgain(_, me) => self.claim_again(key.attempt(me)),
            Action::Refuse(_, me) => key.attempt(me).answer_existing(),
            Action::Effect(_, me) if self.handler == Handler::Phase => {
                key.attempt(me).send(Statement::Save);
            }
            Action::Effect(_, me) => {
                key.effect();
                key.attempt(me).effect = true;
            }
            Action::End(_, me, write) => key.attempt(me).settle(write),
            Action::Beat(_, me) => self.beat(key, me),
            Action::BeatHeard(_, me) => {
                key.attempt(me).beaten = false;
                key.attempt(me).trusted = true;
            }
            Action::BeatDelay(_, me) => key.attempt(me).late = Some(Statement::Extend),
            Action::Crash(_, me) => key.attempt(me).end(),
        }
    }

    /// I-5: with the faults off, whoever is alive ends, and one more request, a lease later, gets an
    /// answer or finds the record held.
    fn heals(&self, key: &Key) -> bool {
        if matches!(
            key.row,
            Some(Row {
                state: State::Completed(_),
                ..
            })
        ) {
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
            while key.attempts[index].is_live() || key.attempts[index].late.is_some() {
                let action = key.next_healthy(me);
                self.act(&mut key, action);
                steps += 1;
                if steps > 40 {
                    return false;
                }
            }
        }
        let state = key.row.map(|row| row.state);
        matches!(state, Some(State::Held | State::Completed(_)))
    }
}

impl Action {
    fn key(self) -> usize {
        match self {
            Self::Request(k, _)
            | Self::Call(k, _)
            | Self::Delay(k, ..)
            | Self::Land(k, _)
            | Self::Start(k, _)
            | Self::ClaimAgain(k, _)
            | Self::Refuse(k, _)
            | Self::Effect(k, _)
            | Self::End(k, ..)
            | Self::Beat(k, _)
            | Self::BeatHeard(k, _)
            | Self::BeatDelay(k, _)
            | Self::Crash(k, _)
            | Self::LeaseOver(k)
            | Self::Sweep(k)
            | Self::Resolve(k, _) => k,
        }
    }
}

impl Model for Lease {
    type State = Vec<Key>;
    type Action = Action;

    fn init_states(&self) -> Vec<Self::State> {
        vec![vec![Key::new(self.bounds.attempts); self.bounds.keys]]
    }

    fn actions(&self, state: &Self::State, actions: &mut Vec<Action>) {
        let attempts = state.iter().flat_map(|key| &key.attempts);
        let live = attempts.filter(|attempt| attempt.is_live()).count();
        let is_full = state.iter().map(Key::late).sum::<usize>() >= self.bounds.late;
        for (k, key) in state.iter().enumerate() {
            let mut unsent = key.attempts.iter().zip(0..);
            let next = unsent.find(|(attempt, _)| attempt.step == Step::Unsent);
            if let (Some((_, me)), true) = (next, live < self.bounds.workers) {
                actions.push(Action::Request(k, me));
            }
            for (me, _) in (0..).zip(&key.attempts) {
                self.attempt_actions((k, me), key, is_full, actions);
            }
            Self::record_actions(k, key, actions);
        }
    }

    fn next_state(&self, state: &Self::State, action: Action) -> Option<Self::State> {
        let mut keys = state.clone();
        let key = &mut keys[action.key()];
        self.act(key, action);
        if self.fault.is_none() {
            key.forget_refused();
        }
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
