//! The transactional protocol keeps its promises, and each fault that is planted breaks one.

#![allow(missing_docs, reason = "a test has no users")]

use model::transaction::property::{I1, I2, I2_RECORD, I4, ONCE, OVERLAP, ROLLED_BACK};
use model::transaction::{Fault, Transaction};
use model::{Bounds, check, counterexample};

const BOUNDS: Bounds = Bounds::new(3, 1, 3, 0);

#[track_caller]
fn assert_holds(bounds: Bounds, handler_commits: bool) {
    for savepoint in [true, false] {
        let model = Transaction {
            bounds,
            handler_commits,
            savepoint,
            fault: None,
        };
        let report = check(model, 2);
        println!("{bounds}: {} states, depth {}", report.states, report.depth);
        assert!(report.failures.is_empty(), "{:#?}", report.failures);
        assert!(report.states > 1_000, "{}", report.states);
    }
}

fn find(fault: Fault, handler_commits: bool, property: &'static str) -> Option<Vec<String>> {
    let model = Transaction {
        bounds: BOUNDS,
        handler_commits,
        savepoint: fault != Fault::NotEntered,
        fault: Some(fault),
    };
    let steps = counterexample(model, property)?;
    let count = steps.len();
    println!(
        "{fault:?}: {count} steps to break: {property}\n  {}",
        steps.join("\n  ")
    );
    Some(steps)
}

#[track_caller]
fn assert_found(fault: Fault, property: &'static str) {
    assert!(
        find(fault, false, property).is_some(),
        "{fault:?} is not noticed"
    );
}

#[test]
fn one_key_keeps_every_promise() {
    assert_holds(BOUNDS, false);
}

#[test]
fn two_keys_keep_every_promise() {
    assert_holds(Bounds::new(2, 2, 2, 0), false);
}

#[test]
fn a_handler_that_commits_by_itself_leaves_no_record_that_is_wrong() {
    assert_holds(BOUNDS, true);
}

#[test]
fn lock_and_lookup_in_one_statement_are_noticed() {
    assert_found(Fault::OneSnapshot, ONCE);
}

#[test]
fn a_missing_lock_is_noticed() {
    assert_found(Fault::NoLock, OVERLAP);
}

/// The lock saves work: of the record, its key is the arbiter.
#[test]
fn without_a_lock_the_key_of_the_record_decides() {
    for property in [I1, I2, I4] {
        assert_eq!(find(Fault::NoLock, false, property), None);
    }
}

#[test]
fn a_lock_that_ends_with_the_savepoint_is_noticed() {
    assert_found(Fault::LockInSavepoint, OVERLAP);
}

#[test]
fn a_refusal_that_is_recorded_without_entering_again_is_noticed() {
    assert_found(Fault::NotEntered, OVERLAP);
}

#[test]
fn a_record_before_the_handler_is_noticed() {
    assert!(find(Fault::RecordFirst, true, I2_RECORD).is_some());
}

#[test]
fn a_record_without_the_mark_of_its_attempt_is_noticed() {
    assert!(find(Fault::NoMark, true, I2_RECORD).is_some());
}

#[test]
fn a_commit_that_nobody_asks_about_is_noticed() {
    assert_found(Fault::NoProbe, ROLLED_BACK);
}

#[test]
fn a_probe_that_does_not_wait_is_noticed() {
    assert_found(Fault::ProbeReads, ROLLED_BACK);
}

#[test]
fn a_probe_that_is_committed_is_noticed() {
    assert_found(Fault::ProbeCommits, I2);
}
