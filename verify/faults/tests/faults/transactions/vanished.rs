//! A host that is gone, or stopped, in the middle of a transaction: nobody closes its connection.

use std::time::{Duration, Instant};

use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::process::Subject;
use faults::proxy::{Action, Proxy, request};

use super::{COMMIT, RECORD, behind, runs_afresh, settings, settled, took_effect_once};
use crate::{SUBJECT, assert_code, assert_replays};

const LIMIT: Duration = Duration::from_millis(2000);
/// For the server to notice, and for a duplicate to ask again.
const SLACK: Duration = Duration::from_millis(1500);

/// The host of a transaction vanishes before a statement, while one duplicate waits for longer than
/// its execution limit, one for less, and one does not wait.
async fn vanishes_before(statement: &str) {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let limit = |s: &mut faults::settings::Settings| s.execution_limit = Some(2000);
    let host = behind(&proxy, &database, limit).await;
    let with_wait = |wait| settings(&database).with(limit).with(|s| s.wait = wait);
    let hasty = SUBJECT.start(&with_wait(None)).await;
    let waits = SUBJECT.start(&with_wait(Some(300))).await;
    let patient = SUBJECT.start(&with_wait(Some(20_000))).await;

    let gone = proxy.on(request(statement));
    let gone = gone.does(Action::Blackhole { server_open: true });
    let pay = Pay::new("");
    let connection = pay.begin_on(host.port).await.unwrap();
    gone.has_fired(1).await;
    let since = Instant::now();
    host.kill();
    drop(connection);
    assert_eq!(database.open_transactions().await, 1);
    let retry = tokio::spawn({
        let (pay, port) = (pay.clone(), patient.port);
        async move { pay.send(port).await.unwrap() }
    });
    for subject in [&hasty, &waits] {
        let sent = Instant::now();
        let refused = pay.send(subject.port).await.unwrap();
        assert_code(&refused, "request-in-progress");
        assert!(
            sent.elapsed() < Duration::from_secs(1),
            "{:?}",
            sent.elapsed()
        );
    }
    assert_eq!(database.open_transactions().await, 1);
    let first = retry.await.unwrap();
    let took = since.elapsed();
    println!("run again {took:?} after its host vanished");
    assert!(took > LIMIT / 2, "it was not held for long: {took:?}");
    assert!(took < LIMIT + SLACK, "{took:?}");
    assert!(!first.is_replayed());
    took_effect_once(&database, &patient, &pay, &first).await;
    assert_replays(&pay.send(hasty.port).await.unwrap(), &first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d20_a_host_that_vanishes_before_the_record_holds_its_key_for_the_execution_limit() {
    vanishes_before(RECORD).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d21_a_host_that_vanishes_before_the_commit_holds_its_key_for_the_execution_limit() {
    vanishes_before(COMMIT).await;
}

struct Zombie {
    /// What it answered in the end.
    late: Answer,
    /// What its successor had answered.
    answer: Answer,
    pay: Pay,
    subject: Subject,
    database: Database,
}

impl Zombie {
    async fn wrote_nothing(&self) {
        took_effect_once(&self.database, &self.subject, &self.pay, &self.answer).await;
        assert_eq!(self.subject.runs().await, 1);
    }
}

/// A process that is stopped at a point of its transaction for longer than its execution limit, while
/// another one takes its place, and then goes on.
async fn zombie_at(failpoint: &str, reruns: u32) -> Zombie {
    let database = Database::postgres().await;
    let settings = settings(&database).with(|s| {
        s.execution_limit = Some(1000);
        s.reruns = reruns;
    });
    let subject = SUBJECT.start(&settings).await;
    let successor = SUBJECT.start(&settings).await;
    subject.arm(failpoint, "pause").await;
    let pay = Pay::new("");
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    let client = tokio::spawn(async move { connection.answer().await.unwrap() });
    subject.has_reached(failpoint, 1).await;
    subject.stop().await;
    assert_eq!(database.open_transactions().await, 1);
    assert_code(
        &pay.send(successor.port).await.unwrap(),
        "request-in-progress",
    );
    let answer = runs_afresh(&database, &successor, &pay).await;
    subject.go_on();
    subject.arm(failpoint, "pass").await;
    Zombie {
        late: client.await.unwrap(),
        answer,
        pay,
        subject,
        database,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c04_what_a_zombie_wrote_is_rolled_back_and_it_answers_that_it_did_not_end_in_time() {
    let zombie = zombie_at("handler_mid", 0).await;
    assert_code(&zombie.late, "execution-limit");
    zombie.wrote_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c04_a_zombie_that_was_about_to_commit_commits_nothing() {
    let zombie = zombie_at("before_commit", 0).await;
    assert_code(&zombie.late, "transaction-conflict");
    zombie.wrote_nothing().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c04_a_zombie_that_may_run_again_gives_its_successors_answer() {
    let zombie = zombie_at("before_commit", 1).await;
    assert_replays(&zombie.late, &zombie.answer);
    zombie.wrote_nothing().await;
}

/// SQLite has one writer, and no server to end it: all others are refused while it is stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c04_on_sqlite_others_are_refused_while_the_writer_is_stopped_and_then_replay() {
    let database = Database::sqlite().await;
    let settings = settings(&database).with(|s| s.store_timeout = Some(500));
    let subject = SUBJECT.start(&settings).await;
    let other = SUBJECT.start(&settings).await;
    subject.arm("handler_mid", "pause").await;
    let pay = Pay::new("");
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    let client = tokio::spawn(async move { connection.answer().await.unwrap() });
    subject.has_reached("handler_mid", 1).await;
    subject.stop().await;
    for _ in 0..3 {
        let sent = Instant::now();
        let refused = pay.send(other.port).await.unwrap();
        assert_code(&refused, "store-unavailable");
        assert!(
            sent.elapsed() < Duration::from_secs(1),
            "{:?}",
            sent.elapsed()
        );
    }
    subject.go_on();
    subject.arm("handler_mid", "pass").await;
    let first = client.await.unwrap();
    took_effect_once(&database, &subject, &pay, &first).await;
    assert_replays(&settled(&pay, &other).await, &first);
    assert_eq!(other.runs().await, 0);
}
