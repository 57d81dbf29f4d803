use std::panic::AssertUnwindSafe;
use std::time::Duration;

use axum_core::body::Body;
use bytes::Bytes;
use futures_util::FutureExt;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body::Body as HttpBody;
use tokio::time::timeout;
use tower_service::Service;

use super::claim::Grant;
use super::settle::Attempt;
use super::{Exchange, Reply};
use crate::body::{self, Captured};
use crate::extract::{IdempotencyContext, Standing};
use crate::headers;
use crate::outcome::Outcome;
use crate::policy::EXECUTION_LIMIT;
use crate::rejection::Code;
use crate::running::Listed;
use crate::service::Covered;
use crate::stats::Event;
use crate::store::phases::Times;
use crate::store::{Phases, Store};

/// How the handler ended.
pub(super) enum Ended<E> {
    /// With a whole answer.
    Answered(Response<Bytes>, Option<Outcome>),
    /// With an answer whose body goes on.
    Streaming(Response<Body>, Option<Outcome>),
    /// Without one.
    Failed(Code),
    /// With an error of the inner service.
    Error(E),
}

impl<S: Store> Exchange<S> {
    /// # Cancel safety
    ///
    /// Runs in the detached task, under a lease that the heartbeat keeps. Were the task dropped, the
    /// lease would run out and the policy decide.
    pub(super) async fn execute<I, B>(
        &self,
        inner: I,
        mut request: Request<Body>,
        grant: Grant,
        listed: Listed,
        reply: Reply<I::Error>,
    ) where
        I: Service<Request<Body>, Response = Response<B>>,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.count(Event::Executed);
        let lease = self.keep(&grant, &listed);
        let standing = Standing::Lease(lease.clone());
        let Grant {
            claim,
            sent,
            unheard,
            ..
        } = grant;
        let context = IdempotencyContext::new(self.identity.clone(), claim.attempt, standing);
        self.prepare(&mut request, &context, false);
        let times = Times {
            limit: self.leased_limit(),
            patience: self.policy.settle_timeout,
        };
        let store = self.shared.core.store.clone();
        let phases = Phases::new(store, claim.clone(), context.clone(), times);
        request.extensions_mut().insert(phases);
        let ended = self.perform(inner, request, self.leased_limit()).await;
        let attempt = Attempt {
            claim,
            sent,
            listed,
            lease,
            unheard,
        };
        self.settle(attempt, ended, context.references(), reply)
            .await;
    }

    pub(super) async fn execute_unprotected<I, B>(
        &self,
        inner: I,
        mut request: Request<Body>,
        listed: Listed,
        mut reply: Reply<I::Error>,
    ) where
        I: Service<Request<Body>, Response = Response<B>>,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.count(Event::Unprotected);
        tracing::warn!(id = %self.identity.id(), operation = self.identity.operation(), "runs unprotected");
        let context = IdempotencyContext::new(self.identity.clone(), 1, Standing::Nothing);
        self.prepare(&mut request, &context, false);
        let ended = self.perform(inner, request, self.leased_limit()).await;
        let marked = self.answer_of(ended).await.map(|mut response| {
            let yes = HeaderValue::from_static("true");
            response.headers_mut().insert(headers::UNPROTECTED, yes);
            response
        });
        drop(listed);
        reply.send(marked);
    }

    fn leased_limit(&self) -> Duration {
        self.policy.execution_limit.unwrap_or(EXECUTION_LIMIT)
    }

    pub(super) fn prepare(
        &self,
        request: &mut Request<Body>,
        context: &IdempotencyContext,
        is_transactional: bool,
    ) {
        let extensions = request.extensions_mut();
        extensions.insert(context.clone());
        extensions.insert(Covered {
            policy: self.policy.clone(),
            scope: self
                .policy
                .scope
                .as_ref()
                .unwrap_or(&self.shared.scope)
                .clone(),
            layer: self.shared.id(),
            core: self.shared.core_id(),
            is_transactional,
        });
    }

    /// Runs the handler within its limit, and catches its panics: neither may leave the record behind.
    pub(super) async fn perform<I, B>(
        &self,
        inner: I,
        request: Request<Body>,
        limit: Duration,
    ) -> Ended<I::Error>
    where
        I: Service<Request<Body>, Response = Response<B>>,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let id = self.identity.id();
        let run = AssertUnwindSafe(self.call(inner, request)).catch_unwind();
        match timeout(limit, run).await {
            Ok(Ok(ended)) => ended,
            Ok(Err(_panic)) => {
                tracing::error!(%id, operation = self.identity.operation(), "handler panicked");
                Ended::Failed(Code::HandlerPanicked)
            }
            Err(_elapsed) => {
                tracing::error!(%id, operation = self.identity.operation(), "handler reached its execution limit");
                Ended::Failed(Code::ExecutionLimit)
            }
        }
    }

    async fn call<I, B>(&self, mut inner: I, request: Request<Body>) -> Ended<I::Error>
    where
        I: Service<Request<Body>, Response = Response<B>>,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut response = match inner.call(request).await {
            Ok(response) => response.map(Body::new),
            Err(error) => return Ended::Error(error),
        };
        headers::strip_markers(response.headers_mut());
        let outcome = response.extensions_mut().remove::<Outcome>();
        if outcome == Some(Outcome::Stream) || is_endless(&response) {
            return Ended::Streaming(response, outcome);
        }
        let (parts, body) = response.into_parts();
        let (limit, patience) = (self.policy.response_limit, self.policy.body_deadline);
        match body::capture(body, limit, patience).await {
            Captured::Whole(bytes) => Ended::Answered(Response::from_parts(parts, bytes), outcome),
            Captured::Stream(body) => Ended::Streaming(Response::from_parts(parts, body), outcome),
            Captured::Broken(error) => {
                let cause: &dyn std::error::Error = &error;
                let (id, operation) = (self.identity.id(), self.identity.operation());
                tracing::error!(%id, operation, error = cause, "answer broke off");
                Ended::Failed(Code::ResponseFailed)
            }
        }
    }
}

fn is_endless<B>(response: &Response<B>) -> bool {
    let kind = response.headers().get(CONTENT_TYPE);
    let is_event_stream = kind.is_some_and(|kind| {
        let kind = kind.as_bytes();
        kind.len() >= 17 && kind[..17].eq_ignore_ascii_case(b"text/event-stream")
    });
    is_event_stream || response.status() == StatusCode::SWITCHING_PROTOCOLS
}
