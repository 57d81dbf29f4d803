//! The table of faults: what is injected, what must hold, how often, and which tests do it.
//! [`runner`] runs it, [`docs`] makes a page of it.
//!
//! A test is of the row that its name begins with: `a04_after_a_crash_..` is of A04.

pub mod docs;
mod rows;
pub mod runner;

pub use rows::ROWS;

/// The groups of rows, by the first letter of their ids.
pub const GROUPS: &[(char, &str)] = &[
    ('A', "Crash of the application"),
    ('B', "Cancellation and disconnect"),
    ('C', "Concurrency and fencing"),
    ('D', "Database faults"),
    ('E', "Expiry and clocks"),
    ('F', "Abuse and odd input"),
    ('G', "Outbox"),
    ('H', "Inbox and webhooks"),
    ('I', "Downstream calls"),
    ('J', "Operations"),
    ('K', "Several regions, portable SQL"),
];

/// The groups in which every row has to have tests.
pub const GATE: std::ops::RangeInclusive<char> = 'A'..='E';

/// What must hold, whatever happens.
pub const INVARIANTS: &[&str] = &[
    "at most one committed effect per scope, operation and key within retention",
    "effect if and only if record: on a transactional route both carry one transaction id",
    "a replay equals the answer: status, replayable headers and body bytes",
    "no lost reply: once a client saw a recorded reply, every later request within retention gets it",
    "no stuck key: with the faults off, every key is terminal, held, or claimable within one lease",
    "fencing: no write of an attempt is accepted after the next one has claimed",
    "a mismatch never executes and shows nothing of the stored request; scopes never meet",
    "store down: the mode that the route declares, closed by default (503, handler not run)",
    "outbox: published at least once if committed, never if rolled back, in order per partition, \
     under one id",
    "inbox: one effect per source and message id in the window; acknowledged only after the commit",
    "hygiene: the pool comes back full, nothing is idle in a transaction, no connection is poisoned, \
     memory and tasks are bounded",
    "accounting: outcome counters sum to keyed requests; no raw keys or payloads in labels or logs",
];

/// One fault.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// A letter and two digits.
    pub id: &'static str,
    /// What goes wrong.
    pub fault: &'static str,
    /// How it is made to.
    pub injection: &'static str,
    /// What must hold nevertheless.
    pub holds: &'static str,
    /// How often it is injected: in a small run, in a full one, and of what. `runs` are runs of the
    /// tests; anything else is counted within them, by [`size`].
    pub size: (u64, u64, &'static str),
    /// Where its tests are: `target`, for those that begin with its id, or `target:prefix`.
    pub tests: &'static [&'static str],
    /// Whether each of its tests fills a disk: they begin first, and run one after another.
    pub is_heavy: bool,
    /// Why there is no test.
    pub not_yet: Option<&'static str>,
}

const fn row(
    id: &'static str,
    fault: &'static str,
    injection: &'static str,
    holds: &'static str,
) -> Row {
    Row {
        id,
        fault,
        injection,
        holds,
        size: (1, 3, RUNS),
        tests: &["faults"],
        is_heavy: false,
        not_yet: None,
    }
}

/// The tests of this package that are of no row: those of its tools, and of cases beside the table.
pub const OTHERS: &str = "faults:others";

/// The unit of rows whose tests are run over and over.
pub const RUNS: &str = "runs";

impl Row {
    const fn repeated(self, small: u64, full: u64, unit: &'static str) -> Self {
        Self {
            size: (small, full, unit),
            ..self
        }
    }

    const fn tested_by(self, tests: &'static [&'static str]) -> Self {
        Self { tests, ..self }
    }

    const fn heavy(self) -> Self {
        Self {
            is_heavy: true,
            ..self
        }
    }

    const fn not_yet(self, why: &'static str) -> Self {
        Self {
            not_yet: Some(why),
            tests: &[],
            ..self
        }
    }

    /// Tests that are of no row: `target:prefix`, in a program's words.
    #[must_use]
    pub fn of_tests(tests: &str) -> Self {
        let tests: &'static str = Box::leak(tests.to_owned().into_boxed_str());
        Self {
            tests: Box::leak(Box::new([tests])),
            ..row(tests, "", "", "")
        }
    }

    /// Whether it is one of the table, whose faults are counted.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        !self.id.contains(':')
    }

    /// The letter of its group.
    #[must_use]
    pub fn group(&self) -> char {
        self.id.chars().next().unwrap_or_default()
    }

    /// How often it is injected.
    #[must_use]
    pub fn times(&self, is_full: bool) -> u64 {
        if is_full { self.size.1 } else { self.size.0 }
    }
}

/// How often the tests of a row inject its fault in this run, which is of the full size where the
/// environment says `FAULTS_SIZE=full`.
///
/// # Panics
///
/// When there is no such row.
#[must_use]
pub fn size(id: &str) -> u64 {
    let row = ROWS.iter().find(|row| row.id == id);
    let is_full = std::env::var_os("FAULTS_SIZE").is_some_and(|size| size == "full");
    row.expect("a row of the table").times(is_full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_of_a_group_and_there_once() {
        let groups = GROUPS.iter().map(|(group, _)| *group);
        assert!(ROWS.is_sorted_by(|one, other| one.id < other.id));
        assert!(
            ROWS.iter()
                .all(|row| groups.clone().any(|group| group == row.group()))
        );
    }

    #[test]
    fn no_row_of_the_gate_is_excused() {
        let mut gate = ROWS.iter().filter(|row| GATE.contains(&row.group()));
        assert_eq!(gate.clone().count(), 63);
        assert!(gate.all(|row| row.not_yet.is_none()));
    }

    #[test]
    fn the_page_is_made_of_this_table() {
        let page = docs::page(include_str!("../../results.txt"));
        let is_current = page == include_str!("../../../../docs/faults.md");
        assert!(is_current, "run ./scripts/faults --docs");
    }
}
