//! The same key, many times at once.

use std::collections::BTreeMap;
use std::time::Instant;

use faults::client::{Answer, Connection, Pay};
use faults::database::Database;
use faults::fired::fired;
use faults::matrix::size;
use faults::process::Subject;
use futures_util::future::join_all;

use crate::{SUBJECT, assert_replays, on_every_store, warm};

const DUPLICATES: usize = 200;

on_every_store! {
    c01_200_concurrent_duplicates_on_one_process_execute_once,
    c02_200_concurrent_duplicates_on_four_processes_execute_once,
    c01_200_waiting_duplicates_on_one_process_get_equal_answers,
    c02_200_waiting_duplicates_on_four_processes_get_equal_answers,
    c03_of_200_concurrent_bodies_under_one_key_one_executes_and_the_others_are_refused,
}

async fn c01_200_concurrent_duplicates_on_one_process_execute_once(database: Database) {
    execute_once(database, 1).await;
}

async fn c02_200_concurrent_duplicates_on_four_processes_execute_once(database: Database) {
    execute_once(database, 4).await;
}

async fn c01_200_waiting_duplicates_on_one_process_get_equal_answers(database: Database) {
    get_equal_answers(database, 1).await;
}

async fn c02_200_waiting_duplicates_on_four_processes_get_equal_answers(database: Database) {
    get_equal_answers(database, 4).await;
}

/// Processes that wait for their store on a busy machine, too, where two hundred are before it.
async fn patient(database: &Database, processes: usize, wait: Option<u64>) -> Vec<Subject> {
    let settings = database.settings("high").with(|s| {
        s.store_timeout = Some(20_000);
        s.wait = wait;
    });
    warm::<16>(SUBJECT.start_all(processes, &settings).await).await
}

async fn execute_once(database: Database, processes: usize) {
    let subjects = patient(&database, processes, None).await;
    let began = Instant::now();
    let mut kinds = BTreeMap::new();
    for round in 0..size("C01") {
        // Every other handler ends while the duplicates are still being answered.
        let pay = Pay::new(if round % 2 == 0 { "delay=40" } else { "" });
        let answers = at_once(&subjects, &vec![pay.clone(); DUPLICATES]).await;
        let first = the_one_execution(&answers);
        for answer in &answers {
            *kinds.entry(answer.kind()).or_insert(0) += 1;
            if answer.is_replayed() {
                assert_replays(answer, &first);
            } else if *answer != first {
                crate::assert_code(answer, "request-in-progress");
                assert!(answer.header("retry-after").is_some());
            }
        }
        assert_eq!(database.runs(&pay.key).await.len(), 1);
        for subject in &subjects {
            assert_replays(&pay.send(subject.port).await.unwrap(), &first);
        }
    }
    println!("{processes} processes, {:?}: {kinds:?}", began.elapsed());
}

async fn get_equal_answers(database: Database, processes: usize) {
    let subjects = patient(&database, processes, Some(20_000)).await;
    let began = Instant::now();
    for _ in 0..size("C01") {
        let pay = Pay::new("delay=40");
        let answers = at_once(&subjects, &vec![pay.clone(); DUPLICATES]).await;
        let first = the_one_execution(&answers);
        for answer in answers.iter().filter(|answer| **answer != first) {
            assert_replays(answer, &first);
        }
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
    println!("{processes} processes, {:?}", began.elapsed());
}

async fn c03_of_200_concurrent_bodies_under_one_key_one_executes_and_the_others_are_refused(
    database: Database,
) {
    let subjects = patient(&database, 2, None).await;
    let (mut asked, mut undecided) = (0, 0);
    for _ in 0..size("C01") {
        let pay = Pay::new("delay=20");
        let bodies = (0..DUPLICATES).map(|n| pay.with_body(&format!(r#"{{"amount":{n}}}"#)));
        let pays: Vec<_> = bodies.collect();
        let answers = at_once(&subjects, &pays).await;
        asked += answers.len();
        let first = the_one_execution(&answers);
        let executed = answers.iter().position(|answer| *answer == first).unwrap();
        for (n, answer) in answers.iter().enumerate().filter(|(n, _)| *n != executed) {
            // A claim waits so long for another process's, which commits when the disk lets it.
            if answer.kind() == "request-in-progress" {
                undecided += 1;
                assert!(answer.header("retry-after").is_some(), "{n}");
            } else {
                crate::assert_code(answer, "key-reused");
                assert!(answer.header("retry-after").is_none(), "{n}");
            }
            assert!(!answer.text().contains("amount"), "{}", answer.text());
        }
        let runs = database.runs(&pay.key).await;
        assert_eq!(runs.len(), 1);
        assert_eq!(runs[0].body, pays[executed].body);
        let retry = pays[executed].send(subjects[1].port).await.unwrap();
        assert_replays(&retry, &first);
        let other = pays[(executed + 1) % DUPLICATES].send(subjects[0].port);
        crate::assert_code(&other.await.unwrap(), "key-reused");
    }
    println!("{undecided} of {asked} undecided");
    assert!(undecided * 20 < asked, "{undecided} of {asked}");
}

/// Connects all, and only then sends.
async fn at_once(subjects: &[Subject], pays: &[Pay]) -> Vec<Answer> {
    fired("duplicates");
    let ports = subjects.iter().map(|subject| subject.port).cycle();
    let opening = ports.take(pays.len()).map(Connection::open);
    let connections = join_all(opening).await;
    let sending = connections.into_iter().zip(pays).map(|(connection, pay)| {
        let request = pay.bytes();
        tokio::spawn(async move {
            let mut connection = connection.expect("it listens");
            connection.write(&request).await.expect("it reads");
            connection.answer().await.expect("it answers")
        })
    });
    let sending: Vec<_> = sending.collect();
    let answers = join_all(sending).await;
    answers.into_iter().map(Result::unwrap).collect()
}

#[track_caller]
fn the_one_execution(answers: &[Answer]) -> Answer {
    let executed = |answer: &&Answer| answer.status == 201 && !answer.is_replayed();
    let executed: Vec<_> = answers.iter().filter(executed).collect();
    let mut kinds = BTreeMap::new();
    for answer in answers {
        *kinds.entry(answer.kind()).or_insert(0) += 1;
    }
    assert_eq!(executed.len(), 1, "{kinds:?}");
    executed[0].clone()
}
