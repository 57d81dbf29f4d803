//! The reference service keeps its promises: the real program, on a real socket, killed and started again.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod common;

#[path = "payments/bench.rs"]
mod bench;
#[path = "payments/charges.rs"]
mod charges;
#[path = "payments/client.rs"]
mod client;
#[path = "payments/crashes.rs"]
mod crashes;
#[path = "payments/hooks.rs"]
mod hooks;
#[path = "payments/messages.rs"]
mod messages;
#[path = "payments/notifications.rs"]
mod notifications;
#[path = "payments/receiver.rs"]
mod receiver;
#[path = "payments/start.rs"]
mod start;
#[path = "payments/transitions.rs"]
mod transitions;

const CHARGES: &str = "select count(*) from payments.charge";
const POSTINGS: &str = "select count(*) from payments.ledger";
const MESSAGES: &str = "select count(*) from idempotency.outbox";
