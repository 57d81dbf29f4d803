//! The process ends at a point between two steps of a request.

use std::io::ErrorKind;

use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::process::Subject;
use faults::settings::Settings;
use faults::wait::until;

use crate::{SUBJECT, assert_code, assert_replays, on_every_store};

on_every_store! {
    a01_after_a_crash_before_the_claim_a_retry_executes_once,
    a02_after_a_crash_before_the_handler_nothing_ran_and_critical_holds_the_key,
    a02_after_a_crash_before_the_handler_nothing_ran_and_high_answers_a_stored_500,
    a02_after_a_crash_before_the_handler_medium_runs_it_once_the_lease_is_over,
    a05_after_a_crash_between_record_and_answer_a_retry_replays_the_answer,
    a06_after_a_crash_in_the_middle_of_the_answer_a_retry_replays_all_of_it,
}

fn settings(database: &Database, risk: &str) -> Settings {
    database.settings(risk).with(|s| s.lease = Some(2000))
}

/// Sends a request that ends its process at a failpoint. Another is there already, so that the lease is
/// not over before it can be asked.
pub(crate) async fn crash_at(failpoint: &str, pay: &Pay, settings: &Settings) -> Subject {
    let subject = SUBJECT.start(settings).await;
    let next = SUBJECT.start(settings).await;
    subject.arm(failpoint, "abort").await;
    let error = pay.send(subject.port).await.unwrap_err();
    let kinds = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
    assert!(kinds.contains(&error.kind()), "{error}");
    subject.aborted_at(failpoint).await;
    next
}

/// In progress until the lease is over, and then something else.
async fn after_the_lease(pay: &Pay, subject: &Subject) -> Answer {
    assert_code(
        &pay.send(subject.port).await.unwrap(),
        "request-in-progress",
    );
    until("the lease to run out", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.kind() != "request-in-progress").then_some(answer)
    })
    .await
}

async fn a01_after_a_crash_before_the_claim_a_retry_executes_once(database: Database) {
    let pay = Pay::new("");
    let subject = crash_at("before_claim", &pay, &settings(&database, "high")).await;
    assert_eq!(database.state(&pay.key).await, None);
    assert!(database.runs(&pay.key).await.is_empty());
    let first = pay.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    assert!(!first.is_replayed());
    assert_replays(&pay.send(subject.port).await.unwrap(), &first);
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

/// A claim whose handler never ran, and what is said after its lease.
async fn claimed_for_nothing(database: &Database, risk: &str) -> (Subject, Pay, Answer) {
    let pay = Pay::new("");
    let subject = crash_at("after_claim", &pay, &settings(database, risk)).await;
    assert_eq!(database.state(&pay.key).await.as_deref(), Some("running"));
    assert!(database.runs(&pay.key).await.is_empty());
    let settled = after_the_lease(&pay, &subject).await;
    (subject, pay, settled)
}

async fn a02_after_a_crash_before_the_handler_nothing_ran_and_critical_holds_the_key(
    database: Database,
) {
    let (_subject, pay, settled) = claimed_for_nothing(&database, "critical").await;
    assert_code(&settled, "outcome-unknown");
    assert_eq!(database.held().await[0].identity.key(), pay.key);
    assert!(database.runs(&pay.key).await.is_empty());
}

async fn a02_after_a_crash_before_the_handler_nothing_ran_and_high_answers_a_stored_500(
    database: Database,
) {
    let (subject, pay, settled) = claimed_for_nothing(&database, "high").await;
    assert_code(&settled, "attempt-lost");
    assert_eq!(settled.status, 500);
    assert_replays(&pay.send(subject.port).await.unwrap(), &settled);
    assert!(database.runs(&pay.key).await.is_empty());
}

async fn a02_after_a_crash_before_the_handler_medium_runs_it_once_the_lease_is_over(
    database: Database,
) {
    let (subject, pay, settled) = claimed_for_nothing(&database, "medium").await;
    assert_eq!(settled.status, 201, "{}", settled.text());
    assert_replays(&pay.send(subject.port).await.unwrap(), &settled);
    let runs = database.runs(&pay.key).await;
    assert_eq!((runs.len(), runs[0].attempt), (1, 2));
}

async fn a05_after_a_crash_between_record_and_answer_a_retry_replays_the_answer(
    database: Database,
) {
    let pay = Pay::new("size=1000");
    let subject = crash_at("after_commit", &pay, &settings(&database, "critical")).await;
    replays_the_one_run(&database, &subject, &pay).await;
}

async fn a06_after_a_crash_in_the_middle_of_the_answer_a_retry_replays_all_of_it(
    database: Database,
) {
    let settings = settings(&database, "critical");
    let subject = SUBJECT.start(&settings).await;
    subject.arm("body_chunk", "pause").await;
    let pay = Pay::new("size=100000");
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    let seen = connection.read_at_least(40_000).await.unwrap();
    subject.has_reached("body_chunk", 1).await;
    subject.arm("body_chunk", "abort").await;
    let error = connection.answer().await.unwrap_err();
    println!("{seen} bytes were seen, then: {error}");
    subject.aborted_at("body_chunk").await;
    let subject = SUBJECT.start(&settings).await;
    let replay = replays_the_one_run(&database, &subject, &pay).await;
    assert!(replay.body.len() > 100_000);
}

/// The answer of the run in the ledger, from the record.
pub(crate) async fn replays_the_one_run(
    database: &Database,
    subject: &Subject,
    pay: &Pay,
) -> Answer {
    let replay = pay.send(subject.port).await.unwrap();
    assert_eq!(replay.status, 201, "{}", replay.text());
    assert!(replay.is_replayed());
    let runs = database.runs(&pay.key).await;
    assert_eq!(runs.len(), 1);
    assert!(replay.text().contains(&runs[0].execution));
    assert_replays(&pay.send(subject.port).await.unwrap(), &replay);
    replay
}
