//! An effect in a foreign system, which fails, falls silent, or outlives the service.

use crate::bench::Bench;
use crate::client::Client;
use crate::receiver::Receiver;
use crate::receiver::Step::{Answer, HangUp, Silence};

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_notification_is_not_kept_and_every_try_sends_the_same_key() {
    let receiver = Receiver::new(&[Answer(500), HangUp, Answer(302), Answer(204), Answer(204)]);
    let bench = Bench::with(&[("RECEIVER_URL", &receiver.url)]).await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    let mut keys = Vec::new();
    for _ in 0..3 {
        let failed = client.notify(&charge, "notify-1");
        assert_eq!((failed.status, failed.is_replay()), (502, false));
        assert_eq!(failed.header("retry-after"), Some("1"));
        keys.push(receiver.key());
    }

    let told = client.notify(&charge, "notify-1");

    assert_eq!((told.status, told.is_replay()), (200, false));
    keys.push(receiver.key());
    assert_eq!(keys, vec![told.member("notification"); 4]);
    assert_eq!(client.notify(&charge, "notify-1").replayed(), told);
    assert!(!receiver.was_called_again());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_receiver_is_a_502_that_is_not_kept() {
    let bench = Bench::with(&[("RECEIVER_URL", "http://127.0.0.1:1/")]).await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    for _ in 0..2 {
        let failed = client.notify(&charge, "notify-1");
        assert_eq!((failed.status, failed.is_replay()), (502, false));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_kill_9_in_the_middle_of_the_call_the_receiver_sees_the_same_key() {
    let receiver = Receiver::new(&[Silence, Answer(204)]);
    let mut bench = Bench::with(&[("RECEIVER_URL", &receiver.url)]).await;
    let charge = bench.service.client.new_charge("order-1");
    let waiting = {
        let (client, charge) = (bench.service.client.clone(), charge.clone());
        // The service is killed before it answers.
        std::thread::spawn(move || client.try_notify(&charge, "notify-1").is_none())
    };
    // The handler waits for the receiver's answer.
    let first = receiver.key();
    bench.kill();
    assert!(waiting.join().unwrap());
    bench.restart(&[("RECEIVER_URL", &receiver.url)]);
    bench.end_leases().await;

    let told = bench.service.client.notify(&charge, "notify-1");

    assert_eq!((told.status, told.is_replay()), (200, false));
    assert_eq!(receiver.key(), first);
    assert_eq!(told.member("notification"), first);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receiver_that_is_built_in_counts_one_call_for_each_notification() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.new_charge("order-1");
    let one = client.notify(&charge, "notify-1").member("notification");
    client.notify(&charge, "notify-1");
    let two = client.notify(&charge, "notify-2").member("notification");

    assert_eq!(calls(client, &one), Some(1));
    assert_eq!(calls(client, &two), Some(1));
}

fn calls(client: &Client, key: &str) -> Option<u64> {
    let calls: serde_json::Value = serde_json::from_str(&client.get("/receiver").body).unwrap();
    calls[key].as_u64()
}
