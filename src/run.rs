//! The steps of one keyed request: read the body, claim, execute, settle, or replay.

mod claim;
mod execute;
mod follow;
mod open;
mod replay;
mod settle;
mod tell;
mod transact;

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum_core::body::Body;
use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tower_service::Service;

use crate::body::{self, Whole};
use crate::fingerprint::Fingerprint;
use crate::identity::Identity;
use crate::mode::Mode;
use crate::operation::original_uri;
use crate::policy::Policy;
use crate::rejection::{Code, Rejection};
use crate::shared::Shared;
use crate::stats::Event;
use crate::store::Store;

use claim::Entry;

/// A request that is covered, and carries a key or may tell one.
pub(crate) struct Call<S> {
    pub(crate) shared: Arc<Shared<S>>,
    pub(crate) policy: Arc<Policy>,
    pub(crate) operation: String,
    pub(crate) key: Option<String>,
}

/// One operation on its way through the layer.
pub struct Exchange<S> {
    shared: Arc<Shared<S>>,
    policy: Arc<Policy>,
    identity: Identity,
    fingerprint: Fingerprint,
    counted: Arc<AtomicBool>,
}

/// # Cancel safety
///
/// Until the body is read nothing has happened. From then on a task of its own does the work, and
/// dropping this future only means that nobody waits for the answer.
#[allow(
    clippy::manual_async_fn,
    reason = "arguments of an `async fn` take their room twice"
)]
pub(crate) fn run<M, I, S, ReqBody, ResBody>(
    mut call: Call<S>,
    mut inner: I,
    parts: Parts,
    body: ReqBody,
) -> impl Future<Output = Result<Response<Body>, I::Error>> + Send
where
    I: Service<Request<Body>, Response = Response<ResBody>> + Clone + Send + 'static,
    I::Future: Send,
    I::Error: Send + 'static,
    ReqBody: HttpBody<Data = Bytes> + Send,
    ReqBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S: Store,
    M: Mode<S>,
{
    async move {
        if call.is_keyed() && call.shared.permits.available_permits() == 0 {
            return Ok(call.reject(Rejection::new(Code::Overloaded)));
        }
        let (exchange, body) = match call.open(&parts, body).await {
            Ok(opened) => opened,
            Err(rejection) => return Ok(call.reject(rejection)),
        };
        let Some(exchange) = exchange else {
            let request = Request::from_parts(parts, body.into_body());
            let response = Box::pin(inner.call(request)).await?;
            return Ok(response.map(Body::new));
        };
        let answer = exchange.detach(|exchange, reply| async move {
            M::drive(exchange, inner, parts, body, reply).await;
        });
        answer.await
    }
}

impl<S: Store> Call<S> {
    /// Whether the body decides nothing: without a key the request is refused.
    fn is_keyed(&self) -> bool {
        self.key.is_some() || self.policy.key.required
    }

    fn reject(&self, rejection: Rejection) -> Response<Body> {
        self.shared.reject(&self.policy, rejection)
    }

    /// All that can be said before the store is asked. `None` for a request that tells no key where
    /// none is required.
    async fn open<B>(
        &mut self,
        parts: &Parts,
        body: B,
    ) -> Result<(Option<Exchange<S>>, Whole), Rejection>
    where
        B: HttpBody<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (shared, policy) = (&self.shared, &self.policy);
        let scope = policy.scope.as_ref().unwrap_or(&shared.scope);
        let scope = scope.resolve(parts);
        let missing = || Rejection::new(Code::ScopeMissing);
        if self.key.is_some() && scope.is_none() {
            return Err(missing());
        }
        let patience = shared.request_timeout;
        let body = body::read_request(body, policy.request_limit, patience).await?;
        let key = match &policy.derived_key {
            Some(derived) => derived.key(parts, &body.bytes, self.key.as_deref()),
            None => self.key.take(),
        };
        let Some(key) = key else {
            return match policy.key.required {
                true if policy.derived_key.is_some() => Err(Rejection::new(Code::KeyMissing)
                    .with_detail("was not sent, and the request does not tell one")),
                true => Err(Rejection::new(Code::KeyMissing)),
                false => Ok((None, body)),
            };
        };
        let uri = original_uri(parts);
        let fingerprint = policy.fingerprint.fingerprint(parts, uri, &body.bytes);
        let operation = policy.operation.clone();
        let operation = operation.unwrap_or_else(|| mem::take(&mut self.operation));
        let identity = Identity::new(scope.ok_or_else(missing)?, operation, key);
        let exchange = Exchange {
            shared: shared.clone(),
            policy: policy.clone(),
            identity,
            fingerprint,
            counted: Arc::default(),
        };
        Ok((Some(exchange), body))
    }
}

impl<S: Store> Exchange<S> {
    /// An operation that was told by something else than a request.
    pub(crate) fn new(
        shared: Arc<Shared<S>>,
        policy: Policy,
        identity: Identity,
        fingerprint: Fingerprint,
    ) -> Self {
        Self {
            shared,
            policy: Arc::new(policy),
            identity,
            fingerprint,
            counted: Arc::default(),
        }
    }

