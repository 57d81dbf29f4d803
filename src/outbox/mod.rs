//! Messages that are published if, and only if, the transaction that wrote them commits.
//!
//! [`enqueue`] writes a [`Message`] in the application's transaction. A [`Relay`], in this process
//! or another, hands it to a [`Publisher`] afterwards: HTTP (feature `outbox-http`), NATS JetStream
//! (`outbox-nats`), RabbitMQ (`outbox-rabbitmq`), or one of your own. The columns of
//! `idempotency.outbox` are those that Debezium's outbox event router looks for, for those who
//! would rather read the log.
//!
//! # What is promised
//!
//! - **At least once if committed, never if rolled back.** A message is done when its publisher has
//!   said so. When that cannot be known it is published again, under the same [`MessageId`].
//! - **In order within a partition.** The first appearances of a partition's messages are in the
//!   order in which their transactions committed. A repeated one may come late, after others:
//!   a relay that was stopped in the middle of publishing goes on where it was. Receivers that
//!   ask the [inbox](crate::inbox) first notice neither.
//! - **Partitions do not wait for each other**, and messages without one wait for nobody.
//! - **Every write of a relay is fenced.** One that has lost its claim to another changes nothing.
//!
//! # Order
//!
//! Neither ids nor sequences say in which order transactions commit, so a relay that remembers the
//! last one it saw would pass over what commits late. Here, [`enqueue`] takes a lock on the
//! partition to the end of the transaction, and numbers the message after that: of two transactions
//! in a partition, the second gets its number when the first has committed. The lock is an advisory
//! one, in memory: it costs no write and no row, and leaves nothing to sweep. What it costs is that
//! writers of one partition wait for each other, which those who change the same aggregate do
//! anyway.
//!
//! A relay claims the *head* of a partition, its first message that is not sent, by the state of the
//! row and with a lease. While the claim lasts, nobody can claim what comes after it.

mod admin;
mod enqueue;
mod error;
#[cfg(feature = "outbox-http")]
mod http;
mod message;
#[cfg(feature = "outbox-nats")]
mod nats;
mod publisher;
mod queue;
#[cfg(feature = "outbox-rabbitmq")]
mod rabbitmq;
mod relay;

pub use admin::{Backlog, DeadMessage, Outbox};
pub use enqueue::enqueue;
pub use error::{Limit, OutboxError, OutboxErrorKind};
#[cfg(feature = "outbox-http")]
pub use http::HttpPublisher;
pub use message::{InvalidMessageId, Message, MessageId};
#[cfg(feature = "outbox-nats")]
pub use nats::NatsPublisher;
pub use publisher::{Outgoing, PublishError, PublishErrorKind, Publisher};
#[cfg(feature = "outbox-rabbitmq")]
pub use rabbitmq::RabbitPublisher;
pub use relay::{Poison, Relay, RelayHandle, RelayStats};

/// The header that names the record of the request which has written a message.
pub const OPERATION_HEADER: &str = "operation-id";
