//! One statement of a transaction fails on its way, or its client goes away meanwhile.

use std::time::{Duration, Instant};

use faults::client::{Answer, Pay};
use faults::cluster::Cluster;
use faults::database::Database;
use faults::ledger::Ledger;
use faults::process::Subject;
use faults::proxy::{Action, Close, Proxy, reply, request};
use faults::settings::Settings;
use futures_util::future::join_all;

use super::{
    BEGIN, COMMIT, PROBE, RECORD, WRITE, begins_are_clean, behind, runs_afresh, settled,
    took_effect_once,
};
use crate::{assert_code, warm};

/// A request whose client resets its connection while the reply to a statement is held back.
async fn client_leaves_during(statement: &str) {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = behind(&proxy, &database, |s| s.max_transactions = Some(2)).await;
    let held = proxy.on(reply(statement)).does(Action::Hold);
    let pay = Pay::new("");
    let connection = pay.begin_on(subject.port).await.unwrap();
    held.has_fired(1).await;
    let ends = connection.ends();
    connection.reset();
    ends.closed_by_server().await;
    held.release();
    database.has_state(&pay.key, "completed").await;
    let replay = settled(&pay, &subject).await;
    assert!(replay.is_replayed());
    took_effect_once(&database, &subject, &pay, &replay).await;
    assert_eq!(subject.runs().await, 1);

    // Whoever gets its connections next is in a transaction of his own.
    let pays = [(); 20].map(|()| Pay::new(""));
    for answer in join_all(pays.iter().map(|pay| pay.send(subject.port))).await {
        assert_eq!(answer.unwrap().status, 201);
    }
    assert_eq!(begins_are_clean(&proxy.traffic()), 21);
    let Ledger::Postgres(pool) = &database.ledger else {
        panic!("it is PostgreSQL");
    };
    let transactions = sqlx::query_scalar("select count(distinct xid) from ledger");
    let transactions: i64 = transactions.fetch_one(pool).await.unwrap();
    assert_eq!(transactions, 21);
    assert_eq!(database.unpaired().await, 0);
    database.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b04_a_client_that_leaves_during_begin_poisons_no_connection() {
    client_leaves_during(BEGIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b05_a_client_that_leaves_during_commit_finds_its_answer_later() {
    client_leaves_during(COMMIT).await;
}

/// A subject with a short store timeout, and connections that are open.
async fn impatient(
    proxy: &Proxy,
    database: &Database,
    change: impl FnOnce(&mut Settings),
) -> Subject {
    let settings = |s: &mut Settings| {
        s.store_timeout = Some(1500);
        change(s);
    };
    let subject = behind(proxy, database, settings).await;
    warm::<1>(vec![subject]).await.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b04_a_begin_that_is_heard_of_too_late_is_a_503_and_its_transaction_is_rolled_back() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = impatient(&proxy, &database, |_| {}).await;
    let before = subject.runs().await;
    let held = proxy.on(reply(BEGIN)).does(Action::Hold);
    let pay = Pay::new("");
    let answer = pay.send(subject.port).await.unwrap();
    assert_code(&answer, "store-unavailable");
    assert_eq!(held.fired(), 1);
    assert_eq!(database.open_transactions().await, 1);
    held.release();
    runs_afresh(&database, &subject, &pay).await;
    assert_eq!(subject.runs().await, before + 1);
    begins_are_clean(&proxy.traffic());
}

/// The server ends it when it has idled for the execution limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b04_a_begin_that_is_never_heard_of_is_a_503_and_holds_its_key_for_the_execution_limit() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = impatient(&proxy, &database, |s| s.execution_limit = Some(3000)).await;
    let before = subject.runs().await;
    let lost = proxy.on(reply(BEGIN));
    let lost = lost.does(Action::Blackhole { server_open: true });
    let pay = Pay::new("");
    let answer = pay.send(subject.port).await.unwrap();
    assert_code(&answer, "store-unavailable");
    assert_eq!(lost.fired(), 1);
    let again = pay.send(subject.port).await.unwrap();
    assert_code(&again, "request-in-progress");
    assert_eq!(database.open_transactions().await, 1);
    let since = Instant::now();
    runs_afresh(&database, &subject, &pay).await;
    assert!(
        since.elapsed() < Duration::from_secs(6),
        "{:?}",
        since.elapsed()
    );
    assert_eq!(subject.runs().await, before + 1);
}

/// A request that met a fault.
struct Met {
    pay: Pay,
    answer: Answer,
    subject: Subject,
    database: Database,
    // The subject's only way to the database.
    proxy: Proxy,
}

impl Met {
    async fn executes_afresh(&self) {
        runs_afresh(&self.database, &self.subject, &self.pay).await;
        begins_are_clean(&self.proxy.traffic());
    }

    async fn took_effect_once(&self) {
        took_effect_once(&self.database, &self.subject, &self.pay, &self.answer).await;
        begins_are_clean(&self.proxy.traffic());
    }
}

/// While the server fails a statement this often.
async fn fails(statement: &str, times: usize, reruns: u32) -> Met {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = behind(&proxy, &database, |s| s.reruns = reruns).await;
    let failing = proxy.on(request(statement)).times(times);
    let failing = failing.does(Action::Fail("40001"));
    let pay = Pay::new("");
    let answer = pay.send(subject.port).await.unwrap();
    assert_eq!(failing.fired(), times);
    assert_eq!(proxy.traffic().failures("40001"), times);
    assert_eq!(
        begins_are_clean(&proxy.traffic()) as u64,
        subject.runs().await
    );
    Met {
        pay,
        answer,
        subject,
        database,
        proxy,
    }
}

const STATEMENTS: [&str; 3] = [WRITE, RECORD, COMMIT];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c10_after_a_serialization_failure_at_any_statement_it_is_a_503_and_the_key_is_free() {
    for statement in STATEMENTS {
        let failed = fails(statement, 1, 0).await;
        assert_code(&failed.answer, "transaction-conflict");
        assert_eq!(failed.answer.status, 503);
        assert!(failed.answer.header("retry-after").is_some());
        failed.executes_afresh().await;
        assert_eq!(failed.subject.runs().await, 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c10_after_a_serialization_failure_at_any_statement_it_is_run_again_where_the_policy_says()
{
    for statement in STATEMENTS {
        let failed = fails(statement, 2, 2).await;
        failed.took_effect_once().await;
        assert_eq!(failed.subject.runs().await, 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c10_after_more_serialization_failures_than_reruns_it_is_a_503() {
    for statement in STATEMENTS {
        let failed = fails(statement, 3, 2).await;
        assert_code(&failed.answer, "transaction-conflict");
        failed.executes_afresh().await;
        assert_eq!(failed.subject.runs().await, 4);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_a_commit_whose_reply_is_lost_is_the_answer_and_not_run_again() {
    for action in [Action::Cut(Close::Reset), Action::Cut(Close::Fin)] {
        let database = Database::postgres().await;
        let proxy = Proxy::start(&database.url).await;
        let subject = behind(&proxy, &database, |s| s.reruns = 3).await;
        let lost = proxy.on(reply(COMMIT)).does(action);
        // Nor is the first word on what became of it heard.
        let unheard = proxy.on(reply(PROBE)).does(Action::Cut(Close::Reset));
        let pay = Pay::new("");
        let first = pay.send(subject.port).await.unwrap();
        assert!(!first.is_replayed());
        assert_eq!((lost.fired(), unheard.fired()), (1, 1));
        took_effect_once(&database, &subject, &pay, &first).await;
        assert_eq!(subject.runs().await, 1);
        assert_eq!(begins_are_clean(&proxy.traffic()), 1);
    }
}

/// No connection breaks, and nothing is ever heard of those that were there again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d04_a_commit_whose_reply_never_comes_is_the_answer_and_not_run_again() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = impatient(&proxy, &database, |_| {}).await;
    let runs = subject.runs().await;
    let before = proxy.traffic();
    let lost = proxy.on(reply(COMMIT)).does(Action::Hold);
    let pay = Pay::new("");
    let mut client = pay.begin_on(subject.port).await.unwrap();
    lost.has_fired(1).await;
    proxy.strand();
    let first = client.answer().await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    let traffic = proxy.traffic().since(&before);
    assert!(traffic.executions(PROBE) > 0, "nobody asked");
    // The server knows of no end of the transaction that the commit was chained to: it is empty.
    proxy.cut();
    took_effect_once(&database, &subject, &pay, &first).await;
    assert_eq!(subject.runs().await, runs + 1);
}

async fn loses_the_commit(reruns: u32) -> Met {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = behind(&proxy, &database, |s| s.reruns = reruns).await;
    let lost = proxy.on(request(COMMIT)).does(Action::Cut(Close::Reset));
    let pay = Pay::new("");
    let answer = pay.send(subject.port).await.unwrap();
    assert_eq!(lost.fired(), 1);
    let traffic = proxy.traffic();
    assert!(traffic.executions(PROBE) > 0, "nobody asked");
    Met {
        pay,
        answer,
        subject,
        database,
        proxy,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d05_after_a_commit_that_never_arrived_it_is_a_503_and_a_retry_executes_once() {
    let lost = loses_the_commit(0).await;
    assert_code(&lost.answer, "transaction-conflict");
    assert_eq!(lost.answer.status, 503);
    lost.executes_afresh().await;
    assert_eq!(lost.subject.runs().await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d05_after_a_commit_that_never_arrived_it_is_run_again_where_the_policy_says() {
    let lost = loses_the_commit(1).await;
    lost.took_effect_once().await;
    assert_eq!(lost.subject.runs().await, 2);
}

/// A server of its own, and one request whose COMMIT it is crashed at.
async fn crashes_at_the_commit(is_executed: bool) -> (Met, Cluster) {
    let cluster = Cluster::start().await;
    let database = Database::foreign(&cluster.url()).await;
    let proxy = Proxy::start(&cluster.url()).await;
    let subject = behind(&proxy, &database, |_| {}).await;
    let on_commit = if is_executed { reply } else { request };
    let commit = proxy.on(on_commit(COMMIT)).does(Action::Hold);
    let pay = Pay::new("");
    let mut client = pay.begin_on(subject.port).await.unwrap();
    commit.has_fired(1).await;
    cluster.shut("immediate");
    proxy.cut();
    cluster.boot();
    let answer = client.answer().await.unwrap();
    let commits = proxy.traffic().executions(COMMIT);
    assert_eq!(commits, usize::from(is_executed));
    let crashed = Met {
        pay,
        answer,
        subject,
        database,
        proxy,
    };
    (crashed, cluster)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x10_a_commit_that_the_server_crashed_after_is_the_answer() {
    let (crashed, _cluster) = crashes_at_the_commit(true).await;
    crashed.took_effect_once().await;
    assert_eq!(crashed.subject.runs().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x10_after_a_commit_that_the_server_crashed_before_a_retry_executes_once() {
    let (crashed, _cluster) = crashes_at_the_commit(false).await;
    assert_code(&crashed.answer, "transaction-conflict");
    crashed.executes_afresh().await;
    assert_eq!(crashed.subject.runs().await, 2);
}
