use axum::http::StatusCode;
use tower_idempotency::{KeyFormat, Policy};

use crate::backend::Backend;
use crate::flaky::Flaky;
use crate::site::{Runs, Sent, Site, policy};

on_every_store!(
    k1_a_required_key_that_is_missing_is_refused,
    k2_requests_without_an_optional_key_all_run_unmarked,
    k3_an_empty_key_is_refused,
    k4_a_quoted_and_a_bare_key_are_one_key,
    k4_strict_refuses_a_bare_key,
    k5_two_lines_are_refused,
    k6_a_comma_and_bytes_that_are_not_printable_ascii_are_refused,
    k7_a_key_over_the_limit_is_refused_before_the_store_is_asked,
    k7_keys_of_255_printable_characters_work_and_stay_apart,
    k8_a_key_under_the_minimum_is_refused,
    k9_a_uuid_is_one_key_in_either_case_and_the_uuid_format_takes_nothing_else,
    k10_another_header_is_honoured_and_the_default_one_ignored,
);

async fn site(backend: &impl Backend, policy: Policy, runs: &Runs) -> Site {
    let layer = backend.layer().with_policy(policy).unwrap();
    Site::orders(&layer, runs.handler()).await
}

async fn assert_invalid(backend: impl Backend, requests: Vec<Sent>) {
    let runs = Runs::free();
    let site = site(&backend, policy(), &runs).await;
    for request in requests {
        site.send(request).await.assert_problem(400, "key-invalid");
    }
    assert_eq!(runs.count(), 0);
}

async fn k1_a_required_key_that_is_missing_is_refused(backend: impl Backend) {
    let runs = Runs::free();
    let site = site(&backend, policy(), &runs).await;
    let answer = site.send(Sent::post("/orders")).await;
    answer.assert_problem(400, "key-missing");
    assert!(!answer.headers.contains_key("retry-after"));
    assert_eq!(runs.count(), 0);
}

async fn k2_requests_without_an_optional_key_all_run_unmarked(backend: impl Backend) {
    let runs = Runs::free();
    let site = site(&backend, Policy::medium(), &runs).await;
    site.send(Sent::post("/orders")).await.assert_run(1);
    site.send(Sent::post("/orders")).await.assert_run(2);
}

async fn k3_an_empty_key_is_refused(backend: impl Backend) {
    let keys = ["", "\"\"", "\" \"", "   "];
    assert_invalid(backend, keys.map(Sent::order).to_vec()).await;
}

async fn k4_a_quoted_and_a_bare_key_are_one_key(backend: impl Backend) {
    let runs = Runs::free();
    let site = site(&backend, policy(), &runs).await;
    let first = site.order("\"abc\"").await;
    first.assert_run(1);
    site.order("abc").await.assert_replay_of(&first);
}

async fn k4_strict_refuses_a_bare_key(backend: impl Backend) {
    let runs = Runs::free();
    let strict = policy().with_key_format(KeyFormat::Strict);
    let site = site(&backend, strict, &runs).await;
    site.order("abc").await.assert_problem(400, "key-invalid");
    site.order("\"abc\"").await.assert_run(1);
}

async fn k5_two_lines_are_refused(backend: impl Backend) {
    assert_invalid(
        backend,
        vec![Sent::order("a").key("a"), Sent::order("a").key("b")],
    )
    .await;
}

async fn k6_a_comma_and_bytes_that_are_not_printable_ascii_are_refused(backend: impl Backend) {
    let request = || Sent::post("/orders");
    let values: [&[u8]; 4] = [b"a,b", b"a\tb", b"caf\xc3\xa9", b"a\xff"];
    let requests = values.map(|value| request().header_bytes("idempotency-key", value));
    assert_invalid(backend, requests.to_vec()).await;
}

async fn k7_a_key_over_the_limit_is_refused_before_the_store_is_asked(backend: impl Backend) {
    let runs = Runs::free();
    let store = Flaky::new(backend.store());
    let layer =
        tower_idempotency::IdempotencyLayer::new(store.clone(), tower_idempotency::Scope::global());
    let site = Site::orders(&layer, runs.handler()).await;
    let long = "k".repeat(256);
    site.order(&long).await.assert_problem(400, "key-invalid");
    site.order(&format!("\"{long}\""))
        .await
        .assert_problem(400, "key-invalid");
    assert_eq!((store.calls(), runs.count()), (0, 0));
    site.order(&format!("\"{}\"", "k".repeat(255)))
        .await
        .assert_run(1);
    assert!(store.calls() > 0);
}

async fn k7_keys_of_255_printable_characters_work_and_stay_apart(backend: impl Backend) {
    let runs = Runs::free();
    let site = site(&backend, policy(), &runs).await;
    let printable: String = (' '..='~').filter(|c| *c != ',').collect();
    let long = |last: char| {
        let repeated: String = printable.trim().chars().cycle().take(254).collect();
        format!("{repeated}{last}")
    };
    for (run, last) in ['a', 'b', '"', '\'', '\\', '%', ';']
        .into_iter()
        .enumerate()
    {
        let key = long(last);
        assert_eq!(key.len(), 255);
        let first = site.order(&key).await;
        first.assert_run(run + 1);
        site.order(&key).await.assert_replay_of(&first);
    }
}

async fn k8_a_key_under_the_minimum_is_refused(backend: impl Backend) {
    let runs = Runs::free();
    let site = site(&backend, policy().with_key_length(16, 255), &runs).await;
    site.order("k23456789012345")
        .await
        .assert_problem(400, "key-invalid");
    site.order("k234567890123456").await.assert_run(1);
}

async fn k9_a_uuid_is_one_key_in_either_case_and_the_uuid_format_takes_nothing_else(
    backend: impl Backend,
) {
    let uuid = "5B0CBE2A-1D6C-4A37-A1AD-0A7A0A3F2A11";
    let runs = Runs::free();
    let lenient = site(&backend, policy(), &runs).await;
    let first = lenient.order(uuid).await;
    first.assert_run(1);
    lenient
        .order(&uuid.to_ascii_lowercase())
        .await
        .assert_replay_of(&first);

    let uuids = policy().with_key_format(KeyFormat::Uuid);
    let strict = site(&backend, uuids, &runs).await;
    strict
        .order("order-1")
        .await
        .assert_problem(400, "key-invalid");
    strict.order(uuid).await.assert_replay_of(&first);
}

async fn k10_another_header_is_honoured_and_the_default_one_ignored(backend: impl Backend) {
    let runs = Runs::free();
    let renamed = policy().with_key_header("X-Request-Key").unwrap();
    let site = site(&backend, renamed, &runs).await;
    site.order("a").await.assert_problem(400, "key-missing");
    let keyed = || Sent::post("/orders").header("x-request-key", "a");
    let first = site.send(keyed()).await;
    first.assert_run(1);
    let again = site.send(keyed().key("ignored")).await;
    assert_eq!(again.status, StatusCode::CREATED);
    again.assert_replay_of(&first);
}
