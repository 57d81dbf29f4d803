//! The process ends at a point between two steps of a transactional request.

use faults::client::Pay;
use faults::database::Database;
use faults::proxy::{Action, Proxy, request};

use super::{COMMIT, RECORD, behind, runs_afresh, settings, took_effect_once};
use crate::crashes::{crash_at, replays_the_one_run};
use crate::{SUBJECT, on_every_store};

on_every_store! {
    a01_after_a_crash_before_the_transaction_a_retry_executes_once,
    a02_after_a_crash_before_the_handler_the_key_is_free_at_once,
    a03_after_a_crash_in_the_handler_its_write_is_rolled_back_and_a_retry_executes_once,
    a04_after_a_crash_before_the_record_nothing_is_left_and_a_retry_executes_once,
    a05_after_a_crash_between_commit_and_answer_a_retry_replays_the_answer,
    a06_after_a_crash_in_the_middle_of_the_answer_a_retry_replays_all_of_it,
}

async fn nothing_is_left_after_a_crash_at(failpoint: &str, database: &Database) {
    let pay = Pay::new("");
    let subject = crash_at(failpoint, &pay, &settings(database)).await;
    runs_afresh(database, &subject, &pay).await;
}

async fn a01_after_a_crash_before_the_transaction_a_retry_executes_once(database: Database) {
    nothing_is_left_after_a_crash_at("before_begin", &database).await;
}

async fn a02_after_a_crash_before_the_handler_the_key_is_free_at_once(database: Database) {
    nothing_is_left_after_a_crash_at("after_begin", &database).await;
}

async fn a03_after_a_crash_in_the_handler_its_write_is_rolled_back_and_a_retry_executes_once(
    database: Database,
) {
    nothing_is_left_after_a_crash_at("handler_mid", &database).await;
}

async fn a04_after_a_crash_before_the_record_nothing_is_left_and_a_retry_executes_once(
    database: Database,
) {
    nothing_is_left_after_a_crash_at("before_commit", &database).await;
}

/// The process is killed while its COMMIT is on its way, which never arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a04_after_a_crash_between_record_and_commit_nothing_is_left_and_a_retry_executes_once() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = behind(&proxy, &database, |_| {}).await;
    let commit = proxy.on(request(COMMIT)).does(Action::Hold);
    let pay = Pay::new("");
    let connection = pay.begin_on(subject.port).await.unwrap();
    commit.has_fired(1).await;
    subject.kill();
    proxy.cut();
    drop(connection);
    let traffic = proxy.traffic();
    assert_eq!(
        (traffic.executions(RECORD), traffic.executions(COMMIT)),
        (1, 0)
    );
    let subject = SUBJECT.start(&settings(&database)).await;
    runs_afresh(&database, &subject, &pay).await;
}

async fn a05_after_a_crash_between_commit_and_answer_a_retry_replays_the_answer(
    database: Database,
) {
    let pay = Pay::new("size=1000");
    let subject = crash_at("after_commit", &pay, &settings(&database)).await;
    assert_eq!(database.effects(&pay.key).await, 1);
    let replay = replays_the_one_run(&database, &subject, &pay).await;
    took_effect_once(&database, &subject, &pay, &replay).await;
}

async fn a06_after_a_crash_in_the_middle_of_the_answer_a_retry_replays_all_of_it(
    database: Database,
) {
    let subject = SUBJECT.start(&settings(&database)).await;
    subject.arm("body_chunk", "pause").await;
    let pay = Pay::new("size=100000");
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    connection.read_at_least(40_000).await.unwrap();
    subject.has_reached("body_chunk", 1).await;
    subject.arm("body_chunk", "abort").await;
    assert!(connection.answer().await.is_err());
    subject.aborted_at("body_chunk").await;
    let subject = SUBJECT.start(&settings(&database)).await;
    let replay = replays_the_one_run(&database, &subject, &pay).await;
    assert!(replay.body.len() > 100_000);
    took_effect_once(&database, &subject, &pay, &replay).await;
}
