//! Recovery points: what a lost attempt has finished is not run again.
//!
//! Each rule is run on PostgreSQL and on SQLite, over a real socket; what only PostgreSQL can show is in
//! a module of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test may panic, and has no users"
)]

mod common;

#[path = "cases/flaky.rs"]
mod flaky;
#[path = "phases/shop.rs"]
mod shop;
#[path = "cases/site.rs"]
mod site;

/// One test for each rule and each store.
macro_rules! on_both_stores {
    ($($case:ident),* $(,)?) => {
        mod sqlite { crate::on_one_store!(crate::shop::sqlite::Shop; $($case),*); }
        mod postgres { crate::on_one_store!(crate::shop::postgres::Shop; $($case),*); }
    };
}

macro_rules! on_one_store {
    ($shop:ty; $($case:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case(<$shop as crate::shop::Shopping>::start().await).await;
            }
        )*
    };
}

pub(crate) use on_one_store;

#[path = "phases/commits.rs"]
mod commits;
#[path = "phases/completing.rs"]
mod completing;
#[path = "phases/locks.rs"]
mod locks;
#[path = "phases/misuse.rs"]
mod misuse;
#[path = "phases/resume.rs"]
mod resume;
