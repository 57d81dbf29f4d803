//! Counts the faults where they are injected, for whoever runs a test and asks whether its fault
//! was there: one line each in the file that `FAULTS_FIRED` names. Without one, nothing is written.

#![allow(
    dead_code,
    clippy::expect_used,
    reason = "a helper of tests, which fail by panicking; not every test injects faults"
)]

use std::fs::OpenOptions;
use std::io::Write as _;

/// One more fault of a kind: `kill`, `proxy cut`, `failpoint after_claim`.
///
/// # Panics
///
/// When the file cannot be written.
pub fn fired(what: &str) {
    let Some(path) = std::env::var_os("FAULTS_FIRED") else {
        return;
    };
    let file = OpenOptions::new().append(true).create(true).open(path);
    // One write of one line: many processes append to the same file.
    let written = file.and_then(|mut file| file.write_all(format!("{what}\n").as_bytes()));
    written.expect("the file of FAULTS_FIRED can be written");
}
