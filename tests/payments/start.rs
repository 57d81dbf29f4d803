//! How it starts, what it says, and what it leaves behind.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::bench::{Bench, PATIENCE, Service, command, refusal};
use crate::client::ADA;

#[test]
fn without_a_database_it_starts_a_private_one_and_sigint_removes_it() {
    let mut service = Service::start(&mut private());
    let directory = directory(&service);
    assert!(directory.join("data").is_dir());
    let first = service.client.charge(ADA, "order-1", 1250);
    assert_eq!(
        service.client.charge(ADA, "order-1", 1250).replayed(),
        first
    );

    assert_eq!(service.stop("INT").code(), Some(0));

    assert!(!directory.exists());
}

#[test]
fn the_private_database_is_removed_after_kill_9() {
    let mut service = Service::start(&mut private());
    let directory = directory(&service);
    assert!(directory.exists());

    assert!(!service.stop("KILL").success());

    until_gone(&directory);
}

#[test]
fn without_a_postgresql_it_says_how_to_get_one() {
    let said = refusal(private().env("PG_BIN", "/nonexistent"));
    assert!(said.contains("./scripts/test --setup"), "{said}");
    assert!(said.contains("DATABASE_URL="), "{said}");
}

#[test]
fn a_receiver_that_is_no_url_is_named() {
    for wrong in ["events", "https://example.com/events", ""] {
        let said = refusal(private().env("RECEIVER_URL", wrong));
        assert!(said.contains(&format!("RECEIVER_URL={wrong}")), "{said}");
    }
}

#[test]
fn a_port_that_is_no_number_is_named_with_the_fix() {
    let said = refusal(private().env("PORT", "http"));
    assert!(said.contains("PORT=http"), "{said}");
    assert!(said.contains("PORT=3001 cargo run"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_where_it_listens_and_does_not_show_a_password() {
    let bench = Bench::new().await;
    let said = bench.service.said.join("\n");
    assert!(said.contains(&bench.service.client.0), "{said}");
    assert!(!said.contains("postgres://"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_it_with_exit_code_0_and_a_restart_replays() {
    let mut bench = Bench::new().await;
    let first = bench.service.client.charge(ADA, "order-1", 1250);
    assert_eq!(bench.service.stop("TERM").code(), Some(0));

    bench.restart(None);

    let retried = bench.service.client.charge(ADA, "order-1", 1250);
    assert_eq!(retried.replayed(), first);
}

fn private() -> std::process::Command {
    let mut command = command();
    if let Some(programs) = std::env::var_os("TEST_PG_BIN") {
        command.env("PG_BIN", programs);
    }
    command
}

fn directory(service: &Service) -> PathBuf {
    let said = service.said.join("\n");
    let (_, rest) = said.split_once("?host=").expect(&said);
    PathBuf::from(rest.lines().next().unwrap())
}

fn until_gone(directory: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while directory.exists() {
        assert!(Instant::now() < deadline, "it is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}
