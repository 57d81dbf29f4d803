//! The bank's webhook: an event changes a charge once, and nobody else's event changes anything.

use std::process::Stdio;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::MESSAGES;
use crate::bench::{Bench, command};
use crate::client::{Answer, Client};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const SETTLED: &str = "select count(*) from payments.charge where status = 'settled'";
const DISPUTED: &str = "select count(*) from payments.charge where status = 'disputed'";
const RECORDED: &str =
    "select count(*) from idempotency.record where operation like '%/hooks/bank'";

async fn bench() -> Bench {
    Bench::with(&[("BANK_SECRET", SECRET)]).await
}

/// Signed so many seconds ago.
fn deliver(client: &Client, secret: &str, id: &str, age: u64, body: &str) -> Answer {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let time = now.as_secs() - age;
    let key = STANDARD.decode(&secret["whsec_".len()..]).unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{id}.{time}.{body}").as_bytes());
    let signature = STANDARD.encode(mac.finalize().into_bytes());
    let headers = format!(
        "webhook-id: {id}\r\nwebhook-timestamp: {time}\r\nwebhook-signature: v1,{signature}\r\n"
    );
    let answer = client.exchange("POST", "/hooks/bank", &headers, body);
    Answer::parse(&answer.unwrap())
}

fn event(kind: &str, charge: &str) -> String {
    format!(r#"{{"type": "{kind}", "data": {{"charge": "{charge}"}}, "more": true}}"#)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_delivered_five_times_changes_the_charge_once() {
    let bench = bench().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    let body = event("payout.settled", &charge);

    // Signed anew each time, as providers do.
    for try_ in 0..5 {
        let answer = deliver(client, SECRET, "evt_1", try_, &body);
        assert_eq!((answer.status, answer.is_replay()), (204, try_ > 0));
    }

    assert_eq!(bench.number(SETTLED).await, 1);
    // Of the charge, its capture, and its settlement.
    assert_eq!(bench.number(MESSAGES).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_whose_record_is_long_forgotten_is_still_known() {
    let bench = bench().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    let body = event("payout.settled", &charge);
    assert_eq!(deliver(client, SECRET, "evt_1", 0, &body).status, 204);
    // Somebody has put it back by hand, and would not like to see it undone.
    let back = "delete from idempotency.record; update payments.charge set status = 'captured'";
    bench.execute(back).await;

    let again = deliver(client, SECRET, "evt_1", 0, &body);

    assert_eq!((again.status, again.is_replay()), (204, false));
    assert_eq!(bench.number(SETTLED).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_secret_has_signed_is_401_and_changes_nothing() {
    let bench = bench().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    let body = event("charge.disputed", &charge);
    let other = format!("whsec_{}", STANDARD.encode([7; 32]));

    let refused = deliver(client, &other, "evt_1", 0, &body);

    assert_eq!(refused.status, 401);
    assert_eq!(refused.member("code"), "signature-invalid");
    assert_eq!(bench.number(DISPUTED).await, 0);
    assert_eq!(bench.number(RECORDED).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_has_signed_is_401_whatever_its_key_and_its_token() {
    let bench = bench().await;
    let client = &bench.service.client;
    let body = event("charge.disputed", &client.captured_charge("order-1"));
    let token = crate::client::ADA;

    let refused = client.send("POST", "/hooks/bank", token, Some("evt_1"), &body);

    assert_eq!(refused.status, 401);
    assert_eq!(refused.member("code"), "signature-missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_overtook_another_is_refused_until_its_charge_is_there() {
    let bench = bench().await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    let body = event("payout.settled", &charge);
    for _ in 0..2 {
        let early = deliver(client, SECRET, "evt_1", 0, &body);
        assert_eq!((early.status, early.is_replay()), (409, false));
        assert_eq!(early.member("code"), "not-yet");
    }
    assert_eq!(client.capture(&charge, None).status, 201);

    assert_eq!(deliver(client, SECRET, "evt_1", 0, &body).status, 204);

    assert_eq!(bench.number(SETTLED).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_event_does_not_bring_a_charge_back() {
    let bench = bench().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    let disputed = event("charge.disputed", &charge);
    assert_eq!(deliver(client, SECRET, "evt_2", 0, &disputed).status, 204);

    let late = deliver(
        client,
        SECRET,
        "evt_1",
        0,
        &event("payout.settled", &charge),
    );

    assert_eq!(late.status, 204);
    assert_eq!(bench.number(DISPUTED).await, 1);
    assert_eq!(bench.number(MESSAGES).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_no_interest_are_taken_and_unknown_charges_are_not() {
    let bench = bench().await;
    let client = &bench.service.client;
    for (id, kind, charge, status) in [
        ("evt_1", "card.expired", "ch_unknown", 204),
        ("evt_2", "payout.settled", "ch_unknown", 404),
        ("evt_3", "payout.settled", "\\u0000", 404),
    ] {
        let answer = deliver(client, SECRET, id, 0, &event(kind, charge));
        assert_eq!(answer.status, status, "{kind} {charge}");
    }
    // What was refused may come again.
    assert_eq!(bench.number(RECORDED).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_helper_signs_is_taken() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    let mut sign = command();
    let signed = sign.args(["sign", "payout.settled", &charge]);
    let said = signed.stderr(Stdio::inherit()).output().unwrap().stdout;
    let curl = String::from_utf8(said).unwrap();
    // Every other piece was in quotes.
    let mut quoted = curl.split('\'').skip(1).step_by(2).map(str::to_owned);
    let headers: Vec<_> = quoted.by_ref().take(4).collect();
    let headers = format!("{}\r\n", headers[1..].join("\r\n"));

    let answer = client.exchange("POST", "/hooks/bank", &headers, &quoted.next().unwrap());

    assert_eq!(Answer::parse(&answer.unwrap()).status, 204, "{curl}");
    assert_eq!(bench.number(SETTLED).await, 1);
}
