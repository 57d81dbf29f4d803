//! Faults that were found once: each stays a test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test may panic, and has no users"
)]

mod common;
#[path = "hardening/help.rs"]
mod help;

#[path = "hardening/beats.rs"]
mod beats;
#[path = "hardening/durable.rs"]
mod durable;
#[path = "hardening/extend.rs"]
mod extend;
#[path = "hardening/frames.rs"]
mod frames;
#[path = "hardening/fresh.rs"]
mod fresh;
#[path = "hardening/full.rs"]
mod full;
#[path = "hardening/held.rs"]
mod held;
#[path = "hardening/late.rs"]
mod late;
#[path = "hardening/nested.rs"]
mod nested;
#[path = "hardening/overflow.rs"]
mod overflow;
#[path = "hardening/panics.rs"]
mod panics;
#[path = "hardening/release.rs"]
mod release;
#[path = "hardening/runtimes.rs"]
mod runtimes;
#[path = "hardening/size.rs"]
mod size;
#[path = "hardening/swap.rs"]
mod swap;
#[path = "hardening/unlist.rs"]
mod unlist;
#[path = "hardening/unprotected.rs"]
mod unprotected;
#[path = "hardening/waits.rs"]
mod waits;
