//! How much memory requests take, counted by the allocator: what a layer that covers nothing of a
//! request allocates, what requests in flight take, and what the cache of answers does. Prints a line
//! `NAME VALUE` for each; the program `bench` judges them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a harness, which fails by panicking"
)]

use std::alloc::System;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use faults::cluster::Cluster;
use faults::random::fresh_key;
use http_body_util::BodyExt as _;
use sqlx::postgres::PgPoolOptions;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tower::layer::util::Identity;
use tower::{Layer, Service, ServiceExt as _, service_fn};
use tower_idempotency::{IdempotencyLayer, MemoryStore, PgStore, Policy, Scope};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Requests in flight.
const PARKED: usize = 512;

/// What the cache may take.
const CACHE: usize = 4 << 20;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() {
    let alone = tokio::runtime::Builder::new_current_thread().build();
    println!("allocations {}", alone.unwrap().block_on(allocations()));
    tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(in_flight());
}

/// Of the layer, for a request that it does not cover.
async fn allocations() -> f64 {
    let bare =
        service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(Body::empty())));
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    let without = allocations_of(bare).await;
    let with = allocations_of(layer.layer(bare)).await;
    difference(with, without) / 1000.0
}

async fn allocations_of<S>(mut service: S) -> usize
where
    S: Service<Request<Body>, Response = Response<Body>, Error: std::fmt::Debug>,
{
    let mut before = 0;
    for round in 0..1100 {
        if round == 100 {
            before = allocated();
        }
        let request = Request::get("/charges").body(Body::empty()).unwrap();
        service.ready().await.unwrap().call(request).await.unwrap();
    }
    allocated() - before
}

fn allocated() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

/// Bytes that are not freed.
fn live() -> usize {
    let stats = ALLOCATOR.stats();
    stats
        .bytes_allocated
        .saturating_sub(stats.bytes_deallocated)
}

#[expect(clippy::cast_precision_loss, reason = "they are not that many")]
fn difference(one: usize, other: usize) -> f64 {
    one as f64 - other as f64
}

async fn in_flight() {
    let cluster = Cluster::start_durable().await;
    let pool = PgPoolOptions::new().connect(&cluster.url()).await.unwrap();
    let store = PgStore::new(pool.clone());
    store.migrate().await.unwrap();
    for (name, request, answer) in [("1", 256, 1 << 10), ("16", 16 << 10, 16 << 10)] {
        let layer = IdempotencyLayer::new(store.clone(), Scope::global());
        // The first round opens connections, and has everything grow that is kept.
        park(&layer, request, answer).await;
        let (parked, peak) = park(&layer, request, answer).await;
        let (without, _) = park(&Identity::new(), request, answer).await;
        println!("without-{name} {without}");
        println!("parked-{name} {parked}\npeak-{name} {peak}");
        println!("bound-{name} {}", 2 * (request + answer) + (8 << 10));
    }
    println!("cache {}\ncache-bound {CACHE}", cache(&store).await);
}

/// Bytes of each request: while all are in their handlers, and the most until all are answered.
async fn park<L>(layer: &L, request: usize, answer: usize) -> (f64, f64)
where
    L: Layer<Handler>,
    L::Service: Service<Request<Body>, Response = Response<Body>, Error = Failure, Future: Send>
        + Send
        + 'static,
{
    let gate = Arc::new(Semaphore::new(0));
    let inside = Arc::new(AtomicUsize::new(0));
    let before = live();
    let mut requests = JoinSet::new();
    for _ in 0..PARKED {
        let (gate, inside) = (gate.clone(), inside.clone());
        let handler = Handler {
            answer,
            gate,
            inside,
        };
        let answered = layer.layer(handler).oneshot(charge(request));
        requests.spawn(async move { answered.await.map(|answer| answer.status()) });
    }
    while inside.load(Ordering::SeqCst) < PARKED {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let parked = live();
    let peak = Peak::watch();
    gate.add_permits(PARKED);
    while let Some(answered) = requests.join_next().await {
        assert_eq!(answered.unwrap().unwrap(), StatusCode::CREATED);
    }
    (each(parked, before), each(peak.end(), before))
}

#[derive(Clone)]
struct Handler {
    answer: usize,
    gate: Arc<Semaphore>,
    inside: Arc<AtomicUsize>,
}

impl Service<Request<Body>> for Handler {
    type Response = Response<Body>;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().wait(request))
    }
}

impl Handler {
    /// Has read its request, and made its answer, while it waits.
    async fn wait(self, request: Request<Body>) -> Result<Response<Body>, Failure> {
        let held = request.into_body().collect().await?.to_bytes();
        let answer = vec![7; self.answer];
        self.inside.fetch_add(1, Ordering::SeqCst);
        drop(self.gate.acquire_owned().await?);
        drop(held);
        created(answer)
    }
}

fn each(now: usize, before: usize) -> f64 {
    (difference(now, before) / difference(PARKED, 0)).round()
}

fn charge(length: usize) -> Request<Body> {
    let request = Request::post("/charges").header("idempotency-key", fresh_key());
    request.body(Body::from(vec![7; length])).unwrap()
}

fn created(answer: Vec<u8>) -> Result<Response<Body>, Failure> {
    let response = Response::builder().status(StatusCode::CREATED);
    Ok(response.body(Body::from(answer))?)
}

/// Bytes that a cache takes which was given more than it may keep.
async fn cache(store: &PgStore) -> f64 {
    let layer = IdempotencyLayer::new(store.clone(), Scope::global());
    let layer = layer.with_policy(Policy::high().with_replay_cache(true));
    let layer = layer.unwrap().with_replay_cache_size(CACHE).unwrap();
    let handler = service_fn(async |_: Request<Body>| created(vec![7; 1 << 10]));
    let service = layer.layer(handler);
    let before = live();
    for _ in 0..200 {
        let mut requests = JoinSet::new();
        for _ in 0..64 {
            requests.spawn(service.clone().oneshot(charge(256)));
        }
        while let Some(answered) = requests.join_next().await {
            assert_eq!(answered.unwrap().unwrap().status(), StatusCode::CREATED);
        }
    }
    difference(live(), before)
}

/// Looks at what is live again and again.
struct Peak {
    is_over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<usize>,
}

impl Peak {
    fn watch() -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let ends = is_over.clone();
        let thread = std::thread::spawn(move || {
            let mut most = live();
            while !ends.load(Ordering::Relaxed) {
                most = most.max(live());
                std::thread::sleep(Duration::from_micros(50));
            }
            most
        });
        Self { is_over, thread }
    }

    fn end(self) -> usize {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}
