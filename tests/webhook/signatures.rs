//! Which deliveries are let through, and what the others are answered.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;
use tower::limit::ConcurrencyLimit;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_idempotency::webhook::{Scheme, WebhookEvent, WebhookLayer};

use crate::sender::{
    ALL, GITHUB_SECRET, Provider, SIGNED, STANDARD_SECRET, STRIPE_SECRET, site, site_of,
};
use crate::site::{Answer, Runs, Site};

/// A site whose handler must not run, and the answer that it gave in its place.
async fn refused(scheme: Scheme, sent: crate::site::Sent) -> Answer {
    let runs = Runs::free();
    let answer = site(scheme, runs.handler()).await.send(sent).await;
    assert_eq!(runs.count(), 0);
    answer
}

#[tokio::test]
async fn a_signed_delivery_reaches_the_handler_with_its_event_and_its_bytes() {
    async fn handler(event: WebhookEvent, request: Request) -> Vec<u8> {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let head = format!("{} {} ", event.source(), event.id());
        [head.as_bytes(), &body].concat()
    }
    // Any bytes: what is signed is not text.
    let body = Bytes::from_static(b"\xff\x00 {} \r\n");
    for provider in ALL {
        let delivery = match provider {
            Provider::Stripe => provider.delivery(),
            _ => provider.delivery().body(body.clone()),
        };
        let site = site(provider.keyed(), post(handler)).await;
        let answer = site.send(delivery.sent()).await;
        assert_eq!(answer.status, 200, "{provider:?}");
        let source = match provider {
            Provider::Stripe => "stripe",
            Provider::GitHub => "github",
            _ => "bank",
        };
        let expected = [format!("{source} evt_1 ").as_bytes(), &delivery.body].concat();
        assert_eq!(answer.body, expected, "{provider:?}");
    }
}

#[tokio::test]
async fn h03_a_signature_of_another_secret_is_invalid() {
    for provider in ALL {
        let answer = refused(provider.keyed_wrongly(), provider.delivery().sent()).await;
        answer.assert_problem(401, "signature-invalid");
        assert!(answer.headers.contains_key("www-authenticate"));
    }
}

#[tokio::test]
async fn h03_a_delivery_without_a_signature_is_told_so() {
    for provider in ALL {
        let answer = refused(provider.keyed(), provider.delivery().unsigned()).await;
        answer.assert_problem(401, "signature-missing");
    }
}

#[tokio::test]
async fn a_signature_of_a_version_that_is_not_known_is_none() {
    for (provider, signature) in [
        (Provider::Standard, "v2,AAAA"),
        (Provider::Stripe, "v0=00"),
        (Provider::GitHub, "sha1=00"),
    ] {
        let delivery = provider.delivery();
        let sent = delivery.sent_with(&delivery.header(signature));
        let answer = refused(provider.keyed(), sent).await;
        answer.assert_problem(401, "signature-missing");
    }
}

#[tokio::test]
async fn a_signature_of_the_other_kind_of_key_is_invalid() {
    let sent = Provider::Asymmetric.delivery().sent();
    let answer = refused(Provider::Standard.keyed(), sent).await;
    answer.assert_problem(401, "signature-invalid");
    let sent = Provider::Standard.delivery().sent();
    let answer = refused(Provider::Asymmetric.keyed(), sent).await;
    answer.assert_problem(401, "signature-invalid");
}

#[tokio::test]
async fn a_body_altered_by_one_byte_is_invalid() {
    for provider in ALL {
        let delivery = provider.delivery();
        let altered = String::from_utf8_lossy(&delivery.body).replace("500", "501");
        let answer = refused(provider.keyed(), delivery.sent().body(altered)).await;
        answer.assert_problem(401, "signature-invalid");
    }
}

#[tokio::test]
async fn h03_a_signature_older_than_the_tolerance_is_too_old() {
    for provider in SIGNED {
        let answer = refused(provider.keyed(), provider.delivery().at(-330).sent()).await;
        answer.assert_problem(400, "timestamp-too-old");
    }
}

#[tokio::test]
async fn h03_a_signature_ahead_of_the_tolerance_is_in_the_future() {
    for provider in SIGNED {
        let answer = refused(provider.keyed(), provider.delivery().at(330).sent()).await;
        answer.assert_problem(400, "timestamp-in-future");
    }
}

#[tokio::test]
async fn a_time_within_the_tolerance_is_let_through() {
    for provider in SIGNED {
        let site = site(provider.keyed(), Runs::free().handler()).await;
        for seconds in [-270, 270] {
            let answer = site.send(provider.delivery().at(seconds).sent()).await;
            assert_eq!(answer.status, 201, "{provider:?} {seconds}");
        }
    }
}

#[tokio::test]
async fn the_tolerance_can_be_narrowed() {
    for provider in SIGNED {
        let scheme = provider.keyed();
        let scheme = scheme.with_tolerance(Duration::from_secs(60)).unwrap();
        let answer = refused(scheme, provider.delivery().at(-90).sent()).await;
        answer.assert_problem(400, "timestamp-too-old");
    }
}

