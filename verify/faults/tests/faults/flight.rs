//! C14: a mismatching request that is ahead of a legitimate retry.

use faults::client::Pay;
use faults::database::Database;
use faults::matrix::size;
use faults::proxy::{Action, Match, Proxy, request};
use futures_util::future::join_all;

use crate::{SUBJECT, assert_code, assert_replays};

const CLAIM: &str = "insert into idempotency.record";
const LOOKUP: &str = "from idempotency.record where id = $1";

/// As many claims that meet no record as keep those that do in the minority.
const FRESH: usize = 12;

/// The mismatch is held on its way to the record while retries come in, to its process and another.
async fn led_by_a_mismatch(transactional: bool, matching: Match) {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let settings = database.settings("high").with(|s| {
        s.transactional = transactional;
        s.store_timeout = Some(20_000);
    });
    let behind = settings.clone().with(|s| s.store = proxy.url().to_owned());
    let subject = SUBJECT.start(&behind).await;
    let other = SUBJECT.start(&settings).await;
    let rounds = size("C14");
    for _ in 0..rounds {
        // A store whose claims have met records lately would look first, and not claim.
        let fresh = [(); FRESH].map(|()| Pay::new(""));
        join_all(fresh.iter().map(|pay| pay.send(subject.port))).await;
        let pay = Pay::new("").with_body(r#"{"amount":4711}"#);
        let first = pay.send(other.port).await.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        let held = proxy.on(matching.clone()).does(Action::Hold);
        let leads = tokio::spawn({
            let (wrong, port) = (pay.with_body("{}"), subject.port);
            async move { wrong.send(port).await.unwrap() }
        });
        held.has_fired(1).await;
        // Those in its own process follow it, and must not be told what it is told.
        let follows = [(); 3].map(|()| {
            let (pay, port) = (pay.clone(), subject.port);
            tokio::spawn(async move { pay.send(port).await.unwrap() })
        });
        assert_replays(&pay.send(other.port).await.unwrap(), &first);
        assert!(!leads.is_finished());
        held.release();
        for retry in join_all(follows).await {
            assert_replays(&retry.unwrap(), &first);
        }
        let refused = leads.await.unwrap();
        assert_code(&refused, "key-reused");
        assert!(!refused.text().contains("4711"), "{}", refused.text());
        assert_replays(&pay.send(subject.port).await.unwrap(), &first);
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
    assert_eq!(subject.runs().await, rounds * FRESH as u64);
    database.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c14_behind_a_mismatch_that_is_claiming_retries_are_replayed() {
    led_by_a_mismatch(false, request(CLAIM)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c14_behind_a_mismatch_that_reads_the_record_retries_are_replayed() {
    led_by_a_mismatch(false, request(LOOKUP)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c14_behind_a_mismatch_that_wants_a_transaction_retries_are_replayed() {
    led_by_a_mismatch(true, request(LOOKUP)).await;
}
