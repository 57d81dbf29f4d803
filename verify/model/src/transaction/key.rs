//! What is known of one key: its record, and the transactions of its attempts.

use std::fmt;

use super::{Action, Late, Step, Token};

/// An open transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tx {
    pub(super) locked: bool,
    /// Past the lookup: its handler may run.
    pub(super) entered: bool,
    pub(super) wrote: bool,
    /// An uncommitted record: whether it says that the writes are kept.
    pub(super) record: Option<bool>,
    pub(super) late: Option<Late>,
}

/// One request, or one rerun of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attempt {
    pub(super) step: Step,
    pub(super) tx: Option<Tx>,
    /// Somebody was told that everything is rolled back.
    pub(super) said_rolled_back: bool,
    /// The handler has sent a commit of its own.
    pub(super) ended: bool,
}

/// A committed record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    pub(super) by: Token,
    pub(super) kept: bool,
}

/// All that is known of one key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub(super) record: Option<Record>,
    pub(super) attempts: Vec<Attempt>,
    /// Committed effects; two stands for more.
    pub(super) effects: u8,
    /// A client was given another answer than the recorded one.
    pub(super) contradicted: bool,
    /// A handler started although an answer was recorded.
    pub(super) ran_again: bool,
    /// An answer was recorded while another attempt was at it.
    pub(super) overlapped: bool,
    /// What was said to be rolled back is committed.
    pub(super) lied: bool,
}

impl Tx {
    pub(super) const BEGUN: Self = Self {
        locked: false,
        entered: false,
        wrote: false,
        record: None,
        late: None,
    };
}

impl Attempt {
    pub(super) const UNSENT: Self = Self {
        step: Step::Unsent,
        tx: None,
        said_rolled_back: false,
        ended: false,
    };

    pub(super) fn is_live(&self) -> bool {
        !matches!(self.step, Step::Unsent | Step::Over)
    }

    /// What is left is the transaction, if the server has it open still.
    pub(super) fn end(&mut self) {
        self.step = Step::Over;
    }

    /// 503 `transaction-conflict`, a rerun, or an answer of the handler that frees the key.
    pub(super) fn say_rolled_back(&mut self) {
        self.said_rolled_back = true;
        self.end();
    }
}

impl Key {
    pub(super) fn new(attempts: usize) -> Self {
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

    pub(super) fn attempt(&mut self, me: Token) -> &mut Attempt {
        &mut self.attempts[usize::from(me)]
    }

    pub(super) fn is_locked(&self) -> bool {
        let mut open = self.attempts.iter().filter_map(|attempt| attempt.tx);
        open.any(|tx| tx.locked)
    }

    /// Whether an open transaction, but this one, has a record that is not committed.
    pub(super) fn is_undecided(&self, me: Option<Token>) -> bool {
        let mut others = self.attempts.iter().zip(0..);
        others.any(|(attempt, other)| {
            Some(other) != me && attempt.tx.is_some_and(|tx| tx.record.is_some())
        })
    }

    pub(super) fn commit(&mut self, me: Token) {
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

    pub(super) fn land(&mut self, me: Token) {
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
    pub(super) fn answer(&mut self, me: Token, by: Token) {
        self.contradicted |= self.record.map(|record| record.by) != Some(by);
        self.attempt(me).end();
    }

    pub(super) fn say_rolled_back(&mut self, me: Token) {
        let is_committed = self.record.is_some_and(|record| record.by == me);
        self.lied |= is_committed;
        self.attempt(me).say_rolled_back();
    }

    /// The next step of an attempt, without a fault.
    pub(super) fn next_healthy(&self, me: Token, is_blocked: bool) -> Action {
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

    pub(super) fn is_effect_recorded(&self) -> bool {
        let says_so = self.record.is_some_and(|record| record.kept);
        (self.effects > 0) == says_so
    }

    /// Of attempts that differ in nothing else, which is the first says nothing.
    pub(super) fn rename_attempts(&mut self) {
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
