//! Publishing by POST, over real sockets.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse as _;
use axum::routing::post;
use tokio::net::TcpListener;
use tower_idempotency::outbox::HttpPublisher;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope};

use crate::common::fired::fired;

use super::{Fixture, message, until};

const GRACE: Duration = Duration::from_secs(20);

type Answer = Arc<dyn Fn(usize) -> StatusCode + Send + Sync>;

#[derive(Clone)]
struct Receiver {
    got: Arc<Mutex<Vec<(HeaderMap, String)>>>,
    answer: Answer,
}

impl Receiver {
    /// Answers request `n`, counted from 0.
    fn new(answer: impl Fn(usize) -> StatusCode + Send + Sync + 'static) -> Self {
        Self {
            got: Arc::default(),
            answer: Arc::new(answer),
        }
    }

    fn router(&self) -> Router {
        Router::new()
            .route("/intake", post(take))
            .with_state(self.clone())
    }

    fn bodies(&self) -> Vec<String> {
        let got = self.got.lock().unwrap();
        got.iter().map(|(_, body)| body.clone()).collect()
    }
}

async fn take(State(receiver): State<Receiver>, headers: HeaderMap, body: String) -> StatusCode {
    let mut got = receiver.got.lock().unwrap();
    got.push((headers, body));
    (receiver.answer)(got.len() - 1)
}

async fn serve(router: Router) -> HttpPublisher {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/intake", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    HttpPublisher::new(&uri).unwrap()
}

#[tokio::test]
async fn a_post_carries_the_payload_and_says_which_message_it_is() {
    let fixture = Fixture::new().await;
    let receiver = Receiver::new(|_| StatusCode::ACCEPTED);
    let publisher = serve(receiver.router()).await;
    let id = fixture
        .commit(message("a", 7).with_header("schema-version", "1"))
        .await;
    let relay = fixture.relay(publisher).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let got = receiver.got.lock().unwrap();
    let (headers, body) = &got[0];
    assert_eq!((got.len(), body.as_str()), (1, "7"));
    assert_eq!(headers["idempotency-key"], id.to_string());
    assert_eq!(headers["webhook-id"], id.to_string());
    assert_eq!(headers["message-topic"], "thing.changed");
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(headers["schema-version"], "1");
}

#[tokio::test]
async fn a_message_that_is_not_answered_2xx_is_posted_again_before_the_next() {
    let fixture = Fixture::new().await;
    let receiver = Receiver::new(|n| match n {
        0 => StatusCode::INTERNAL_SERVER_ERROR,
        1 => StatusCode::CONFLICT,
        2 => StatusCode::FOUND,
        _ => StatusCode::NO_CONTENT,
    });
    let publisher = serve(receiver.router()).await;
    fixture.commit(message("a", 1)).await;
    fixture.commit(message("a", 2)).await;
    let relay = fixture.relay(publisher).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(receiver.bodies(), ["1", "1", "1", "1", "2"]);
}

#[tokio::test]
async fn a_message_that_the_receiver_can_never_take_is_dead_at_once() {
    let fixture = Fixture::new().await;
    let receiver = Receiver::new(|_| StatusCode::UNPROCESSABLE_ENTITY);
    let publisher = serve(receiver.router()).await;
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(publisher).spawn();
    until("it is dead", async || relay.stats().dead == 1).await;
    assert!(relay.shutdown(GRACE).await);
    let dead = fixture.outbox().list_dead(None, 1).await.unwrap();
    let said = dead[0].last_error.as_deref();
    assert_eq!(said, Some("answered 422 Unprocessable Entity"));
    assert_eq!(receiver.bodies(), ["1"]);
}

#[tokio::test]
async fn g09_a_receiver_with_the_layer_takes_a_message_in_once() {
    let fixture = Fixture::new().await;
    let receiver = Receiver::new(|_| StatusCode::CREATED);
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    let publisher = serve(receiver.router().route_layer(layer)).await;
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(publisher).spawn();
    fixture.drained().await;
    // As if no acknowledgement had come.
    fixture
        .execute(
            "update idempotency.outbox set state = 'pending', finished_at = null,
                available_at = clock_timestamp()",
        )
        .await;
    fired("acknowledgement lost");
    until("it was sent twice", async || relay.stats().sent == 2).await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(receiver.bodies(), ["1"]);
}

