//! What a deploy changes, and what becomes of the retries that are due across it.
//!
//! Two sites on one store: the old one has answered, the new one gets the retry.

use std::time::Duration;

use axum::Router;
use tower_idempotency::{DerivedKey, Fingerprinter, Policy, Scope};

use crate::backend::{Backend, Corruptible};
use crate::site::{Answer, Runs, Sent, Site, policy};

on_every_store!(
    a_retry_of_equal_bytes_is_replayed_under_other_settings,
    another_body_is_refused_under_other_settings,
    while_the_old_version_runs_a_request_the_new_one_tells_retries_apart_by_their_bytes,
    a_retry_that_only_means_the_same_is_refused_across_the_deploy,
    a_retry_that_only_means_the_same_is_refused_until_the_old_record_has_expired,
    what_only_the_new_settings_would_ignore_is_still_compared,
    a_chosen_header_is_not_compared_under_other_settings,
    a_renamed_route_is_another_operation,
    a_named_operation_whose_route_moves_never_runs_a_retry_again,
    a_named_operation_whose_template_changes_is_still_replayed,
    another_scope_or_derived_key_is_another_operation,
    a_record_is_kept_for_as_long_as_was_said_when_it_was_claimed,
);

on_every_database!(under_another_version_of_the_fingerprint_the_raw_digest_decides);

const FORM: &str = "application/x-www-form-urlencoded";

const PARTS: &str = "--b\r\ncontent-disposition: form-data; name=\"a\"\r\n\r\n1\r\n--b--\r\n";

fn typed(key: &str, content_type: &str, body: &str) -> Sent {
    let sent = Sent::order(key).without("content-type");
    sent.header("content-type", content_type)
        .body(body.to_owned())
}

fn json(body: &'static str) -> Sent {
    Sent::order("a").body(body)
}

fn upper(name: &'static str) -> Fingerprinter {
    Fingerprinter::from_fn(name, |_, body| Some(body.to_ascii_uppercase()))
}

/// Settings before and after a deploy.
fn changes() -> Vec<(Fingerprinter, Fingerprinter)> {
    let raw = Fingerprinter::raw;
    let canonical = Fingerprinter::canonical_json;
    vec![
        (canonical(), raw()),
        (raw(), canonical()),
        (raw(), raw().with_header("x-api-version").unwrap()),
        (raw().with_header("x-api-version").unwrap(), raw()),
        (canonical(), canonical().without_member("/at").unwrap()),
        (canonical().without_member("/at").unwrap(), canonical()),
        (raw(), raw().with_sorted_form()),
        (raw().with_sorted_form(), raw()),
        (raw(), raw().with_multipart()),
        (raw().with_multipart(), raw()),
        (upper("upper 1"), upper("upper 2")),
    ]
}

/// One request of each content type that settings speak of.
fn requests(key: &str) -> [Sent; 3] {
    [
        typed(
            &format!("{key}-json"),
            "application/json",
            r#"{"item":"tea","at":1}"#,
        ),
        typed(&format!("{key}-form"), FORM, "item=tea&at=1"),
        typed(
            &format!("{key}-parts"),
            "multipart/form-data; boundary=b",
            PARTS,
        ),
    ]
    .map(|sent| sent.header("x-api-version", "1"))
}

async fn site(backend: &impl Backend, policy: Policy, runs: &Runs) -> Site {
    let layer = backend.layer().with_policy(policy).unwrap();
    Site::orders(&layer, runs.handler()).await
}

async fn comparing(backend: &impl Backend, by: Fingerprinter, runs: &Runs) -> Site {
    site(backend, policy().with_fingerprint(by), runs).await
}

/// What the site after each change makes of each request that the one before it has answered.
async fn after_every_change(backend: &impl Backend, test: impl AsyncFn(&Site, Sent, &Answer)) {
    for (number, (before, after)) in changes().into_iter().enumerate() {
        let runs = Runs::free();
        let old = comparing(backend, before, &runs).await;
        let new = comparing(backend, after, &runs).await;
        for (run, sent) in requests(&format!("{number}")).into_iter().enumerate() {
            let first = old.send(sent.clone()).await;
            first.assert_run(run + 1);
            test(&new, sent, &first).await;
        }
    }
}

async fn a_retry_of_equal_bytes_is_replayed_under_other_settings<B: Backend>(backend: B) {
    after_every_change(&backend, async |new, sent, first| {
        new.send(sent).await.assert_replay_of(first);
    })
    .await;
}