#[tokio::test]
async fn nothing_is_said_of_the_time_of_a_forged_delivery() {
    for provider in SIGNED {
        let sent = provider.delivery().at(-330).sent();
        let answer = refused(provider.keyed_wrongly(), sent).await;
        answer.assert_problem(401, "signature-invalid");
    }
}

/// Another secret for a scheme that is given one more.
fn rotated(provider: Provider, scheme: Scheme, is_ours: bool) -> Scheme {
    let other = format!("whsec_{}", STANDARD.encode([9; 24]));
    let ours = match provider {
        Provider::Standard => STANDARD_SECRET,
        Provider::Stripe => STRIPE_SECRET,
        _ => GITHUB_SECRET,
    };
    let secret = if is_ours { ours } else { &other };
    scheme.with_secret(secret).unwrap()
}

#[tokio::test]
async fn h03_while_a_secret_is_rotated_either_will_do_in_any_order() {
    for provider in [Provider::Standard, Provider::Stripe, Provider::GitHub] {
        for order in [[true, false], [false, true]] {
            let [one, two] = order;
            let scheme = rotated(provider, provider.scheme(), one);
            let scheme = rotated(provider, scheme, two);
            let site = site(scheme, Runs::free().handler()).await;
            let answer = site.send(provider.delivery().sent()).await;
            assert_eq!(answer.status, 201, "{provider:?} {order:?}");
        }
    }
}

#[tokio::test]
async fn h03_one_good_signature_among_others_will_do_in_any_order() {
    let (standard, stripe) = (Provider::Standard.delivery(), Provider::Stripe.delivery());
    let other = STANDARD.encode([1; 32]);
    let zeros = "0".repeat(64);
    for (delivery, provider, list) in [
        (
            &standard,
            Provider::Standard,
            format!("{} v1,{other}", standard.signature()),
        ),
        (
            &standard,
            Provider::Standard,
            format!("v1a,x v1,{other} {}", standard.signature()),
        ),
        (
            &stripe,
            Provider::Stripe,
            format!("{},v1={zeros},v0=x", stripe.signature()),
        ),
        (
            &stripe,
            Provider::Stripe,
            format!("v0=x,v1={zeros},{}", stripe.signature()),
        ),
    ] {
        let site = site(provider.keyed(), Runs::free().handler()).await;
        let answer = site.send(delivery.sent_with(&delivery.header(&list))).await;
        assert_eq!(answer.status, 201, "{list}");
    }
}