#[tokio::test]
async fn g08_a_receiver_that_takes_nothing_at_present_costs_no_attempts() {
    let fixture = Fixture::new().await;
    let receiver = Receiver::new(|n| match n {
        0 => StatusCode::SERVICE_UNAVAILABLE,
        1 => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::OK,
    });
    let publisher = serve(receiver.router()).await;
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(publisher).with_max_attempts(1);
    let relay = relay.unwrap().spawn();
    fixture.drained().await;
    fired("receiver busy");
    assert_eq!((relay.stats().unavailable, relay.stats().dead), (2, 0));
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(receiver.bodies(), ["1", "1", "1"]);
}

/// Answers the first request with 503 and `Retry-After`; when each request came.
async fn busy_for(seconds: u64) -> (HttpPublisher, Arc<Mutex<Vec<Instant>>>) {
    let came = Arc::<Mutex<Vec<_>>>::default();
    let taking = came.clone();
    let take = async move || {
        let mut came = taking.lock().unwrap();
        came.push(Instant::now());
        if came.len() > 1 {
            return StatusCode::OK.into_response();
        }
        let headers = [(RETRY_AFTER, seconds.to_string())];
        (StatusCode::SERVICE_UNAVAILABLE, headers).into_response()
    };
    let publisher = serve(Router::new().route("/intake", post(take))).await;
    (publisher, came)
}

#[tokio::test]
async fn g08_a_receiver_is_left_alone_for_as_long_as_it_asks() {
    let fixture = Fixture::new().await;
    let (publisher, came) = busy_for(2).await;
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(publisher);
    let longest = Duration::from_secs(60);
    let relay = relay.with_backoff(Duration::from_millis(1), longest);
    let relay = relay.unwrap().spawn();
    until("it was tried", async || relay.stats().unavailable == 1).await;
    fired("receiver busy");
    // Of another partition, which is not sent meanwhile either.
    fixture.commit(message("b", 2)).await;
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let came = came.lock().unwrap();
    assert_eq!(came.len(), 3);
    assert!(came[1] - came[0] >= Duration::from_secs(2), "{came:?}");
}

#[tokio::test]
async fn g08_a_receiver_is_left_alone_for_no_longer_than_the_longest_pause() {
    let fixture = Fixture::new().await;
    let (publisher, came) = busy_for(24 * 3600).await;
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(publisher).spawn();
    fixture.drained().await;
    fired("receiver busy");
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(came.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn g08_a_receiver_that_is_not_there_costs_no_attempts() {
    let fixture = Fixture::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let publisher = HttpPublisher::new(&format!("http://{address}/intake")).unwrap();
    fixture.commit(message("a", 1)).await;
    let relay = fixture.relay(publisher).with_max_attempts(1);
    let relay = relay.unwrap().spawn();
    until("it was tried", async || relay.stats().unavailable >= 2).await;
    fired("receiver away");
    let receiver = Receiver::new(|_| StatusCode::OK);
    let listener = TcpListener::bind(address).await.unwrap();
    let router = receiver.router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    fixture.drained().await;
    assert_eq!(relay.stats().dead, 0);
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(receiver.bodies(), ["1"]);
}

#[tokio::test]
async fn a_message_is_sent_once_its_status_is_2xx_whatever_becomes_of_the_rest_of_the_answer() {
    let fixture = Fixture::new().await;
    let receiver = Receiver::new(|_| StatusCode::OK);
    let endless = |answer: axum::response::Response| async {
        answer.map(|_| {
            let never =
                futures_util::stream::pending::<Result<axum::body::Bytes, std::io::Error>>();
            axum::body::Body::from_stream(never)
        })
    };
    let router = receiver.router();
    let publisher = serve(router.layer(axum::middleware::map_response(endless))).await;
    fixture.commit(message("a", 1)).await;
    fixture.commit(message("a", 2)).await;
    let relay = fixture.relay(publisher).spawn();
    fixture.drained().await;
    assert_eq!(relay.stats().failed, 0);
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(receiver.bodies(), ["1", "2"]);
}
