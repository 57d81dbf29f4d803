//! For every code, what makes the layer answer with it.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Response, StatusCode};
use axum::routing::MethodRouter;
use bytes::Bytes;
use tower_idempotency::{Lost, Outcome, Policy};

use crate::backend::{Backend, Corruptible};
use crate::flaky::Fault;
use crate::site::{Answer, PATIENCE, Runs, Sent, Site, every_method};

/// A structured-field string, which every profile takes.
const KEY: &str = "\"a\"";

/// The same key, at the head of a request whose body is still to come.
const HEAD: &str =
    "POST /orders HTTP/1.1\r\nhost: a\r\nx-tenant: acme\r\nidempotency-key: \"a\"\r\n";

async fn site(backend: &impl Backend, policy: Policy, handler: MethodRouter) -> Site {
    Site::orders(&backend.layer().with_policy(policy).unwrap(), handler).await
}

/// What is answered to a request whose handler must not run.
async fn refused(backend: &impl Backend, policy: Policy, sent: Sent) -> Answer {
    let runs = Runs::free();
    let answer = site(backend, policy, runs.handler()).await.send(sent).await;
    assert_eq!(runs.count(), 0);
    answer
}

/// What is answered to a request while another one runs.
async fn beside<B: Backend>(backend: &B, policy: Policy, most: usize, sent: Sent) -> Answer {
    let runs = Runs::gated();
    let layer = backend.layer().with_policy(policy).unwrap();
    let site = Site::orders(&layer.with_max_running(most).unwrap(), runs.handler()).await;
    let test = async {
        runs.entered().await;
        let answer = site.send(sent).await;
        runs.let_go();
        answer
    };
    let (first, answer) = tokio::join!(site.order(KEY), test);
    first.assert_run(1);
    answer
}

pub async fn key_missing(backend: &impl Backend, policy: Policy) -> Answer {
    refused(backend, policy, Sent::post("/orders")).await
}

pub async fn key_invalid(backend: &impl Backend, policy: Policy) -> Answer {
    let long = format!("\"{}\"", "k".repeat(256));
    refused(backend, policy, Sent::order(&long)).await
}

pub async fn bare_key(backend: &impl Backend, policy: Policy) -> Answer {
    refused(backend, policy, Sent::order("a")).await
}

pub async fn scope_missing(backend: &impl Backend, policy: Policy) -> Answer {
    refused(backend, policy, Sent::order(KEY).without("x-tenant")).await
}

pub async fn body_too_large(backend: &impl Backend, policy: Policy) -> Answer {
    let sent = Sent::order(KEY).body("x".repeat(101));
    refused(backend, policy.with_request_limit(100), sent).await
}

pub async fn body_timeout(backend: &impl Backend, policy: Policy) -> Answer {
    let layer = backend.layer().with_policy(policy).unwrap();
    let hasty = layer
        .with_request_timeout(Duration::from_millis(100))
        .unwrap();
    let runs = Runs::free();
    let site = Site::orders(&hasty, runs.handler()).await;
    let request = format!("{HEAD}content-length: 50\r\n\r\nhalf");
    let answer = Answer::read(&site.raw(request.as_bytes()).await);
    assert_eq!(runs.count(), 0);
    answer
}

pub async fn body_unreadable(backend: &impl Backend, policy: Policy) -> Answer {
    let runs = Runs::free();
    let site = site(backend, policy, runs.handler()).await;
    let request = format!("{HEAD}transfer-encoding: chunked\r\n\r\nno length\r\n");
    let answer = Answer::read(&site.raw(request.as_bytes()).await);
    assert_eq!(runs.count(), 0);
    answer
}

pub async fn key_reused(backend: &impl Backend, policy: Policy) -> Answer {
    let runs = Runs::free();
    let site = site(backend, policy, runs.handler()).await;
    site.order(KEY).await.assert_run(1);
    let answer = site.send(Sent::order(KEY).body("{}")).await;
    assert_eq!(runs.count(), 1);
    answer
}

pub async fn request_in_progress<B: Backend>(backend: &B, policy: Policy) -> Answer {
    beside(backend, policy, 2, Sent::order(KEY)).await
}

pub async fn outcome_unknown(backend: &impl Backend, policy: Policy) -> Answer {
    let runs = Runs::free();
    let handler = runs.answering(|_| (StatusCode::BAD_GATEWAY, Outcome::Hold, "unsure"));
    let site = site(backend, policy, handler).await;
    assert_eq!(site.order(KEY).await.body, "unsure");
    let answer = site.order(KEY).await;
    assert_eq!(runs.count(), 1);
    answer
}

