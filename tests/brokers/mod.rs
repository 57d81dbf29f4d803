//! What the tests of the brokers share: private servers, and a database with an outbox.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a helper of tests, which fail by panicking; not every test uses all of it"
)]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sqlx::{AssertSqlSafe, PgPool};
use tower_idempotency::PgStore;
use tower_idempotency::outbox::{self, Backlog, Message, MessageId, Outbox, Publisher, Relay};

use super::common::database::TestDatabase;
use super::common::fired::fired;

const NEEDED: &str = "this test needs a broker: run ./scripts/brokers";

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A directory that goes with the value.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new(what: &str) -> Self {
        let name = format!(
            "tower-idempotency-{what}.{}.{}",
            std::process::id(),
            free_port()
        );
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server and its children, killed with the value.
pub struct Process(Child);

impl Process {
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let log = fs::File::create(log).unwrap();
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        Self(child.unwrap_or_else(|error| panic!("{NEEDED} ({error}: {command:?})")))
    }

    /// Waits until the server listens on `port`.
    pub async fn listens(&mut self, port: u16, log: &Path) {
        for _ in 0..1200 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return;
            }
            if let Some(status) = self.0.try_wait().unwrap() {
                let log = fs::read_to_string(log).unwrap_or_default();
                panic!("the broker ended with {status}: {log}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!(
            "the broker does not listen: {}",
            fs::read_to_string(log).unwrap_or_default()
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = format!("-{}", self.0.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        if self.0.wait().is_ok_and(|status| !status.success()) {
            fired("broker ends");
        }
    }
}

/// A migrated database.
pub struct Fixture {
    pub store: PgStore,
    pub pool: PgPool,
    pub database: TestDatabase,
}

impl Fixture {
    pub async fn new() -> Self {
        let database = TestDatabase::create().await;
        let pool = database.pool(4).await;
        let store = PgStore::new(pool.clone());
        store.migrate().await.unwrap();
        Self {
            store,
            pool,
            database,
        }
    }

    /// Commits a message.
    pub async fn commit(&self, message: Message) -> MessageId {
        let mut transaction = self.pool.begin().await.unwrap();
        let id = outbox::enqueue(&mut transaction, message).await.unwrap();
        transaction.commit().await.unwrap();
        id
    }

    /// A relay in a hurry.
    pub fn relay<P: Publisher>(&self, publisher: P) -> Relay<P> {
        let relay = Relay::new(self.store.clone(), publisher);
        let relay = relay.with_poll_interval(Duration::from_millis(5)).unwrap();
        let (first, max) = (Duration::from_millis(1), Duration::from_millis(20));
        relay.with_backoff(first, max).unwrap()
    }

    pub fn outbox(&self) -> Outbox {
        Outbox::new(self.store.clone())
    }

    pub async fn execute(&self, sql: &str) {
        let statement = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        statement.execute(&self.pool).await.unwrap();
    }

    pub async fn number(&self, sql: &str) -> i64 {
        let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
        query.fetch_one(&self.pool).await.unwrap()
    }

    /// As if no acknowledgement had come.
    pub async fn forget_what_was_sent(&self) {
        self.execute(
            "update idempotency.outbox set state = 'pending', finished_at = null,
                available_at = clock_timestamp() where state = 'sent'",
        )
        .await;
    }

    pub async fn until_backlog(&self, what: &str, is_so: impl Fn(Backlog) -> bool) {
        until(what, async || is_so(self.outbox().backlog().await.unwrap())).await;
    }

    pub async fn drained(&self) {
        self.until_backlog("everything is published", |backlog| backlog.pending == 0)
            .await;
    }
}

/// Message `n` about an aggregate.
pub fn message(aggregate: &str, n: u64) -> Message {
    Message::new("thing.changed", &n).with_aggregate("thing", aggregate)
}

/// Asks again until it is so; panics after a while.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}
