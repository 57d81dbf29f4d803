//! Killed at each step of a charge, started again, and asked again.

use crate::bench::Bench;
use crate::client::ADA;
use crate::{CHARGES, MESSAGES, POSTINGS};

/// Statements that wait for the test, which holds what they need.
const AT_THE_LEDGER: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock'
        and query like 'insert into payments.ledger%'";
/// Sessions that have not noticed yet that their client is gone.
const BUSY: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and state <> 'idle' and pid <> pg_backend_pid()";
const RECORDS: &str = "select count(*) from idempotency.record";

#[tokio::test(flavor = "multi_thread")]
async fn killed_before_the_commit_nothing_was_charged_and_a_retry_charges_at_once() {
    let mut bench = Bench::new().await;
    let ledger = bench.closed_ledger().await;
    let waiting = bench.service.client.begin_charge("order-1", 1250);
    // The handler is in its transaction, between the charge and the ledger.
    bench.until(AT_THE_LEDGER, 1).await;
    bench.kill();
    drop(waiting);
    ledger.rollback().await.unwrap();
    bench.until(BUSY, 0).await;
    for table in [CHARGES, POSTINGS, MESSAGES, RECORDS] {
        assert_eq!(bench.number(table).await, 0, "{table}");
    }

    bench.restart(&[]);
    // No lease is waited for.
    let retried = bench.service.client.charge(ADA, "order-1", 1250);

    assert_eq!((retried.status, retried.is_replay()), (201, false));
    for table in [CHARGES, POSTINGS, MESSAGES, RECORDS] {
        assert_eq!(bench.number(table).await, 1, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_after_the_commit_a_retry_gets_the_answer_that_nobody_has_seen() {
    let mut bench = Bench::new().await;
    let ledger = bench.closed_ledger().await;
    let waiting = bench.service.client.begin_charge("order-1", 1250);
    bench.until(AT_THE_LEDGER, 1).await;
    // Whoever asked is gone before there is an answer. The handler goes on.
    drop(waiting);
    ledger.rollback().await.unwrap();
    bench.until(RECORDS, 1).await;
    bench.kill();

    bench.restart(&[]);
    let retried = bench.service.client.charge(ADA, "order-1", 1250);

    assert_eq!((retried.status, retried.is_replay()), (201, true));
    for table in [CHARGES, POSTINGS, MESSAGES, RECORDS] {
        assert_eq!(bench.number(table).await, 1, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicts_of_transactions_run_again_and_the_client_does_not_notice() {
    let bench = Bench::new().await;
    // Serialization failures: at the ledger in the first run, at the message in the second. A sequence
    // is not rolled back.
    bench
        .execute(
            "create sequence tries;
            create function fail() returns trigger language plpgsql as $$
            begin
                if nextval('public.tries') in (1, 3) then
                    raise exception using errcode = '40001';
                end if;
                return new;
            end $$;
            create trigger fail before insert on payments.ledger
                for each row execute function fail();
            create trigger fail before insert on idempotency.outbox
                for each row execute function fail()",
        )
        .await;

    let made = bench.service.client.charge(ADA, "order-1", 1250);

    assert_eq!((made.status, made.is_replay()), (201, false));
    assert_eq!(bench.number("select last_value from tries").await, 5);
    for table in [CHARGES, POSTINGS, MESSAGES, RECORDS] {
        assert_eq!(bench.number(table).await, 1, "{table}");
    }
}