#[tokio::test]
async fn a_secret_and_a_public_key_can_be_used_together() {
    let scheme = Provider::Asymmetric
        .keyed()
        .with_secret(STANDARD_SECRET)
        .unwrap();
    let site = site(scheme, Runs::free().handler()).await;
    for provider in [Provider::Standard, Provider::Asymmetric] {
        let answer = site.send(provider.delivery().sent()).await;
        assert_eq!(answer.status, 201, "{provider:?}");
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_before_it_is_read() {
    let layer = WebhookLayer::new(Provider::Standard.keyed()).unwrap();
    let site = site_of(
        layer.with_request_limit(64).unwrap(),
        Runs::free().handler(),
    )
    .await;
    let fits = Provider::Standard.delivery().body("x".repeat(64));
    assert_eq!(site.send(fits.sent()).await.status, 201);

    let delivery = Provider::Standard.delivery();
    // The rest never comes.
    let head = format!(
        "POST /hooks HTTP/1.1\r\nhost: x\r\nwebhook-id: 1\r\nwebhook-timestamp: 1\r\n\
         webhook-signature: {}\r\ncontent-length: 65\r\n\r\n",
        delivery.signature()
    );
    let answer = site.raw(head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(answer.contains(r#""code":"body-too-large""#), "{answer}");
}

#[tokio::test]
async fn a_body_of_unknown_length_is_read_to_the_limit() {
    let layer = WebhookLayer::new(Provider::GitHub.keyed()).unwrap();
    let site = site_of(
        layer.with_request_limit(64).unwrap(),
        Runs::free().handler(),
    )
    .await;
    let zeros = "0".repeat(64);
    let head = format!(
        "POST /hooks HTTP/1.1\r\nhost: x\r\nx-github-delivery: 1\r\n\
         x-hub-signature-256: sha256={zeros}\r\ntransfer-encoding: chunked\r\n\r\n\
         40\r\n{zeros}\r\n1\r\n0\r\n0\r\n\r\n"
    );
    let answer = site.raw(head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let layer = WebhookLayer::new(Provider::GitHub.keyed()).unwrap();
    let layer = layer
        .with_request_timeout(Duration::from_millis(50))
        .unwrap();
    let site = site_of(layer, Runs::free().handler()).await;
    let head = format!(
        "POST /hooks HTTP/1.1\r\nhost: x\r\nx-github-delivery: 1\r\n\
         x-hub-signature-256: sha256={}\r\ncontent-length: 10\r\n\r\nhalf",
        "0".repeat(64)
    );
    let answer = site.raw(head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains(r#""code":"body-timeout""#), "{answer}");
}

#[tokio::test]
async fn a_delivery_that_breaks_off_does_not_run() {
    let runs = Runs::free();
    let provider = Provider::GitHub;
    let site: Site = site(provider.keyed(), runs.handler()).await;
    let mut stream = site.connect().await;
    let delivery = provider.delivery();
    let head = format!(
        "POST /hooks HTTP/1.1\r\nhost: x\r\nx-github-delivery: 1\r\n\
         x-hub-signature-256: {}\r\ncontent-length: 1000\r\n\r\nhalf",
        delivery.signature()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    drop(stream);
    // The next delivery is served, and is the first to run.
    let answer = site.send(delivery.sent()).await;
    answer.assert_run(1);
}

#[tokio::test]
async fn every_method_is_checked() {
    let runs = Runs::free();
    let site = site(Provider::GitHub.keyed(), runs.handler()).await;
    for method in ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"] {
        let method = axum::http::Method::from_bytes(method.as_bytes()).unwrap();
        let answer = site.send(crate::site::Sent::new(method, "/hooks")).await;
        answer.assert_problem(401, "signature-missing");
    }
    assert_eq!(runs.count(), 0);
}

/// A concurrency limit panics when it is called without having been asked.
#[tokio::test]
async fn the_service_that_was_ready_is_the_one_that_is_called() {
    let delivery = Provider::GitHub.delivery();
    let inner = service_fn(|request: Request| async {
        Ok::<_, Infallible>(Response::new(request.into_body()))
    });
    let limited = ConcurrencyLimit::new(inner, 1);
    let layer = WebhookLayer::new(Provider::GitHub.keyed()).unwrap();
    let mut service = layer.layer(limited);
    for _ in 0..2 {
        let request = Request::post("/hooks")
            .header("x-github-delivery", "evt_1")
            .header("x-hub-signature-256", delivery.signature())
            .body(Body::from(delivery.body.clone()))
            .unwrap();
        let ready = ServiceExt::<Request>::ready(&mut service).await.unwrap();
        let answer = ready.call(request).await.unwrap();
        assert_eq!(answer.status(), 200);
    }
}

#[tokio::test]
async fn a_renderer_makes_the_answers() {
    let layer = WebhookLayer::new(Provider::GitHub.keyed()).unwrap();
    let layer = layer.with_renderer(|rejection| rejection.to_problem("https://docs.example.com/"));
    let site = site_of(layer, Runs::free().handler()).await;
    let answer = site.send(Provider::GitHub.delivery().unsigned()).await;
    assert_eq!(
        answer.json()["type"],
        "https://docs.example.com/signature-missing"
    );
}

#[test]
fn a_secret_is_never_shown() {
    for provider in ALL {
        let layer = WebhookLayer::new(provider.keyed()).unwrap();
        let shown = format!("{layer:?}");
        for secret in [STANDARD_SECRET, STRIPE_SECRET, GITHUB_SECRET] {
            assert!(!shown.contains(&secret[6..]), "{shown}");
        }
        assert!(
            shown.contains("Hmac(..)") || shown.contains("Ed25519(..)"),
            "{shown}"
        );
    }
}

#[test]
fn a_scheme_that_can_accept_nothing_is_refused() {
    for provider in ALL {
        let error = WebhookLayer::new(provider.scheme()).unwrap_err();
        assert_eq!(error.field(), "secret");
    }
    for source in ["", "two words", "b\u{e4}nk"] {
        let scheme = Scheme::github(source).with_secret("hidden").unwrap();
        assert_eq!(WebhookLayer::new(scheme).unwrap_err().field(), "source");
    }
}

#[test]
fn a_fifth_secret_is_refused() {
    let mut scheme = Provider::GitHub.scheme();
    for _ in 0..4 {
        scheme = scheme.with_secret("hidden").unwrap();
    }
    assert_eq!(scheme.with_secret("hidden").unwrap_err().field(), "secret");
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let scheme = || Provider::Stripe.keyed();
    for tolerance in [Duration::ZERO, Duration::from_millis(999), Duration::MAX] {
        assert_eq!(
            scheme().with_tolerance(tolerance).unwrap_err().field(),
            "tolerance"
        );
    }
    let key = "whpk_11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
    assert_eq!(
        scheme().with_public_key(key).unwrap_err().field(),
        "public_key"
    );
    let layer = || WebhookLayer::new(scheme()).unwrap();
    let error = layer().with_request_timeout(Duration::ZERO).unwrap_err();
    assert_eq!(error.field(), "request_timeout");
    let error = layer().with_request_limit(usize::MAX).unwrap_err();
    assert_eq!(error.field(), "request_limit");
}