async fn another_body_is_refused_under_other_settings<B: Backend>(backend: B) {
    after_every_change(&backend, async |new, sent, first| {
        let other = new.send(sent.clone().body("another")).await;
        other.assert_problem(409, "key-reused");
        new.send(sent).await.assert_replay_of(first);
    })
    .await;
}

async fn while_the_old_version_runs_a_request_the_new_one_tells_retries_apart_by_their_bytes(
    backend: impl Backend,
) {
    let runs = Runs::gated();
    let old = comparing(&backend, Fingerprinter::canonical_json(), &runs).await;
    let new = comparing(&backend, Fingerprinter::raw(), &runs).await;
    let test = async {
        runs.entered().await;
        let same = new.order("a").await;
        same.assert_problem(409, "request-in-progress");
        let other = new.send(json("{}")).await;
        other.assert_problem(409, "key-reused");
        runs.let_go();
    };
    let (first, ()) = tokio::join!(old.order("a"), test);
    first.assert_run(1);
    new.order("a").await.assert_replay_of(&first);
}

/// What the settings before the deploy ignored is compared after it, and never run again.
async fn a_retry_that_only_means_the_same_is_refused_across_the_deploy(backend: impl Backend) {
    let runs = Runs::free();
    let without = Fingerprinter::raw().without_member("/at").unwrap();
    let old = comparing(&backend, without, &runs).await;
    let new = comparing(&backend, Fingerprinter::canonical_json(), &runs).await;
    let first = old.send(json(r#"{"item":"tea","at":1}"#)).await;
    first.assert_run(1);
    for retry in [
        r#"{"item":"tea","at":2}"#,
        r#"{"at":1,"item":"tea"}"#,
        r#"{"item": "tea", "at": 1}"#,
    ] {
        old.send(json(retry)).await.assert_replay_of(&first);
        new.send(json(retry))
            .await
            .assert_problem(409, "key-reused");
    }
    assert_eq!(runs.count(), 1);
}

async fn a_retry_that_only_means_the_same_is_refused_until_the_old_record_has_expired(
    backend: impl Backend,
) {
    let runs = Runs::free();
    let day = Duration::from_secs(24 * 3600);
    let with = |by: Fingerprinter| policy().with_ttl(day).with_fingerprint(by);
    let old = site(&backend, with(Fingerprinter::raw()), &runs).await;
    let new = site(&backend, with(Fingerprinter::canonical_json()), &runs).await;
    old.send(json(r#"{"item":"tea","at":1}"#))
        .await
        .assert_run(1);
    let reordered = || json(r#"{"at":1,"item":"tea"}"#);
    new.send(reordered())
        .await
        .assert_problem(409, "key-reused");
    backend.age(day + Duration::from_secs(1)).await;
    let next = new.send(reordered()).await;
    next.assert_run(2);
    let retry = new.send(json(r#"{"item":"tea","at":1}"#)).await;
    retry.assert_replay_of(&next);
}

async fn what_only_the_new_settings_would_ignore_is_still_compared(backend: impl Backend) {
    let runs = Runs::free();
    let old = comparing(&backend, Fingerprinter::canonical_json(), &runs).await;
    let without = Fingerprinter::raw().without_member("/at").unwrap();
    let new = comparing(&backend, without, &runs).await;
    old.send(json(r#"{"item":"tea","at":1}"#))
        .await
        .assert_run(1);
    let later = new.send(json(r#"{"item":"tea","at":2}"#)).await;
    later.assert_problem(409, "key-reused");
}

/// The raw digest is one of method, path, query, content type and body.
async fn a_chosen_header_is_not_compared_under_other_settings(backend: impl Backend) {
    let runs = Runs::free();
    let by_version = || Fingerprinter::raw().with_header("x-api-version").unwrap();
    let old = comparing(&backend, by_version(), &runs).await;
    let both = by_version().with_header("x-currency").unwrap();
    let new = comparing(&backend, both, &runs).await;
    let sent = |version: &str| Sent::order("a").header("x-api-version", version);
    let first = old.send(sent("1")).await;
    first.assert_run(1);
    old.send(sent("2")).await.assert_problem(409, "key-reused");
    new.send(sent("2")).await.assert_replay_of(&first);
}

/// One handler on one route, under a policy.
async fn routed(backend: &impl Backend, route: &str, policy: Policy, runs: &Runs) -> Site {
    let layer = backend.layer().with_policy(policy).unwrap();
    Site::start(Router::new().route(route, runs.handler().layer(layer))).await
}

async fn a_renamed_route_is_another_operation(backend: impl Backend) {
    let runs = Runs::free();
    let old = routed(&backend, "/payments", policy(), &runs).await;
    let new = routed(&backend, "/charges", policy(), &runs).await;
    old.send(Sent::post("/payments").key("a"))
        .await
        .assert_run(1);
    new.send(Sent::post("/charges").key("a"))
        .await
        .assert_run(2);
}

async fn a_named_operation_whose_route_moves_never_runs_a_retry_again(backend: impl Backend) {
    let runs = Runs::free();
    let old = routed(&backend, "/payments", policy(), &runs).await;
    let named = policy().with_operation("POST /payments");
    let layer = backend.layer().with_policy(named).unwrap();
    let both = Router::new()
        .route("/payments", runs.handler())
        .route("/charges", runs.handler())
        .layer(layer);
    let new = Site::start(both).await;
    let first = old.send(Sent::post("/payments").key("a")).await;
    first.assert_run(1);
    let moved = new.send(Sent::post("/charges").key("a")).await;
    moved.assert_problem(409, "key-reused");
    let same = new.send(Sent::post("/payments").key("a")).await;
    same.assert_replay_of(&first);
}

async fn a_named_operation_whose_template_changes_is_still_replayed(backend: impl Backend) {
    let runs = Runs::free();
    let old = routed(&backend, "/payments/{id}/void", policy(), &runs).await;
    let named = policy().with_operation("POST /payments/{}/void");
    let new = routed(&backend, "/payments/{id}/{action}", named, &runs).await;
    let sent = || Sent::post("/payments/1/void").key("a");
    let first = old.send(sent()).await;
    first.assert_run(1);
    new.send(sent()).await.assert_replay_of(&first);
}

async fn another_scope_or_derived_key_is_another_operation(backend: impl Backend) {
    let runs = Runs::free();
    let members = |name: &str| DerivedKey::json_members([name]).unwrap();
    let with = |name: &str| policy().with_derived_key(members(name));
    let sent = || Sent::post("/orders").body(r#"{"order":1,"intent":2}"#);
    let old = site(&backend, with("/order"), &runs).await;
    old.send(sent()).await.assert_run(1);
    let by_intent = site(&backend, with("/intent"), &runs).await;
    by_intent.send(sent()).await.assert_run(2);
    let scoped = with("/order").with_scope(Scope::fixed("shop"));
    let by_shop = site(&backend, scoped, &runs).await;
    by_shop.send(sent()).await.assert_run(3);
    let again = site(&backend, with("/order"), &runs).await;
    assert!(again.send(sent()).await.is_replay());
}

async fn a_record_is_kept_for_as_long_as_was_said_when_it_was_claimed(backend: impl Backend) {
    let day = Duration::from_secs(24 * 3600);
    let runs = Runs::free();
    let short = site(&backend, policy().with_ttl(day), &runs).await;
    let long = site(&backend, policy().with_ttl(3 * day), &runs).await;
    short.order("short").await.assert_run(1);
    let kept = long.order("long").await;
    kept.assert_run(2);
    backend.age(2 * day).await;
    long.order("short").await.assert_run(3);
    short.order("long").await.assert_replay_of(&kept);
}

/// Bytes 0 to 1 are the version, 2 to 9 the settings, then come the digest and the raw one.
async fn under_another_version_of_the_fingerprint_the_raw_digest_decides(
    backend: impl Corruptible,
) {
    let runs = Runs::free();
    let site = comparing(&backend, Fingerprinter::canonical_json(), &runs).await;
    let first = site.send(json(r#"{"item":"tea","at":1}"#)).await;
    first.assert_run(1);
    let mut bytes = backend.fingerprint().await;
    assert_eq!((bytes.len(), &bytes[..2]), (74, [0, 1].as_slice()));
    bytes[1] = 2;
    bytes[10..42].fill(0);
    backend.set_fingerprint(bytes).await;
    let same = site.send(json(r#"{"item":"tea","at":1}"#)).await;
    same.assert_replay_of(&first);
    for other in [r#"{"at":1,"item":"tea"}"#, "{}"] {
        site.send(json(other))
            .await
            .assert_problem(409, "key-reused");
    }
}