pub async fn answer_not_recorded(backend: &impl Backend, policy: Policy) -> Answer {
    let settles = policy.with_settle_timeout(Duration::from_millis(200));
    let (store, layer) = backend.flaky(settles);
    let site = Site::orders(&layer, Runs::free().handler()).await;
    store.completions(Fault::Down);
    let answer = site.order(KEY).await;
    assert!(store.fired() > 0);
    answer
}

pub async fn response_not_retained(backend: &impl Backend, policy: Policy) -> Answer {
    let runs = Runs::free();
    let site = site(backend, policy.with_response_limit(1), runs.handler()).await;
    site.order(KEY).await.assert_run(1);
    let answer = site.order(KEY).await;
    assert_eq!(runs.count(), 1);
    answer
}

pub async fn store_unavailable(backend: &impl Backend, policy: Policy) -> Answer {
    let (store, layer) = backend.flaky(policy);
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    store.claims(Fault::Down);
    let answer = site.order(KEY).await;
    assert!(store.fired() > 0);
    assert_eq!(runs.count(), 0);
    answer
}

pub async fn overloaded<B: Backend>(backend: &B, policy: Policy) -> Answer {
    beside(backend, policy, 1, Sent::order("\"b\"")).await
}

pub async fn shutting_down(backend: &impl Backend, policy: Policy) -> Answer {
    let layer = backend.layer().with_policy(policy).unwrap();
    let runs = Runs::free();
    let site = Site::orders(&layer, runs.handler()).await;
    assert!(layer.shutdown(PATIENCE).await.unfinished.is_empty());
    let answer = site.order(KEY).await;
    assert_eq!(runs.count(), 0);
    answer
}

pub async fn nested_layers(backend: &impl Backend, policy: Policy) -> Answer {
    let runs = Runs::free();
    let outer = backend.layer().with_policy(policy.clone()).unwrap();
    let lenient = policy.with_required_key(false);
    let inner = outer.clone().with_policy(lenient).unwrap();
    let nested = Router::new()
        .route("/orders", runs.handler().layer(inner))
        .layer(outer);
    let answer = Site::start(nested).await.order(KEY).await;
    assert_eq!(runs.count(), 0);
    answer
}

pub async fn record_unreadable(backend: &impl Corruptible, policy: Policy) -> Answer {
    let runs = Runs::free();
    let site = site(backend, policy, runs.handler()).await;
    site.order(KEY).await.assert_run(1);
    backend.set_answers(vec![99]).await;
    let answer = site.order(KEY).await;
    assert_eq!(runs.count(), 1);
    answer
}

/// The first answer, of which the second is the replay.
async fn failed(backend: &impl Backend, policy: Policy, handler: MethodRouter) -> Answer {
    let site = site(backend, policy, handler).await;
    let first = site.order(KEY).await;
    let again = site.order(KEY).await;
    again.assert_replay_of(&first);
    for header in ["content-type", "link", "stripe-should-retry"] {
        assert_eq!(again.headers.get(header), first.headers.get(header));
    }
    first
}

pub async fn handler_panicked(backend: &impl Backend, policy: Policy) -> Answer {
    let panics = Runs::free().answering(|_| -> StatusCode { panic!("planted") });
    failed(backend, policy, panics).await
}

pub async fn execution_limit(backend: &impl Backend, policy: Policy) -> Answer {
    let endless = every_method(|_body: Bytes| std::future::pending::<StatusCode>());
    let limited = policy.with_execution_limit(Duration::from_millis(200));
    failed(backend, limited, endless).await
}

pub async fn response_failed(backend: &impl Backend, policy: Policy) -> Answer {
    let broken = Runs::free().answering(|_| {
        let chunks = [
            Ok(Bytes::from_static(b"half")),
            Err(std::io::Error::other("broke")),
        ];
        Response::new(Body::from_stream(futures_util::stream::iter(chunks)))
    });
    failed(backend, policy, broken).await
}

pub async fn attempt_lost<B: Backend>(backend: &B, policy: Policy) -> Answer {
    let policy = policy.with_lost(Lost::Answer);
    let runs = Runs::gated();
    let first = site(backend, policy.clone(), runs.handler()).await;
    let other = site(backend, policy, runs.handler()).await;
    let test = async {
        runs.entered().await;
        backend.age(Duration::from_secs(31)).await;
        let answer = other.order(KEY).await;
        runs.let_go();
        answer
    };
    let (_, answer) = tokio::join!(first.order(KEY), test);
    assert_eq!(runs.count(), 1);
    answer
}
