//! Headers that no provider sends.

use axum::http::Method;

use crate::sender::{ALL, Delivery, Provider, SIGNED, hmac, site};
use crate::site::{Answer, Runs, Sent};

async fn refused(provider: Provider, sent: Sent) -> Answer {
    let runs = Runs::free();
    let answer = site(provider.keyed(), runs.handler())
        .await
        .send(sent)
        .await;
    assert_eq!(runs.count(), 0);
    answer
}

/// The header of the id, where there is one.
fn id_header(provider: Provider) -> Option<&'static str> {
    match provider {
        Provider::Standard | Provider::Asymmetric => Some("webhook-id"),
        Provider::GitHub => Some("x-github-delivery"),
        Provider::Stripe => None,
    }
}

#[tokio::test]
async fn a_signature_that_is_not_ascii_is_invalid() {
    for provider in ALL {
        let header = provider.delivery();
        let unsigned = header.unsigned();
        let bytes: &[u8] = match provider {
            Provider::Standard => b"v1,\xc3\xa4\xff",
            Provider::Asymmetric => b"v1a,\xc3\xa4\xff",
            Provider::Stripe => b"t=1,v1=\xc3\xa4\xff",
            Provider::GitHub => b"sha256=\xc3\xa4\xff",
        };
        let sent = unsigned.header_bytes(provider.signature_header(), bytes);
        refused(provider, sent)
            .await
            .assert_problem(401, "signature-invalid");
    }
}

#[tokio::test]
async fn a_signature_on_two_lines_is_invalid() {
    for provider in ALL {
        let delivery = provider.delivery();
        let again = delivery.header(&delivery.signature());
        let sent = delivery.sent().header(provider.signature_header(), &again);
        refused(provider, sent)
            .await
            .assert_problem(401, "signature-invalid");
    }
}

#[tokio::test]
async fn more_signatures_than_eight_are_refused_though_one_is_good() {
    for (provider, filler) in [(Provider::Standard, "v1,x "), (Provider::Stripe, "v1=x,")] {
        let delivery = provider.delivery();
        let list = |fillers: usize| {
            let list = filler.repeat(fillers) + &delivery.signature();
            delivery.sent_with(&delivery.header(&list))
        };
        let site = site(provider.keyed(), Runs::free().handler()).await;
        assert_eq!(site.send(list(7)).await.status, 201);
        site.send(list(8))
            .await
            .assert_problem(401, "signature-invalid");
    }
}

#[tokio::test]
async fn a_signature_header_over_its_bound_is_refused_though_it_is_good() {
    let delivery = Provider::Stripe.delivery();
    let list = |filler: usize| {
        let header = delivery.header(&delivery.signature());
        format!("{header},v0={}", "0".repeat(filler - 4 - header.len()))
    };
    let site = site(Provider::Stripe.keyed(), Runs::free().handler()).await;
    let (fits, over) = (list(4096), list(4097));
    assert_eq!((fits.len(), over.len()), (4096, 4097));
    assert_eq!(site.send(delivery.sent_with(&fits)).await.status, 201);
    let answer = site.send(delivery.sent_with(&over)).await;
    answer.assert_problem(401, "signature-invalid");
}

#[tokio::test]
async fn an_absent_doubled_or_malformed_id_is_missing() {
    for provider in ALL {
        let Some(name) = id_header(provider) else {
            continue;
        };
        let sent = provider.delivery().sent();
        let answer = refused(provider, sent.clone().without(name)).await;
        answer.assert_problem(400, "event-id-missing");
        let answer = refused(provider, sent.clone().header(name, "evt_1")).await;
        answer.assert_problem(400, "event-id-missing");
        let long = "e".repeat(256);
        for id in [&b""[..], b"a b", b"\xc3\xa4", long.as_bytes()] {
            let sent = sent.clone().without(name).header_bytes(name, id);
            refused(provider, sent)
                .await
                .assert_problem(400, "event-id-missing");
        }
    }
}

