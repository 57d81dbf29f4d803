use tower_idempotency::{DerivedKey, Policy};

use crate::backend::Backend;
use crate::site::{Runs, Sent, Site, policy};

on_every_store!(
    a_key_derived_from_the_payload_needs_none_of_the_client,
    a_payload_that_tells_no_key_is_refused_where_one_is_required,
    a_key_of_the_client_beside_a_derived_one_tells_operations_apart,
    a_request_that_tells_no_key_passes_through_where_none_is_required,
    a_derived_key_belongs_to_its_scope,
);

async fn deriving(backend: &impl Backend, policy: Policy, runs: &Runs) -> Site {
    let members = DerivedKey::json_members(["/merchant", "/order"]).unwrap();
    let policy = policy.with_derived_key(members);
    let layer = backend.layer().with_policy(policy).unwrap();
    Site::orders(&layer, runs.handler()).await
}

fn sent(body: &'static str) -> Sent {
    Sent::post("/orders").body(body)
}

fn order() -> Sent {
    sent(r#"{"merchant":"m","order":1}"#)
}

async fn a_key_derived_from_the_payload_needs_none_of_the_client(backend: impl Backend) {
    let runs = Runs::free();
    let site = deriving(&backend, policy(), &runs).await;
    let first = site.send(order()).await;
    first.assert_run(1);
    site.send(order()).await.assert_replay_of(&first);
    let changed = sent(r#"{"merchant":"m","order":1,"amount":9}"#);
    site.send(changed).await.assert_problem(409, "key-reused");
    let next = sent(r#"{"merchant":"m","order":2}"#);
    site.send(next).await.assert_run(2);
}

async fn a_payload_that_tells_no_key_is_refused_where_one_is_required(backend: impl Backend) {
    let runs = Runs::free();
    let site = deriving(&backend, policy(), &runs).await;
    for body in [
        r#"{"order":2}"#,
        r#"{"merchant":null,"order":2}"#,
        "order 2",
    ] {
        let answer = site.send(sent(body)).await;
        answer.assert_problem(400, "key-missing");
    }
    assert_eq!(runs.count(), 0);
}

async fn a_key_of_the_client_beside_a_derived_one_tells_operations_apart(backend: impl Backend) {
    let runs = Runs::free();
    let site = deriving(&backend, policy(), &runs).await;
    site.send(order()).await.assert_run(1);
    let first = site.send(order().key("a")).await;
    first.assert_run(2);
    site.send(order().key("b")).await.assert_run(3);
    site.send(order().key("a")).await.assert_replay_of(&first);
}

async fn a_request_that_tells_no_key_passes_through_where_none_is_required(backend: impl Backend) {
    let runs = Runs::free();
    let site = deriving(&backend, Policy::medium(), &runs).await;
    for run in 1..=2 {
        let keyless = sent(r#"{"merchant":"m"}"#).without("x-tenant");
        site.send(keyless).await.assert_run(run);
    }
    let nobody = site.send(order().without("x-tenant")).await;
    nobody.assert_problem(403, "scope-missing");
}

async fn a_derived_key_belongs_to_its_scope(backend: impl Backend) {
    let runs = Runs::free();
    let site = deriving(&backend, policy(), &runs).await;
    site.send(order()).await.assert_run(1);
    site.send(order().tenant("zen")).await.assert_run(2);
}
