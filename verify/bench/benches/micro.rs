//! What costs a request processor time beside its database: keys, fingerprints, envelopes.
//!
//! Where a step is no part of the public interface, the least that contains it is measured: a refused
//! key is read and refused, a replay from memory is a fingerprint and a lookup.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a harness, which fails by panicking"
)]

use std::convert::Infallible;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use bytes::Bytes;
use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use tokio::runtime::Runtime;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_idempotency::{
    Envelope, Fingerprint, Fingerprinter, Idempotency, IdempotencyLayer, Identity, KeyFormat,
    MemoryStore, Policy, Scope,
};

const SIZES: [usize; 3] = [256, 16 << 10, 1 << 20];

const V4: &str = "8e03978e-40d5-43dd-bc93-6894a57f9324";
const V7: &str = "019a2f1e-7b3c-7d4e-9f5a-6b7c8d9e0f1a";

fn main() {
    divan::main();
}

/// Digest and id of a record.
#[divan::bench(args = [V4, V7, "order-1"])]
fn identity(key: &str) -> Identity {
    Identity::new("acme", "POST /charges", black_box(key))
}

/// A key that is read and refused, and the answer that says so.
#[divan::bench]
fn refused_key(bencher: Bencher<'_, '_>) {
    let policy = Policy::high().with_key_format(KeyFormat::Strict);
    requests(bencher, policy, 0, StatusCode::BAD_REQUEST);
}

#[divan::bench(args = SIZES)]
fn fingerprint(bencher: Bencher<'_, '_>, size: usize) {
    let body = json(size);
    bencher
        .counter(BytesCount::new(body.len()))
        .bench(|| Fingerprint::of_bytes(black_box(&body)));
}

/// A replay whose fingerprint is of the bytes.
#[divan::bench(args = SIZES)]
fn replay_raw(bencher: Bencher<'_, '_>, size: usize) {
    let policy = Policy::high().with_fingerprint(Fingerprinter::raw());
    requests(bencher, policy, size, StatusCode::CREATED);
}

/// A replay whose fingerprint is of what the JSON means.
#[divan::bench(args = SIZES)]
fn replay_canonical_json(bencher: Bencher<'_, '_>, size: usize) {
    let policy = Policy::high().with_fingerprint(Fingerprinter::canonical_json());
    requests(bencher, policy, size, StatusCode::CREATED);
}

#[divan::bench(args = SIZES)]
fn envelope_encode(bencher: Bencher<'_, '_>, size: usize) {
    let envelope = envelope(size);
    bencher
        .counter(BytesCount::new(size))
        .bench(|| black_box(&envelope).encode());
}

#[divan::bench(args = SIZES)]
fn envelope_decode(bencher: Bencher<'_, '_>, size: usize) {
    let bytes = envelope(size).encode();
    bencher
        .counter(BytesCount::new(size))
        .bench(|| Envelope::decode(black_box(&bytes)));
}

fn envelope(size: usize) -> Envelope {
    let answer = Response::builder()
        .status(StatusCode::CREATED)
        .header("content-type", "application/json")
        .header("location", "/charges/1");
    Envelope::new(answer.body(Bytes::from(json(size))).unwrap())
}

/// An object of about so many bytes.
fn json(size: usize) -> Vec<u8> {
    let member = |n: usize| format!(r#""member {n}":{{"amount":{n}.5,"currency":"EUR"}},"#);
    let mut text = String::from("{");
    for n in 0.. {
        if text.len() + 60 > size {
            break;
        }
        text.push_str(&member(n));
    }
    text.push_str(r#""end":true}"#);
    text.into_bytes()
}

/// The same request again and again, the first of which is not measured.
fn requests(bencher: Bencher<'_, '_>, policy: Policy, size: usize, status: StatusCode) {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime: Runtime = { runtime }.enable_all().build().unwrap();
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    let layer = layer.with_policy(policy.with_volatile_store(true)).unwrap();
    let service = layer.layer(service_fn(answer));
    let body = Bytes::from(json(size));
    let ask = async || {
        let request = Request::post("/charges")
            .header("content-type", "application/json")
            .header("idempotency-key", V4);
        let request = request.body(Body::from(body.clone())).unwrap();
        let service: Idempotency<_, _> = service.clone();
        let answer = service.oneshot(request).await.unwrap();
        assert_eq!(answer.status(), status);
        answer
    };
    runtime.block_on(ask());
    bencher
        .counter(BytesCount::new(body.len()))
        .bench_local(|| runtime.block_on(ask()));
}

async fn answer(_: Request<Body>) -> Result<Response<Body>, Infallible> {
    let mut answer = Response::new(Body::from("charged"));
    *answer.status_mut() = StatusCode::CREATED;
    Ok(answer)
}
