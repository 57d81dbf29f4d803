//! What the outbox promises, on PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod common;

#[path = "outbox/damage.rs"]
mod damage;
#[path = "outbox/dead.rs"]
mod dead;
#[path = "outbox/enqueue.rs"]
mod enqueue;
#[path = "outbox/http.rs"]
mod http;
#[path = "outbox/order.rs"]
mod order;
#[path = "outbox/relay.rs"]
mod relay;
#[path = "outbox/sweep.rs"]
mod sweep;

#[path = "outbox/transactional.rs"]
mod transactional;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::{AssertSqlSafe, PgPool};
use tower_idempotency::PgStore;
use tower_idempotency::outbox::{
    self, Message, MessageId, Outbox, Outgoing, PublishError, Publisher, Relay,
};

use common::database::TestDatabase;
use common::fired::fired;

/// A migrated database, and the application's pool.
struct Fixture {
    store: PgStore,
    pool: PgPool,
    database: TestDatabase,
}

impl Fixture {
    async fn new() -> Self {
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
    async fn commit(&self, message: Message) -> MessageId {
        let mut transaction = self.pool.begin().await.unwrap();
        let id = outbox::enqueue(&mut transaction, message).await.unwrap();
        transaction.commit().await.unwrap();
        id
    }

    fn outbox(&self) -> Outbox {
        Outbox::new(self.store.clone())
    }

    /// A relay in a hurry.
    fn relay<P: Publisher>(&self, publisher: P) -> Relay<P> {
        hurry(Relay::new(self.store.clone(), publisher))
    }

    async fn execute(&self, sql: &str) {
        let statement = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        statement.execute(&self.pool).await.unwrap();
    }

    async fn number(&self, sql: &str) -> i64 {
        let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
        query.fetch_one(&self.pool).await.unwrap()
    }

    /// Waits until nothing is pending.
    async fn drained(&self) {
        until("everything is published", async || {
            self.outbox().backlog().await.unwrap().pending == 0
        })
        .await;
    }
}

fn hurry<P: Publisher>(relay: Relay<P>) -> Relay<P> {
    let relay = relay.with_poll_interval(Duration::from_millis(5)).unwrap();
    let (first, max) = (Duration::from_millis(1), Duration::from_millis(20));
    relay.with_backoff(first, max).unwrap()
}

/// Message `n` of a partition.
fn message(partition: &str, n: u64) -> Message {
    Message::new("thing.changed", &n).with_aggregate("thing", partition)
}

/// Keeps what was published, in the order it was; and asks first.
#[derive(Clone)]
struct Recorder(Arc<Inner>);

type Answer = Box<dyn Fn(&Outgoing) -> Result<(), PublishError> + Send + Sync>;

struct Inner {
    published: Mutex<Vec<Outgoing>>,
    answer: Answer,
}

impl Recorder {
    fn new() -> Self {
        Self::answering(|_| Ok(()))
    }

    /// With an answer for each message, which is kept in any case.
    fn answering(
        answer: impl Fn(&Outgoing) -> Result<(), PublishError> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner {
            published: Mutex::default(),
            answer: Box::new(answer),
        }))
    }

    fn published(&self) -> Vec<Outgoing> {
        self.0.published.lock().unwrap().clone()
    }

    fn ids(&self) -> Vec<MessageId> {
        self.published().iter().map(Outgoing::id).collect()
    }

    fn payloads(&self) -> Vec<String> {
        let published = self.published();
        published.iter().map(|m| m.payload().to_owned()).collect()
    }
}

impl Publisher for Recorder {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        self.0.published.lock().unwrap().push(message.clone());
        let answer = (self.0.answer)(message);
        if answer.is_err() {
            fired("publisher fails");
        }
        answer
    }
}

/// Asks again until it is so; panics after a while.
async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}
