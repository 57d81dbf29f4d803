//! Real processes, real sockets, real databases: what must hold when they crash, hang or vanish.
//!
//! The *subject* ([`subject`], a binary) is an axum server with the layer on `POST /pay`; its
//! handler writes what it does to a [`ledger`], through a pool of its own. The tests start subjects
//! ([`process`]), talk to them by raw TCP ([`client`]), hurt them ([`signal`], [`failpoint`]), their
//! database ([`cluster`]) or what is between them ([`proxy`]), and then compare the ledger with what the
//! clients were told.
//!
//! A test of a fault has to show that the fault was there when it should: it waits for the row of
//! the ledger, for the state of the process, for the broken connection.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a harness of tests, which fail by panicking"
)]

pub mod bouncer;
pub mod chaos;
pub mod client;
pub mod cluster;
#[path = "../../../tests/common/cut.rs"]
pub mod cut;
pub mod database;
pub mod disk;
pub mod durability;
pub mod failover;
pub mod failpoint;
pub mod faketime;
#[path = "../../../tests/common/fired.rs"]
pub mod fired;
pub mod http2;
pub mod ledger;
pub mod matrix;
pub mod process;
pub mod proxy;
pub mod random;
pub mod record;
pub mod schema;
pub mod settings;
pub mod shop;
pub mod signal;
pub mod strictness;
pub mod subject;
pub mod wait;
