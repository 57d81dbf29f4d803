//! A process that is stopped for longer than its lease, and goes on as if nothing had been.

use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::process::Subject;
use faults::wait::{Gate, until};
use tower_idempotency::store::Resolution;

use crate::{SUBJECT, assert_code, assert_replays, on_every_store};

on_every_store! {
    c04_the_completion_of_a_zombie_is_refused_and_its_client_gets_the_successors_answer,
    c04_the_completion_of_a_zombie_is_refused_while_its_successor_runs,
    c04_a_zombie_completes_what_was_held_in_its_absence,
    c04_a_zombie_whose_hold_was_resolved_completes_nothing,
    c04_a_zombie_of_the_class_high_gets_the_stored_500,
    c05_a_zombie_that_fails_does_not_free_the_key_of_its_successor,
    c05_a_zombie_that_fails_does_not_free_the_key_while_its_successor_runs,
}

/// A subject that holds a claim, stopped in the middle of its handler.
async fn stopped_holder(database: &Database, risk: &str, pay: &Pay) -> (Subject, Subject, Client) {
    let settings = database.settings(risk).with(|s| s.lease = Some(1000));
    let (holder, other) = (
        SUBJECT.start(&settings).await,
        SUBJECT.start(&settings).await,
    );
    let mut connection = pay.begin_on(holder.port).await.unwrap();
    let client = tokio::spawn(async move { connection.answer().await.unwrap() });
    let runs = database.has_begun(&pay.key, 1).await;
    assert!(!runs[0].finished);
    holder.stop().await;
    (holder, other, client)
}

type Client = tokio::task::JoinHandle<Answer>;

/// Retries until there is something else to say than that the first one runs.
async fn outlive_the_lease(pay: &Pay, subject: &Subject) -> Answer {
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

async fn c04_the_completion_of_a_zombie_is_refused_and_its_client_gets_the_successors_answer(
    database: Database,
) {
    let pay = Pay::new("delay=1500");
    let (zombie, other, client) = stopped_holder(&database, "medium", &pay).await;
    let successor = outlive_the_lease(&pay.behaving(""), &other).await;
    assert_eq!(successor.status, 201, "{}", successor.text());
    assert!(
        successor.text().contains(r#""attempt":2"#),
        "{}",
        successor.text()
    );
    zombie.go_on();
    let late = client.await.unwrap();
    assert!(zombie.said().contains("refused by the record"));
    assert_replays(&late, &successor);
    for subject in [&zombie, &other] {
        assert_replays(&pay.send(subject.port).await.unwrap(), &successor);
    }
    // Both ran to their end: the effects overlap, as documented, and only the record is protected.
    let runs = database.runs(&pay.key).await;
    assert_eq!(runs.iter().filter(|run| run.finished).count(), 2);
}

/// The record is running, as it was when the zombie was stopped, only that it is another's.
async fn the_write_is_refused_while_the_successor_runs(database: Database, behave: &str) {
    let pay = Pay::new(behave);
    let (zombie, other, client) = stopped_holder(&database, "medium", &pay).await;
    let gate = Gate::new();
    let taking_over = tokio::spawn({
        let (pay, port) = (pay.behaving(&gate.behave()), other.port);
        async move {
            until("the lease to run out", async || {
                let answer = pay.send(port).await.unwrap();
                (answer.kind() != "request-in-progress").then_some(answer)
            })
            .await
        }
    });
    database.has_begun(&pay.key, 2).await;
    zombie.go_on();
    until("the late write to be refused", async || {
        let said = zombie.said();
        said.contains("refused by the record").then_some(())
    })
    .await;
    assert_code(&pay.send(other.port).await.unwrap(), "request-in-progress");
    gate.open();
    let successor = taking_over.await.unwrap();
    assert_eq!(successor.status, 201, "{}", successor.text());
    assert!(successor.text().contains(r#""attempt":2"#));
    // It heard of the successor while that one ran, or of its answer.
    let late = client.await.unwrap();
    if late.status == 201 {
        assert_replays(&late, &successor);
    } else {
        assert_code(&late, "request-in-progress");
    }
    for subject in [&zombie, &other] {
        assert_replays(&pay.send(subject.port).await.unwrap(), &successor);
    }
    assert_eq!(database.runs(&pay.key).await.len(), 2);
}

async fn c04_the_completion_of_a_zombie_is_refused_while_its_successor_runs(database: Database) {
    the_write_is_refused_while_the_successor_runs(database, "delay=1500").await;
}

async fn c05_a_zombie_that_fails_does_not_free_the_key_while_its_successor_runs(
    database: Database,
) {
    the_write_is_refused_while_the_successor_runs(database, "delay=1500 status=500").await;
}

async fn c04_a_zombie_completes_what_was_held_in_its_absence(database: Database) {
    let pay = Pay::new("delay=1500");
    let (zombie, other, client) = stopped_holder(&database, "critical", &pay).await;
    assert_code(&outlive_the_lease(&pay, &other).await, "outcome-unknown");
    assert_eq!(database.held().await.len(), 1);
    zombie.go_on();
    let first = client.await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    assert!(!first.is_replayed());
    assert_replays(&pay.send(other.port).await.unwrap(), &first);
    assert!(database.held().await.is_empty());
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn c04_a_zombie_whose_hold_was_resolved_completes_nothing(database: Database) {
    let pay = Pay::new("delay=1500");
    let (zombie, other, client) = stopped_holder(&database, "critical", &pay).await;
    assert_code(&outlive_the_lease(&pay, &other).await, "outcome-unknown");
    let held = database.held().await.remove(0);
    database.resolve(&held, &Resolution::Release).await.unwrap();
    let successor = pay.behaving("").send(other.port).await.unwrap();
    assert_eq!(successor.status, 201);
    zombie.go_on();
    assert_replays(&client.await.unwrap(), &successor);
    assert_replays(&pay.send(zombie.port).await.unwrap(), &successor);
}

async fn c04_a_zombie_of_the_class_high_gets_the_stored_500(database: Database) {
    let pay = Pay::new("delay=1500");
    let (zombie, other, client) = stopped_holder(&database, "high", &pay).await;
    let lost = outlive_the_lease(&pay, &other).await;
    assert_code(&lost, "attempt-lost");
    zombie.go_on();
    assert_replays(&client.await.unwrap(), &lost);
    assert_replays(&pay.send(zombie.port).await.unwrap(), &lost);
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn c05_a_zombie_that_fails_does_not_free_the_key_of_its_successor(database: Database) {
    let pay = Pay::new("delay=1500 status=500");
    let (zombie, other, client) = stopped_holder(&database, "medium", &pay).await;
    let successor = outlive_the_lease(&pay.behaving(""), &other).await;
    assert_eq!(successor.status, 201, "{}", successor.text());
    zombie.go_on();
    assert_replays(&client.await.unwrap(), &successor);
    assert!(zombie.said().contains("refused by the record"));
    assert_replays(&pay.send(other.port).await.unwrap(), &successor);
}
