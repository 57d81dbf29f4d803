use std::fmt;
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
use crate::layer::Shared;
use crate::operation;
use crate::outcome::Outcome;
use crate::policy::{Policy, PolicyTable};
use crate::rejection::{Code, Rejection};
use crate::run::{self, Call};
use crate::scope::Scope;
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
pub struct Idempotency<I, S> {
    inner: I,
    shared: Arc<Shared<S>>,
}

impl<I, S> Idempotency<I, S> {
    pub(crate) fn new(inner: I, shared: Arc<Shared<S>>) -> Self {
        Self { inner, shared }
    }
}

impl<I: fmt::Debug, S> fmt::Debug for Idempotency<I, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl<I: Clone, S> Clone for Idempotency<I, S> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
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
}

impl<I, S, ReqBody, ResBody> Service<Request<ReqBody>> for Idempotency<I, S>
where
    I: Service<Request<Body>, Response = Response<ResBody>> + Clone + Send + 'static,
    I::Future: Send + 'static,
    I::Error: Send + 'static,
    ReqBody: HttpBody<Data = Bytes> + Send + 'static,
    ReqBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S: Store,
{
    type Response = Response<Body>;
    type Error = I::Error;
    type Future = ResponseFuture<I::Future, I::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), I::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let (parts, body) = request.into_parts();
        match self.shared.decide(&parts) {
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
                ResponseFuture::tracked(run::run(call, inner, parts, body))
            }
        }
    }
}

impl<S: Store> Shared<S> {
    fn decide(&self, parts: &Parts) -> Decision {
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
        match policy.key.read(&parts.headers) {
            Ok(None) | Err(KeyError::Missing) if is_derived => {
                self.decide_nested(parts, policy, operation, None)
            }
            Ok(None) => Decision::PassThrough,
            Ok(key) => self.decide_nested(parts, policy, operation, key),
            Err(KeyError::Missing) => Decision::Reject(policy, Rejection::new(Code::KeyMissing)),
            Err(KeyError::Invalid(why)) => {
                Decision::Reject(policy, Rejection::new(Code::KeyInvalid).with_detail(why))
            }
        }
    }

    /// An outer layer that covers the request already is fine if it does the same.
    fn decide_nested(
        &self,
        parts: &Parts,
        policy: Arc<Policy>,
        operation: String,
        key: Option<String>,
    ) -> Decision {
        match parts.extensions.get::<Covered>() {
            None => Decision::Run {
                policy,
                operation,
                key,
            },
            // Clones read one table, though it may have been replaced in between.
            Some(outer) if outer.layer == self.id() => Decision::PassThrough,
            Some(outer)
                if outer.core == self.core_id()
                    && *outer.policy == *policy
                    && outer.scope == *policy.scope.as_ref().unwrap_or(&self.scope) =>
            {
                Decision::PassThrough
            }
            Some(_) => {
                tracing::error!("an outer and an inner idempotency layer disagree on one route");
                Decision::Reject(policy, Rejection::new(Code::NestedLayers))
            }
        }
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

impl PolicyTable {
    fn covers(&self, method: &http::Method) -> bool {
        let mut routes = self.routes.values();
        self.default.covers(method) || routes.any(|policy| policy.covers(method))
    }
}
