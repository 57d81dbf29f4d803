//! Killed at each step of a charge, started again, and asked again.

use crate::bench::Bench;
use crate::client::ADA;
use crate::{CHARGES, POSTINGS};

/// Statements that wait for the test, which holds what they need.
const AT_THE_LEDGER: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock'
        and query like 'insert into payments.ledger%'";
const AT_THE_RECORD: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock'
        and query like '%idempotency.record%'";
/// Sessions that have not noticed yet that their client is gone.
const BUSY: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and state <> 'idle' and pid <> pg_backend_pid()";
const RUNNING: &str = "select count(*) from idempotency.record where state = 'running'";

#[tokio::test(flavor = "multi_thread")]
async fn killed_before_the_commit_nothing_was_charged_and_a_retry_charges_once() {
    let mut bench = Bench::new().await;
    let ledger = bench.closed_ledger().await;
    let waiting = bench.service.client.charging("order-1", 1250);
    // The handler is in its transaction, between the charge and the ledger.
    bench.until(AT_THE_LEDGER, 1).await;
    bench.kill();
    waiting.join().unwrap();
    ledger.rollback().await.unwrap();
    bench.until(BUSY, 0).await;
    assert_eq!(bench.number(CHARGES).await, 0);

    charges_once_after_a_restart(&mut bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_commit_and_the_record_a_retry_finds_the_charge() {
    let mut bench = Bench::new().await;
    let ledger = bench.closed_ledger().await;
    let waiting = bench.service.client.charging("order-1", 1250);
    bench.until(AT_THE_LEDGER, 1).await;
    let mut record = bench.pool.begin().await.unwrap();
    let lock = sqlx::raw_sql("select from idempotency.record for update");
    lock.execute(&mut *record).await.unwrap();
    ledger.rollback().await.unwrap();
    // Committed; and the answer cannot be recorded.
    bench.until(AT_THE_RECORD, 1).await;
    assert_eq!(bench.number(POSTINGS).await, 1);
    bench.kill();
    waiting.join().unwrap();
    // The server would execute the statement that waits, although its client is gone.
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
        where application_name = 'tower-idempotency' and datname = current_database()";
    bench.execute(end).await;
    bench.until(AT_THE_RECORD, 0).await;
    record.rollback().await.unwrap();
    assert_eq!(bench.number(RUNNING).await, 1);

    charges_once_after_a_restart(&mut bench).await;
}

async fn charges_once_after_a_restart(bench: &mut Bench) {
    bench.restart(None);
    let client = &bench.service.client;
    let early = client.charge(ADA, "order-1", 1250);
    assert_eq!(early.status, 409);
    assert_eq!(early.member("code"), "request-in-progress");
    bench.end_leases().await;

    let retried = client.charge(ADA, "order-1", 1250);

    assert_eq!((retried.status, retried.is_replay()), (201, false));
    let second = "select count(*) from idempotency.record where attempt = 2";
    assert_eq!(bench.number(second).await, 1);
    assert_eq!(bench.number(CHARGES).await, 1);
    assert_eq!(bench.number(POSTINGS).await, 1);
    assert_eq!(client.charge(ADA, "order-1", 1250).replayed(), retried);
}
