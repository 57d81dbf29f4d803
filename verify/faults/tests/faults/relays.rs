//! Relays that are stopped for longer than their lease, killed, or cut off from the database.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use faults::process::Subject;
use faults::proxy::Proxy;
use faults::random::Random;
use faults::shop::Settings;
use faults::wait::{PATIENCE, until};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tower_idempotency::PgStore;
use tower_idempotency::outbox::{self, Message, Outgoing, PublishError, Publisher, Relay};

use crate::SHOP;
use crate::phases::shop;

/// Commits messages `from..to` of one partition.
async fn commit(pool: &PgPool, from: u64, to: u64) {
    for n in from..to {
        let mut transaction = pool.begin().await.unwrap();
        let message = Message::new("counted", &n).with_partition_key("p");
        outbox::enqueue(&mut transaction, message).await.unwrap();
        transaction.commit().await.unwrap();
    }
}

async fn count(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

const PENDING: &str = "select count(*) from idempotency.outbox where state = 'pending'";

/// What holds up the others.
const HEAD: &str = "select row_to_json(outbox)::text from idempotency.outbox
    where state in ('pending', 'dead') order by position limit 1";

async fn drained(pool: &PgPool) {
    let sent = until("everything to be sent", async || {
        (count(pool, PENDING).await == 0).then_some(())
    });
    let late = tokio::time::timeout(PATIENCE - Duration::from_secs(1), sent);
    if late.await.is_err() {
        let head: String = sqlx::query_scalar(HEAD).fetch_one(pool).await.unwrap();
        panic!("not everything is sent: {head}");
    }
}

/// First appearances in the order of commits, under one id each, and every one marked.
async fn assert_in_order(pool: &PgPool, messages: u64) {
    let deliveries = sqlx::query_as("select message, payload from delivery order by n");
    let deliveries: Vec<(String, String)> = deliveries.fetch_all(pool).await.unwrap();
    let (mut seen, mut payloads) = (HashSet::new(), Vec::new());
    for (id, payload) in &deliveries {
        if seen.insert(id) {
            payloads.push(payload.parse::<u64>().unwrap());
        }
    }
    let expected: Vec<u64> = (0..messages).collect();
    assert_eq!(payloads, expected);
    println!("{} deliveries of {messages} messages", deliveries.len());
    let sent = "select count(*) from idempotency.outbox where state = 'sent'";
    assert_eq!(count(pool, sent).await, i64::try_from(messages).unwrap());
}

async fn deliveries(pool: &PgPool, relay: &Subject) -> i64 {
    let count = sqlx::query_scalar("select count(*) from delivery where pid = $1");
    let count = count.bind(i32::try_from(relay.pid()).unwrap());
    count.fetch_one(pool).await.unwrap()
}

/// The relay that has delivered last, and the others.
async fn at_work<'a>(pool: &PgPool, relays: &'a [Subject]) -> (&'a Subject, &'a Subject) {
    let before = count(pool, "select count(*) from delivery").await;
    let pid: i32 = until("another delivery", async || {
        let last =
            sqlx::query_scalar("select pid from delivery where n > $1 order by n desc limit 1");
        last.bind(before).fetch_optional(pool).await.unwrap()
    })
    .await;
    let is_last = |relay: &&Subject| i32::try_from(relay.pid()) == Ok(pid);
    let last = relays.iter().find(is_last).unwrap();
    let other = relays.iter().find(|relay| !is_last(relay)).unwrap();
    (last, other)
}

async fn relays(settings: &Settings) -> Vec<Subject> {
    let settings = Settings {
        lease: 1000,
        relays: Some(40),
        ..settings.clone()
    };
    SHOP.start_all(2, &settings).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g03_a_relay_stopped_beyond_its_lease_marks_nothing_that_another_has_taken_over() {
    let (database, pool, settings) = shop().await;
    let relays = relays(&settings).await;
    let (each, rounds) = (30, 6);
    for round in 0..rounds {
        commit(&pool, round * each, (round + 1) * each).await;
        let (stopped, other) = at_work(&pool, &relays).await;
        stopped.stop().await;
        let before = deliveries(&pool, other).await;
        until("the other to take over, and go on", async || {
            (deliveries(&pool, other).await >= before + 3).then_some(())
        })
        .await;
        stopped.go_on();
        drained(&pool).await;
    }
    assert_in_order(&pool, rounds * each).await;
    let refused: usize = relays
        .iter()
        .map(|relay| relay.said().matches("was lost to another relay").count())
        .sum();
    println!("{refused} late writes refused");
    assert!(refused > 0, "nobody was late with a mark");
    database.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g02_relays_killed_at_any_moment_lose_no_message_and_keep_the_order() {
    let (database, pool, settings) = shop().await;
    let mut random = Random::seeded("relays");
    let (each, kills) = (15, 8);
    for round in 0..kills {
        let relays = relays(&settings).await;
        commit(&pool, round * each, (round + 1) * each).await;
        let (last, _) = at_work(&pool, &relays).await;
        let pid = last.pid();
        tokio::time::sleep(Duration::from_millis(random.below(90))).await;
        for relay in relays {
            if relay.pid() == pid {
                relay.kill();
            }
        }
    }
    let relays = relays(&settings).await;
    drained(&pool).await;
    assert_in_order(&pool, kills * each).await;
    drop(relays);
    database.is_clean().await;
}

/// Keeps what it is given.
#[derive(Clone, Default)]
struct Basket(Arc<Mutex<Vec<String>>>);

impl Publisher for Basket {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        self.0.lock().unwrap().push(message.payload().to_owned());
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d17_a_relay_whose_connections_fall_silent_goes_on_over_new_ones() {
    let (_database, pool, settings) = shop().await;
    PgStore::new(pool.clone()).migrate().await.unwrap();
    let proxy = Proxy::start(&settings.store).await;
    let through = PgPoolOptions::new().connect_lazy(proxy.url()).unwrap();
    let store = PgStore::builder(through)
        .with_statement_timeout(Duration::from_secs(1))
        .unwrap()
        .build();
    let basket = Basket::default();
    let relay = Relay::new(store, basket.clone())
        .with_poll_interval(Duration::from_millis(5))
        .unwrap()
        // The last claim before the silence may have been for what is committed after it.
        .with_lease(Duration::from_secs(5))
        .unwrap()
        .spawn();
    commit(&pool, 0, 1).await;
    drained(&pool).await;
    // Nobody says that they are gone: no byte comes through any more.
    proxy.strand();
    commit(&pool, 1, 2).await;
    drained(&pool).await;
    assert_eq!(*basket.0.lock().unwrap(), ["0", "1"]);
    assert!(relay.shutdown(Duration::from_secs(20)).await);
}
