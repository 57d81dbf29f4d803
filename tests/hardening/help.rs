//! A store that is slow on demand, and a service called without a socket.
#![allow(dead_code, unreachable_pub)]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, Response, StatusCode};
use bytes::Bytes;
use http_body_util::BodyExt;
use tower::util::BoxCloneSyncService;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, RecordSummary,
    Renewed, Resolution, Swept, Token, Within,
};
use tower_idempotency::{
    Fingerprint, IdempotencyLayer, Identity, RecordId, References, Store, StoreError,
};

#[derive(Debug, Default)]
pub struct Delays {
    /// Before and after; one pair a call, then none.
    pub claim: Mutex<VecDeque<(Duration, Duration)>>,
    pub complete: Mutex<VecDeque<(Duration, Duration)>>,
    pub extend: Mutex<VecDeque<(Duration, Duration)>>,
    /// For every call of `extend` beyond those.
    pub extend_always: Mutex<Duration>,
    pub claim_down: Mutex<bool>,
    /// Makes one claim fail, and take effect this much later. Until then the key is in progress.
    pub claim_late: Mutex<Option<Duration>>,
    pub claim_undecided: AtomicBool,
    /// Makes one claim fail, and take effect this much later. The same claim may be made before.
    pub claim_twice: Mutex<Option<Duration>>,
    /// It was, and nothing was in its way.
    pub claimed_twice: AtomicBool,
    /// Loses the acknowledgement of one release, and lets this claim in before the next.
    pub release_then: Mutex<Option<ClaimRequest>>,
    pub complete_down: Mutex<bool>,
    pub release_down: Mutex<bool>,
    /// So many releases failed by that.
    pub releases_failed: AtomicUsize,
}

async fn around<T>(
    delays: &Mutex<VecDeque<(Duration, Duration)>>,
    call: impl Future<Output = T>,
) -> T {
    let (before, after) = delays.lock().unwrap().pop_front().unwrap_or_default();
    if !before.is_zero() {
        tokio::time::sleep(before).await;
    }
    let done = call.await;
    if !after.is_zero() {
        tokio::time::sleep(after).await;
    }
    done
}

#[derive(Debug, Clone)]
pub struct Slow<S> {
    pub store: S,
    pub delays: Arc<Delays>,
}

impl<S> Slow<S> {
    pub fn new(store: S) -> Self {
        Self {
            store,
            delays: Arc::default(),
        }
    }
}

impl<S: Store + Clone> Store for Slow<S> {
    fn is_durable(&self) -> bool {
        self.store.is_durable()
    }
    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        if *self.delays.claim_down.lock().unwrap() {
            return Err(StoreError::unavailable("planted"));
        }
        if let Some(late) = self.delays.claim_late.lock().unwrap().take() {
            let (slow, request) = (self.clone(), request.clone());
            self.delays.claim_undecided.store(true, Ordering::SeqCst);
            tokio::spawn(async move {
                tokio::time::sleep(late).await;
                slow.store.claim(&request).await.unwrap();
                slow.delays.claim_undecided.store(false, Ordering::SeqCst);
            });
            return Err(StoreError::unavailable("connection is lost"));
        }
        if let Some(late) = self.delays.claim_twice.lock().unwrap().take() {
            let (slow, request) = (self.clone(), request.clone());
            tokio::spawn(async move {
                tokio::time::sleep(late).await;
                let claimed = slow.store.claim(&request).await.unwrap();
                let is_acquired = matches!(claimed, Claimed::Acquired(_));
                slow.delays
                    .claimed_twice
                    .store(is_acquired, Ordering::SeqCst);
            });
            return Err(StoreError::unavailable("connection is lost"));
        }
        if self.delays.claim_undecided.load(Ordering::SeqCst) {
            let lease_left = Duration::from_secs(1);
            let running = Claimed::Existing(Existing::InProgress { lease_left });
            return around(&self.delays.claim, async { Ok(running) }).await;
        }
        around(&self.delays.claim, self.store.claim(request)).await
    }
    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        if *self.delays.complete_down.lock().unwrap() {
            return Err(StoreError::unavailable("planted"));
        }
        around(
            &self.delays.complete,
            self.store.complete(claim, completion),
        )
        .await
    }
    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        if *self.delays.release_down.lock().unwrap() {
            self.delays.releases_failed.fetch_add(1, Ordering::SeqCst);
            return Err(StoreError::unavailable("planted"));
        }
        let then = self.delays.release_then.lock().unwrap().take();
        self.store.release(claim).await?;
        if let Some(next) = then {
            self.store.claim(&next).await?;
            return Err(StoreError::unavailable("connection is lost"));
        }
        Ok(())
    }
    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        self.store.hold(claim, references).await
    }
    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        let always = *self.delays.extend_always.lock().unwrap();
        if !always.is_zero() {
            tokio::time::sleep(always).await;
        }
        around(&self.delays.extend, self.store.extend(leases)).await
    }
    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        self.store.lookup(identity, fingerprint).await
    }
    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.store.resolve(identity, token, resolution).await
    }
    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        self.store.list_held(after, limit).await
    }
    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        self.store.inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        self.store
            .find_by_reference(within, kind, id, after, limit)
            .await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.store.delete_expired(limit).await
    }
    async fn wait_for_change(&self, identity: &Identity, limit: Duration) {
        self.store.wait_for_change(identity, limit).await;
    }
}

pub type App = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// The layer around a handler.
pub fn app<S: Store, F>(
    layer: &IdempotencyLayer<S>,
    handler: impl Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
) -> App
where
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let inner = service_fn(move |request| {
        let answer: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(handler(request));
        async move { Ok::<_, Infallible>(answer.await) }
    });
    BoxCloneSyncService::new(layer.layer(inner))
}

#[derive(Debug, Clone)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
    pub fn is_replay(&self) -> bool {
        self.headers.contains_key("idempotent-replayed")
    }
}

pub fn order(key: &str, body: &'static str) -> Request<Body> {
    Request::post("/orders")
        .header("idempotency-key", key)
        .header("x-tenant", "acme")
        .body(Body::from(body))
        .unwrap()
}

pub async fn send<T>(app: T, request: Request<Body>) -> Answer
where
    T: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let (parts, body) = app.oneshot(request).await.unwrap().into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: body.collect().await.unwrap().to_bytes(),
    }
}

pub const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
