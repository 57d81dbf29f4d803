//! Clients that go away: before, while and after the handler runs.

use faults::client::{Connection, Pay};
use faults::database::Database;
use faults::process::Subject;
use faults::wait::{Gate, until};

use crate::{SUBJECT, assert_replays, on_every_store};

on_every_store! {
    b01_a_handler_whose_client_closed_finishes_and_a_retry_replays,
    b02_a_handler_whose_client_reset_finishes_and_a_retry_replays,
    b02_a_client_that_half_closed_gets_its_answer_or_a_replay,
    b07_an_answer_cut_off_on_its_way_is_replayed_whole,
    b07_an_answer_too_large_to_keep_cut_off_on_its_way_is_not_run_again,
    b09_a_disconnect_hidden_by_pipelined_bytes_loses_nothing,
    a_body_cut_off_claims_nothing_and_a_retry_runs,
    a_chunked_body_without_an_end_claims_nothing_and_a_retry_runs,
    a_chunked_body_without_a_length_is_the_same_request_as_one_with,
}

async fn b01_a_handler_whose_client_closed_finishes_and_a_retry_replays(database: Database) {
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    let connection = pay.begin_on(subject.port).await.unwrap();
    database.has_begun(&pay.key, 1).await;
    let ends = connection.ends();
    connection.fin();
    ends.closed_by_server().await;
    gate.open();
    finishes_and_replays(&database, &subject, &pay).await;
}

async fn b02_a_handler_whose_client_reset_finishes_and_a_retry_replays(database: Database) {
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    let connection = pay.begin_on(subject.port).await.unwrap();
    database.has_begun(&pay.key, 1).await;
    let ends = connection.ends();
    connection.reset();
    ends.closed_by_server().await;
    gate.open();
    finishes_and_replays(&database, &subject, &pay).await;
}

async fn b02_a_client_that_half_closed_gets_its_answer_or_a_replay(database: Database) {
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    database.has_begun(&pay.key, 1).await;
    let ends = connection.ends();
    connection.half_close().await.unwrap();
    // hyper takes it for a disconnect; a server that does not would keep it half open.
    ends.closed_by_server().await;
    gate.open();
    let answer = connection.answer().await;
    finishes_and_replays(&database, &subject, &pay).await;
    if let Ok(first) = answer {
        assert_replays(&pay.send(subject.port).await.unwrap(), &first);
    }
}

/// The run that nobody waited for came to its end, once, and its answer is there for good.
async fn finishes_and_replays(database: &Database, subject: &Subject, pay: &Pay) {
    database.has_state(&pay.key, "completed").await;
    // The record is there a moment before the process has taken note of it.
    let replay = until("the end of the run", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.code().as_deref() != Some("request-in-progress")).then_some(answer)
    })
    .await;
    assert_eq!(replay.status, 201, "{}", replay.text());
    assert_replays(&pay.send(subject.port).await.unwrap(), &replay);
    assert!(replay.is_replayed());
    let runs = database.runs(&pay.key).await;
    assert_eq!(runs.len(), 1);
    assert!(runs[0].finished, "the handler was cancelled");
    assert!(replay.text().contains(&runs[0].execution));
}

async fn b07_an_answer_cut_off_on_its_way_is_replayed_whole(database: Database) {
    const SIZE: usize = 1_000_000;
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let pay = Pay::new(&format!("size={SIZE}"));
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    let read = connection.read_at_least(1000).await.unwrap();
    assert!(
        (1000..SIZE).contains(&read),
        "the answer was not cut: {read}"
    );
    connection.reset();
    let replay = pay.send(subject.port).await.unwrap();
    assert!(replay.is_replayed() && replay.body.len() > SIZE);
    assert_replays(&pay.send(subject.port).await.unwrap(), &replay);
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn b07_an_answer_too_large_to_keep_cut_off_on_its_way_is_not_run_again(database: Database) {
    const SIZE: usize = 4_000_000;
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let pay = Pay::new(&format!("size={SIZE}"));
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    let read = connection.read_at_least(1000).await.unwrap();
    assert!(
        (1000..SIZE).contains(&read),
        "the answer was not cut: {read}"
    );
    connection.reset();
    let retry = pay.send(subject.port).await.unwrap();
    crate::assert_code(&retry, "response-not-retained");
    assert!(retry.text().contains("201"), "{}", retry.text());
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

async fn b09_a_disconnect_hidden_by_pipelined_bytes_loses_nothing(database: Database) {
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let gate = Gate::new();
    let (pay, next) = (Pay::new(&gate.behave()), Pay::new(""));
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    database.has_begun(&pay.key, 1).await;
    // The server has these to read, and so does not see the end behind them.
    connection.write(&next.bytes()).await.unwrap();
    let ends = connection.ends();
    connection.fin();
    ends.closed_unseen().await;
    gate.open();
    finishes_and_replays(&database, &subject, &pay).await;
    let answer = next.send(subject.port).await.unwrap();
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert_eq!(database.runs(&next.key).await.len(), 1);
}

async fn a_body_cut_off_claims_nothing_and_a_retry_runs(database: Database) {
    let subject = SUBJECT.start(&database.settings("critical")).await;
    for reset in [false, true] {
        let pay = Pay::new("");
        let mut connection = Connection::open(subject.port).await.unwrap();
        let half = &pay.body[..pay.body.len() / 2];
        let cut = pay.head() + half;
        connection.write(cut.as_bytes()).await.unwrap();
        let ends = connection.ends();
        if reset {
            connection.reset();
        } else {
            connection.fin();
        }
        ends.closed_by_server().await;
        claims_nothing_and_runs_whole(&database, &subject, &pay).await;
    }
}

async fn a_chunked_body_without_an_end_claims_nothing_and_a_retry_runs(database: Database) {
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let pay = Pay::new("");
    let mut connection = Connection::open(subject.port).await.unwrap();
    connection.write(&pay.chunked(false)).await.unwrap();
    connection.half_close().await.unwrap();
    // It says no or nothing, and has then read all there is.
    let answer = connection.answer().await;
    assert!(answer.is_err() || answer.unwrap().status == 400);
    claims_nothing_and_runs_whole(&database, &subject, &pay).await;
}

async fn claims_nothing_and_runs_whole(database: &Database, subject: &Subject, pay: &Pay) {
    assert_eq!(database.state(&pay.key).await, None);
    assert_eq!(database.runs(&pay.key).await.len(), 0);
    let first = pay.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    assert!(!first.is_replayed());
    assert_replays(&pay.send(subject.port).await.unwrap(), &first);
    let runs = database.runs(&pay.key).await;
    assert_eq!(runs.len(), 1);
    assert_eq!(runs[0].body, pay.body);
}

async fn a_chunked_body_without_a_length_is_the_same_request_as_one_with(database: Database) {
    let subject = SUBJECT.start(&database.settings("critical")).await;
    let pay = Pay::new("");
    let mut connection = Connection::open(subject.port).await.unwrap();
    connection.write(&pay.chunked(true)).await.unwrap();
    let first = connection.answer().await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    assert_replays(&pay.send(subject.port).await.unwrap(), &first);
}
