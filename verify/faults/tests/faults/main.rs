//! The faults, one module a group; names begin with the row of the table of faults that they are.
//!
//! `FAULTS_SIZE=full` makes the repeating ones as long as the table says, `FAULTS_SEED` repeats a run.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "tests fail by panicking"
)]

mod cancelled;
mod clocks;
mod crashes;
mod database;
mod disconnects;
mod duplicates;
mod exhaustion;
mod expiry;
mod flight;
mod handover;
mod hazard;
mod http2;
mod kills;
mod leases;
mod limits;
mod locks;
mod outages;
mod phases;
mod proxy;
mod relays;
mod shutdown;
mod starved;
mod timeouts;
mod transactions;
mod volume;
mod wire;
mod zombies;

use faults::client::{Answer, Pay};
use faults::process::{Launcher, Subject};
use faults::wait::until;
use futures_util::future::join_all;

const SUBJECT: Launcher = Launcher(env!("CARGO_BIN_EXE_subject"));
const SHOP: Launcher = Launcher(env!("CARGO_BIN_EXE_shop"));

/// Makes of each rule a test on PostgreSQL and one on SQLite.
#[macro_export]
macro_rules! on_every_store {
    ($($rule:ident),+ $(,)?) => {
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                super::$rule(faults::database::Database::postgres().await).await;
            })+
        }
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                super::$rule(faults::database::Database::sqlite().await).await;
            })+
        }
    };
}

/// Makes every subject open its connections to the database. In an unoptimised build each takes a
/// tenth of a second of computing: hundreds of requests at once would be refused meanwhile, and a
/// kill would meet them all before their claim.
async fn warm<const AT_ONCE: usize>(subjects: Vec<Subject>) -> Vec<Subject> {
    for subject in &subjects {
        until("all connections to be open", async || {
            let pays = [(); AT_ONCE].map(|()| Pay::new(""));
            let sent = join_all(pays.iter().map(|pay| pay.send(subject.port))).await;
            let mut sent = sent.into_iter().map(Result::unwrap);
            sent.all(|answer| answer.status == 201).then_some(())
        })
        .await;
    }
    subjects
}

/// A replay of `first`: the same status, the same bytes, and the word for it.
#[track_caller]
fn assert_replays(answer: &Answer, first: &Answer) {
    assert_eq!(answer.status, first.status, "{}", answer.text());
    assert_eq!(answer.body, first.body);
    assert!(answer.is_replayed(), "{answer:?}");
}

#[track_caller]
fn assert_code(answer: &Answer, code: &str) {
    assert_eq!(answer.kind(), code, "{answer:?}");
}
