//! An event is handled once by each of its handlers.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use axum::routing::MethodRouter;
use tower_idempotency::webhook::{WebhookEvent, WebhookLayer};
use tower_idempotency::{IdempotencyLayer, PgStore, Policy};

use crate::backend::{Backend, Postgres};
use crate::sender::{ALL, Provider, SIGNED};
use crate::site::{PATIENCE, Runs, Sent, Site};

const HOUR: u64 = 3600;

fn policy() -> Policy {
    Policy::medium()
        .with_required_key(true)
        .with_ttl(Duration::from_secs(7 * 24 * HOUR))
        .with_derived_key(WebhookEvent::derived_key())
        .with_fingerprint(WebhookEvent::fingerprint())
}

pub fn once(backend: &Postgres) -> IdempotencyLayer<PgStore> {
    IdempotencyLayer::new(backend.store(), WebhookEvent::scope())
        .with_policy(policy())
        .unwrap()
        // A busy machine is not what these tests are about.
        .with_store_timeout(PATIENCE)
        .unwrap()
}

fn webhook(provider: Provider) -> WebhookLayer {
    WebhookLayer::new(provider.keyed()).unwrap()
}

async fn site(backend: &Postgres, provider: Provider, handler: MethodRouter) -> Site {
    let route = handler.layer((webhook(provider), once(backend)));
    Site::start(Router::new().route("/hooks", route)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h04_an_event_delivered_again_is_replayed_and_not_run() {
    let backend = Postgres::start().await;
    for provider in ALL {
        let runs = Runs::free();
        let site = site(&backend, provider, runs.handler()).await;
        // Its own source of events, or the second provider of one scheme would find those of the first.
        let event = format!("evt_{provider:?}");
        let delivery = provider.delivery().id(&event);
        let delivery = delivery.body(format!(r#"{{"id":"{event}"}}"#));
        let first = site.send(delivery.sent()).await;
        first.assert_run(1);
        // A provider signs each try anew.
        let again = match provider {
            Provider::GitHub => delivery,
            _ => delivery.at(1),
        };
        site.send(again.sent()).await.assert_replay_of(&first);
        assert_eq!(runs.count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h04_an_event_that_was_handled_is_refused_once_its_signature_is_too_old() {
    let backend = Postgres::start().await;
    for provider in SIGNED {
        let runs = Runs::free();
        let site = site(&backend, provider, runs.handler()).await;
        assert_eq!(site.send(provider.delivery().sent()).await.status, 201);
        let answer = site.send(provider.delivery().at(-330).sent()).await;
        answer.assert_problem(400, "timestamp-too-old");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_of_a_hundred_deliveries_at_once_one_runs() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let site = site(&backend, Provider::Standard, runs.handler()).await;
    let sent = Provider::Standard.delivery().sent();
    let all = (0..100).map(|_| tokio::spawn(sent.clone().send_to(site.address)));
    let mut ran = 0;
    for answer in all.collect::<Vec<_>>() {
        let answer = answer.await.unwrap();
        match answer.status.as_u16() {
            201 => ran += usize::from(!answer.is_replay()),
            _ => answer.assert_problem(409, "request-in-progress"),
        }
    }
    assert_eq!((runs.count(), ran), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_handlers_of_one_event_are_independent() {
    let backend = Postgres::start().await;
    let (mail, ledger) = (Runs::free(), Runs::free());
    let (layer, idempotency) = (webhook(Provider::Stripe), once(&backend));
    let router = Router::new()
        .route("/mail", mail.handler())
        .route("/ledger", ledger.handler())
        .route_layer(idempotency)
        .route_layer(layer);
    let site = Site::start(router).await;
    let delivery = Provider::Stripe.delivery();
    let header = delivery.header(&delivery.signature());
    for path in ["/mail", "/ledger", "/mail", "/ledger"] {
        let sent = Sent::post(path).body(delivery.body.clone());
        let sent = sent.header("stripe-signature", &header);
        assert_eq!(site.send(sent).await.status, 201);
    }
    assert_eq!((mail.count(), ledger.count()), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sources_may_use_one_id() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let provider = Provider::GitHub;
    let mut sites = Vec::new();
    for source in ["ours", "theirs"] {
        let scheme = tower_idempotency::webhook::Scheme::github(source);
        let scheme = scheme.with_secret(crate::sender::GITHUB_SECRET).unwrap();
        let layer = WebhookLayer::new(scheme).unwrap();
        let route = runs.handler().layer((layer, once(&backend)));
        sites.push(Site::start(Router::new().route("/hooks", route)).await);
    }
    for site in &sites {
        assert_eq!(site.send(provider.delivery().sent()).await.status, 201);
    }
    assert_eq!(runs.count(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h05_an_event_tried_again_after_75_hours_is_not_run() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let site = site(&backend, Provider::Standard, runs.handler()).await;
    let delivery = Provider::Standard.delivery();
    let first = site.send(delivery.sent()).await;
    backend.age(Duration::from_secs(75 * HOUR)).await;
    site.send(delivery.sent()).await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_whose_handler_failed_is_run_again_when_it_comes_again() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let handler = runs.answering(|run| -> Response<Body> {
        match run {
            1 => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            2 => panic!("planted"),
            _ => StatusCode::NO_CONTENT.into_response(),
        }
    });
    let site = site(&backend, Provider::Standard, handler).await;
    for (status, replayed) in [(500, false), (500, false), (204, false), (204, true)] {
        let answer = site.send(Provider::Standard.delivery().sent()).await;
        assert_eq!(
            (answer.status.as_u16(), answer.is_replay()),
            (status, replayed)
        );
    }
    assert_eq!(runs.count(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_transactional_route_an_event_is_run_until_it_succeeds_and_then_replayed() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let handler = runs.answering(|run| match run {
        1 => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::NO_CONTENT,
    });
    let route = handler.layer((webhook(Provider::Standard), once(&backend).transactional()));
    let site = Site::start(Router::new().route("/hooks", route)).await;
    for (status, replayed) in [(500, false), (204, false), (204, true)] {
        let answer = site.send(Provider::Standard.delivery().sent()).await;
        assert_eq!(
            (answer.status.as_u16(), answer.is_replay()),
            (status, replayed)
        );
    }
    assert_eq!(runs.count(), 2);
}

/// `pending_webhooks` of Stripe counts down from one try to the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_written_in_another_way_is_still_the_same() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let site = site(&backend, Provider::Stripe, runs.handler()).await;
    let delivery = Provider::Stripe.delivery();
    let one = delivery
        .clone()
        .body(r#"{"id":"evt_1","pending_webhooks":2}"#);
    let two = delivery.body(r#"{"id":"evt_1","pending_webhooks":1}"#);
    let first = site.send(one.sent()).await;
    site.send(two.sent()).await.assert_replay_of(&first);
}

/// Headers are not signed: whoever sends a delivery again could add one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_sent_along_makes_no_other_operation_of_an_event() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let site = site(&backend, Provider::Standard, runs.handler()).await;
    let sent = || Provider::Standard.delivery().sent();
    let first = site.send(sent()).await;
    first.assert_run(1);
    for key in ["another", "", "a,b"] {
        site.send(sent().key(key)).await.assert_replay_of(&first);
    }
    assert_eq!(runs.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h06_in_the_wrong_order_nothing_is_let_through() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let route = runs
        .handler()
        .layer((once(&backend), webhook(Provider::GitHub)));
    let site = Site::start(Router::new().route("/hooks", route)).await;
    let answer = site.send(Provider::GitHub.delivery().sent()).await;
    answer.assert_problem(400, "key-missing");
    assert_eq!(runs.count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_webhook_layer_nothing_is_let_through() {
    let backend = Postgres::start().await;
    let runs = Runs::free();
    let route = runs.handler().layer(once(&backend));
    let site = Site::start(Router::new().route("/hooks", route)).await;
    let sent = Provider::GitHub.delivery().sent();
    let answer = site.send(sent.key("a-key-of-the-sender")).await;
    answer.assert_problem(400, "key-missing");
    assert_eq!(runs.count(), 0);
}

/// A layer in front that writes the body in another way breaks the signature, and is noticed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h06_a_body_that_was_written_anew_on_its_way_is_refused() {
    let runs = Runs::free();
    let rewrite = axum::middleware::map_request(|request: axum::extract::Request| async {
        let (parts, _) = request.into_parts();
        axum::extract::Request::from_parts(parts, Body::from(r#"{ "id": "evt_1" }"#))
    });
    let route = runs.handler().layer((rewrite, webhook(Provider::Stripe)));
    let site = Site::start(Router::new().route("/hooks", route)).await;
    let delivery = Provider::Stripe.delivery().body(r#"{"id":"evt_1"}"#);
    let answer = site.send(delivery.sent()).await;
    answer.assert_problem(401, "signature-invalid");
    assert_eq!(runs.count(), 0);
}
