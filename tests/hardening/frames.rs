//! Bodies that are always ready, and never get anywhere.
use std::sync::mpsc;
use std::time::Duration;

use crate::help::{app, ms, order};
use axum::body::Body;
use axum::http::{Request, Response};
use bytes::Bytes;
use futures_util::stream;
use tower::ServiceExt;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Policy, Scope};

fn empty_frames() -> Body {
    Body::from_stream(stream::repeat_with(
        || Ok::<_, std::io::Error>(Bytes::new()),
    ))
}

/// In a thread of its own, since it may never come back.
fn status_of(limit: Duration, request: Request<Body>, answer: fn() -> Body) -> Option<u16> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let status = runtime.block_on(async move {
            let policy = Policy::high()
                .with_body_deadline(ms(200))
                .with_execution_limit(ms(500));
            let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
                .with_request_timeout(ms(200))
                .unwrap()
                .with_policy(policy)
                .unwrap();
            let app = app(&layer, move |_| async move { Response::new(answer()) });
            app.oneshot(request).await.unwrap().status().as_u16()
        });
        sender.send(status).unwrap();
    });
    receiver.recv_timeout(limit).ok()
}

#[test]
fn an_answer_of_empty_frames_reaches_the_body_deadline() {
    let status = status_of(Duration::from_secs(4), order("a", "tea"), empty_frames);
    assert_eq!(
        status,
        Some(200),
        "neither deadline nor execution limit ended it"
    );
}

#[test]
fn a_request_of_empty_frames_reaches_the_request_timeout() {
    let request = order("a", "tea").map(|_| empty_frames());
    let status = status_of(Duration::from_secs(4), request, || Body::from("tea"));
    assert_eq!(status, Some(408));
}
