//! A rolling deploy.

use faults::client::Pay;
use faults::database::Database;
use faults::wait::Gate;
use futures_util::future::join_all;

use crate::{SUBJECT, assert_replays, on_every_store};

on_every_store! {
    a08_requests_in_flight_at_sigterm_get_their_answers,
    a08_requests_whose_clients_left_before_sigterm_are_completed,
}

async fn a08_requests_in_flight_at_sigterm_get_their_answers(database: Database) {
    let mut subject = SUBJECT.start(&database.settings("critical")).await;
    let port = subject.port;
    let gate = Gate::new();
    let pays: Vec<_> = (0..10).map(|_| Pay::new(&gate.behave())).collect();
    let running = pays.iter().cloned();
    let running = running.map(|pay| tokio::spawn(async move { pay.send(port).await.unwrap() }));
    let running: Vec<_> = running.collect();
    for pay in &pays {
        assert!(!database.has_begun(&pay.key, 1).await[0].finished);
    }
    subject.terminate();
    subject.closed().await;
    gate.open();
    let answers = join_all(running).await;
    assert_eq!(subject.ended().await.code(), Some(0), "{}", subject.said());
    let next = SUBJECT.start(&database.settings("critical")).await;
    for (pay, first) in pays.iter().zip(answers) {
        let first = first.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        assert_replays(&pay.send(next.port).await.unwrap(), &first);
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
}

async fn a08_requests_whose_clients_left_before_sigterm_are_completed(database: Database) {
    let mut subject = SUBJECT.start(&database.settings("critical")).await;
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    let connection = pay.begin_on(subject.port).await.unwrap();
    assert!(!database.has_begun(&pay.key, 1).await[0].finished);
    connection.reset();
    subject.terminate();
    subject.closed().await;
    gate.open();
    assert_eq!(subject.ended().await.code(), Some(0), "{}", subject.said());
    assert_eq!(database.state(&pay.key).await.as_deref(), Some("completed"));
    assert!(database.runs(&pay.key).await[0].finished);
}
