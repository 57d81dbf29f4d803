//! One charge, however often it is asked for, and by whom.

use crate::bench::Bench;
use crate::client::{ADA, ADA_REFRESHED, GRACE};
use crate::{CHARGES, MESSAGES, POSTINGS};

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_gets_the_first_answer_byte_for_byte_and_charges_nothing() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let first = client.charge(ADA, "order-1", 1250);
    assert_eq!(first.status, 201);
    assert!(!first.is_replay());

    for _ in 0..3 {
        assert_eq!(client.charge(ADA, "order-1", 1250).replayed(), first);
    }

    assert_eq!(bench.number(CHARGES).await, 1);
    assert_eq!(bench.number(POSTINGS).await, 1);
    let shown = client.get(first.header("location").unwrap());
    assert_eq!((shown.status, shown.body), (200, first.body));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_amount_under_the_same_key_is_a_conflict_and_charges_nothing() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    client.new_charge("order-1");

    let refused = client.charge(ADA, "order-1", 1251);

    assert_eq!(refused.status, 409);
    assert_eq!(refused.member("code"), "key-reused");
    assert_eq!(bench.number(POSTINGS).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refreshed_token_of_the_same_account_replays() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let first = client.charge(ADA, "order-1", 1250);

    let retried = client.charge(ADA_REFRESHED, "order-1", 1250);

    assert_eq!(retried.replayed(), first);
    assert_eq!(bench.number(CHARGES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_accounts_with_one_key_make_two_charges_and_see_one_each() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let ada = client.charge(ADA, "order-1", 1250);
    let grace = client.charge(GRACE, "order-1", 700);

    assert_eq!((ada.status, grace.status), (201, 201));
    assert!(!grace.is_replay());
    assert_ne!(ada.member("id"), grace.member("id"));
    let list = client.get("/charges").body;
    assert_eq!(list, format!("[{}]", ada.body));
    let foreign = client.get(grace.header("location").unwrap());
    assert_eq!(foreign.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_cannot_be_one_is_not_found() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    for id in ["ch_unknown", "%00", "ch_%27"] {
        assert_eq!(client.get(&format!("/charges/{id}")).status, 404, "{id}");
        assert_eq!(client.capture(id, None).status, 404, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_token_is_refused_before_the_key_is_looked_at() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let first = client.charge("ada-sunday", "order-1", 1250);
    assert_eq!((first.status, first.is_replay()), (401, false));
    assert_eq!(
        bench
            .number("select count(*) from idempotency.record")
            .await,
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_charge_without_a_key_is_refused() {
    let bench = Bench::new().await;
    let payload = r#"{"amount": 1250, "currency": "EUR"}"#;
    let client = &bench.service.client;
    let refused = client.send("POST", "/charges", ADA, None, payload);
    assert_eq!(refused.status, 400);
    assert_eq!(refused.member("code"), "key-missing");
    assert_eq!(bench.number(CHARGES).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_payload_is_named_and_leaves_its_key_free() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    for (payload, named) in [
        (r#"{"amount": 0, "currency": "EUR"}"#, "1 to 99999999"),
        (r#"{"amount": -5, "currency": "EUR"}"#, "1 to 99999999"),
        (r#"{"amount": 12.5, "currency": "EUR"}"#, "floating point"),
        (r#"{"amount": 1250, "currency": "eur"}"#, "EUR, GBP"),
        (r#"{"amount": 1250}"#, "missing field `currency`"),
        (r#"{"amount": 1, "currency": "EUR", "tip": 1}"#, "tip"),
        ("{", "parse"),
    ] {
        let refused = client.send("POST", "/charges", ADA, Some("order-1"), payload);
        assert!((400..500).contains(&refused.status), "{payload}");
        let detail = refused.member("detail");
        assert!(detail.contains(named), "{payload}: {detail}");
    }

    client.new_charge("order-1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_ledger_rolls_the_charge_back_and_leaves_its_key_free() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    bench
        .execute("alter table payments.ledger rename to moved")
        .await;
    let failed = client.charge(ADA, "order-1", 1250);
    assert_eq!(failed.status, 503);
    assert_eq!(failed.header("retry-after"), Some("1"));
    assert_eq!(bench.number(CHARGES).await, 0);
    bench
        .execute("alter table payments.moved rename to ledger")
        .await;

    client.new_charge("order-1");

    assert_eq!(bench.number(POSTINGS).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_long_forgotten_does_not_charge_again() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let first = client.charge(ADA, "order-1", 1250);
    bench.execute("delete from idempotency.record").await;

    let late = client.charge(ADA, "order-1", 1250);
    assert_eq!(late, first);

    bench.execute("delete from idempotency.record").await;
    let other = client.charge(ADA, "order-1", 700);
    assert_eq!((other.status, &*other.member("code")), (409, "key-spent"));
    assert_eq!(bench.number(POSTINGS).await, 1);
    assert_eq!(bench.number(MESSAGES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_is_changed_without_a_key_and_replayed_with_one() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let change = |key, name: &str| {
        client.send(
            "PATCH",
            "/profile",
            ADA,
            key,
            &format!(r#"{{"name": "{name}"}}"#),
        )
    };
    for _ in 0..2 {
        let changed = change(None, "Ada");
        assert_eq!((changed.status, changed.is_replay()), (200, false));
    }

    let first = change(Some("rename-1"), "Countess");
    assert_eq!(change(Some("rename-1"), "Countess").replayed(), first);
    let count = "select count(*) from payments.profile where name = 'Countess'";
    assert_eq!(bench.number(count).await, 1);
}
