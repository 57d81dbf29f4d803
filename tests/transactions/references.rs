//! What a transaction made, and which request made it.

use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use tower_idempotency::store::{RecordState, RecordSummary, Within};
use tower_idempotency::{IdempotencyContext, Store};

use crate::bank::{Banking, answer};
use crate::site::{Answer, Sent, Site, policy};

on_both_stores!(
    a_committed_transaction_is_found_by_what_it_made_within_its_scope,
    r7_the_tombstone_of_a_transaction_shows_what_was_made_in_the_410,
    x5_a_transaction_that_is_held_is_found_by_what_it_made,
    x1_a_transaction_that_was_rolled_back_is_not_found,
    x2_a_refusal_without_the_handlers_writes_is_found_by_what_it_noted,
    l1_the_next_run_after_the_ttl_has_references_of_its_own,
);

/// `POST /charges` makes the payment `x-charge`, and answers as `x-then` says.
async fn open(bank: &impl Banking) -> Site {
    open_with(bank, 1000).await
}

/// The same, where no answer over the limit is kept.
async fn open_with(bank: &impl Banking, limit: usize) -> Site {
    let handler = async |context: IdempotencyContext, headers: HeaderMap, _body: String| {
        let text = |name| headers[name].to_str().unwrap();
        context.reference("charge", text("x-charge")).unwrap();
        answer(text("x-then"), 1)
    };
    let limited = policy().with_response_limit(limit);
    let layer = bank.layer().with_policy(limited).unwrap();
    Site::start(Router::new().route("/charges", post(handler).layer(layer))).await
}

async fn charge(site: &Site, charge: &str, then: &str) -> Answer {
    let sent = Sent::post("/charges").key("a").header("x-charge", charge);
    site.send(sent.header("x-then", then)).await
}

async fn find(bank: &impl Banking, charge: &str) -> Vec<RecordSummary> {
    let store = bank.store();
    let scope = Within::Scope("acme");
    let found = store.find_by_reference(scope, "charge", charge, None, 10);
    found.await.unwrap()
}

async fn a_committed_transaction_is_found_by_what_it_made_within_its_scope(bank: impl Banking) {
    let site = open(&bank).await;
    assert_eq!(charge(&site, "ch_1", "201").await.status, 201);
    let found = find(&bank, "ch_1").await;
    assert_eq!(found.len(), 1);
    let status = StatusCode::CREATED;
    assert_eq!(found[0].state, RecordState::Completed { status });
    assert_eq!(found[0].identity.key(), "a");
    let store = bank.store();
    let inspected = store.inspect(&found[0].identity).await.unwrap();
    assert_eq!(inspected.as_ref(), found.first());
    let other = store.find_by_reference(Within::Scope("zenith"), "charge", "ch_1", None, 10);
    assert!(other.await.unwrap().is_empty());
}

async fn r7_the_tombstone_of_a_transaction_shows_what_was_made_in_the_410(bank: impl Banking) {
    let site = open_with(&bank, 1).await;
    let first = charge(&site, "ch_1", "201").await;
    assert_eq!(first.status, StatusCode::CREATED);
    let again = charge(&site, "ch_1", "201").await;
    again.assert_problem(410, "response-not-retained");
    let shown = &again.json()["original"]["references"];
    assert_eq!(
        *shown,
        serde_json::json!([{"kind": "charge", "id": "ch_1"}])
    );
    assert_eq!(find(&bank, "ch_1").await.len(), 1);
}

async fn x5_a_transaction_that_is_held_is_found_by_what_it_made(bank: impl Banking) {
    let site = open(&bank).await;
    charge(&site, "ch_1", "201 hold").await;
    let found = find(&bank, "ch_1").await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].state, RecordState::Held);
}

async fn x1_a_transaction_that_was_rolled_back_is_not_found(bank: impl Banking) {
    let site = open(&bank).await;
    charge(&site, "ch_1", "503").await;
    assert!(find(&bank, "ch_1").await.is_empty());
    charge(&site, "ch_1", "201").await;
    assert_eq!(find(&bank, "ch_1").await.len(), 1);
}

async fn x2_a_refusal_without_the_handlers_writes_is_found_by_what_it_noted(bank: impl Banking) {
    let site = open(&bank).await;
    charge(&site, "ch_1", "402").await;
    let status = StatusCode::PAYMENT_REQUIRED;
    let found = find(&bank, "ch_1").await;
    assert_eq!(found[0].state, RecordState::Completed { status });
}

async fn l1_the_next_run_after_the_ttl_has_references_of_its_own(bank: impl Banking) {
    let site = open(&bank).await;
    charge(&site, "ch_1", "201").await;
    bank.age(Duration::from_secs(73 * 3600)).await;
    assert!(find(&bank, "ch_1").await.is_empty());
    charge(&site, "ch_2", "201").await;
    assert!(find(&bank, "ch_1").await.is_empty());
    assert_eq!(find(&bank, "ch_2").await.len(), 1);
}
