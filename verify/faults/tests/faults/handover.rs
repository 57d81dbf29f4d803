//! Connections that go from one transaction to the next, and fail on their way, or are waited for in vain.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use faults::client::Pay;
use faults::database::Database;
use faults::ledger::Ledger;
use faults::process::Subject;
use faults::proxy::{Action, Close, Proxy, request};
use faults::settings::Settings;
use faults::wait::{Gate, until};
use futures_util::future::{join, join_all};
use sqlx::{AssertSqlSafe, PgPool};

use crate::{SUBJECT, assert_code, assert_replays};

const BEGIN: &str = "select idempotency.enter(";

/// How a transaction begins on a connection that another has ended its own on.
const HANDED: &str = "select idempotency.enter($1";

const TIMES: usize = 4;

/// Few transactions at once, on connections that are behind a proxy and open.
async fn with_transactions(
    max: u32,
    change: impl FnOnce(&mut Settings),
) -> (Database, Proxy, Subject) {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let settings = database.settings("high").with(|s| {
        s.transactional = true;
        s.max_transactions = Some(max);
        s.store = proxy.url().to_owned();
        change(s);
    });
    let subject = SUBJECT.start(&settings).await;
    is_executed(&Pay::new(""), &subject).await;
    (database, proxy, subject)
}

async fn is_executed(pay: &Pay, subject: &Subject) {
    until("it to be executed", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.status == 201).then_some(())
    })
    .await;
}

fn server(database: &Database) -> &PgPool {
    match &database.ledger {
        Ledger::Postgres(pool) => pool,
        _ => panic!("it is PostgreSQL"),
    }
}

