use std::fmt;
use std::marker::PhantomData;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum_core::body::Body;
use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tower_service::Service;

use crate::future::ResponseFuture;
use crate::key::KeyError;
use crate::mode::{Leased, Mode};
use crate::operation;
use crate::outcome::Outcome;
use crate::policy::Policy;
use crate::rejection::{Code, Rejection};
use crate::run::{self, Call};
use crate::scope::Scope;
use crate::shared::Shared;
use crate::store::Store;

/// The service an [`IdempotencyLayer`](crate::IdempotencyLayer) makes of another.
///
/// ```
/// use std::convert::Infallible;
/// use axum::{body::Body, http::{Request, Response}};
/// use tower::{Layer, ServiceExt, service_fn};
/// use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let inner = service_fn(|_: Request<Body>| async {
///     Ok::<_, Infallible>(Response::new(Body::from("ordered")))
/// });
/// let service = IdempotencyLayer::new(MemoryStore::new(), Scope::global()).layer(inner);
///
/// let order = Request::post("/orders").header("idempotency-key", "order-1");
/// let answer = service.oneshot(order.body(Body::empty())?).await?;
/// assert_eq!(answer.status(), 200);
/// # Ok(())
/// # }
/// ```
pub struct Idempotency<I, S, M = Leased> {
    inner: I,
    shared: Arc<Shared<S>>,
    mode: PhantomData<fn() -> M>,
}

impl<I, S, M> Idempotency<I, S, M> {
    pub(crate) fn new(inner: I, shared: Arc<Shared<S>>) -> Self {
        Self {
            inner,
            shared,
            mode: PhantomData,
        }
    }
}

impl<I: fmt::Debug, S, M> fmt::Debug for Idempotency<I, S, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl<I: Clone, S, M> Clone for Idempotency<I, S, M> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
            mode: PhantomData,
        }
    }
}

/// What the service does with a request.
enum Decision {
    PassThrough,
    Reject(Arc<Policy>, Rejection),
    Run {
        policy: Arc<Policy>,
        operation: String,
        key: Option<String>,
    },
}

/// Left in the request by the layer that covers it, for layers further in.
#[derive(Debug, Clone)]
pub(crate) struct Covered {
    pub(crate) policy: Arc<Policy>,
    pub(crate) scope: Scope,
    pub(crate) layer: usize,
    pub(crate) core: usize,
    pub(crate) is_transactional: bool,
}

impl<I, S, M, ReqBody, ResBody> Service<Request<ReqBody>> for Idempotency<I, S, M>
where
    I: Service<Request<Body>, Response = Response<ResBody>> + Clone + Send + 'static,
    I::Future: Send + 'static,
    I::Error: Send + 'static,
    ReqBody: HttpBody<Data = Bytes> + Send + 'static,
    ReqBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S: Store,
    M: Mode<S>,
{
    type Response = Response<Body>;
    type Error = I::Error;
    type Future = ResponseFuture<I::Future, I::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), I::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let (parts, body) = request.into_parts();
        match self.shared.decide(&parts, M::IS_TRANSACTIONAL) {
            Decision::PassThrough => {
                let request = Request::from_parts(parts, Body::new(body));
                ResponseFuture::pass_through(self.inner.call(request))
            }
            Decision::Reject(policy, rejection) => {
                ResponseFuture::ready(self.shared.refuse(&policy, rejection))
            }
            Decision::Run {
                policy,
                operation,
                key,
            } => {
                // The one that was polled ready; its clone is not (tower's contract of `Service`).
                let clone = self.inner.clone();
                let inner = mem::replace(&mut self.inner, clone);
                let call = Call {
                    shared: self.shared.clone(),
                    policy,
                    operation,
                    key,
                };
                ResponseFuture::tracked(run::run::<M, _, _, _, _>(call, inner, parts, body))
            }
        }
    }
}

impl<S: Store> Shared<S> {
    fn decide(&self, parts: &Parts, is_transactional: bool) -> Decision {
        let table = self.policies.load();
        if !table.covers(&parts.method) {
            return Decision::PassThrough;
        }
        let operation = operation::of_request(parts);
        let policy = table.for_operation(&operation).clone();
        if !policy.covers(&parts.method) {
            return Decision::PassThrough;
        }
        let is_derived = policy.derived_key.is_some();
        let sent = match &policy.derived_key {
            Some(derived) if derived.is_alone => Ok(None),
            _ => policy.key.read(&parts.headers),
        };
        let key = match sent {
            Ok(None) | Err(KeyError::Missing) if is_derived => None,
            Ok(None) => return Decision::PassThrough,
            Ok(key) => key,
            Err(KeyError::Missing) => {
                return Decision::Reject(policy, Rejection::new(Code::KeyMissing));
            }
            Err(KeyError::Invalid(why)) => {
                let rejection = Rejection::new(Code::KeyInvalid).with_detail(why);
                return Decision::Reject(policy, rejection);
            }
        };
        match parts.extensions.get::<Covered>() {
            None => Decision::Run {
                policy,
                operation,
                key,
            },
            Some(outer) if self.agrees(outer, &policy, is_transactional) => Decision::PassThrough,
            Some(_) => {
                tracing::error!("an outer and an inner idempotency layer disagree on one route");
                Decision::Reject(policy, Rejection::new(Code::NestedLayers))
            }
        }
    }

    /// An outer layer that covers the request already is fine if it does the same. Clones read one
    /// table, though it may have been replaced in between.
    fn agrees(&self, outer: &Covered, policy: &Policy, is_transactional: bool) -> bool {
        let is_clone = outer.layer == self.id();
        let is_equal = outer.core == self.core_id()
            && *outer.policy == *policy
            && outer.scope == *policy.scope.as_ref().unwrap_or(&self.scope);
        outer.is_transactional == is_transactional && (is_clone || is_equal)
    }

    /// Tells clones of a layer from others.
    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Tells layers of one store from those of another.
    pub(crate) fn core_id(&self) -> usize {
        Arc::as_ptr(&self.core).addr()
    }

    /// Where layers disagree, the outer one has to free its key. Any other refusal is an answer like
    /// another: what was done in front of it, or by the handler that passes it on, is not known here.
    fn refuse(&self, policy: &Policy, rejection: Rejection) -> Response<Body> {
        let disagrees = rejection.code() == Code::NestedLayers;
        let mut response = self.reject(policy, rejection);
        if disagrees {
            response.extensions_mut().insert(Outcome::Release);
        }
        response
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::convert::Infallible;

    use tower::{Layer as _, service_fn};

    use super::*;
    use crate::{IdempotencyLayer, MemoryStore};

    /// The GNU allocator keeps pieces of up to 1,032 bytes for each thread. Larger ones are behind a lock,
    /// which threads that share a core wait for in turns.
    #[test]
    fn a_request_takes_no_large_piece_of_memory_until_it_has_a_task() {
        let inner =
            service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(Body::empty())));
        let service = IdempotencyLayer::new(MemoryStore::new(), Scope::global()).layer(inner);
        let (parts, body) = Request::new(Body::empty()).into_parts();
        let call = Call {
            shared: service.shared.clone(),
            policy: Arc::new(Policy::high()),
            operation: "POST /orders".to_owned(),
            key: Some("order-1".to_owned()),
        };
        let running = run::run::<Leased, _, _, _, _>(call, service.inner, parts, body);
        let size = size_of_val(&running);
        assert!(size <= 1032, "{size}");
    }
}
