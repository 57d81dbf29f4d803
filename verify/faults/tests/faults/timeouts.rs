//! B06: tower's `TimeoutLayer`, outside of the layer and inside, and a handler that is too slow for it.

use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::process::Subject;
use faults::wait::Gate;

use crate::kills::retry_until_settled;
use crate::{SUBJECT, assert_code, assert_replays, on_every_store};

on_every_store! {
    b06_a_timeout_outside_ends_the_waiting_and_not_the_handler,
    b06_a_timeout_outside_of_a_transaction_ends_the_waiting_and_not_the_handler,
    b06_a_timeout_inside_is_held_under_critical,
    b06_a_timeout_inside_is_stored_under_high,
    b06_a_timeout_inside_frees_the_key_under_medium,
    b06_a_timeout_inside_of_a_transaction_rolls_back_and_frees_the_key,
}

const LIMIT: u64 = 400;

async fn b06_a_timeout_outside_ends_the_waiting_and_not_the_handler(database: Database) {
    for risk in ["critical", "medium"] {
        outside(&database, risk, false).await;
    }
}

async fn b06_a_timeout_outside_of_a_transaction_ends_the_waiting_and_not_the_handler(
    database: Database,
) {
    outside(&database, "high", true).await;
}

async fn outside(database: &Database, risk: &str, transactional: bool) {
    let settings = database.settings(risk).with(|s| {
        s.transactional = transactional;
        s.timeout_outside = Some(LIMIT);
    });
    let subject = SUBJECT.start(&settings).await;
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    timed_out(&pay, &subject).await;
    assert_eq!(subject.runs().await, 1);
    assert_code(
        &pay.send(subject.port).await.unwrap(),
        "request-in-progress",
    );
    gate.open();
    database.has_state(&pay.key, "completed").await;
    // The record is there for others before its own process has heard of it.
    let replay = retry_until_settled(&subject, &pay).await;
    assert_eq!(replay.status, 201, "{}", replay.text());
    assert!(replay.is_replayed());
    let runs = database.runs(&pay.key).await;
    assert_eq!((runs.len(), runs[0].finished), (1, true));
    assert!(replay.text().contains(&runs[0].execution));
    database.is_clean().await;
}

async fn timed_out(pay: &Pay, subject: &Subject) -> Answer {
    let answer = pay.send(subject.port).await.unwrap();
    assert_eq!(answer.status, 408, "{}", answer.text());
    assert!(answer.body.is_empty(), "{}", answer.text());
    assert!(!answer.is_replayed());
    answer
}

/// The handler is dropped in the middle: it has begun, and never ends.
async fn inside(database: &Database, risk: &str) -> (Subject, Pay, Answer) {
    let settings = database.settings(risk);
    let settings = settings.with(|s| s.timeout_inside = Some(LIMIT));
    let subject = SUBJECT.start(&settings).await;
    let pay = Pay::new("hang");
    let first = timed_out(&pay, &subject).await;
    let runs = database.runs(&pay.key).await;
    assert_eq!((runs.len(), runs[0].finished), (1, false));
    (subject, pay.behaving(""), first)
}

async fn b06_a_timeout_inside_is_held_under_critical(database: Database) {
    let (subject, pay, _) = inside(&database, "critical").await;
    assert_code(&pay.send(subject.port).await.unwrap(), "outcome-unknown");
    assert_eq!(database.held().await[0].identity.key(), pay.key);
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn b06_a_timeout_inside_is_stored_under_high(database: Database) {
    let (subject, pay, first) = inside(&database, "high").await;
    assert_replays(&pay.send(subject.port).await.unwrap(), &first);
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn b06_a_timeout_inside_frees_the_key_under_medium(database: Database) {
    let (subject, pay, _) = inside(&database, "medium").await;
    let second = pay.send(subject.port).await.unwrap();
    assert_eq!(second.status, 201, "{}", second.text());
    assert_replays(&pay.send(subject.port).await.unwrap(), &second);
    assert_eq!(database.runs(&pay.key).await.len(), 2);
}

async fn b06_a_timeout_inside_of_a_transaction_rolls_back_and_frees_the_key(database: Database) {
    let settings = database.settings("critical").with(|s| {
        s.transactional = true;
        s.timeout_inside = Some(LIMIT);
    });
    let subject = SUBJECT.start(&settings).await;
    let pay = Pay::new("hang");
    timed_out(&pay, &subject).await;
    assert_eq!(database.effects(&pay.key).await, 0);
    database.is_clean().await;
    let second = pay.behaving("").send(subject.port).await.unwrap();
    assert_eq!(second.status, 201, "{}", second.text());
    assert_replays(&pay.send(subject.port).await.unwrap(), &second);
    assert_eq!(database.effects(&pay.key).await, 1);
}
