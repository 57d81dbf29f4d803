//! A10: an application that is out of files, or of memory.

use std::time::Duration;

use faults::client::{Connection, Pay};
use faults::database::Database;
use faults::settings::Settings;
use faults::wait::{Gate, until};
use futures_util::future::join_all;

use crate::kills::retry_until_settled;
use crate::{SUBJECT, assert_replays};

fn settings(database: &Database, transactional: bool) -> Settings {
    database.settings("high").with(|s| {
        s.transactional = transactional;
        s.lease = Some(1000);
        s.store_timeout = Some(500);
    })
}

/// No connection to the database can be made, and no handler runs.
async fn without_files(transactional: bool) {
    let database = Database::postgres().await;
    // The ledger is elsewhere: its connections are not what is missing.
    let ledger = Database::sqlite().await;
    let settings = settings(&database, transactional).with(|s| s.ledger = ledger.url.clone());
    drop(SUBJECT.start(&settings).await);
    let settings = settings.with(|s| s.migrate = false);
    let subject = SUBJECT.start(&settings).await;
    let pays: Vec<_> = (0..12).map(|_| Pay::new("")).collect();
    let opened = pays.iter().map(|_| Connection::open(subject.port));
    let mut connections: Vec<_> = join_all(opened)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    // Served once, so that it is known to be accepted.
    for connection in &mut connections {
        connection
            .write(b"GET /runs HTTP/1.1\r\nhost: subject\r\n\r\n")
            .await
            .unwrap();
        assert_eq!(connection.answer().await.unwrap().status, 200);
    }
    subject.limit_files(true);
    let answers = connections
        .iter_mut()
        .zip(&pays)
        .map(async |(connection, pay)| {
            connection.write(&pay.bytes()).await.unwrap();
            connection.answer().await.unwrap()
        });
    let answers = join_all(answers).await;
    subject.is_out_of_files().await;
    let mut fails_closed = 0;
    for (pay, answer) in pays.iter().zip(&answers) {
        if answer.status == 201 {
            continue;
        }
        assert_eq!(answer.kind(), "store-unavailable", "{}", answer.text());
        assert!(answer.header("retry-after").is_some());
        assert_eq!(database.state(&pay.key).await, None);
        fails_closed += 1;
    }
    println!("{fails_closed} of {} refused", pays.len());
    assert!(fails_closed > 0, "nobody was refused");
    subject.limit_files(false);
    assert_eq!(subject.runs().await, pays.len() as u64 - fails_closed);
    for pay in &pays {
        // The breaker asks only now and then whether the store is back.
        let settled = until("the store to be back", async || {
            let answer = pay.send(subject.port).await.unwrap();
            (answer.status != 503).then_some(answer)
        })
        .await;
        assert_eq!(settled.status, 201, "{}", settled.text());
        assert_replays(&pay.send(subject.port).await.unwrap(), &settled);
    }
    assert_eq!(subject.runs().await, pays.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a10_without_files_for_connections_requests_are_refused_and_then_run_once() {
    without_files(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a10_without_files_for_connections_transactions_are_refused_and_then_run_once() {
    without_files(true).await;
}

/// The process dies of a flood of large requests in the middle of its handlers.
async fn without_memory(database: Database, transactional: bool) {
    let settings = settings(&database, transactional).with(|s| s.store_timeout = Some(10_000));
    let mut subject = SUBJECT.start(&settings).await;
    let gate = Gate::new();
    // Some that run, and one that is done.
    let done = Pay::new("");
    let first = done.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    let running: Vec<_> = (0..3).map(|_| Pay::new(&gate.behave())).collect();
    let clients = join_all(running.iter().map(|pay| pay.begin_on(subject.port))).await;
    subject.has_run(2).await;
    subject.limit_memory(16 << 20);
    let large = "x".repeat(1 << 20);
    let (port, mut flood, mut sending) = (subject.port, Vec::new(), Vec::new());
    // None of them ends, and so what they have is never given back.
    while subject.is_running() {
        let pay = Pay::new(&gate.behave()).with_body(&large);
        flood.push(pay.clone());
        sending.push(tokio::spawn(async move { pay.send(port).await.is_ok() }));
        assert!(flood.len() < 500, "it has all the memory it wants");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    subject.ran_out_of_memory().await;
    let answered = join_all(sending)
        .await
        .into_iter()
        .filter(|sent| *sent.as_ref().unwrap());
    println!("{} of {} answered", answered.count(), flood.len());
    drop(clients);

    gate.open();
    let subject = SUBJECT.start(&settings).await;
    assert_replays(&done.send(subject.port).await.unwrap(), &first);
    let mut kinds = std::collections::BTreeMap::new();
    for pay in flood.iter().step_by(3).chain(&running) {
        let settled = retry_until_settled(&subject, &pay.behaving("")).await;
        let runs = database.runs(&pay.key).await.len();
        *kinds.entry(settled.kind()).or_insert(0) += 1;
        match (settled.kind().as_str(), transactional) {
            ("201", _) => assert_eq!(runs, 1),
            ("attempt-lost", false) => assert!(runs <= 1, "{runs} runs"),
            _ => panic!("{settled:?}"),
        }
        assert_replays(&pay.send(subject.port).await.unwrap(), &settled);
    }
    println!("{kinds:?}");
    database.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a10_after_the_process_died_without_memory_nothing_runs_twice() {
    without_memory(Database::postgres().await, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a10_after_the_process_died_without_memory_every_transaction_is_whole() {
    without_memory(Database::postgres().await, true).await;
}
