//! The outbox before a RabbitMQ of its own: run by `./scripts/brokers`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod brokers;
mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::Duration;

use brokers::{Directory, Fixture, Process, free_port, message, until};
use lapin::options::{
    BasicGetOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use tokio::sync::Mutex;
use tower_idempotency::outbox::RabbitPublisher;

const GRACE: Duration = Duration::from_secs(20);

struct Rabbit {
    process: Option<Process>,
    directory: Directory,
    port: u16,
    distribution: u16,
    epmd: u16,
}

impl Rabbit {
    /// One for all tests that run at once: it takes seconds to start.
    async fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Rabbit>> = Mutex::const_new(Weak::new());
        let mut shared = SHARED.lock().await;
        if let Some(rabbit) = shared.upgrade() {
            return rabbit;
        }
        let rabbit = Arc::new(Self::start().await);
        *shared = Arc::downgrade(&rabbit);
        rabbit
    }

    async fn start() -> Self {
        let mut rabbit = Self {
            process: None,
            directory: Directory::new("rabbitmq"),
            port: free_port(),
            distribution: free_port(),
            epmd: free_port(),
        };
        let path = rabbit.directory.path();
        let conf = format!("listeners.tcp.1 = 127.0.0.1:{}\n", rabbit.port);
        fs::write(path.join("rabbitmq.conf"), conf).unwrap();
        fs::write(path.join("plugins"), "[].\n").unwrap();
        rabbit.restart().await;
        rabbit
    }

    async fn restart(&mut self) {
        self.stop();
        let path = self.directory.path();
        let log = path.join("log");
        let program = "/usr/lib/rabbitmq/bin/rabbitmq-server";
        let mut command = Command::new(std::env::var("RABBITMQ_BIN").unwrap_or(program.into()));
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", path)
            .env("RABBITMQ_NODENAME", format!("test{}@localhost", self.port))
            .env("RABBITMQ_DIST_PORT", self.distribution.to_string())
            .env("ERL_EPMD_PORT", self.epmd.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_MNESIA_BASE", path.join("mnesia"))
            .env("RABBITMQ_LOGS", "-")
            .env("RABBITMQ_CONFIG_FILE", path.join("rabbitmq.conf"))
            .env("RABBITMQ_CONF_ENV_FILE", path.join("none"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path.join("plugins"))
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 1:1 +sbwt none")
            .current_dir(path);
        let mut process = Process::start(&mut command, &log);
        process.listens(self.port, &log).await;
        self.process = Some(process);
    }

    fn stop(&mut self) {
        self.process = None;
    }

    fn uri(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }

    async fn connect(&self) -> (Connection, Channel) {
        let options = ConnectionProperties::default;
        let mut connection = Connection::connect(&self.uri(), options()).await;
        // It listens a moment before it lets anybody in.
        while connection.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
            connection = Connection::connect(&self.uri(), options()).await;
        }
        let connection = connection.unwrap();
        let channel = connection.create_channel().await.unwrap();
        (connection, channel)
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        self.process = None;
        // The port mapper is a daemon of its own, and stays while it knows of a node.
        for _ in 0..50 {
            let kill = Command::new("epmd")
                .env("ERL_EPMD_PORT", self.epmd.to_string())
                .arg("-kill")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            if kill.is_ok_and(|status| status.success()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// An exchange, and a queue that gets every topic of it that begins with `thing`.
async fn exchange(channel: &Channel, name: &str) {
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let none = FieldTable::default;
    let declared = channel.exchange_declare(name.into(), ExchangeKind::Topic, durable, none());
    declared.await.unwrap();
    let queue = QueueDeclareOptions::durable();
    let declared = channel.queue_declare(name.into(), queue, none()).await;
    declared.unwrap();
    let bind = QueueBindOptions::default();
    let bound = channel.queue_bind(name.into(), name.into(), "thing.#".into(), bind, none());
    bound.await.unwrap();
}

struct Got {
    id: String,
    payload: String,
    persistent: bool,
    header: Option<String>,
}

async fn get(channel: &Channel, queue: &str) -> Option<Got> {
    let options = BasicGetOptions { no_ack: true };
    let got = channel.basic_get(queue.into(), options).await.unwrap()?;
    let properties = &got.delivery.properties;
    let header = properties.headers().as_ref().and_then(|headers| {
        let value = headers.inner().get("schema-version")?;
        Some(value.as_long_string()?.to_string())
    });
    Some(Got {
        id: properties.message_id().as_ref().unwrap().to_string(),
        payload: String::from_utf8(got.delivery.data.to_vec()).unwrap(),
        persistent: *properties.delivery_mode() == Some(2),
        header,
    })
}

#[tokio::test]
async fn messages_are_in_the_queue_in_order_and_under_their_ids() {
    let fixture = Fixture::new().await;
    let rabbit = Rabbit::shared().await;
    let (_connection, channel) = rabbit.connect().await;
    exchange(&channel, "in-order").await;
    let first = message("a", 1).with_header("schema-version", "7");
    let ids = [
        fixture.commit(first).await,
        fixture.commit(message("a", 2)).await,
        fixture.commit(message("a", 3)).await,
    ];
    let publisher = RabbitPublisher::new(&rabbit.uri(), "in-order").unwrap();
    let relay = fixture.relay(publisher).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    for (n, id) in (1..).zip(ids) {
        let got = get(&channel, "in-order").await.unwrap();
        assert_eq!((got.id, got.payload), (id.to_string(), n.to_string()));
        assert!(got.persistent);
        assert_eq!(got.header.as_deref(), (n == 1).then_some("7"));
    }
    assert!(get(&channel, "in-order").await.is_none());
}

#[tokio::test]
async fn a_message_that_no_queue_is_bound_for_is_not_sent() {
    let fixture = Fixture::new().await;
    let rabbit = Rabbit::shared().await;
    let (_connection, channel) = rabbit.connect().await;
    exchange(&channel, "unbound").await;
    let lost = tower_idempotency::outbox::Message::new("other.topic", &1);
    fixture.commit(lost).await;
    let publisher = RabbitPublisher::new(&rabbit.uri(), "unbound").unwrap();
    let relay = fixture.relay(publisher).with_max_attempts(2);
    let relay = relay.unwrap().spawn();
    fixture
        .until_backlog("it is dead", |backlog| backlog.dead == 1)
        .await;
    assert_eq!(relay.stats().sent, 0);
    assert!(relay.shutdown(GRACE).await);
    let dead = fixture.outbox().list_dead(None, 1).await.unwrap();
    let said = dead[0].last_error.as_deref();
    assert_eq!(said, Some("no queue is bound for the topic"));
}

#[tokio::test]
async fn a_message_for_an_exchange_that_is_not_there_is_dead_after_its_attempts() {
    let fixture = Fixture::new().await;
    let rabbit = Rabbit::shared().await;
    fixture.commit(message("a", 1)).await;
    let publisher = RabbitPublisher::new(&rabbit.uri(), "nowhere").unwrap();
    let relay = fixture.relay(publisher).with_max_attempts(2);
    let relay = relay.unwrap().spawn();
    fixture
        .until_backlog("it is dead", |backlog| backlog.dead == 1)
        .await;
    assert!(relay.shutdown(GRACE).await);
}

#[tokio::test]
async fn g08_what_was_committed_while_the_broker_was_away_is_published_when_it_is_back() {
    let fixture = Fixture::new().await;
    let mut rabbit = Rabbit::start().await;
    let (connection, channel) = rabbit.connect().await;
    exchange(&channel, "outage").await;
    let publisher = RabbitPublisher::new(&rabbit.uri(), "outage").unwrap();
    let relay = fixture.relay(publisher).with_max_attempts(3);
    let relay = relay.unwrap().spawn();
    fixture.commit(message("a", 1)).await;
    fixture.drained().await;
    drop((connection, channel));
    rabbit.stop();
    for n in 2..=20 {
        fixture.commit(message("a", n)).await;
    }
    until("it was tried", async || relay.stats().unavailable >= 2).await;
    rabbit.restart().await;
    fixture
        .until_backlog("all is published or dead", |backlog| backlog.pending == 0)
        .await;
    assert_eq!(relay.stats().dead, 0);
    assert!(relay.shutdown(GRACE).await);
    let (_connection, channel) = rabbit.connect().await;
    let mut got = Vec::new();
    while let Some(next) = get(&channel, "outage").await {
        let n: u64 = next.payload.parse().unwrap();
        // Confirmed or not when the broker went, a message may be there twice.
        if !got.contains(&n) {
            got.push(n);
        }
    }
    assert_eq!(got, (1..=20).collect::<Vec<u64>>());
}
