use std::io::Write;

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use tower_idempotency::IdempotencyContext;

use crate::backend::Backend;
use crate::site::{Runs, Sent, Site, every_method, policy};

on_every_store!(
    r1_a_repeated_request_gets_the_first_answer_and_runs_once,
    r2_n_repeats_have_one_effect_and_n_equal_answers,
    r3_the_marker_is_on_replays_alone_whatever_the_handler_says,
    r4_cookies_dates_hop_by_hop_and_trace_headers_are_not_replayed,
    r5_other_headers_are_replayed_unsplit_and_in_order,
    r6_binary_and_compressed_bodies_are_replayed_byte_for_byte,
    r7_an_answer_over_the_limit_reaches_its_client_and_is_gone_for_retries,
    r7_an_answer_of_exactly_the_limit_is_kept,
    r8_a_replay_has_the_right_content_length,
    r9_the_expiry_is_equal_on_first_answer_and_replay,
);

async fn r1_a_repeated_request_gets_the_first_answer_and_runs_once(backend: impl Backend) {
    let runs = Runs::free();
    let site = Site::orders(&backend.layer(), runs.handler()).await;
    let first = site.order("a").await;
    first.assert_run(1);
    let again = site.order("a").await;
    again.assert_replay_of(&first);
    assert_eq!(again.headers["location"], "/orders/1");
    assert_eq!(again.headers["content-type"], "application/json");
    assert_eq!(runs.count(), 1);
}

async fn r2_n_repeats_have_one_effect_and_n_equal_answers(backend: impl Backend) {
    let runs = Runs::free();
    let layer = backend.layer();
    let site = Site::orders(&layer, runs.handler()).await;
    let first = site.order("a").await;
    for _ in 0..20 {
        site.order("a").await.assert_replay_of(&first);
    }
    assert_eq!(runs.count(), 1);
    assert_eq!((layer.stats().executed, layer.stats().replayed), (1, 20));
}

async fn r3_the_marker_is_on_replays_alone_whatever_the_handler_says(backend: impl Backend) {
    let runs = Runs::free();
    let handler = runs.answering(|_| ([("idempotent-replayed", "true")], "spoofed"));
    let site = Site::orders(&backend.layer(), handler).await;
    assert!(
        !site
            .order("a")
            .await
            .headers
            .contains_key("idempotent-replayed")
    );
    let again = site.order("a").await;
    let markers = again.headers.get_all("idempotent-replayed").iter();
    assert_eq!(markers.collect::<Vec<_>>(), ["true"]);
    let uncovered = site
        .send(Sent::new(axum::http::Method::GET, "/orders"))
        .await;
    assert_eq!(uncovered.body, "spoofed");
}

async fn r4_cookies_dates_hop_by_hop_and_trace_headers_are_not_replayed(backend: impl Backend) {
    const GONE: [&str; 9] = [
        "set-cookie",
        "age",
        "keep-alive",
        "traceparent",
        "tracestate",
        "x-request-id",
        "server-timing",
        "x-per-hop",
        "x-mine",
    ];
    let handler = || {
        Runs::free().answering(|_| {
            let mut response = "done".into_response();
            for name in GONE {
                let value = HeaderValue::from_static("first");
                response.headers_mut().insert(name, value);
            }
            let named = HeaderValue::from_static("x-per-hop");
            response.headers_mut().insert("connection", named);
            let old = HeaderValue::from_static("Mon, 01 Jan 2001 00:00:00 GMT");
            response.headers_mut().insert("date", old);
            response
        })
    };
    let hidden = policy().with_hidden_headers(["x-mine"]).unwrap();
    let layer = backend.layer().with_policy(hidden).unwrap();
    let site = Site::orders(&layer, handler()).await;
    let first = site.order("a").await;
    let again = site.order("a").await;
    again.assert_replay_of(&first);
    for name in GONE {
        assert!(
            first.headers.contains_key(name),
            "{name} on the first answer"
        );
        assert!(!again.headers.contains_key(name), "{name} on the replay");
    }
    // The server puts a new one in its place.
    assert_eq!(first.headers["date"], "Mon, 01 Jan 2001 00:00:00 GMT");
    assert_ne!(again.headers["date"], first.headers["date"]);
}

async fn r5_other_headers_are_replayed_unsplit_and_in_order(backend: impl Backend) {
    let handler = Runs::free().answering(|_| {
        let mut response = (StatusCode::SEE_OTHER, "moved").into_response();
        for (name, value) in [
            ("location", b"/orders/1?a=b, c".as_slice()),
            ("etag", b"\"v1\""),
            ("x-two", b"1, one"),
            ("x-two", b"2"),
            ("x-latin", b"caf\xe9"),
            ("x-empty", b""),
        ] {
            let value = HeaderValue::from_bytes(value).unwrap();
            response
                .headers_mut()
                .append(HeaderName::from_static(name), value);
        }
        response
    });
    let site = Site::orders(&backend.layer(), handler).await;
    let first = site.order("a").await;
    let mut again = site.order("a").await;
    again.assert_replay_of(&first);
    again.headers.remove("idempotent-replayed");
    again.headers.remove("date");
    let mut expected = first.headers.clone();
    expected.remove("date");
    let lines = |headers: &axum::http::HeaderMap| -> Vec<_> {
        headers
            .iter()
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect()
    };
    assert_eq!(lines(&again.headers), lines(&expected));
    let two: Vec<_> = again.headers.get_all("x-two").iter().collect();
    assert_eq!(two, ["1, one", "2"]);
    assert_eq!(again.headers["x-latin"].as_bytes(), b"caf\xe9");
}

