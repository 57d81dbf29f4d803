//! The two kinds of route, told apart by type: only a store with transactions can have both.

use std::future::Future;

use axum_core::body::Body;
use bytes::Bytes;
use http::request::Parts;
use http::{Request, Response};
use http_body::Body as HttpBody;
use tower_service::Service;

use crate::body::Whole;
use crate::run::{Exchange, Reply};
use crate::store::{Store, TransactionalStore};

/// A route that claims its key, runs, and then records the answer, which takes three steps. What its
/// handler does is outside of the record. The kind of every layer, unless it is
/// [made transactional](crate::IdempotencyLayer::transactional).
#[derive(Debug)]
pub enum Leased {}

/// A route whose handler writes in one transaction with its record.
#[derive(Debug)]
pub enum Transactional {}

/// [`Leased`] on any store, or [`Transactional`] on a [`TransactionalStore`].
pub trait Mode<S>: Drive<S> {}

impl<S, M: Drive<S>> Mode<S> for M {}

pub trait Drive<S>: Send + Sync + 'static {
    const IS_TRANSACTIONAL: bool;

    /// Takes one operation to its end.
    fn drive<I, B>(
        exchange: Exchange<S>,
        inner: I,
        parts: Parts,
        body: Whole,
        reply: Reply<I::Error>,
    ) -> impl Future<Output = ()> + Send
    where
        I: Service<Request<Body>, Response = Response<B>> + Clone + Send,
        I::Future: Send,
        I::Error: Send,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>;
}

impl<S: Store> Drive<S> for Leased {
    const IS_TRANSACTIONAL: bool = false;

    async fn drive<I, B>(
        exchange: Exchange<S>,
        inner: I,
        parts: Parts,
        body: Whole,
        reply: Reply<I::Error>,
    ) where
        I: Service<Request<Body>, Response = Response<B>> + Clone + Send,
        I::Future: Send,
        I::Error: Send,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let request = Request::from_parts(parts, body.into_body());
        exchange.run_leased(inner, request, reply).await;
    }
}

impl<S: TransactionalStore> Drive<S> for Transactional {
    const IS_TRANSACTIONAL: bool = true;

    async fn drive<I, B>(
        exchange: Exchange<S>,
        inner: I,
        parts: Parts,
        body: Whole,
        reply: Reply<I::Error>,
    ) where
        I: Service<Request<Body>, Response = Response<B>> + Clone + Send,
        I::Future: Send,
        I::Error: Send,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        exchange.run_transaction(inner, parts, body, reply).await;
    }
}
