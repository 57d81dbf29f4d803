use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tower_idempotency::store::Existing;
use tower_idempotency::{Fingerprint, Identity, Outcome, Policy, Store};

use crate::backend::Backend;
use crate::site::{Runs, Site, channel_body, every_method, policy};

on_every_store!(
    r10_an_event_stream_is_recorded_at_its_head_and_passed_through,
    r10_a_stream_the_handler_names_is_recorded_at_its_head,
    r10_a_switch_of_protocols_is_recorded_and_works,
    r10_a_body_slower_than_its_deadline_is_passed_through,
    r10_an_answer_with_trailers_is_passed_through,
    r11_a_body_that_breaks_off_is_an_unknown_outcome,
);

/// The first bytes of a stream reach the client while it goes on, and a retry already gets 410.
async fn assert_stream<B: Backend>(
    backend: B,
    policy: Policy,
    head: impl Fn(Response) -> Response + Clone + Send + Sync + 'static,
) {
    let (sender, body) = channel_body();
    let body = std::sync::Arc::new(std::sync::Mutex::new(Some(body)));
    let runs = Runs::free();
    let counted = runs.clone();
    let handler = every_method(move |_body: Bytes| {
        let (body, runs, head) = (body.clone(), counted.clone(), head.clone());
        async move {
            runs.run().await;
            let body = body.lock().unwrap().take().unwrap_or_default();
            head(Response::new(body))
        }
    });
    let layer = backend.layer().with_policy(policy).unwrap();
    let site = Site::orders(&layer, handler).await;
    let mut stream = site.connect().await;
    let request = "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
                   content-type: application/json\r\ncontent-length: 14\r\n\r\n{\"item\":\"tea\"}";
    stream.write_all(request.as_bytes()).await.unwrap();
    sender
        .send(Ok(Bytes::from_static(b"first-chunk")))
        .await
        .unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"first-chunk\r\n") {
        assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0);
    }
    site.order("a")
        .await
        .assert_problem(410, "response-not-retained");
    sender
        .send(Ok(Bytes::from_static(b"last-chunk")))
        .await
        .unwrap();
    drop(sender);
    while !read.ends_with(b"0\r\n\r\n") {
        assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0);
    }
    let text = String::from_utf8(read).unwrap();
    assert!(
        text.starts_with("HTTP/1.1 200 OK") && text.contains("last-chunk"),
        "{text}"
    );
    assert_eq!(runs.count(), 1);
}

async fn r10_an_event_stream_is_recorded_at_its_head_and_passed_through(backend: impl Backend) {
    assert_stream(backend, policy(), |mut response| {
        let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
        response.headers_mut().insert("content-type", kind);
        response
    })
    .await;
}

async fn r10_a_stream_the_handler_names_is_recorded_at_its_head(backend: impl Backend) {
    assert_stream(backend, policy(), |mut response| {
        response.extensions_mut().insert(Outcome::Stream);
        response
    })
    .await;
}

async fn r10_a_body_slower_than_its_deadline_is_passed_through(backend: impl Backend) {
    let hasty = policy().with_body_deadline(Duration::from_millis(200));
    assert_stream(backend, hasty, |response| response).await;
}

async fn r10_a_switch_of_protocols_is_recorded_and_works(backend: impl Backend) {
    let handler = every_method(|mut request: axum::extract::Request| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut upgraded = hyper_util::rt::TokioIo::new(upgrade.await.unwrap());
            let mut line = [0; 4];
            upgraded.read_exact(&mut line).await.unwrap();
            upgraded.write_all(&line).await.unwrap();
        });
        let head = [("connection", "upgrade"), ("upgrade", "echo")];
        (StatusCode::SWITCHING_PROTOCOLS, head).into_response()
    });
    let site = Site::orders(&backend.layer(), handler).await;
    let mut stream = site.connect().await;
    let request = "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
                   connection: upgrade\r\nupgrade: echo\r\ncontent-type: application/json\r\n\
                   content-length: 14\r\n\r\n{\"item\":\"tea\"}";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut read = Vec::new();
    while !read.ends_with(b"\r\n\r\n") {
        assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0);
    }
    assert!(read.starts_with(b"HTTP/1.1 101"));
    stream.write_all(b"ping").await.unwrap();
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"ping");
    site.order("a")
        .await
        .assert_problem(410, "response-not-retained");
}

async fn r10_an_answer_with_trailers_is_passed_through(backend: impl Backend) {
    let runs = Runs::free();
    let handler = runs.answering(|_| {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-checksum", HeaderValue::from_static("1"));
        let trailers = async move { Some(Ok(trailers)) };
        Response::new(Body::new(
            Full::from("with trailers").with_trailers(trailers),
        ))
    });
    let site = Site::orders(&backend.layer(), handler).await;
    assert_eq!(site.order("a").await.body, "with trailers");
    site.order("a")
        .await
        .assert_problem(410, "response-not-retained");
    assert_eq!(runs.count(), 1);
}

async fn r11_a_body_that_breaks_off_is_an_unknown_outcome<B: Backend>(backend: B) {
    let broken = |runs: &Runs| {
        runs.answering(|_| {
            let chunks = [
                Ok(Bytes::from_static(b"half")),
                Err(std::io::Error::other("broke")),
            ];
            Response::new(Body::from_stream(futures_util::stream::iter(chunks)))
        })
    };
    let with = |policy: Policy| {
        backend
            .layer()
            .with_policy(policy.with_volatile_store(true))
    };

    let runs = Runs::free();
    let site = Site::orders(&with(Policy::high()).unwrap(), broken(&runs)).await;
    let first = site.order("high").await;
    first.assert_problem(500, "response-failed");
    site.order("high").await.assert_replay_of(&first);

    let site = Site::orders(&with(Policy::medium()).unwrap(), broken(&runs)).await;
    site.order("medium")
        .await
        .assert_problem(500, "response-failed");
    site.order("medium")
        .await
        .assert_problem(500, "response-failed");
    assert_eq!(runs.count(), 3);

    let site = Site::orders(&with(Policy::critical()).unwrap(), broken(&runs)).await;
    site.order("critical")
        .await
        .assert_problem(500, "response-failed");
    site.order("critical")
        .await
        .assert_problem(409, "outcome-unknown");
    assert_eq!(runs.count(), 4);
    let other = Fingerprint::of_bytes(b"other");
    let identity = Identity::new("acme", "POST /orders", "critical");
    let seen = backend.store().lookup(&identity, &other).await.unwrap();
    assert!(matches!(seen, Some(Existing::Mismatch)));
}