#[tokio::test]
async fn an_id_of_255_characters_is_one() {
    let delivery = Provider::Standard.delivery().id(&"e".repeat(255));
    let site = site(Provider::Standard.keyed(), Runs::free().handler()).await;
    assert_eq!(site.send(delivery.sent()).await.status, 201);
}

/// `a.1.{..}` signed as the id `a` at the time 1 must not pass as the id `a.1`.
#[tokio::test]
async fn an_id_with_a_full_stop_is_refused_though_it_is_signed() {
    for provider in [Provider::Standard, Provider::Asymmetric] {
        let sent = provider.delivery().id("evt.1").sent();
        refused(provider, sent)
            .await
            .assert_problem(400, "event-id-missing");
    }
}

#[tokio::test]
async fn an_absent_doubled_or_malformed_time_is_missing() {
    let sent = Provider::Standard.delivery().sent();
    let name = "webhook-timestamp";
    let without = sent.clone().without(name);
    let mut all = vec![without.clone(), sent.header(name, "1")];
    for time in [
        "",
        "-1",
        "1.5",
        "now",
        "1614265330000",
        "99999999999999999999",
    ] {
        all.push(without.clone().header(name, time));
    }
    for sent in all {
        let answer = refused(Provider::Standard, sent).await;
        answer.assert_problem(400, "timestamp-missing");
    }
}

#[tokio::test]
async fn an_absent_doubled_or_malformed_time_of_stripe_is_missing() {
    let delivery = Provider::Stripe.delivery();
    let signature = delivery.signature();
    for time in ["", "t=,", "t=1,t=1,", "t=-1,", "t=\u{661},", "T=1,"] {
        let header = format!("{time}{signature}");
        let sent = delivery.unsigned();
        let sent = sent.header_bytes("stripe-signature", header.as_bytes());
        let answer = refused(Provider::Stripe, sent).await;
        answer.assert_problem(400, "timestamp-missing");
    }
}

#[tokio::test]
async fn a_body_of_stripe_without_an_id_is_told_so_once_its_signature_is_right() {
    let provider = Provider::Stripe;
    for body in [
        "",
        "[]",
        "{}",
        r#"{"id":1}"#,
        r#"{"id":""}"#,
        r#"{"id":"a b"}"#,
        "not json",
    ] {
        let delivery = provider.delivery().body(body);
        let answer = refused(provider, delivery.sent()).await;
        answer.assert_problem(400, "event-id-missing");
        let forged = delivery.sent_with(&delivery.header(&format!("v1={}", "0".repeat(64))));
        let answer = refused(provider, forged).await;
        answer.assert_problem(401, "signature-invalid");
    }
}

#[tokio::test]
async fn a_compressed_body_is_verified_and_passed_on_as_it_came() {
    // An empty gzip file; nothing here unpacks it.
    let gzip = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0";
    for provider in [Provider::Standard, Provider::Asymmetric, Provider::GitHub] {
        let delivery: Delivery = provider.delivery().body(&gzip[..]);
        let echo = crate::site::every_method(|request: axum::extract::Request| async {
            let encoding = request.headers()["content-encoding"].clone();
            ([("x-encoding", encoding)], request.into_body())
        });
        let site = site(provider.keyed(), echo).await;
        let answer = site
            .send(delivery.sent().header("content-encoding", "gzip"))
            .await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["x-encoding"], "gzip");
        assert_eq!(answer.body, &gzip[..]);
    }
}

#[tokio::test]
async fn hexadecimal_in_upper_case_is_no_signature_of_these_providers() {
    let delivery = Provider::GitHub.delivery();
    let mac = hmac(crate::sender::GITHUB_SECRET.as_bytes(), &delivery.body);
    let header = format!("sha256={}", hex::encode_upper(mac));
    let answer = refused(Provider::GitHub, delivery.sent_with(&header)).await;
    answer.assert_problem(401, "signature-invalid");
}

#[tokio::test]
async fn a_request_that_is_no_delivery_at_all_is_told_so() {
    for provider in SIGNED {
        let answer = refused(provider, Sent::new(Method::POST, "/hooks")).await;
        answer.assert_problem(401, "signature-missing");
    }
}