async fn r6_binary_and_compressed_bodies_are_replayed_byte_for_byte(backend: impl Backend) {
    let bytes: Bytes = (0..=255).cycle().take(70_000).collect();
    // A gzip member with stored blocks: what matters is that nobody decodes it on the way.
    let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1, 5, 0, 0xfa, 0xff];
    gzip.write_all(b"hello\x86\xa6\x10\x36\x05\0\0\0").unwrap();
    let gzip = Bytes::from(gzip);
    let handler = {
        let (bytes, gzip) = (bytes.clone(), gzip.clone());
        Runs::free().answering(move |run| match run {
            1 => bytes.clone().into_response(),
            _ => ([("content-encoding", "gzip")], gzip.clone()).into_response(),
        })
    };
    let site = Site::orders(&backend.layer(), handler).await;
    let binary = site.order("binary").await;
    assert_eq!(binary.body, bytes);
    site.order("binary").await.assert_replay_of(&binary);
    let compressed = site.order("gzip").await;
    assert_eq!(compressed.body, gzip);
    let again = site.order("gzip").await;
    again.assert_replay_of(&compressed);
    assert_eq!(again.headers["content-encoding"], "gzip");
}

async fn r7_an_answer_over_the_limit_reaches_its_client_and_is_gone_for_retries(
    backend: impl Backend,
) {
    let runs = Runs::free();
    let counted = runs.clone();
    let handler = every_method(move |context: IdempotencyContext, _body: Bytes| {
        let runs = counted.clone();
        async move {
            runs.run().await;
            context.reference("order", "ord_1").unwrap();
            (
                StatusCode::CREATED,
                [("location", "/orders/1")],
                "x".repeat(1001),
            )
        }
    });
    let limited = policy().with_response_limit(1000);
    let layer = backend.layer().with_policy(limited).unwrap();
    let site = Site::orders(&layer, handler).await;
    let first = site.order("a").await;
    assert_eq!(first.status, StatusCode::CREATED);
    assert_eq!(first.body.len(), 1001);
    for _ in 0..2 {
        let again = site.order("a").await;
        again.assert_problem(410, "response-not-retained");
        assert_eq!(again.headers["location"], "/orders/1");
        let original = &again.json()["original"];
        assert_eq!(original["status"], 201);
        assert_eq!(original["references"][0]["kind"], "order");
        assert_eq!(original["references"][0]["id"], "ord_1");
    }
    assert_eq!(runs.count(), 1);
}

async fn r7_an_answer_of_exactly_the_limit_is_kept(backend: impl Backend) {
    for size in [0, 1, 1000] {
        let limited = policy().with_response_limit(1000);
        let layer = backend.layer().with_policy(limited).unwrap();
        let handler = Runs::free().answering(move |_| "x".repeat(size));
        let site = Site::orders(&layer, handler).await;
        let key = format!("size-{size}");
        let first = site.order(&key).await;
        assert_eq!(first.body.len(), size);
        site.order(&key).await.assert_replay_of(&first);
    }
}

async fn r8_a_replay_has_the_right_content_length(backend: impl Backend) {
    let handler = Runs::free().answering(|_| {
        let chunks = ["one", "two"].map(|chunk| Ok::<_, std::io::Error>(Bytes::from(chunk)));
        Response::new(Body::from_stream(futures_util::stream::iter(chunks)))
    });
    let site = Site::orders(&backend.layer(), handler).await;
    let first = site.order("a").await;
    let again = site.order("a").await;
    again.assert_replay_of(&first);
    assert_eq!(again.body, "onetwo");
    assert_eq!(again.headers["content-length"], "6");
    assert!(!again.headers.contains_key("transfer-encoding"));
}

async fn r9_the_expiry_is_equal_on_first_answer_and_replay(backend: impl Backend) {
    let shown = policy().with_expiry_header(true);
    let layer = backend.layer().with_policy(shown).unwrap();
    let site = Site::orders(&layer, Runs::free().handler()).await;
    let first = site.order("a").await;
    let again = site.order("a").await;
    again.assert_replay_of(&first);
    let expires = first.headers["idempotency-expires"].to_str().unwrap();
    assert!(expires.ends_with(" GMT"), "{expires}");
    assert_eq!(again.headers["idempotency-expires"], expires);

    let hidden = Site::orders(&backend.layer(), Runs::free().handler()).await;
    assert!(
        !hidden
            .order("b")
            .await
            .headers
            .contains_key("idempotency-expires")
    );
}
