//! The outbox before a NATS server of its own: run by `./scripts/brokers`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod brokers;
mod common;
#[allow(dead_code, reason = "the tests do without its main function")]
#[path = "../examples/worker.rs"]
mod worker;

use std::process::Command;
use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream::{self, stream};
use brokers::{Directory, Fixture, Process, free_port, message, until};
use futures_util::StreamExt as _;
use tower_idempotency::inbox::Once;
use tower_idempotency::outbox::{Message, NatsPublisher};

const GRACE: Duration = Duration::from_secs(20);

struct Nats {
    process: Option<Process>,
    directory: Directory,
    port: u16,
}

impl Nats {
    async fn start() -> Self {
        let mut nats = Self {
            process: None,
            directory: Directory::new("nats"),
            port: free_port(),
        };
        nats.restart().await;
        nats
    }

    async fn restart(&mut self) {
        self.stop();
        let log = self.directory.path().join("log");
        let mut command = Command::new("nats-server");
        command.args([
            "-js",
            "-a",
            "127.0.0.1",
            "-p",
            &self.port.to_string(),
            "-sd",
        ]);
        command.arg(self.directory.path());
        let mut process = Process::start(&mut command, &log);
        process.listens(self.port, &log).await;
        self.process = Some(process);
    }

    fn stop(&mut self) {
        self.process = None;
    }

    async fn client(&self) -> Client {
        let url = format!("nats://127.0.0.1:{}", self.port);
        let options = async_nats::ConnectOptions::new()
            .retry_on_initial_connect()
            .reconnect_delay_callback(|_| Duration::from_millis(50));
        options.connect(url).await.unwrap()
    }

    /// With a stream that takes every topic of the tests.
    async fn with_stream() -> (Self, stream::Stream, Client) {
        let nats = Self::start().await;
        let client = nats.client().await;
        let config = stream::Config {
            name: "things".into(),
            subjects: vec!["shop.>".into()],
            ..stream::Config::default()
        };
        let context = jetstream::new(client.clone());
        let mut stream = context.create_stream(config.clone()).await;
        // JetStream is up a moment after its port is.
        while stream.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            stream = context.create_stream(config.clone()).await;
        }
        (nats, stream.unwrap(), client)
    }
}

fn publisher(client: &Client) -> NatsPublisher {
    NatsPublisher::new(client.clone()).with_subject_prefix("shop.")
}

async fn count(stream: &stream::Stream) -> u64 {
    stream.get_info().await.unwrap().state.messages
}

#[tokio::test]
async fn messages_are_in_the_stream_in_order_and_under_their_ids() {
    let fixture = Fixture::new().await;
    let (_nats, stream, client) = Nats::with_stream().await;
    let first = message("a", 1).with_header("schema-version", "7");
    let ids = [
        fixture.commit(first).await,
        fixture.commit(message("a", 2)).await,
        fixture.commit(message("a", 3)).await,
    ];
    let relay = fixture.relay(publisher(&client)).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(count(&stream).await, 3);
    for (sequence, id) in (1..).zip(ids) {
        let stored = stream.get_raw_message(sequence).await.unwrap();
        assert_eq!(stored.subject.as_str(), "shop.thing.changed");
        assert_eq!(stored.payload, sequence.to_string());
        let header = stored.headers.get("Nats-Msg-Id").unwrap();
        assert_eq!(header.as_str(), id.to_string());
    }
    let stored = stream.get_raw_message(1).await.unwrap();
    assert_eq!(stored.headers.get("schema-version").unwrap().as_str(), "7");
}

#[tokio::test]
async fn a_message_that_is_published_again_is_in_the_stream_once() {
    let fixture = Fixture::new().await;
    let (_nats, stream, client) = Nats::with_stream().await;
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(publisher(&client)).spawn();
    fixture.drained().await;
    fixture.forget_what_was_sent().await;
    fixture.drained().await;
    until("it was sent twice", async || relay.stats().sent == 2).await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(count(&stream).await, 1);
}

