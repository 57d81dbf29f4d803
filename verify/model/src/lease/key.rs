//! What is known of one key, and what has become of it.

use std::fmt;

use super::Action;
use super::attempt::{Attempt, Step, Write};
use super::record::{Row, State, Statement, Token};

/// All that is known of one key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub(super) row: Option<Row>,
    pub(super) attempts: Vec<Attempt>,
    /// Effects in the ledger; two stands for more.
    pub(super) effects: u8,
    /// The first answer that was recorded.
    pub(super) recorded: Option<Token>,
    /// Another answer was recorded, or given as if it were.
    pub(super) contradicted: bool,
    /// A handler started although an answer was recorded.
    pub(super) ran_again: bool,
    /// A write was accepted after another attempt had claimed.
    pub(super) stale_write: bool,
    /// A claim was told that it is running elsewhere, by a record of its own.
    pub(super) in_own_way: bool,
}

impl Key {
    pub(super) fn new(attempts: usize) -> Self {
        Self {
            row: None,
            attempts: vec![Attempt::UNSENT; attempts],
            effects: 0,
            recorded: None,
            contradicted: false,
            ran_again: false,
            stale_write: false,
            in_own_way: false,
        }
    }

    pub(super) fn attempt(&mut self, me: Token) -> &mut Attempt {
        &mut self.attempts[usize::from(me)]
    }

    pub(super) fn update(&mut self, change: impl FnOnce(&mut Row) -> Option<()>) -> bool {
        self.row.as_mut().and_then(change).is_some()
    }

    pub(super) fn effect(&mut self) {
        self.effects = (self.effects + 1).min(2);
    }

    pub(super) fn record(&mut self, answer: Token) {
        let first = *self.recorded.get_or_insert(answer);
        self.contradicted |= first != answer;
    }

    /// A client sees an answer that is said to be recorded.
    pub(super) fn answer(&mut self, answer: Token) {
        self.contradicted |= self.recorded != Some(answer);
    }

    pub(super) fn lease_over(&mut self) {
        let Some(row) = &mut self.row else {
            return;
        };
        row.over = true;
        if let Some(attempt) = self.attempts.get_mut(usize::from(row.token)) {
            attempt.trusted = false;
        }
    }

    /// The next step of an attempt, without a fault.
    pub(super) fn next_healthy(&self, me: Token) -> Action {
        let attempt = &self.attempts[usize::from(me)];
        match attempt.step {
            _ if attempt.late.is_some() => Action::Land(0, me),
            Step::Send(_) => Action::Call(0, me),
            Step::Claimed => Action::Start(0, me),
            Step::InProgress => match self.row {
                Some(row) if row.state == State::Running && !row.over => Action::LeaseOver(0),
                _ => Action::ClaimAgain(0, me),
            },
            Step::Run | Step::Over | Step::Unsent => Action::End(0, me, Write::Complete),
        }
    }

    /// Statements under way behind somebody's back.
    pub(super) fn late(&self) -> usize {
        let attempts = self.attempts.iter();
        attempts.filter(|attempt| attempt.late.is_some()).count()
    }

    /// A statement that will change nothing whenever it is executed is as good as executed. An answer
    /// stays; and who has lost the claim, and claims no more, will not have it again.
    pub(super) fn forget_refused(&mut self) {
        let row = self.row;
        let is_completed = row.is_some_and(|row| matches!(row.state, State::Completed(_)));
        for (attempt, me) in self.attempts.iter_mut().zip(0..) {
            let claims = matches!(attempt.step, Step::Send(statement) if statement.is_claim())
                || attempt.step == Step::InProgress;
            let is_lost = !claims && row.is_none_or(|row: Row| row.token != me);
            let is_fenced = attempt.late.is_some_and(Statement::is_fenced);
            if is_completed || is_lost && is_fenced {
                attempt.late = None;
            }
        }
    }

    pub(super) fn is_claim_exclusive(&self) -> bool {
        let mut attempts = self.attempts.iter().zip(0..);
        attempts.all(|(attempt, me)| {
            let is_current = attempt.runs() && attempt.trusted;
            !is_current || self.row.is_some_and(|row| row.is_kept_by(me))
        })
    }

    pub(super) fn stands(&self) -> bool {
        let stored = self.row.map(|row| row.state);
        let is_stored = |answer| stored == Some(State::Completed(answer));
        !self.contradicted && self.recorded.is_none_or(is_stored)
    }

    /// Whether some attempt is about to do this, and the record is like that.
    pub(super) fn about_to(
        &self,
        statement: Statement,
        mut such: impl FnMut(Token, Row) -> bool,
    ) -> bool {
        let mut attempts = self.attempts.iter().zip(0..);
        let row = self.row;
        attempts.any(|(attempt, me)| {
            attempt.step == Step::Send(statement) && row.is_some_and(|row| such(me, row))
        })
    }

    pub(super) fn is_taken_over(&self) -> bool {
        let mut attempts = self.attempts.iter();
        attempts.any(|attempt| match (attempt.step, self.row) {
            (Step::Send(Statement::TakeOver(old, _)), Some(row)) => {
                row.token == old && row.is_lost()
            }
            _ => false,
        })
    }

    /// Tokens are random: which attempt is the first says nothing. Of states that differ in nothing
    /// else, one is visited.
    pub(super) fn rename_attempts(&mut self) {
        let named = |token: Token| {
            let row = self.row.is_some_and(|row| row.token == token);
            (row, self.recorded == Some(token))
        };
        let mut order: Vec<(Attempt, (bool, bool), Token)> = Vec::with_capacity(4);
        for (attempt, me) in self.attempts.iter().zip(0..) {
            order.push((*attempt, named(me), me));
        }
        order.sort_unstable();
        if order.iter().zip(0..).all(|((.., old), new)| *old == new) {
            return;
        }
        let mut names = [0; 8];
        for ((.., old), new) in order.iter().zip(0..) {
            names[usize::from(*old)] = new;
        }
        let rename = |token: &mut Token| {
            if let Some(new) = names.get(usize::from(*token)) {
                *token = *new;
            }
        };
        for (place, (attempt, ..)) in self.attempts.iter_mut().zip(order) {
            *place = attempt;
            if let Step::Send(statement) = &mut place.step {
                statement.rename(rename);
            }
            if let Some(statement) = &mut place.late {
                statement.rename(rename);
            }
        }
        if let Some(row) = &mut self.row {
            rename(&mut row.token);
            if let State::Completed(answer) = &mut row.state {
                rename(answer);
            }
        }
        if let Some(answer) = &mut self.recorded {
            rename(answer);
        }
    }
}

/// Where each attempt is, what it left under way, and the row.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (attempt, me) in self.attempts.iter().zip(0_u8..) {
            let current = if attempt.trusted { " current" } else { "" };
            write!(f, "{me} {:?}{current}, ", attempt.step)?;
            if let Some(statement) = attempt.late {
                write!(f, "late {statement:?}, ")?;
            }
        }
        match self.row {
            None => write!(f, "no row"),
            Some(row) => {
                let over = if row.is_lost() { " lost" } else { "" };
                write!(f, "row {:?} of {}{over}", row.state, row.token)
            }
        }
    }
}
