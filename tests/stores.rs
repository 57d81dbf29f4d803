//! Every store of this crate keeps every rule, and a store that breaks one is found out.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod common;

#[path = "stores/broken.rs"]
mod broken;
#[path = "stores/crowd.rs"]
mod crowd;
#[path = "stores/memory.rs"]
mod memory;
#[path = "stores/model/mod.rs"]
mod model;
#[path = "stores/postgres.rs"]
mod postgres;
#[path = "stores/sqlite.rs"]
mod sqlite;
