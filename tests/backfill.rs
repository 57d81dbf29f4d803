//! The example's promise, with real processes: however often the backfill is started, each customer
//! gets one mail.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const CUSTOMERS: usize = 200;

/// A directory that goes with the test.
struct Shop(PathBuf);

impl Shop {
    fn open() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("idempotency-backfill-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    fn backfill(&self) -> Child {
        Command::new(program())
            .arg(self.0.join("shop.db"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// How many mails each customer got.
    fn mails(&self) -> BTreeMap<String, usize> {
        let mails = std::fs::read_to_string(self.0.join("shop.mail")).unwrap_or_default();
        let mut counts = BTreeMap::new();
        for mail in mails.lines() {
            *counts.entry(mail.to_owned()).or_default() += 1;
        }
        counts
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Cargo puts examples beside the directory of the tests.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join("backfill");
    assert!(
        program.exists(),
        "run `cargo build --example backfill` first"
    );
    program
}

/// What it said that it sent, and that others did.
fn counts(child: Child) -> (usize, usize) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    let numbers: Vec<usize> = said
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect();
    (numbers[0], numbers[1])
}

#[test]
fn t13_a_backfill_started_twice_at_once_sends_each_mail_once() {
    let shop = Shop::open();
    let (left, right) = (shop.backfill(), shop.backfill());
    let (left, right) = (counts(left), counts(right));
    assert_eq!(left.0 + right.0, CUSTOMERS);
    assert_eq!((left.0 + left.1, right.0 + right.1), (CUSTOMERS, CUSTOMERS));
    // They did run at once.
    assert!(left.1 > 0 && right.1 > 0, "{left:?} {right:?}");
    let mails = shop.mails();
    assert_eq!(mails.len(), CUSTOMERS);
    assert!(mails.values().all(|mails| *mails == 1));
}

#[test]
fn a_backfill_killed_and_started_again_sends_no_mail_twice() {
    let shop = Shop::open();
    let mut first = shop.backfill();
    let deadline = Instant::now() + Duration::from_secs(30);
    while shop.mails().len() < 10 {
        assert!(Instant::now() < deadline, "no mail was sent");
        std::thread::sleep(Duration::from_millis(1));
    }
    first.kill().unwrap();
    assert!(!first.wait().unwrap().success());
    let before = shop.mails().len();
    assert!(before < CUSTOMERS, "it was killed too late");

    let (sent, _others) = counts(shop.backfill());
    let mails = shop.mails();
    assert!(mails.values().all(|mails| *mails == 1));
    assert_eq!(before + sent, mails.len());
    // The one it died in is nobody's to send again: it waits for a person.
    assert!(mails.len() + 1 >= CUSTOMERS, "{}", mails.len());
}
