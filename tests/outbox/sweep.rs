//! What is kept, and for how long.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tower_idempotency::outbox::PublishError;

use super::{Fixture, Recorder, message, until};

const GRACE: Duration = Duration::from_secs(20);
const DAY: Duration = Duration::from_secs(24 * 3600);

async fn filled(fixture: &Fixture, state: &str, age: &str) {
    let finished = match state {
        "pending" => "null",
        _ => "now() - interval",
    };
    let age = if state == "pending" {
        String::new()
    } else {
        format!("'{age}'")
    };
    fixture
        .execute(&format!(
            "insert into idempotency.outbox
                (id, partition_key, aggregatetype, aggregateid, type, payload, headers, state, finished_at)
            select gen_random_uuid(), 'p' || n, 'a', 'b', 'c', '1', '{{}}', '{state}', {finished} {age}
            from generate_series(1, 25) as n"
        ))
        .await;
}

#[tokio::test]
async fn a_sweep_deletes_what_was_sent_or_discarded_long_ago_and_no_more_than_its_limit() {
    let fixture = Fixture::new().await;
    filled(&fixture, "sent", "2 days").await;
    filled(&fixture, "discarded", "2 days").await;
    let outbox = fixture.outbox();
    assert_eq!(outbox.sweep(DAY, 20).await.unwrap(), 20);
    assert_eq!(outbox.sweep(DAY, 20).await.unwrap(), 20);
    assert_eq!(outbox.sweep(DAY, 20).await.unwrap(), 10);
}

#[tokio::test]
async fn a_sweep_leaves_alone_what_is_young_pending_or_dead() {
    let fixture = Fixture::new().await;
    filled(&fixture, "sent", "1 hour").await;
    filled(&fixture, "dead", "2 years").await;
    filled(&fixture, "pending", "").await;
    assert_eq!(fixture.outbox().sweep(DAY, 1000).await.unwrap(), 0);
}

#[tokio::test]
async fn a_relay_sweeps_by_itself() {
    let fixture = Fixture::new().await;
    filled(&fixture, "sent", "8 days").await;
    let relay = fixture.relay(Recorder::new()).spawn();
    until("it has swept", async || relay.stats().swept == 25).await;
    assert!(relay.shutdown(GRACE).await);
}

#[tokio::test]
async fn the_backlog_counts_what_waits_and_for_how_long() {
    let fixture = Fixture::new().await;
    filled(&fixture, "dead", "1 hour").await;
    filled(&fixture, "sent", "1 hour").await;
    fixture.commit(message("a", 1)).await;
    fixture
        .execute(
            "update idempotency.outbox set created_at = now() - interval '1 hour' where state = 'pending'",
        )
        .await;
    let backlog = fixture.outbox().backlog().await.unwrap();
    assert_eq!((backlog.pending, backlog.dead), (1, 25));
    assert!((3600..3700).contains(&backlog.oldest.as_secs()));
}

/// A blocked partition of 20,000, and one message behind it in the order of keys.
#[tokio::test]
async fn a_blocked_partition_costs_one_step_however_long_it_is() {
    let fixture = Fixture::new().await;
    fixture
        .execute(
            "insert into idempotency.outbox
                (id, partition_key, aggregatetype, aggregateid, type, payload, headers)
            select gen_random_uuid(), 'a', 'a', 'b', 'c', '666', '{}'
            from generate_series(1, 20000) as n;
            analyze idempotency.outbox",
        )
        .await;
    let recorder = Recorder::answering(|message| match message.payload() {
        "666" => Err(PublishError::permanent("no")),
        _ => Ok(()),
    });
    let relay = fixture.relay(recorder.clone()).spawn();
    until("the first is dead", async || relay.stats().dead == 1).await;
    let id = fixture.commit(message("z", 1)).await;
    until("the other is published", async || {
        recorder.ids().contains(&id)
    })
    .await;
    assert!(relay.shutdown(GRACE).await);
    fixture.store.close().await;
    let scanned = "select coalesce(sum(seq_tup_read), 0)::bigint from pg_stat_user_tables
        where schemaname = 'idempotency' and relname = 'outbox'";
    let fetched = "select coalesce(sum(idx_tup_read), 0)::bigint from pg_stat_user_indexes
        where indexrelname = 'outbox_unsent'";
    until("the statistics show the scans", async || {
        fixture.number(fetched).await > 0
    })
    .await;
    // The analysis above is the only one to read them all.
    assert!(fixture.number(scanned).await < 20_000);
    assert!(fixture.number(fetched).await < 20_000);
}

/// The table is counted while nothing is left in it, and then there is much to send.
#[tokio::test]
async fn a_backlog_that_nobody_has_counted_is_not_walked_for_each_of_its_messages() {
    const MESSAGES: u64 = 2000;
    let fixture = Fixture::new().await;
    filled(&fixture, "sent", "1 hour").await;
    fixture
        .execute(
            "alter table idempotency.outbox set (autovacuum_enabled = off);
            delete from idempotency.outbox;
            analyze idempotency.outbox;
            select pg_stat_reset()",
        )
        .await;
    let counted = "select count(*) from pg_class
        where oid = 'idempotency.outbox'::regclass and reltuples = 0 and relpages > 0";
    assert_eq!(fixture.number(counted).await, 1);
    fixture
        .execute(&format!(
            "insert into idempotency.outbox
                (id, partition_key, aggregatetype, aggregateid, type, payload, headers)
            select gen_random_uuid(), 'p' || n % 20, 'a', 'b', 'c', '1', '{{}}'
            from generate_series(1, {MESSAGES}) as n"
        ))
        .await;
    // Every third comes again, after a pause.
    let asked = AtomicU64::new(0);
    let recorder = Recorder::answering(move |_| match asked.fetch_add(1, Relaxed) % 3 {
        0 => Err(PublishError::retryable("not now")),
        _ => Ok(()),
    });
    let relay = fixture.relay(recorder.clone()).spawn();
    until("all are sent", async || relay.stats().sent == MESSAGES).await;
    assert!(relay.shutdown(GRACE).await);
    fixture.store.close().await;
    // What a session did is known at the latest when it ends.
    let sessions = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name like 'tower-idempotency%'";
    until("the sessions are over", async || {
        fixture.number(sessions).await == 0
    })
    .await;
    let fetched = "select sum(idx_tup_read)::bigint from pg_stat_user_indexes
        where relname = 'outbox'";
    let fetched = u64::try_from(fixture.number(fetched).await).unwrap();
    // A walk for each would meet a thousand; what was sent lately is met beside what is next.
    let each = 1..200;
    assert!(
        each.contains(&(fetched / MESSAGES)),
        "{fetched} of {MESSAGES}"
    );
}