#[tokio::test]
async fn a_message_that_no_stream_takes_is_dead_after_its_attempts() {
    let fixture = Fixture::new().await;
    let (_nats, _stream, client) = Nats::with_stream().await;
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(NatsPublisher::new(client.clone()));
    let relay = relay.with_max_attempts(2).unwrap().spawn();
    fixture
        .until_backlog("it is dead", |backlog| backlog.dead == 1)
        .await;
    assert!(relay.shutdown(GRACE).await);
    let dead = fixture.outbox().list_dead(None, 1).await.unwrap();
    assert_eq!(dead[0].attempts, 2);
}

#[tokio::test]
async fn a_message_larger_than_the_server_takes_is_dead_at_once() {
    let fixture = Fixture::new().await;
    let (_nats, stream, client) = Nats::with_stream().await;
    let large = Message::new("large", &"x".repeat(1024 * 1024));
    fixture
        .commit(large.with_max_payload(2 * 1024 * 1024))
        .await;
    let relay = fixture.relay(publisher(&client)).spawn();
    fixture
        .until_backlog("it is dead", |backlog| backlog.dead == 1)
        .await;
    assert!(relay.shutdown(GRACE).await);
    let dead = fixture.outbox().list_dead(None, 1).await.unwrap();
    assert_eq!((dead[0].attempts, count(&stream).await), (1, 0));
}

#[tokio::test]
async fn g08_what_was_committed_while_the_server_was_away_is_published_when_it_is_back() {
    let fixture = Fixture::new().await;
    let (mut nats, stream, client) = Nats::with_stream().await;
    nats.stop();
    until("the client has noticed", async || {
        client.connection_state() != async_nats::connection::State::Connected
    })
    .await;
    for n in 1..=20 {
        fixture.commit(message("a", n)).await;
    }
    let relay = fixture.relay(publisher(&client)).with_max_attempts(1);
    let relay = relay.unwrap().spawn();
    until("it was tried", async || relay.stats().unavailable >= 2).await;
    nats.restart().await;
    fixture
        .until_backlog("all is published or dead", |backlog| backlog.pending == 0)
        .await;
    assert_eq!(relay.stats().dead, 0);
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(count(&stream).await, 20);
    for n in 1..=20 {
        let stored = stream.get_raw_message(n).await.unwrap();
        assert_eq!(stored.payload, n.to_string());
    }
}

#[tokio::test]
async fn h02_a_worker_that_dies_between_its_commit_and_its_acknowledgement_has_one_effect() {
    let fixture = Fixture::new().await;
    worker::prepare(&fixture.pool).await.unwrap();
    let nats = Nats::start().await;
    let client = nats.client().await;
    let context = jetstream::new(client.clone());
    let ack_wait = Duration::from_secs(1);
    let mut consumer = worker::consumer(&context, ack_wait).await;
    // JetStream is up a moment after its port is.
    while consumer.is_err() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        consumer = worker::consumer(&context, ack_wait).await;
    }
    let consumer = consumer.unwrap();
    for order in ["order-1", "order-2"] {
        fixture.commit(Message::new("orders.created", order)).await;
    }
    let relay = fixture.relay(NatsPublisher::new(client)).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);

    let mut messages = consumer.messages().await.unwrap();
    let message = messages.next().await.unwrap().unwrap();
    let taken = worker::take_in(&fixture.pool, &message).await.unwrap();
    assert_eq!(taken, Once::First);
    drop((message, messages));
    common::fired::fired("worker ends");

    let (pool, next) = (fixture.pool.clone(), consumer.clone());
    let worker = tokio::spawn(async move { worker::work(&pool, next).await });
    until("all is acknowledged", async || {
        let info = consumer.get_info().await.unwrap();
        info.num_pending == 0 && info.num_ack_pending == 0
    })
    .await;
    worker.abort();
    let redelivered = consumer
        .get_info()
        .await
        .unwrap()
        .delivered
        .consumer_sequence;
    assert!(redelivered > 2, "{redelivered} deliveries");
    let effects = fixture.number("select count(*) from shipment");
    assert_eq!(effects.await, 2);
}
