//! Records that somebody has locked, in PostgreSQL.

use std::time::{Duration, Instant};

use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::fired::fired;
use faults::ledger::Ledger;
use faults::wait::Gate;
use futures_util::future::join_all;
use sqlx::{Postgres, Transaction};

use crate::{SUBJECT, assert_replays};

const LEASE: Duration = Duration::from_secs(1);

/// What an operator's `select .. for update` in psql does.
async fn lock(database: &Database, pay: &Pay) -> Transaction<'static, Postgres> {
    let Ledger::Postgres(pool) = &database.ledger else {
        panic!("SQLite has no locked rows");
    };
    let mut transaction = pool.begin().await.unwrap();
    let locked = sqlx::query("select 1 from idempotency.record where key = $1 for update")
        .bind(&pay.key)
        .fetch_all(&mut *transaction)
        .await
        .unwrap();
    assert_eq!(locked.len(), 1, "there is no record to lock");
    fired("record lock");
    transaction
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c13_a_locked_record_does_not_keep_other_leases_from_being_renewed() {
    let database = Database::postgres().await;
    let settings = database.settings("medium").with(|s| s.lease = Some(1000));
    let subjects = SUBJECT.start_all(2, &settings).await;
    let (port, other) = (subjects[0].port, subjects[1].port);
    let gate = Gate::new();
    let pays: Vec<_> = (0..6).map(|_| Pay::new(&gate.behave())).collect();
    let running = start(&pays, port);
    for pay in &pays {
        database.has_begun(&pay.key, 1).await;
    }
    let locked = lock(&database, &pays[0]).await;
    let began = Instant::now();
    while began.elapsed() < 2 * LEASE {
        for pay in &pays[1..] {
            let answer = pay.send(other).await.unwrap();
            crate::assert_code(&answer, "request-in-progress");
        }
    }
    locked.rollback().await.unwrap();
    gate.open();
    for (pay, ended) in pays.iter().zip(join_all(running).await) {
        let first = ended.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        assert_replays(&pay.send(other).await.unwrap(), &first);
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c15_duplicates_of_a_locked_and_lost_record_delay_no_other_key() {
    let database = Database::postgres().await;
    let settings = database.settings("medium").with(|s| s.lease = Some(1000));
    let subjects = SUBJECT.start_all(2, &settings).await;
    let (port, other) = (subjects[0].port, subjects[1].port);
    // A lost attempt: its process is gone, and its record is locked for longer than its lease.
    let lost = Pay::new("hang");
    let connection = lost.begin_on(port).await.unwrap();
    database.has_begun(&lost.key, 1).await;
    let mut subjects = subjects.into_iter();
    subjects.next().unwrap().kill();
    drop(connection);
    let locked = lock(&database, &lost).await;
    tokio::time::sleep(LEASE).await;

    // Twice as many as the store has connections.
    let waiting = start(&vec![lost.behaving(""); 16], other);
    let gate = Gate::new();
    let slow = Pay::new(&gate.behave());
    let kept = start(std::slice::from_ref(&slow), other);
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    while began.elapsed() < 2 * LEASE {
        let sent = Instant::now();
        let answer = Pay::new("").send(other).await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
        slowest = slowest.max(sent.elapsed());
    }
    crate::assert_code(&slow.send(other).await.unwrap(), "request-in-progress");
    println!("slowest of the others: {slowest:?}");
    // Whoever waits for the lock waits until the end of the test.
    assert!(slowest < Duration::from_secs(10), "{slowest:?}");
    locked.rollback().await.unwrap();
    gate.open();
    for answer in join_all(waiting).await {
        let kind = answer.unwrap().kind();
        assert!(["request-in-progress", "201"].contains(&&*kind), "{kind}");
    }
    for first in join_all(kept).await {
        assert_eq!(first.unwrap().status, 201);
        assert_eq!(database.runs(&slow.key).await.len(), 1);
    }
    let again = lost.behaving("").send(other).await.unwrap();
    assert_eq!(again.status, 201, "{}", again.text());
}

fn start(pays: &[Pay], port: u16) -> Vec<tokio::task::JoinHandle<Answer>> {
    let pays = pays.iter().cloned();
    pays.map(|pay| tokio::spawn(async move { pay.send(port).await.unwrap() }))
        .collect()
}
