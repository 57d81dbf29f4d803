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
fn what_one_command_starts_it_ends_and_no_process_is_left() {
    let mut service = Service::start(&mut private());
    let directory = directory(&service);
    let started = belonging_to(&service, &directory);
    for part in [" consumer", "sh -c", "/data"] {
        assert!(
            started.iter().any(|(_, what)| what.contains(part)),
            "{part}"
        );
    }

    assert_eq!(service.stop("INT").code(), Some(0));

    for (id, what) in &started {
        assert!(!is_running(id), "{what}");
    }
}

#[test]
fn what_one_command_starts_ends_after_kill_9() {
    let mut service = Service::start(&mut private());
    let started = belonging_to(&service, &directory(&service));
    assert!(!started.is_empty());

    assert!(!service.stop("KILL").success());

    let deadline = Instant::now() + PATIENCE;
    for (id, what) in &started {
        while is_running(id) {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
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
fn a_consumer_that_is_no_url_is_named() {
    for wrong in ["events", "https://example.com/events", ""] {
        let said = refusal(private().env("CONSUMER_URL", wrong));
        assert!(said.contains(&format!("CONSUMER_URL={wrong}")), "{said}");
    }
}

#[test]
fn a_secret_that_is_none_is_refused_and_not_shown() {
    let said = refusal(private().env("BANK_SECRET", "hunter2"));
    assert!(said.contains("BANK_SECRET: "), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
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

    bench.restart(&[]);

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

/// The ids of the children of the service and of its PostgreSQL, and what they are.
fn belonging_to(service: &Service, directory: &Path) -> Vec<(String, String)> {
    let parent = service.id().to_string();
    let directory = directory.to_str().unwrap();
    let all = ps(&["-A", "-o", "pid=,ppid=,args="]);
    let all = all.lines().map(|line| {
        let (id, line) = line.trim_start().split_once(' ').unwrap();
        let (parent, what) = line.trim_start().split_once(' ').unwrap();
        (id, parent, what)
    });
    let own = all.filter(|(_, other, what)| *other == parent || what.contains(directory));
    own.map(|(id, _, what)| (id.to_owned(), what.to_owned()))
        .collect()
}

/// A zombie is not: whose parent it was is gone, and not everywhere somebody takes their place.
fn is_running(id: &str) -> bool {
    let state = ps(&["-o", "stat=", "-p", id]);
    !state.trim().is_empty() && !state.starts_with('Z')
}

fn ps(arguments: &[&str]) -> String {
    let output = std::process::Command::new("ps").args(arguments).output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
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
