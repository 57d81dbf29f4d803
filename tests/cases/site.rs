//! A server on a real socket, a client for it, and a handler that waits where a test wants it to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{MethodFilter, MethodRouter, on};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tower_idempotency::{IdempotencyLayer, Policy, Store};

use crate::common::fired::fired;

/// Longer than anything takes: a test that waits for it has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Site {
    pub address: SocketAddr,
    server: tokio::task::JoinHandle<()>,
}

impl Site {
    pub async fn start(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, server }
    }

    /// `POST /orders` and all other methods to one handler behind one layer.
    pub async fn orders<S: Store>(layer: &IdempotencyLayer<S>, handler: MethodRouter) -> Self {
        Self::start(Router::new().route("/orders", handler.layer(layer.clone()))).await
    }

    pub async fn send(&self, sent: Sent) -> Answer {
        tokio::time::timeout(PATIENCE, sent.send_to(self.address))
            .await
            .expect("answered in time")
    }

    /// `POST /orders` of tenant `acme` with a key.
    pub async fn order(&self, key: &str) -> Answer {
        self.send(Sent::order(key)).await
    }

    /// A connection to write bytes to.
    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes as they are, and reads until the server closes or has answered.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let read = async {
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut chunk).await {
                answer.extend(&chunk[..length]);
                if is_complete(&answer) {
                    break;
                }
            }
        };
        tokio::time::timeout(PATIENCE, read).await.unwrap();
        fired("request");
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn is_complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let head = head.to_ascii_lowercase();
    let length = head.split_once("content-length: ").map(|(_, rest)| {
        let number = rest.lines().next().unwrap_or_default();
        number.trim().parse::<usize>().unwrap()
    });
    length.is_some_and(|length| body.len() >= length) || body.ends_with("0\r\n\r\n")
}

/// A request to be sent.
#[derive(Debug, Clone)]
pub struct Sent {
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Sent {
    pub fn new(method: Method, path: &str) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("x-tenant", "acme".parse().unwrap());
        headers.insert("content-type", "application/json".parse().unwrap());
        Self {
            method,
            path: path.to_owned(),
            headers,
            body: Bytes::from_static(br#"{"item":"tea"}"#),
        }
    }

    pub fn post(path: &str) -> Self {
        Self::new(Method::POST, path)
    }

    pub fn order(key: &str) -> Self {
        Self::post("/orders").key(key)
    }

    pub fn key(self, key: &str) -> Self {
        self.header("idempotency-key", key)
    }

    /// Adds a line.
    pub fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.append(name, value.parse().unwrap());
        self
    }

    pub fn header_bytes(mut self, name: &'static str, value: &[u8]) -> Self {
        let value = axum::http::HeaderValue::from_bytes(value).unwrap();
        self.headers.append(name, value);
        self
    }

    pub fn tenant(mut self, tenant: &str) -> Self {
        self.headers.insert("x-tenant", tenant.parse().unwrap());
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.headers.remove(name);
        self
    }

    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    pub async fn send_to(self, address: SocketAddr) -> Answer {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let mut request = Request::new(Full::new(self.body));
        *request.method_mut() = self.method;
        *request.uri_mut() = self.path.parse().unwrap();
        *request.headers_mut() = self.headers;
        let host = address.to_string().parse().unwrap();
        request.headers_mut().insert("host", host);
        let response = sender.send_request(request).await.unwrap();
        fired("request");
        let (parts, body) = response.into_parts();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: body.collect().await.unwrap().to_bytes(),
        }
    }
}

