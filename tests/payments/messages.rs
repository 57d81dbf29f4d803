//! What the service tells others: once for each operation, in order, and taken in once.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver as Channel};
use std::thread;

use crate::MESSAGES;
use crate::bench::{Bench, PATIENCE};
use crate::client::ADA;
use crate::receiver::Step::{Answer, Silence};
use crate::receiver::{Receiver, read_request};

const LINES: &str = "select count(*) from payments.statement";
const SENT: &str = "select count(*) from idempotency.outbox where state = 'sent'";
const AT_THE_STATEMENT: &str = "select count(*) from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock'
        and query like 'insert into payments.statement%'";

#[tokio::test(flavor = "multi_thread")]
async fn a_charge_is_told_once_however_often_it_is_retried() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    for _ in 0..4 {
        assert_eq!(client.charge(ADA, "order-1", 1250).status, 201);
    }

    bench.until(SENT, 1).await;

    assert_eq!(bench.number(MESSAGES).await, 1);
    assert_eq!(bench.number(LINES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_or_rolled_back_is_not_told() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    bench
        .execute("alter table payments.ledger rename to moved")
        .await;
    assert_eq!(client.charge(ADA, "order-1", 1250).status, 503);
    bench
        .execute("alter table payments.moved rename to ledger")
        .await;
    let charge = client.new_charge("order-2");
    assert_eq!(client.refund(&charge, "refund-1", 500).status, 409);

    // That of the charge which was made.
    assert_eq!(bench.number(MESSAGES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_to_a_charge_is_on_the_statement_in_its_order() {
    let bench = Bench::new().await;
    let client = &bench.service.client;
    let charge = client.captured_charge("order-1");
    client.refund(&charge, "refund-1", 500);

    bench.until(LINES, 3).await;

    let lines: serde_json::Value = serde_json::from_str(&client.get("/statement").body).unwrap();
    let lines = lines.as_array().unwrap().iter();
    let lines: Vec<_> = lines
        .map(|line| (&line["event"], &line["amount"]))
        .collect();
    // The newest comes first.
    let expected = [("refunded", 500), ("captured", 1250), ("created", 1250)];
    for (line, (event, amount)) in lines.iter().zip(expected) {
        assert_eq!(*line.0, format!("charge.{event}"));
        assert_eq!(*line.1, amount);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_killed_between_commit_and_answer_takes_the_message_in_once() {
    let wire = Wire::new();
    let bench = Bench::with(&[("CONSUMER_URL", &wire.url)]).await;
    let mut consumer = bench.consumer("0");
    bench.service.client.new_charge("order-1");
    let lost = wire.deliver(&consumer.address);
    assert_eq!(lost.status, 204);
    assert_eq!(bench.number(LINES).await, 1);
    consumer.kill();
    let id = lost.id;
    // The relay never learns what was answered.
    drop(lost.relay);

    let consumer = bench.consumer("0");
    for _ in 0..2 {
        let again = wire.deliver(&consumer.address);
        assert_eq!((&again.id, again.status), (&id, 204));
        drop(again.relay);
    }
    wire.deliver(&consumer.address).pass_on();
    bench.until(SENT, 1).await;

    assert_eq!(bench.number(LINES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_killed_before_its_commit_takes_the_message_in_when_it_is_back() {
    let (bench, mut consumer) = Bench::with_consumer().await;
    let statement = bench
        .closed("lock table payments.statement in share mode")
        .await;
    bench.service.client.new_charge("order-1");
    bench.until(AT_THE_STATEMENT, 1).await;
    consumer.kill();
    statement.rollback().await.unwrap();
    bench.until(AT_THE_STATEMENT, 0).await;
    let (_, port) = consumer.address.split_once(':').unwrap();

    let _consumer = bench.consumer(port);
    bench.until(SENT, 1).await;

    assert_eq!(bench.number(LINES).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_was_sending_when_it_was_killed_another_sends() {
    let receiver = Receiver::new(&[Silence, Answer(204)]);
    let env = [("CONSUMER_URL", &*receiver.url)];
    let mut bench = Bench::with(&env).await;
    bench.service.client.new_charge("order-1");
    // The relay waits for the answer.
    let id = receiver.key();
    bench.kill();

    bench.restart(&env);
    // Lets a minute pass for every claim of a relay.
    let age = "update idempotency.outbox set available_at = available_at - interval '1 minute'";
    bench.execute(age).await;

    assert_eq!(receiver.key(), id);
    bench.until(SENT, 1).await;
    assert!(!receiver.was_called_again());
}

/// The wire from the relay to the consumer, in the hands of the test.
struct Wire {
    url: String,
    relays: Channel<TcpStream>,
}

/// A message that the consumer has answered; the relay waits.
struct Delivery {
    id: String,
    status: u16,
    answer: String,
    relay: TcpStream,
}

impl Wire {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/events", listener.local_addr().unwrap());
        let (sender, relays) = mpsc::channel();
        thread::spawn(move || {
            for relay in listener.incoming().map_while(Result::ok) {
                if sender.send(relay).is_err() {
                    return;
                }
            }
        });
        Self { url, relays }
    }

    /// Takes the next message to the consumer.
    fn deliver(&self, consumer: &str) -> Delivery {
        let relay = self.relays.recv_timeout(PATIENCE).expect("it is sent");
        let (id, request) = read_request(&relay);
        let mut consumer = TcpStream::connect(consumer).unwrap();
        consumer.set_read_timeout(Some(PATIENCE)).unwrap();
        consumer.write_all(&request).unwrap();
        let mut answer = String::new();
        let mut reader = BufReader::new(consumer);
        while !answer.ends_with("\r\n\r\n") {
            assert_ne!(reader.read_line(&mut answer).unwrap(), 0, "{answer}");
        }
        Delivery {
            id,
            status: answer.split(' ').nth(1).unwrap().parse().unwrap(),
            answer,
            relay,
        }
    }
}

impl Delivery {
    fn pass_on(mut self) {
        self.relay.write_all(self.answer.as_bytes()).unwrap();
    }
}
