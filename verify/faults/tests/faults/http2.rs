//! B03: streams and connections of HTTP/2 that end while the handler runs.

use faults::client::Pay;
use faults::database::Database;
use faults::http2::Connection;
use faults::process::Subject;
use faults::wait::{Gate, until};

use crate::kills::retry_until_settled;
use crate::{SUBJECT, assert_replays, on_every_store};

on_every_store! {
    b03_a_stream_that_is_reset_in_mid_handler_leaves_the_handler_to_its_end,
    b03_a_connection_that_goes_away_in_mid_handler_still_gets_its_answer,
    b03_a_connection_that_ends_in_mid_handler_leaves_the_handler_to_its_end,
    b03_a_transactional_stream_that_is_reset_in_mid_handler_is_committed,
    b03_a_transactional_connection_that_ends_in_mid_handler_is_committed,
}

const PROTOCOL_ERROR: u32 = 1;

/// A payment on a stream, in the middle of its handler.
struct Running {
    database: Database,
    subject: Subject,
    connection: Connection,
    gate: Gate,
    pay: Pay,
}

impl Running {
    async fn start(database: Database, transactional: bool) -> Self {
        let settings = database.settings("critical");
        let settings = settings.with(|s| s.transactional = transactional);
        let subject = SUBJECT.start(&settings).await;
        let gate = Gate::new();
        let pay = Pay::new(&gate.behave());
        let mut connection = Connection::open(subject.port).await.unwrap();
        connection.pay(1, &pay).await.unwrap();
        subject.has_run(1).await;
        Self {
            database,
            subject,
            connection,
            gate,
            pay,
        }
    }

    /// Nobody waits for the handler, and it ends: a retry gets its answer.
    async fn ends_replayed(self) {
        self.gate.open();
        self.database.has_state(&self.pay.key, "completed").await;
        // The record is there for others before its own process has heard of it.
        let replay = retry_until_settled(&self.subject, &self.pay).await;
        assert_eq!(replay.status, 201, "{}", replay.text());
        assert!(replay.is_replayed());
        assert_replays(&self.pay.send(self.subject.port).await.unwrap(), &replay);
        let mut connection = Connection::open(self.subject.port).await.unwrap();
        connection.pay(1, &self.pay).await.unwrap();
        assert_eq!(connection.body(1).await.unwrap(), replay.body);
        let runs = self.database.runs(&self.pay.key).await;
        assert_eq!((runs.len(), runs[0].finished), (1, true));
        assert!(replay.text().contains(&runs[0].execution));
        assert_eq!(self.subject.runs().await, 1);
    }
}

async fn b03_a_stream_that_is_reset_in_mid_handler_leaves_the_handler_to_its_end(
    database: Database,
) {
    reset(database, false).await;
}

async fn b03_a_transactional_stream_that_is_reset_in_mid_handler_is_committed(database: Database) {
    reset(database, true).await;
}

async fn reset(database: Database, transactional: bool) {
    let mut running = Running::start(database, transactional).await;
    running.connection.rst_stream(1).await.unwrap();
    // The connection is as good as before: on another stream, the same payment is running.
    running.connection.pay(3, &running.pay).await.unwrap();
    let refused = running.connection.body(3).await.unwrap();
    let refused = String::from_utf8(refused).unwrap();
    assert!(refused.contains("request-in-progress"), "{refused}");
    running.ends_replayed().await;
}

async fn b03_a_connection_that_goes_away_in_mid_handler_still_gets_its_answer(database: Database) {
    let mut running = Running::start(database, false).await;
    running.connection.go_away(0).await.unwrap();
    running.gate.open();
    let first = running.connection.body(1).await.unwrap();
    let replay = running.pay.send(running.subject.port).await.unwrap();
    assert_eq!(replay.body, first);
    running.ends_replayed().await;
}

async fn b03_a_connection_that_ends_in_mid_handler_leaves_the_handler_to_its_end(
    database: Database,
) {
    end(database, false).await;
}

async fn b03_a_transactional_connection_that_ends_in_mid_handler_is_committed(database: Database) {
    end(database, true).await;
}

async fn end(database: Database, transactional: bool) {
    let mut running = Running::start(database, transactional).await;
    running.connection.go_away(PROTOCOL_ERROR).await.unwrap();
    let closed = Connection::open(running.subject.port).await.unwrap();
    std::mem::replace(&mut running.connection, closed).reset();
    // It serves the next connection before the handler ends.
    until("another payment", async || {
        let other = Pay::new("");
        let mut connection = Connection::open(running.subject.port).await.unwrap();
        connection.pay(1, &other).await.unwrap();
        connection.body(1).await.is_ok().then_some(())
    })
    .await;
    running.gate.open();
    running
        .database
        .has_state(&running.pay.key, "completed")
        .await;
    let replay = retry_until_settled(&running.subject, &running.pay).await;
    assert_eq!(replay.status, 201, "{}", replay.text());
    assert!(replay.is_replayed());
    assert_eq!(running.database.runs(&running.pay.key).await.len(), 1);
}
