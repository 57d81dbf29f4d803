//! A consumer of NATS JetStream: ships each order once, however often its message is delivered.
//!
//! ```sh
//! nats-server -js &
//! DATABASE_URL=postgres://… cargo run --example worker --features outbox-nats
//! ```
//!
//! Publish to it with an outbox (`NatsPublisher`), or by hand:
//! `nats pub orders.created '"order-1"' -H Nats-Msg-Id:1`.
//!
//! The effect and the note that the message was taken in are one transaction. The message is
//! acknowledged after its commit: a crash between the two brings it again, and it is a duplicate.

use std::env;
use std::error::Error;
use std::time::Duration;

use async_nats::jetstream::{self, AckKind, Message, consumer, stream};
use futures_util::StreamExt as _;
use sqlx::PgPool;
use tower_idempotency::PgStore;
use tower_idempotency::inbox::{self, InboxSweeper, Once};

type AnyError = Box<dyn Error + Send + Sync>;

const STREAM: &str = "orders";

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    tracing_subscriber::fmt::init();
    let pool = PgPool::connect(&env::var("DATABASE_URL")?).await?;
    let store = PgStore::new(pool.clone());
    store.migrate().await?;
    prepare(&pool).await?;
    tokio::spawn(InboxSweeper::new(store).run());

    let url = env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".into());
    let context = jetstream::new(async_nats::connect(url).await?);
    work(&pool, consumer(&context, Duration::from_secs(30)).await?).await
}

/// The table of the effects.
pub(crate) async fn prepare(pool: &PgPool) -> Result<(), AnyError> {
    let table = "create table if not exists shipment (order_id text not null)";
    sqlx::query(table).execute(pool).await?;
    Ok(())
}

/// A durable consumer: where it stopped, the next process goes on. What is not acknowledged within
/// `ack_wait` is delivered again.
pub(crate) async fn consumer(
    context: &jetstream::Context,
    ack_wait: Duration,
) -> Result<consumer::PullConsumer, AnyError> {
    let stream = context
        .get_or_create_stream(stream::Config {
            name: STREAM.into(),
            subjects: vec!["orders.>".into()],
            ..stream::Config::default()
        })
        .await?;
    let config = consumer::pull::Config {
        durable_name: Some("shipping".into()),
        ack_wait,
        ..consumer::pull::Config::default()
    };
    Ok(stream.get_or_create_consumer("shipping", config).await?)
}

pub(crate) async fn work(pool: &PgPool, consumer: consumer::PullConsumer) -> Result<(), AnyError> {
    let mut messages = consumer.messages().await?;
    while let Some(message) = messages.next().await {
        let message = message?;
        let answer = match take_in(pool, &message).await {
            Ok(taken) => {
                tracing::info!(?taken, "taken in");
                AckKind::Ack
            }
            Err(error) => {
                tracing::warn!(error, "not taken in");
                AckKind::Nak(Some(Duration::from_secs(1)))
            }
        };
        message.ack_with(answer).await?;
    }
    Ok(())
}

/// Its effect is committed when this returns, whoever has committed it.
pub(crate) async fn take_in(pool: &PgPool, message: &Message) -> Result<Once, AnyError> {
    let id = message.headers.as_ref();
    let id = id.and_then(|headers| headers.get("Nats-Msg-Id"));
    let id = id.ok_or("message has no Nats-Msg-Id")?;
    let order: String = serde_json::from_slice(&message.payload)?;

    let mut transaction = pool.begin().await?;
    let taken = inbox::once(&mut transaction, STREAM, id.as_str()).await?;
    if taken == Once::First {
        sqlx::query("insert into shipment (order_id) values ($1)")
            .bind(order)
            .execute(&mut *transaction)
            .await?;
    }
    transaction.commit().await?;
    Ok(taken)
}
