//! A small run of `./scripts/exactly-once`, and the proof that a run can fail.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking"
)]

use std::process::{Command, Output};

fn run(options: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_exactly-once"))
        .args(options)
        .output()
        .expect("it can be started");
    println!("{}", String::from_utf8_lossy(&output.stderr));
    println!("{}", String::from_utf8_lossy(&output.stdout));
    output
}

fn planted(fault: &str) -> String {
    let small = ["--operations", "100", "--kills", "1", "--restarts", "1"];
    let output = run(&[&small[..], &["--seed", "1", "--plant", fault]].concat());
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn charges_messages_and_effects_are_there_once_whatever_is_killed() {
    let output = run(&["--operations", "200", "--kills", "2", "--restarts", "2"]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    let last = said.lines().last().expect("it says what came of it");
    let dropped = last.split(' ').nth(9).expect("a number");
    assert_eq!(
        last,
        format!(
            "operations 200 ledger 200 outbox 200 effects 200 dropped {dropped} kills 2 restarts 2 violations 0"
        )
    );
}

#[test]
fn a_charge_written_past_its_transaction_is_found_and_found_twice() {
    let said = planted("double-effect");
    assert!(said.contains("written by two transactions"));
    assert!(said.contains(r#"[("ledger", 2), ("record", 1)"#));
}

#[test]
fn a_message_that_was_marked_and_not_sent_is_found() {
    let said = planted("lost-message");
    assert!(said.contains(r#"("outbox", 1), ("effect", 0)]"#));
}

#[test]
fn fewer_operations_than_blows_need_are_refused() {
    let output = run(&["--operations", "199", "--kills", "10", "--restarts", "10"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
}