/// An answer, read whole.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    /// An answer as its bytes were, with a body of known length.
    pub fn read(raw: &str) -> Self {
        let (head, body) = raw.split_once("\r\n\r\n").expect(raw);
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        let headers = lines.map(|line| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.parse().unwrap(), value.parse().unwrap())
        });
        Self {
            status: status.parse().unwrap(),
            headers: headers.collect(),
            body: Bytes::from(body.to_owned()),
        }
    }

    pub fn is_replay(&self) -> bool {
        self.headers
            .get("idempotent-replayed")
            .is_some_and(|v| v == "true")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The answer is the layer's own: its status and code.
    #[track_caller]
    pub fn assert_problem(&self, status: u16, code: &str) {
        let shown = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, status, "{shown}");
        assert_eq!(self.headers["content-type"], "application/problem+json");
        let problem = self.json();
        assert_eq!(problem["code"], code);
        assert_eq!(problem["status"], status);
        assert!(!self.is_replay());
    }

    #[track_caller]
    pub fn assert_run(&self, run: usize) {
        let shown = String::from_utf8_lossy(&self.body);
        assert_eq!(self.status, StatusCode::CREATED, "{shown}");
        assert!(!self.is_replay(), "{shown}");
        assert_eq!(self.json()["run"], run);
    }

    #[track_caller]
    pub fn assert_replay_of(&self, first: &Self) {
        assert!(self.is_replay(), "{self:?}");
        assert_eq!((self.status, &self.body), (first.status, &first.body));
    }
}

/// Counts runs, and lets each wait until the test lets it go.
#[derive(Debug, Clone)]
pub struct Runs {
    count: Arc<AtomicUsize>,
    entered: Arc<Semaphore>,
    leave: Arc<Semaphore>,
}

impl Runs {
    /// Handlers answer at once.
    pub fn free() -> Self {
        let runs = Self::gated();
        runs.leave.add_permits(Semaphore::MAX_PERMITS / 2);
        runs
    }

    /// Handlers wait for [`let_go`](Self::let_go).
    pub fn gated() -> Self {
        Self {
            count: Arc::default(),
            entered: Arc::new(Semaphore::new(0)),
            leave: Arc::new(Semaphore::new(0)),
        }
    }

    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Waits until one more handler has been entered.
    pub async fn entered(&self) {
        let entered = tokio::time::timeout(PATIENCE, self.entered.acquire()).await;
        entered.expect("a handler was entered").unwrap().forget();
    }

    /// Lets one handler go on.
    pub fn let_go(&self) {
        self.leave.add_permits(1);
    }

    pub async fn run(&self) -> usize {
        let run = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        self.entered.add_permits(1);
        self.leave.acquire().await.unwrap().forget();
        run
    }

    /// A handler for every method that answers 201 with the number of its run.
    pub fn handler(&self) -> MethodRouter {
        self.answering(|run| {
            let location = format!("/orders/{run}");
            let body = axum::Json(serde_json::json!({ "run": run }));
            (StatusCode::CREATED, [("location", location)], body)
        })
    }

    /// A handler for every method that makes its answer of the number of its run.
    pub fn answering<R: IntoResponse>(
        &self,
        answer: impl Fn(usize) -> R + Clone + Send + Sync + 'static,
    ) -> MethodRouter {
        let runs = self.clone();
        every_method(move |_body: Bytes| {
            let (runs, answer) = (runs.clone(), answer.clone());
            async move { answer(runs.run().await).into_response() }
        })
    }
}

pub fn every_method<H, T>(handler: H) -> MethodRouter
where
    H: axum::handler::Handler<T, ()>,
    T: 'static,
{
    let filter = MethodFilter::GET
        .or(MethodFilter::OPTIONS)
        .or(MethodFilter::TRACE)
        .or(MethodFilter::POST)
        .or(MethodFilter::PUT)
        .or(MethodFilter::PATCH)
        .or(MethodFilter::DELETE);
    on(filter, handler)
}

/// A policy with every setting of the preset but a limit that tests can reach.
pub fn policy() -> Policy {
    Policy::high().with_volatile_store(true)
}

/// The critical preset, on any store.
pub fn critical() -> Policy {
    Policy::critical().with_volatile_store(true)
}

/// Looks again until it holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A body of chunks that come when the test sends them.
pub fn channel_body() -> (
    tokio::sync::mpsc::Sender<Result<Bytes, std::io::Error>>,
    Body,
) {
    let (sender, mut receiver) = tokio::sync::mpsc::channel(16);
    let stream = futures_util::stream::poll_fn(move |context| receiver.poll_recv(context));
    (sender, Body::from_stream(stream))
}
