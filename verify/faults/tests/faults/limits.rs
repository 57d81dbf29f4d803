//! Handlers that never end, or end badly.

use std::time::{Duration, Instant};

use faults::client::Pay;
use faults::database::Database;

use crate::{SUBJECT, assert_code, assert_replays, on_every_store};

on_every_store! {
    a11_a_handler_that_hangs_is_ended_at_its_limit_and_held_under_critical,
    a11_a_handler_that_hangs_is_ended_at_its_limit_and_answered_under_high,
    a11_a_handler_that_hangs_is_ended_at_its_limit_and_run_again_under_medium,
    a11_a_shutdown_returns_although_a_handler_hangs,
    a09_a_panic_is_answered_and_settled_by_risk_class,
}

const LIMIT: Duration = Duration::from_millis(700);

async fn hang(database: &Database, risk: &str) -> (faults::process::Subject, Pay) {
    let settings = database
        .settings(risk)
        .with(|s| s.execution_limit = Some(700));
    let subject = SUBJECT.start(&settings).await;
    let pay = Pay::new("hang");
    let sent = Instant::now();
    let answer = pay.send(subject.port).await.unwrap();
    assert_code(&answer, "execution-limit");
    assert_eq!(answer.status, 500);
    let took = sent.elapsed();
    assert!((LIMIT..LIMIT * 3).contains(&took), "{took:?}");
    let runs = database.runs(&pay.key).await;
    assert_eq!(runs.len(), 1);
    assert!(!runs[0].finished);
    (subject, pay)
}

async fn a11_a_handler_that_hangs_is_ended_at_its_limit_and_held_under_critical(
    database: Database,
) {
    let (subject, pay) = hang(&database, "critical").await;
    let retry = pay.behaving("").send(subject.port).await.unwrap();
    assert_code(&retry, "outcome-unknown");
    let held = database.held().await;
    assert_eq!(held[0].identity.key(), pay.key);
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn a11_a_handler_that_hangs_is_ended_at_its_limit_and_answered_under_high(
    database: Database,
) {
    let (subject, pay) = hang(&database, "high").await;
    let retry = pay.behaving("").send(subject.port).await.unwrap();
    assert_code(&retry, "execution-limit");
    assert!(retry.is_replayed());
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn a11_a_handler_that_hangs_is_ended_at_its_limit_and_run_again_under_medium(
    database: Database,
) {
    let (subject, pay) = hang(&database, "medium").await;
    let retry = pay.behaving("").send(subject.port).await.unwrap();
    assert_eq!(retry.status, 201, "{}", retry.text());
    assert_replays(&pay.send(subject.port).await.unwrap(), &retry);
    assert_eq!(database.runs(&pay.key).await.len(), 2);
}

async fn a11_a_shutdown_returns_although_a_handler_hangs(database: Database) {
    let settings = database.settings("critical").with(|s| s.grace = 300);
    let mut subject = SUBJECT.start(&settings).await;
    let pay = Pay::new("hang");
    // Its connection is gone, so that only the layer knows of it.
    let connection = pay.begin_on(subject.port).await.unwrap();
    database.has_begun(&pay.key, 1).await;
    connection.reset();
    let asked = Instant::now();
    subject.terminate();
    let status = subject.ended().await;
    assert!(
        asked.elapsed() < Duration::from_secs(3),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(status.code(), Some(faults::subject::UNFINISHED));
    assert!(subject.line().starts_with("unfinished 1 "));
}

async fn a09_a_panic_is_answered_and_settled_by_risk_class(database: Database) {
    for (risk, retried) in [
        ("critical", "outcome-unknown"),
        ("high", "handler-panicked"),
        ("medium", "201"),
    ] {
        let subject = SUBJECT.start(&database.settings(risk)).await;
        let pay = Pay::new("panic");
        let first = pay.send(subject.port).await.unwrap();
        assert_code(&first, "handler-panicked");
        assert!(!first.text().contains("asked to"), "{}", first.text());
        let retry = pay.behaving("").send(subject.port).await.unwrap();
        assert_code(&retry, retried);
        let runs = database.runs(&pay.key).await.len();
        assert_eq!(runs, if risk == "medium" { 2 } else { 1 });
    }
}
