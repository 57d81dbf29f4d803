//! A layer that is asked in this process: what a client writes goes the way it always goes.

use std::cell::RefCell;
use std::convert::Infallible;
use std::time::Duration;

use axum_core::body::Body;
use http::{HeaderMap, Request, Response, StatusCode};
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::{IdempotencyContext, IdempotencyLayer, MemoryStore, Policy, Scope};

const LIMIT: Duration = Duration::from_secs(60);
const TTL: Duration = Duration::from_secs(180);

thread_local! {
    static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) };
}

/// A layer, and a handler behind it that shows what the layer has read.
pub struct Site {
    store: MemoryStore,
    layer: IdempotencyLayer<MemoryStore>,
}

/// What came back: of the handler, or the layer's own.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// The handler has run under this scope and key.
    Ran(String, String),
    /// The first answer.
    Replayed,
    /// The layer has refused it.
    Refused(StatusCode),
}

impl Site {
    /// # Panics
    ///
    /// When the policy is not valid.
    pub fn new(scope: Scope, policy: Policy) -> Self {
        let policy = policy
            .with_execution_limit(LIMIT)
            .with_lease(LIMIT)
            .with_ttl(TTL);
        let store = MemoryStore::new();
        let layer = IdempotencyLayer::new(store.clone(), scope);
        let layer = layer.with_policy(policy).expect("the policy is valid");
        Self { store, layer }
    }

    /// Sends one request, and waits for its answer.
    ///
    /// # Panics
    ///
    /// When the layer or the handler does.
    pub fn send(&self, headers: HeaderMap, body: &[u8]) -> Answer {
        let mut request = Request::post("/")
            .body(Body::from(body.to_vec()))
            .expect("it is valid");
        *request.headers_mut() = headers;
        let service = self.layer.layer(service_fn(show));
        let answer = block_on(service.oneshot(request)).expect("it is infallible");
        match answer.extensions().get::<IdempotencyContext>() {
            Some(context) => {
                let identity = context.identity();
                Answer::Ran(identity.scope().to_owned(), identity.key().to_owned())
            }
            None if answer.headers().contains_key("idempotent-replayed") => Answer::Replayed,
            None => Answer::Refused(answer.status()),
        }
    }

    /// Lets every record expire, so that the next request is the first.
    pub fn forget(&self) {
        self.store.advance(TTL + LIMIT);
        block_on(tower_idempotency::Store::delete_expired(&self.store, 100)).expect("it is there");
    }
}

async fn show(request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let mut response = Response::new(Body::empty());
    if let Some(context) = request.extensions().get::<IdempotencyContext>() {
        response.extensions_mut().insert(context.clone());
    }
    Ok(response)
}

fn block_on<F: Future>(future: F) -> F::Output {
    RUNTIME.with_borrow_mut(|runtime| {
        let runtime = runtime.get_or_insert_with(|| {
            let mut builder = Builder::new_current_thread();
            builder
                .enable_time()
                .build()
                .expect("a runtime needs little")
        });
        runtime.block_on(future)
    })
}

/// The first byte, for a choice, and the rest.
pub fn choice(input: &[u8]) -> Option<(u8, &[u8])> {
    input.split_first().map(|(choice, rest)| (*choice, rest))
}
