//! Captures and refunds: what may follow on what, and what is left in the ledger.

use std::thread;

use tokio::runtime::Handle;
use tokio::task::block_in_place;

use crate::POSTINGS;
use crate::bench::Bench;
use crate::client::{Answer, Client};

const CAPTURES: &str = "select count(*) from payments.ledger where debit = 'customer:reserved'";
const WAITING: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock'";
const REFUNDS: &str = "select count(*) from payments.ledger where debit = 'merchant:acme'";

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_without_a_key_is_replayed_for_its_charge() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    let first = client.capture(&charge, None);
    assert_eq!(first.status, 201);

    assert_eq!(client.capture(&charge, None).replayed(), first);

    assert_eq!(bench.number(CAPTURES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_under_another_key_gets_the_original_success_and_moves_nothing() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    let first = client.capture(&charge, Some("one"));

    let again = client.capture(&charge, Some("two"));

    assert!(!again.is_replay());
    assert_eq!(again, first);
    assert_eq!(bench.number(CAPTURES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn captures_of_one_charge_at_once_leave_one_row() {
    let bench = Bench::new().await;
    let charge = bench.service.client.new_charge("order-1");

    let answers = at_once(&bench, |client, key| client.capture(&charge, Some(key))).await;

    assert_eq!(answers.map(|answer| answer.status), [201, 201]);
    assert_eq!(bench.number(CAPTURES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_of_a_charge_that_went_on_gets_the_original_success() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    let first = client.capture(&charge, Some("one"));
    for (key, state) in [
        ("two", "update payments.charge set status = 'settled'"),
        ("three", "update payments.charge set status = 'disputed'"),
    ] {
        bench.execute(state).await;
        assert_eq!(client.capture(&charge, Some(key)), first, "{state}");
    }
    assert_eq!(bench.number(CAPTURES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_of_a_disputed_charge_is_a_conflict_and_moves_nothing() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    bench
        .execute("update payments.charge set status = 'disputed'")
        .await;

    let refused = client.refund(&charge, "refund-1", 500);

    assert_eq!(
        (refused.status, &*refused.member("code")),
        (409, "disputed")
    );
    assert_eq!(bench.number(REFUNDS).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_whose_key_is_long_forgotten_is_not_made_again() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    let first = client.refund(&charge, "refund-1", 500);
    bench.execute("delete from idempotency.record").await;

    assert_eq!(client.refund(&charge, "refund-1", 500), first);

    bench.execute("delete from idempotency.record").await;
    let other = client.refund(&charge, "refund-1", 700);
    assert_eq!((other.status, &*other.member("code")), (409, "key-spent"));
    assert_eq!(bench.number(REFUNDS).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_that_came_before_its_charge_is_not_refused_for_ever() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    assert_eq!(client.capture("ch_late", None).status, 404);
    bench
        .execute(
            "insert into payments.charge (id, account, amount, currency)
            values ('ch_late', 'acme', 1250, 'EUR')",
        )
        .await;

    assert_eq!(client.capture("ch_late", None).status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_is_replayed_and_a_new_key_is_a_new_refund() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    let first = client.refund(&charge, "refund-1", 500);
    assert_eq!(first.status, 201);

    assert_eq!(client.refund(&charge, "refund-1", 500).replayed(), first);
    let second = client.refund(&charge, "refund-2", 500);

    assert_ne!(second.member("id"), first.member("id"));
    assert_eq!(bench.number(REFUNDS).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_before_the_capture_is_a_conflict_for_its_key_and_for_no_other() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    let refused = client.refund(&charge, "refund-1", 500);
    assert_eq!(refused.status, 409);
    assert_eq!(refused.member("code"), "not-captured");
    assert_eq!(client.capture(&charge, None).status, 201);

    // A refusal is the answer to its key: a retry that was on its way refunds nothing.
    assert_eq!(client.refund(&charge, "refund-1", 500).replayed(), refused);
    assert_eq!(bench.number(REFUNDS).await, 0);
    assert_eq!(client.refund(&charge, "refund-2", 500).status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_over_what_is_left_is_refused_and_not_in_the_ledger() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    assert_eq!(client.refund(&charge, "refund-1", 1000).status, 201);
    let before = bench.number(POSTINGS).await;

    let refused = client.refund(&charge, "refund-2", 251);

    assert_eq!(refused.status, 409);
    assert_eq!(refused.member("code"), "refund-too-large");
    assert_eq!(bench.number(POSTINGS).await, before);
    assert_eq!(client.refund(&charge, "refund-3", 250).status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn refunds_at_once_never_give_back_more_than_was_captured() {
    let bench = Bench::new().await;
    let charge = bench.service.client.captured_charge("order-1");

    let answers = at_once(&bench, |client, key| client.refund(&charge, key, 1000)).await;

    let mut statuses = answers.map(|answer| answer.status);
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409]);
    assert_eq!(bench.number(REFUNDS).await, 1);
}

/// Two requests, each of which has begun its transaction before the other ends.
async fn at_once(bench: &Bench, send: impl Fn(&Client, &str) -> Answer + Sync) -> [Answer; 2] {
    let ledger = bench.closed_ledger().await;
    let client = &bench.service.client;
    let both_wait = async {
        bench.until(WAITING, 2).await;
        ledger.rollback().await.unwrap();
    };
    let send = &send;
    thread::scope(|scope| {
        let requests = ["one", "two"].map(|key| scope.spawn(move || send(client, key)));
        block_in_place(|| Handle::current().block_on(both_wait));
        requests.map(|request| request.join().unwrap())
    })
}
