//! When a full layer says so.
use crate::help::{app, ms, order, send};
use axum::body::Body;
use axum::http::{Request, Response};
use bytes::Bytes;
use futures_util::stream;
use tower_idempotency::{DerivedKey, IdempotencyLayer, MemoryStore, Policy, Scope};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_layer_refuses_before_it_reads_a_body() {
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
        .with_max_running(1)
        .unwrap();
    let app = app(&layer, |_| async {
        tokio::time::sleep(ms(3000)).await;
        Response::new(Body::from("tea"))
    });
    tokio::spawn(send(app.clone(), order("a", "tea")));
    tokio::time::sleep(ms(200)).await;
    let endless = Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>());
    let request = Request::post("/orders").header("idempotency-key", "b");
    let answer = send(app, request.body(endless).unwrap());
    let answer = tokio::time::timeout(ms(1500), answer).await;
    assert_eq!(answer.expect("refused at once").status, 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_layer_lets_a_request_pass_that_tells_no_key() {
    let by_order = DerivedKey::json_members(["/order"]).unwrap();
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global())
        .with_policy(Policy::medium().with_derived_key(by_order))
        .unwrap()
        .with_max_running(1)
        .unwrap();
    let (entered, mut running) = tokio::sync::mpsc::channel(2);
    let app = app(&layer, move |request: Request<Body>| {
        let entered = entered.clone();
        async move {
            if request.headers().contains_key("idempotency-key") {
                entered.send(()).await.unwrap();
                std::future::pending::<()>().await;
            }
            Response::new(Body::from("tea"))
        }
    });
    tokio::spawn(send(app.clone(), order("a", "tea")));
    running.recv().await.unwrap();
    let keyless = |body: &'static str| Request::post("/orders").body(Body::from(body)).unwrap();
    assert_eq!(send(app.clone(), keyless("tea")).await.text(), "tea");
    assert_eq!(send(app, keyless(r#"{"order":1}"#)).await.status, 503);
}
