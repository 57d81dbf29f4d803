//! Webhooks of providers, over a real socket, and each event once, on PostgreSQL.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test may panic, and has no users"
)]

mod common;

#[allow(dead_code, reason = "not every test uses all of it")]
#[path = "cases/backend.rs"]
mod backend;
#[path = "cases/flaky.rs"]
mod flaky;
#[allow(dead_code, reason = "not every test uses all of it")]
#[path = "cases/site.rs"]
mod site;

#[path = "webhook/sender.rs"]
mod sender;

#[path = "webhook/cancelled.rs"]
mod cancelled;
#[path = "webhook/flips.rs"]
mod flips;
#[path = "webhook/headers.rs"]
mod headers;
#[path = "webhook/once.rs"]
mod once;
#[path = "webhook/signatures.rs"]
mod signatures;
#[path = "webhook/vectors.rs"]
mod vectors;