    /// Runs the operation in a task of its own, and waits for its answer; what is known already needs
    /// neither a task nor a place among those that run.
    pub(crate) fn detach<E, D>(
        self,
        drive: impl FnOnce(Self, Reply<E>) -> D,
    ) -> impl Future<Output = Result<Response<Body>, E>> + Send
    where
        E: Send + 'static,
        D: Future<Output = ()> + Send + 'static,
    {
        let begun = self.begin(drive);
        async move {
            match begun {
                Begun::Detached(waiting) => waiting.answer().await,
                Begun::Answered(answer) => Ok(answer),
            }
        }
    }

    fn begin<E, D>(self, drive: impl FnOnce(Self, Reply<E>) -> D) -> Begun<S, E>
    where
        E: Send + 'static,
        D: Future<Output = ()> + Send + 'static,
    {
        if let Some(replay) = self.cached() {
            return Begun::Answered(replay);
        }
        let (shared, policy) = (self.shared.clone(), self.policy.clone());
        let rejected = |code| Begun::Answered(shared.reject(&policy, Rejection::new(code)));
        let Ok(permit) = shared.permits.clone().try_acquire_owned() else {
            return rejected(Code::Overloaded);
        };
        let Some(entered) = shared.enter() else {
            return rejected(Code::ShuttingDown);
        };
        let counted = self.counted.clone();
        let (sender, answer) = oneshot::channel();
        let reply = Reply {
            client: Some(sender),
            permit: Some(permit),
        };
        // Moved by its address from here on: each move would else leave room for it twice.
        let driven = Box::pin(drive(self, reply));
        shared.spawn(async move {
            driven.await;
            drop(entered);
        });
        Begun::Detached(Waiting {
            shared,
            policy,
            counted,
            answer,
        })
    }

    pub(crate) async fn run_leased<I, B>(
        &self,
        inner: I,
        request: Request<Body>,
        mut reply: Reply<I::Error>,
    ) where
        I: Service<Request<Body>, Response = Response<B>>,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        match self.claim(&mut reply).await {
            Entry::Answer(response) => reply.send(Ok(response)),
            Entry::Claimed(grant, listed) => {
                self.execute(inner, request, grant, listed, reply).await;
            }
            Entry::Abandoned(grant, listed) => self.answer_lost(grant, listed, reply).await,
            Entry::Unprotected(listed) => {
                self.execute_unprotected(inner, request, listed, reply)
                    .await;
            }
        }
    }

    /// Once a request: what runs again may be answered in another way.
    fn count(&self, event: Event) {
        if !self.counted.swap(true, Ordering::Relaxed) {
            self.shared.count(event);
        }
    }

    /// Counts the rejection and makes an answer of it.
    fn reject(&self, rejection: Rejection) -> Response<Body> {
        if self.counted.swap(true, Ordering::Relaxed) {
            return self.render(rejection);
        }
        self.shared.reject(&self.policy, rejection)
    }

    /// Makes an answer of a rejection of a request that is counted already.
    fn render(&self, rejection: Rejection) -> Response<Body> {
        self.shared.render(&self.policy, rejection)
    }
}

impl<S> fmt::Debug for Exchange<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").finish_non_exhaustive()
    }
}

/// What became of an operation that is to be run.
enum Begun<S, E> {
    Detached(Waiting<S, E>),
    /// It is not run.
    Answered(Response<Body>),
}

/// A client that waits for the task of its operation.
struct Waiting<S, E> {
    shared: Arc<Shared<S>>,
    policy: Arc<Policy>,
    counted: Arc<AtomicBool>,
    answer: oneshot::Receiver<Result<Response<Body>, E>>,
}

impl<S: Store, E> Waiting<S, E> {
    async fn answer(self) -> Result<Response<Body>, E> {
        if let Ok(answer) = self.answer.await {
            return answer;
        }
        // The runtime is going down, or a hook dropped the task: it may have run, or not.
        let rejection = Rejection::new(Code::AnswerNotRecorded);
        Ok(match self.counted.load(Ordering::Relaxed) {
            true => self.shared.render(&self.policy, rejection),
            false => self.shared.reject(&self.policy, rejection),
        })
    }
}

/// The client's end of an operation, which may be gone, and its place among those that run.
pub struct Reply<E> {
    client: Option<oneshot::Sender<Result<Response<Body>, E>>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl<E> fmt::Debug for Reply<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").finish_non_exhaustive()
    }
}

impl<E> Reply<E> {
    /// The place is free before the client knows: its next request must find it.
    fn send(&mut self, answer: Result<Response<Body>, E>) {
        drop(self.permit.take());
        self.send_early(answer);
    }

    /// The place stays taken while the answer is still being recorded.
    fn send_early(&mut self, answer: Result<Response<Body>, E>) {
        if let Some(client) = self.client.take() {
            // Nobody waits any more: the answer is in the record.
            drop(client.send(answer));
        }
    }

    /// Ends when the client is gone.
    async fn closed(&mut self) {
        if let Some(client) = &mut self.client {
            client.closed().await;
        }
    }
}
