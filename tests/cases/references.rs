//! What a request made, and which request made it.

use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use bytes::Bytes;
use tower_idempotency::store::{RecordState, RecordSummary, Within};
use tower_idempotency::{IdempotencyContext, Outcome, Store};

use crate::backend::Backend;
use crate::site::{Sent, Site, every_method, policy};

on_every_store!(
    a_charge_leads_to_the_request_that_made_it_and_back,
    a_charge_of_another_tenant_is_not_shown,
    r7_a_charge_whose_answer_was_too_large_to_keep_is_found,
    a_charge_of_an_operation_that_is_held_is_found,
    a_charge_of_an_answer_that_freed_its_key_is_not_found,
    l1_a_charge_is_found_for_as_long_as_its_record_is_kept,
);

/// Makes the charge `x-charge`, and answers with the status or the outcome `x-then`.
fn charging() -> MethodRouter {
    every_method(
        async |context: IdempotencyContext, headers: HeaderMap, _body: Bytes| {
            let charge = headers["x-charge"].to_str().unwrap();
            context.reference("charge", charge).unwrap();
            answer(headers.get("x-then").map_or("", |v| v.to_str().unwrap()))
        },
    )
}

fn answer(then: &str) -> Response {
    match then {
        "hold" => (Outcome::Hold, StatusCode::BAD_GATEWAY).into_response(),
        "release" => (Outcome::Release, StatusCode::CREATED).into_response(),
        "large" => (StatusCode::CREATED, "x".repeat(1001)).into_response(),
        _ => (StatusCode::CREATED, "made").into_response(),
    }
}

fn charge(key: &str, charge: &str, then: &'static str) -> Sent {
    let sent = Sent::order(key).header("x-charge", charge);
    sent.header("x-then", then)
}

async fn site(backend: &impl Backend) -> Site {
    let limited = policy().with_response_limit(1000);
    let layer = backend.layer().with_policy(limited).unwrap();
    Site::orders(&layer, charging()).await
}

async fn find(backend: &impl Backend, within: Within<'_>, charge: &str) -> Vec<RecordSummary> {
    let store = backend.store();
    let found = store.find_by_reference(within, "charge", charge, None, 10);
    found.await.unwrap()
}

const ACME: Within<'_> = Within::Scope("acme");
const CREATED: RecordState = RecordState::Completed {
    status: StatusCode::CREATED,
};

async fn a_charge_leads_to_the_request_that_made_it_and_back(backend: impl Backend) {
    let site = site(&backend).await;
    for (key, made) in [("a", "ch_1"), ("b", "ch_2"), ("a", "ch_1")] {
        let answer = site.send(charge(key, made, "")).await;
        assert_eq!(answer.status, StatusCode::CREATED);
    }
    let found = find(&backend, ACME, "ch_1").await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].identity.key(), "a");
    assert_eq!((found[0].state, found[0].attempt), (CREATED, 1));

    let made = backend.store().inspect(&found[0].identity).await.unwrap();
    let made = made.expect("the record is there").references;
    assert_eq!(made.as_slice(), [("charge".to_owned(), "ch_1".to_owned())]);
}

async fn a_charge_of_another_tenant_is_not_shown(backend: impl Backend) {
    let site = site(&backend).await;
    site.send(charge("a", "ch_1", "")).await;
    site.send(charge("b", "ch_1", "").tenant("zenith")).await;
    let keys = async |within| -> Vec<_> {
        let found = find(&backend, within, "ch_1").await;
        found.iter().map(|r| r.identity.key().to_owned()).collect()
    };
    assert_eq!(keys(ACME).await, ["a"]);
    assert_eq!(keys(Within::Scope("zenith")).await, ["b"]);
    assert!(keys(Within::Scope("nobody")).await.is_empty());
    assert_eq!(keys(Within::AllScopes).await.len(), 2);
}

async fn r7_a_charge_whose_answer_was_too_large_to_keep_is_found(backend: impl Backend) {
    let site = site(&backend).await;
    site.send(charge("a", "ch_1", "large")).await;
    let again = site.send(charge("a", "ch_1", "large")).await;
    again.assert_problem(410, "response-not-retained");
    let shown = &again.json()["original"]["references"];
    assert_eq!(
        *shown,
        serde_json::json!([{"kind": "charge", "id": "ch_1"}])
    );
    let found = find(&backend, ACME, "ch_1").await;
    assert_eq!(found[0].state, CREATED);
}

async fn a_charge_of_an_operation_that_is_held_is_found(backend: impl Backend) {
    let site = site(&backend).await;
    site.send(charge("a", "ch_1", "hold")).await;
    let found = find(&backend, ACME, "ch_1").await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].state, RecordState::Held);
}

async fn a_charge_of_an_answer_that_freed_its_key_is_not_found(backend: impl Backend) {
    let site = site(&backend).await;
    site.send(charge("a", "ch_1", "release")).await;
    assert!(find(&backend, ACME, "ch_1").await.is_empty());
}

async fn l1_a_charge_is_found_for_as_long_as_its_record_is_kept(backend: impl Backend) {
    let site = site(&backend).await;
    site.send(charge("a", "ch_1", "")).await;
    backend.age(Duration::from_secs(71 * 3600)).await;
    assert_eq!(find(&backend, ACME, "ch_1").await.len(), 1);
    backend.age(Duration::from_secs(3600)).await;
    assert!(find(&backend, ACME, "ch_1").await.is_empty());
    site.send(charge("a", "ch_2", "")).await;
    assert!(find(&backend, ACME, "ch_1").await.is_empty());
    assert_eq!(find(&backend, ACME, "ch_2").await.len(), 1);
}