async fn fails_on_its_way(action: Action) {
    let (database, proxy, subject) = with_transactions(2, |_| {}).await;
    let fault = proxy.on(request(HANDED)).times(TIMES).does(action);
    let pays: Vec<_> = (0..40).map(|_| Pay::new("delay=20")).collect();
    let answers = join_all(pays.iter().map(|pay| async {
        let first = pay.send(subject.port).await.unwrap();
        if first.status == 201 {
            return first;
        }
        assert_eq!(first.kind(), "store-unavailable", "{}", first.text());
        until("a retry to be answered", async || {
            let retry = pay.send(subject.port).await.unwrap();
            (retry.status == 201).then_some(retry)
        })
        .await
    }))
    .await;
    fault.has_fired(TIMES).await;
    for (pay, answer) in pays.iter().zip(&answers) {
        assert_replays(&pay.send(subject.port).await.unwrap(), answer);
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
    until("all transactions to be over", async || {
        (database.open_transactions().await == 0).then_some(())
    })
    .await;
    database.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_whose_connection_breaks_as_it_is_handed_over_is_begun_on_another() {
    fails_on_its_way(Action::Cut(Close::Reset)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_not_begun_where_it_was_handed_over_is_begun_again() {
    fails_on_its_way(Action::Fail("57014")).await;
}

/// What a session of the pool of transactions has done last.
const TRANSACTIONS: &str = "from pg_stat_activity where datname = current_database()
    and application_name like 'tower-idempotency transactions %'
    and query ~ 'idempotency.enter|insert into ledger|idempotency.attempt|idempotency.committed|and chain'";

/// Each that is being opened would be given up for one that is handed over, which is there sooner.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_loses_connections_under_load_opens_others() {
    let (database, proxy, subject) = with_transactions(4, |_| {}).await;
    let is_over = AtomicBool::new(false);
    let load = join_all((0..24).map(|_| async {
        while !is_over.load(Ordering::SeqCst) {
            Pay::new("delay=5").send(subject.port).await.unwrap();
        }
    }));
    let server = server(&database);
    let count = |of: &str| {
        let sql = AssertSqlSafe(format!("select count(*) {TRANSACTIONS} {of}"));
        async move {
            let count: i64 = sqlx::query_scalar(sql).fetch_one(server).await.unwrap();
            count
        }
    };
    let loss = async {
        until("all to be open", async || {
            (count("").await == 4).then_some(())
        })
        .await;
        let slow = proxy.on(request("startup")).times(usize::MAX);
        let slow = slow.does(Action::Delay(Duration::from_millis(300)));
        let now = sqlx::query_scalar("select clock_timestamp()::text");
        let before: String = now.fetch_one(server).await.unwrap();
        let kill = format!(
            "select count(pg_terminate_backend(pid)) from
                (select pid {TRANSACTIONS} order by pid limit 3) as session"
        );
        let killed = sqlx::query_scalar(AssertSqlSafe(kill));
        let killed: i64 = killed.fetch_one(server).await.unwrap();
        assert_eq!(killed, 3);
        until("others to be open for a while", async || {
            let opened = format!(
                "and backend_start between '{before}' and clock_timestamp() - interval '0.5 s'"
            );
            (count(&opened).await == 3).then_some(())
        })
        .await;
        // Each that ends before one is open gives it up, until somebody is left to open it.
        let begun = slow.fired();
        println!("{begun} connections were begun for 3");
        assert!((3..300).contains(&begun), "{begun}");
        is_over.store(true, Ordering::SeqCst);
    };
    join(load, loss).await;
    database.is_clean().await;
}

/// The operation is running in another process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_falls_silent_after_a_refusal_is_replaced() {
    let (database, proxy, subject) = with_transactions(1, |_| {}).await;
    let other = database.settings("high").with(|s| s.transactional = true);
    let other = SUBJECT.start(&other).await;
    let (running, first) = (Gate::new(), Gate::new());
    let (pay, before) = (Pay::new(&running.behave()), Pay::new(&first.behave()));
    let silent = proxy.on(request("start transaction"));
    let silent = silent.does(Action::Blackhole { server_open: true });
    let duplicate = async {
        other.has_run(1).await;
        subject.has_run(2).await;
        let duplicate = pay.send(subject.port);
        let open = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            first.open();
        };
        let (duplicate, ()) = join(duplicate, open).await;
        assert_code(&duplicate.unwrap(), "request-in-progress");
        silent.has_fired(1).await;
        is_executed(&Pay::new(""), &subject).await;
        running.open();
    };
    let both = join(pay.send(other.port), before.send(subject.port));
    let ((running, first), ()) = join(both, duplicate).await;
    assert_eq!((running.unwrap().status, first.unwrap().status), (201, 201));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_nobody_waits_for_is_not_begun() {
    let impatient = |s: &mut Settings| s.store_timeout = Some(300);
    let (_database, proxy, subject) = with_transactions(1, impatient).await;
    let begun = || proxy.traffic().executions(BEGIN);
    let gate = Gate::new();
    let first = Pay::new(&gate.behave());
    let refused = async {
        subject.has_run(2).await;
        let before = begun();
        let pays = [(); 20].map(|()| Pay::new(""));
        for answer in join_all(pays.iter().map(|pay| pay.send(subject.port))).await {
            assert_code(&answer.unwrap(), "store-unavailable");
        }
        gate.open();
        (pays, before)
    };
    let (first, (pays, before)) = join(first.send(subject.port), refused).await;
    assert_eq!(first.unwrap().status, 201);
    for pay in &pays {
        let retry = pay.send(subject.port).await.unwrap();
        assert_eq!(retry.status, 201, "{}", retry.text());
    }
    assert_eq!(begun(), before + pays.len());
}

/// Servers and clients log what is slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_text_of_a_statement_has_the_token_of_its_attempt() {
    let (database, proxy, subject) = with_transactions(1, |_| {}).await;
    let pays = [(); 10].map(|()| Pay::new(""));
    join_all(pays.iter().map(|pay| is_executed(pay, &subject))).await;
    let tokens = sqlx::query_scalar("select token::text from idempotency.record");
    let tokens: Vec<String> = tokens.fetch_all(server(&database)).await.unwrap();
    assert_eq!(tokens.len(), 11);
    let exchanges = proxy.traffic().exchanges;
    assert!(exchanges.iter().any(|exchange| exchange.executes(HANDED)));
    for token in tokens {
        assert!(!exchanges.iter().any(|exchange| exchange.executes(&token)));
    }
}
