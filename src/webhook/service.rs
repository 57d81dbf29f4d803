use std::fmt;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum_core::body::Body;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tower_service::Service;

use crate::webhook::layer::Receiver;

/// The service a [`WebhookLayer`](crate::webhook::WebhookLayer) makes of another.
#[derive(Debug, Clone)]
pub struct Webhook<I> {
    inner: I,
    receiver: Arc<Receiver>,
}

impl<I> Webhook<I> {
    pub(crate) fn new(inner: I, receiver: Arc<Receiver>) -> Self {
        Self { inner, receiver }
    }
}

impl<I, ReqBody, ResBody> Service<Request<ReqBody>> for Webhook<I>
where
    I: Service<Request<Body>, Response = Response<ResBody>> + Clone + Send + 'static,
    I::Future: Send + 'static,
    I::Error: 'static,
    ReqBody: HttpBody<Data = Bytes> + Send + 'static,
    ReqBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = I::Error;
    type Future = ResponseFuture<I::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), I::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        // The one that was polled ready; its clone is not (tower's contract of `Service`).
        let clone = self.inner.clone();
        let inner = mem::replace(&mut self.inner, clone);
        let answer = deliver(self.receiver.clone(), inner, request);
        ResponseFuture {
            answer: Box::pin(answer),
        }
    }
}

/// # Cancel safety
///
/// Until the body is read nothing has happened; from then on it is the inner service's.
async fn deliver<I, ReqBody, ResBody>(
    receiver: Arc<Receiver>,
    mut inner: I,
    request: Request<ReqBody>,
) -> Result<Response<Body>, I::Error>
where
    I: Service<Request<Body>, Response = Response<ResBody>>,
    ReqBody: HttpBody<Data = Bytes>,
    ReqBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (mut parts, body) = request.into_parts();
    let (event, body) = match receiver.receive(&parts.headers, body).await {
        Ok(received) => received,
        Err(rejection) => return Ok(receiver.refuse(&rejection)),
    };
    parts.extensions.insert(event);
    let request = Request::from_parts(parts, body.into_body());
    let response = inner.call(request).await?;
    Ok(response.map(Body::new))
}

/// The future of a [`Webhook`].
pub struct ResponseFuture<E> {
    answer: Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>,
}

impl<E> Future for ResponseFuture<E> {
    type Output = Result<Response<Body>, E>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.answer.as_mut().poll(context)
    }
}

impl<E> fmt::Debug for ResponseFuture<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
