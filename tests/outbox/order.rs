//! Order within a partition, and none between them.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use sqlx::Connection as _;
use tokio::task::JoinSet;
use tower_idempotency::PgStore;
use tower_idempotency::outbox::{self, Message, Outgoing, PublishError, Publisher, Relay};

use crate::common::fired::fired;

use super::{Fixture, Recorder, hurry, message, until};

const GRACE: Duration = Duration::from_secs(20);

/// Whether a backend of this database waits for an advisory lock.
const WAITING: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock' and wait_event = 'advisory'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_of_a_partition_waits_for_the_first_to_commit() {
    let fixture = Fixture::new().await;
    let mut first = fixture.pool.begin().await.unwrap();
    let one = outbox::enqueue(&mut first, message("a", 1)).await.unwrap();
    let pool = fixture.pool.clone();
    let second = tokio::spawn(async move {
        let mut second = pool.begin().await.unwrap();
        let two = outbox::enqueue(&mut second, message("a", 2)).await.unwrap();
        second.commit().await.unwrap();
        two
    });
    until("the second waits", async || {
        fixture.number(WAITING).await == 1
    })
    .await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    first.commit().await.unwrap();
    let two = second.await.unwrap();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [one, two]);
}

#[tokio::test]
async fn g04_what_commits_after_later_ids_is_not_passed_over() {
    let fixture = Fixture::new().await;
    let mut slow = fixture.pool.begin().await.unwrap();
    let late = outbox::enqueue(&mut slow, message("slow", 1))
        .await
        .unwrap();
    let early = fixture.commit(message("fast", 1)).await;
    assert!(late < early);
    fired("commit late");

    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    until("the later id is published", async || {
        recorder.ids() == [early]
    })
    .await;
    slow.commit().await.unwrap();
    until("the earlier id is published", async || {
        recorder.ids() == [early, late]
    })
    .await;
    assert!(relay.shutdown(GRACE).await);
}

#[tokio::test]
async fn messages_without_a_partition_wait_for_nobody() {
    let fixture = Fixture::new().await;
    let mut first = fixture.pool.begin().await.unwrap();
    let free = || Message::new("topic", &1);
    outbox::enqueue(&mut first, free()).await.unwrap();
    // Would wait for ever, were there a lock.
    fixture.commit(free()).await;
    first.commit().await.unwrap();
}

/// Fails, pauses and loses acknowledgements at random.
#[derive(Clone)]
struct Chaos(Recorder);

fn dice(sides: u64) -> u64 {
    RandomState::new().hash_one(()) % sides
}

impl Publisher for Chaos {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        fired("dice");
        match dice(20) {
            0 => return Err(PublishError::retryable("refused")),
            1 if dice(10) == 0 => return Err(PublishError::unavailable("gone")),
            // Longer than the lease: somebody else goes on meanwhile.
            2 if dice(10) == 0 => tokio::time::sleep(Duration::from_millis(600)).await,
            3 => tokio::time::sleep(Duration::from_millis(dice(20))).await,
            _ => {}
        }
        self.0.publish(message).await?;
        match dice(20) {
            0 => Err(PublishError::retryable("acknowledgement lost")),
            _ => Ok(()),
        }
    }
}

