//! Transactional routes: the handler's writes and its answer commit together, or not at all.
//!
//! Each rule is run on PostgreSQL and on SQLite, over a real socket; what only PostgreSQL can do is in
//! modules of its own.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test may panic, and has no users"
)]

mod common;

#[path = "transactions/bank.rs"]
mod bank;
#[path = "cases/crowd.rs"]
mod crowd;
#[path = "cases/flaky.rs"]
mod flaky;
#[path = "cases/site.rs"]
mod site;

/// One test for each rule and each store.
macro_rules! on_both_stores {
    ($($case:ident),* $(,)?) => {
        mod sqlite { crate::on_one_store!(crate::bank::sqlite::Bank; $($case),*); }
        mod postgres { crate::on_one_store!(crate::bank::postgres::Bank; $($case),*); }
    };
}

macro_rules! on_one_store {
    ($bank:ty; $($case:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case(<$bank as crate::bank::Banking>::start().await).await;
            }
        )*
    };
}

pub(crate) use on_one_store;

#[path = "transactions/answers.rs"]
mod answers;
#[path = "transactions/cached.rs"]
mod cached;
#[path = "transactions/cancelled.rs"]
mod cancelled;
#[path = "transactions/conflicts.rs"]
mod conflicts;
#[path = "transactions/cuts.rs"]
mod cuts;
#[path = "transactions/duplicates.rs"]
mod duplicates;
#[path = "transactions/flight.rs"]
mod flight;
#[path = "transactions/handed.rs"]
mod handed;
#[path = "transactions/handlers.rs"]
mod handlers;
#[path = "transactions/hardening.rs"]
mod hardening;
#[path = "transactions/references.rs"]
mod references;
#[path = "transactions/statements.rs"]
mod statements;
