//! What a client may rely on, case by case, on every store, over a real socket.
//!
//! A case is found by its id, which begins its name.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "a test may panic, and has no users"
)]

mod common;

#[path = "cases/backend.rs"]
mod backend;
#[path = "cases/crowd.rs"]
mod crowd;
#[path = "cases/flaky.rs"]
mod flaky;
#[path = "cases/site.rs"]
mod site;

/// One test for each case and each store.
macro_rules! on_every_store {
    ($($case:ident),* $(,)?) => {
        mod memory { crate::on_one_store!(crate::backend::Memory; $($case),*); }
        mod sqlite { crate::on_one_store!(crate::backend::Sqlite; $($case),*); }
        mod postgres { crate::on_one_store!(crate::backend::Postgres; $($case),*); }
    };
}

/// The same, for cases that write to records behind the store's back.
macro_rules! on_every_database {
    ($($case:ident),* $(,)?) => {
        mod databases {
            $(use super::$case;)*

            mod sqlite { crate::on_one_store!(crate::backend::Sqlite; $($case),*); }
            mod postgres { crate::on_one_store!(crate::backend::Postgres; $($case),*); }
        }
    };
}

macro_rules! on_one_store {
    ($backend:ty; $($case:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                super::$case(<$backend as crate::backend::Backend>::start().await).await;
            }
        )*
    };
}

pub(crate) use on_one_store;

#[path = "cases/cached.rs"]
mod cached;
#[path = "cases/canonical.rs"]
mod canonical;
#[path = "cases/concurrency.rs"]
mod concurrency;
#[path = "cases/deploy.rs"]
mod deploy;
#[path = "cases/derived.rs"]
mod derived;
#[path = "cases/failure.rs"]
mod failure;
#[path = "cases/fingerprint.rs"]
mod fingerprint;
#[path = "cases/flight.rs"]
mod flight;
#[path = "cases/key.rs"]
mod key;
#[path = "cases/lease.rs"]
mod lease;
#[path = "cases/profile.rs"]
mod profile;
#[path = "cases/provoke.rs"]
mod provoke;
#[path = "cases/references.rs"]
mod references;
#[path = "cases/replay.rs"]
mod replay;
#[path = "cases/requests.rs"]
mod requests;
#[path = "cases/streams.rs"]
mod streams;
#[path = "cases/takeover.rs"]
mod takeover;