/// Commits messages whose payload is the number of the commit in their partition.
async fn write(fixture: &Fixture, partitions: u64, each: u64) {
    let url = fixture.database.url.clone();
    let mut writers = JoinSet::new();
    for writer in 0..4 {
        let url = url.clone();
        writers.spawn(async move {
            let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
            for n in 0..partitions * each / 4 {
                let partition = (n * 7 + writer * 13) % partitions;
                let key = format!("p{partition}");
                let mut transaction = connection.begin().await.unwrap();
                // The row lock of the counter is the order of commits.
                let count: i64 = sqlx::query_scalar(
                    "update counter set n = n + 1 where partition = $1 returning n",
                )
                .bind(&key)
                .fetch_one(&mut *transaction)
                .await
                .unwrap();
                let message = Message::new("counted", &count).with_partition_key(&key);
                outbox::enqueue(&mut transaction, message).await.unwrap();
                if dice(10) == 0 {
                    transaction.rollback().await.unwrap();
                } else {
                    transaction.commit().await.unwrap();
                }
            }
        });
    }
    while let Some(written) = writers.join_next().await {
        written.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn g05_eight_relays_keep_the_order_of_fifty_partitions_and_lose_nothing() {
    let fixture = Fixture::new().await;
    let (partitions, each) = (50, 24);
    fixture
        .execute(
            "create table counter (partition text primary key, n bigint not null);
            insert into counter select 'p' || n, 0 from generate_series(0, 49) as n",
        )
        .await;
    let recorder = Recorder::new();
    let mut relays = Vec::new();
    for _ in 0..8 {
        let builder = PgStore::builder(fixture.pool.clone());
        let store = builder.with_max_connections(3).unwrap().build();
        let relay = hurry(Relay::new(store, Chaos(recorder.clone())))
            .with_concurrency(8)
            .and_then(|relay| relay.with_lease(Duration::from_millis(400)))
            .and_then(|relay| relay.with_max_attempts(1000))
            .and_then(|relay| relay.with_batch(3));
        relays.push(relay.unwrap().spawn());
    }
    write(&fixture, partitions, each).await;
    fixture.drained().await;
    for relay in relays {
        assert!(relay.shutdown(GRACE).await);
    }

    let mut seen = HashSet::new();
    let mut first_seen: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let mut ids: BTreeMap<(String, i64), BTreeSet<String>> = BTreeMap::new();
    for message in recorder.published() {
        let (key, n) = (
            message.partition_key().to_owned(),
            message.payload().parse(),
        );
        let n: i64 = n.unwrap();
        let id = message.id().to_string();
        ids.entry((key.clone(), n)).or_default().insert(id.clone());
        if seen.insert(id) {
            first_seen.entry(key).or_default().push(n);
        }
    }
    let counters = sqlx::query_as("select partition, n from counter order by partition");
    let counters: Vec<(String, i64)> = counters.fetch_all(&fixture.pool).await.unwrap();
    for (key, n) in counters {
        let expected: Vec<i64> = (1..=n).collect();
        assert_eq!(
            first_seen.remove(&key).unwrap_or_default(),
            expected,
            "{key}"
        );
    }
    assert!(first_seen.is_empty());
    assert!(ids.values().all(|ids| ids.len() == 1), "one id a message");
    let rows = fixture.number("select count(*) from idempotency.outbox where state = 'sent'");
    assert_eq!(rows.await, i64::try_from(seen.len()).unwrap());
    // Or nothing was put to the test.
    assert!(recorder.published().len() > seen.len());
}

/// Of one partition, a message is published for as long as the test says.
#[tokio::test]
async fn while_a_head_is_being_published_only_its_partition_waits() {
    struct Gate(Recorder, tokio::sync::Semaphore);
    impl Publisher for Gate {
        async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
            if message.aggregate_id() == "slow" {
                drop(self.1.acquire().await);
            }
            self.0.publish(message).await
        }
    }
    let fixture = Fixture::new().await;
    let recorder = Recorder::new();
    let gate = std::sync::Arc::new(Gate(recorder.clone(), tokio::sync::Semaphore::new(0)));
    fixture.commit(message("slow", 1)).await;
    fixture.commit(message("slow", 2)).await;
    for n in 0..10 {
        fixture.commit(message("fast", n)).await;
    }
    let first = fixture.relay(gate.clone()).spawn();
    let second = fixture.relay(gate.clone()).spawn();
    until("the others are published", async || {
        recorder.ids().len() == 10
    })
    .await;
    gate.1.add_permits(100);
    fixture.drained().await;
    assert!(first.shutdown(GRACE).await && second.shutdown(GRACE).await);
    assert_eq!(recorder.payloads()[10..], ["1", "2"]);
}

#[tokio::test]
async fn a_long_partition_does_not_keep_others_from_their_turn() {
    let fixture = Fixture::new().await;
    for n in 0..20 {
        fixture.commit(message("a-long", n)).await;
    }
    fixture.commit(message("b-short", 0)).await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone());
    let relay = relay.with_concurrency(1).and_then(|r| r.with_batch(5));
    let relay = relay.unwrap().spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let published = recorder.published();
    let place = published.iter().position(|m| m.aggregate_id() == "b-short");
    assert_eq!(place, Some(5));
}
