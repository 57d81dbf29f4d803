use tower_idempotency::Fingerprinter;

use crate::backend::Backend;
use crate::site::{Runs, Sent, Site, policy};

on_every_store!(
    f6_canonical_json_ignores_order_white_space_and_spelling,
    f6_a_form_is_compared_decoded_and_sorted_by_name,
    f6_pairs_of_one_name_in_a_form_keep_their_order,
    f6_without_a_canonical_form_every_byte_counts,
    f7_a_multipart_body_is_compared_by_its_parts,
    f7_the_order_names_and_types_of_parts_count,
    f8_a_member_that_is_left_out_may_change,
    f8_members_beside_one_that_is_left_out_count,
);

async fn comparing(backend: &impl Backend, by: Fingerprinter) -> Site {
    let policy = policy().with_fingerprint(by);
    let layer = backend.layer().with_policy(policy).unwrap();
    Site::orders(&layer, Runs::free().handler()).await
}

fn json(body: &str) -> Sent {
    Sent::order("a").body(body.to_owned())
}

fn typed(content_type: &str, body: &str) -> Sent {
    json(body)
        .without("content-type")
        .header("content-type", content_type)
}

fn form(body: &str) -> Sent {
    typed("application/x-www-form-urlencoded", body)
}

/// Parts, each of its headers and its content.
fn multipart(boundary: &str, parts: &[(&str, &str)]) -> Sent {
    let parts = parts
        .iter()
        .map(|(headers, content)| format!("--{boundary}\r\n{headers}\r\n\r\n{content}\r\n"));
    let body = parts.collect::<String>() + &format!("--{boundary}--\r\n");
    typed(&format!("multipart/form-data; boundary={boundary}"), &body)
}

/// The first request runs; `equal` ones get its answer, `others` are refused.
async fn assert_compared<const E: usize, const O: usize>(
    site: &Site,
    first: Sent,
    equal: [Sent; E],
    others: [Sent; O],
) {
    let first = site.send(first).await;
    first.assert_run(1);
    for sent in equal {
        site.send(sent).await.assert_replay_of(&first);
    }
    for sent in others {
        site.send(sent).await.assert_problem(409, "key-reused");
    }
}

async fn f6_canonical_json_ignores_order_white_space_and_spelling(backend: impl Backend) {
    let site = comparing(&backend, Fingerprinter::canonical_json()).await;
    assert_compared(
        &site,
        json(r#"{"item":"tea","quantity":1}"#),
        [
            json(r#"{"quantity":1,"item":"tea"}"#),
            json(r#"{ "quantity": 1.0, "item": "\u0074ea" }"#),
        ],
        [
            json(r#"{"item":"tea","quantity":2}"#),
            json(r#"{"item":"tea","quantity":"1"}"#),
        ],
    )
    .await;
}

async fn f6_a_form_is_compared_decoded_and_sorted_by_name(backend: impl Backend) {
    let site = comparing(&backend, Fingerprinter::raw().with_sorted_form()).await;
    assert_compared(
        &site,
        form("item=green+tea&quantity=1"),
        [form("quantity=%31&item=green%20tea")],
        [
            form("item=green+tea&quantity=2"),
            form("item=green+tea%26quantity=1"),
        ],
    )
    .await;
}

async fn f6_pairs_of_one_name_in_a_form_keep_their_order(backend: impl Backend) {
    let site = comparing(&backend, Fingerprinter::raw().with_sorted_form()).await;
    assert_compared(
        &site,
        form("a=1&b=2&a=3"),
        [form("a=1&a=3&b=2")],
        [form("a=3&b=2&a=1")],
    )
    .await;
}

async fn f6_without_a_canonical_form_every_byte_counts(backend: impl Backend) {
    let site = comparing(&backend, Fingerprinter::raw()).await;
    let first = r#"{"item":"tea","quantity":1}"#;
    assert_compared(
        &site,
        json(first),
        [json(first)],
        [
            json(r#"{"quantity":1,"item":"tea"}"#),
            json(r#"{"item":"tea","quantity":1} "#),
            typed("application/json; charset=utf-8", first),
        ],
    )
    .await;
}

const FILE: &str = "content-disposition: form-data; name=\"file\"; filename=\"a\"";
const NOTE: &str = "content-disposition: form-data; name=\"note\"";

async fn f7_a_multipart_body_is_compared_by_its_parts(backend: impl Backend) {
    let site = comparing(&backend, Fingerprinter::raw().with_multipart()).await;
    assert_compared(
        &site,
        multipart("one", &[(NOTE, "hi"), (FILE, "bytes")]),
        [multipart("another", &[(NOTE, "hi"), (FILE, "bytes")])],
        [
            multipart("one", &[(NOTE, "hi"), (FILE, "other")]),
            multipart("one", &[(NOTE, "ho"), (FILE, "bytes")]),
            multipart("one", &[(NOTE, "hi")]),
        ],
    )
    .await;
}

async fn f7_the_order_names_and_types_of_parts_count(backend: impl Backend) {
    let site = comparing(&backend, Fingerprinter::raw().with_multipart()).await;
    let typed_file = format!("{FILE}\r\ncontent-type: text/csv");
    let renamed = FILE.replace("filename=\"a\"", "filename=\"b\"");
    let file = |headers: &str| multipart("two", &[(NOTE, "hi"), (headers, "bytes")]);
    assert_compared(
        &site,
        multipart("one", &[(NOTE, "hi"), (FILE, "bytes")]),
        [file(FILE)],
        [
            multipart("two", &[(FILE, "bytes"), (NOTE, "hi")]),
            file(&renamed),
            file(&typed_file),
        ],
    )
    .await;
}

async fn f8_a_member_that_is_left_out_may_change(backend: impl Backend) {
    let without = Fingerprinter::raw().without_member("/client/sent_at");
    let site = comparing(&backend, without.unwrap()).await;
    assert_compared(
        &site,
        json(r#"{"item":"tea","client":{"sent_at":1}}"#),
        [
            json(r#"{"item":"tea","client":{"sent_at":2}}"#),
            json(r#"{"client":{"sent_at":[2,3]},"item":"tea"}"#),
            json(r#"{"item":"tea","client":{}}"#),
        ],
        [],
    )
    .await;
}

async fn f8_members_beside_one_that_is_left_out_count(backend: impl Backend) {
    let without = Fingerprinter::raw().without_member("/client/sent_at");
    let site = comparing(&backend, without.unwrap()).await;
    assert_compared(
        &site,
        json(r#"{"item":"tea","client":{"sent_at":1}}"#),
        [],
        [
            json(r#"{"item":"mate","client":{"sent_at":1}}"#),
            json(r#"{"item":"tea","client":{"sent_at":1,"id":7}}"#),
            json(r#"{"item":"tea","sent_at":1,"client":{}}"#),
            json(r#"{"item":"tea"}"#),
        ],
    )
    .await;
}
