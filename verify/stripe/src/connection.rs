use std::convert::Infallible;
use std::error::Error;
use std::io;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt;

/// Marks an answer in whose place the connection is closed.
#[derive(Debug, Clone)]
struct Lost;

/// What [`serve`] closes the connection for.
pub(crate) fn lose() -> Response {
    let mut response = ().into_response();
    response.extensions_mut().insert(Lost);
    response
}

/// Serves until the process is ended.
///
/// axum's own `serve` has no way to close a connection without an answer.
pub(crate) async fn serve(listener: TcpListener, app: Router) -> Result<(), Box<dyn Error>> {
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(converse(stream, app.clone()));
    }
}

async fn converse(stream: TcpStream, app: Router) {
    let service = service_fn(|request| answer(request, app.clone()));
    // It fails where a connection is lost on purpose, and where a client hangs up.
    let _ = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(request: Request<Incoming>, app: Router) -> Result<Response, io::Error> {
    let answered: Result<Response, Infallible> = app.oneshot(request.map(Body::new)).await;
    let Ok(response) = answered;
    if response.extensions().get::<Lost>().is_some() {
        return Err(io::Error::other("lost, as was asked for"));
    }
    Ok(response)
}
