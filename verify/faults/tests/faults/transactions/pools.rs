//! Connections that are all taken: by duplicates, by handlers, by one handler that wants two.

use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::fired::fired;
use faults::ledger::Ledger;
use faults::process::Subject;
use faults::proxy::Proxy;
use faults::settings::Settings;
use faults::wait::{Gate, until};
use futures_util::future::join_all;
use http::{HeaderMap, StatusCode};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::net::TcpListener;
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::{IdempotencyLayer, PgStore, Scope};

use super::{behind, settings, took_effect_once};
use crate::{SUBJECT, assert_code, assert_replays, warm};

const DUPLICATES: usize = 100;

/// Two processes with two transactions each, and one request that holds one of the four.
struct Busy {
    pay: Pay,
    gate: Gate,
    client: Client,
    /// The first of them runs it; the second is behind the proxy.
    subjects: Vec<Subject>,
    proxy: Proxy,
    database: Database,
}

async fn one_runs(wait: Option<u64>) -> Busy {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let change = |s: &mut Settings| {
        s.max_transactions = Some(2);
        s.wait = wait;
    };
    let subjects = vec![
        SUBJECT.start(&settings(&database).with(change)).await,
        behind(&proxy, &database, change).await,
    ];
    let subjects = warm::<2>(subjects).await;
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    let before = subjects[0].runs().await;
    let client = send(&pay, &subjects[0]);
    subjects[0].has_run(before + 1).await;
    Busy {
        pay,
        gate,
        client,
        subjects,
        proxy,
        database,
    }
}

impl Busy {
    /// Sends the same to both, and waits until the one that asks for all of its process met the
    /// transaction that is open.
    async fn duplicates(&self) -> Vec<Client> {
        let sent = (0..DUPLICATES).map(|n| send(&self.pay, &self.subjects[n % 2]));
        let sent = sent.collect();
        until("duplicates to meet the transaction", async || {
            (self.proxy.traffic().failures("IK001") >= 1).then_some(())
        })
        .await;
        fired("duplicates");
        sent
    }
}

type Client = tokio::task::JoinHandle<Answer>;

fn send(pay: &Pay, subject: &Subject) -> Client {
    let (pay, port) = (pay.clone(), subject.port);
    tokio::spawn(async move { pay.send(port).await.unwrap() })
}

/// Other keys are executed and other requests served, as if nothing were.
async fn serves_others(subjects: &[Subject]) {
    for subject in subjects {
        for _ in 0..10 {
            let sent = Instant::now();
            let answer = Pay::new("").send(subject.port).await.unwrap();
            assert_eq!(answer.status, 201, "{}", answer.text());
            let unkeyed = subject.get("/ledger/acme/none").await;
            assert_eq!(unkeyed.status, 200);
            assert!(
                sent.elapsed() < Duration::from_secs(10),
                "{:?}",
                sent.elapsed()
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d08_100_waiting_duplicates_hold_no_connection() {
    let busy = one_runs(Some(25_000)).await;
    let waiting = busy.duplicates().await;
    serves_others(&busy.subjects).await;
    let mut clients = waiting.iter();
    assert!(!clients.any(Client::is_finished), "one did not wait");
    busy.gate.open();
    let first = busy.client.await.unwrap();
    for duplicate in join_all(waiting).await {
        assert_replays(&duplicate.unwrap(), &first);
    }
    took_effect_once(&busy.database, &busy.subjects[1], &busy.pay, &first).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d08_100_duplicates_that_do_not_wait_are_refused_and_hold_no_connection() {
    let busy = one_runs(None).await;
    let refused = busy.duplicates().await;
    serves_others(&busy.subjects).await;
    for duplicate in join_all(refused).await {
        assert_code(&duplicate.unwrap(), "request-in-progress");
    }
    busy.gate.open();
    let first = busy.client.await.unwrap();
    took_effect_once(&busy.database, &busy.subjects[0], &busy.pay, &first).await;
}

/// What has its answer needs no transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d08_while_all_transactions_are_taken_by_slow_handlers_answers_are_replayed() {
    let database = Database::postgres().await;
    let settings = settings(&database).with(|s| {
        s.max_transactions = Some(2);
        s.store_timeout = Some(1500);
    });
    let subject = SUBJECT.start(&settings).await;
    let subject = warm::<2>(vec![subject]).await.remove(0);
    let before = subject.runs().await;
    let stored = Pay::new("");
    let first = stored.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    let gate = Gate::new();
    let slow = [(); 2].map(|()| Pay::new(&gate.behave()));
    let running: Vec<_> = slow.iter().map(|pay| send(pay, &subject)).collect();
    subject.has_run(before + 3).await;
    until("all transactions to be taken", async || {
        (database.open_transactions().await == 2).then_some(())
    })
    .await;
    fired("transactions taken");
    let others = [(); 12].map(|()| Pay::new(""));
    let refused: Vec<_> = others.iter().map(|pay| send(pay, &subject)).collect();
    for answer in join_all(refused).await {
        assert_code(&answer.unwrap(), "store-unavailable");
    }
    assert_replays(&stored.send(subject.port).await.unwrap(), &first);
    gate.open();
    for (pay, client) in slow.iter().zip(running) {
        took_effect_once(&database, &subject, pay, &client.await.unwrap()).await;
    }
    for pay in &others {
        let answer = pay.send(subject.port).await.unwrap();
        took_effect_once(&database, &subject, pay, &answer).await;
    }
}

/// Writes, and then wants another connection of the application's if it is told `second`.
async fn pay(
    State(pool): State<PgPool>,
    mut tx: Tx,
    headers: HeaderMap,
) -> Result<StatusCode, TxError> {
    sqlx::query("insert into note (key) values ($1)")
        .bind(headers["idempotency-key"].to_str().unwrap())
        .execute(&mut *tx)
        .await?;
    if headers["x-behave"] == "second" {
        let second = pool.acquire().await;
        // The transaction is open, and has been written in.
        fired("second connection");
        let mut second = second?;
        sqlx::query("select 1").execute(&mut *second).await?;
    }
    Ok(StatusCode::CREATED)
}

/// An application with a pool of one connection, on a port, and that pool.
async fn application(database: &Database, is_shared: bool) -> (u16, PgPool) {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(Duration::from_secs(1))
        .connect(&database.url)
        .await
        .unwrap();
    let store = PgStore::builder(pool.clone()).with_shared_pool(is_shared);
    let store = store.build();
    store.migrate().await.unwrap();
    sqlx::raw_sql("create table note (key text)")
        .execute(&pool)
        .await
        .unwrap();
    let layer = IdempotencyLayer::new(store, Scope::fixed("acme")).transactional();
    let layer = layer.with_store_timeout(Duration::from_secs(10)).unwrap();
    let router = Router::new().route("/pay", post(pay).layer(layer));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = router.with_state(pool.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (port, pool)
}

async fn notes(database: &Database, key: &str) -> i64 {
    let Ledger::Postgres(pool) = &database.ledger else {
        panic!("it is PostgreSQL");
    };
    let count = sqlx::query_scalar("select count(*) from note where key = $1").bind(key);
    count.fetch_one(pool).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d09_a_handler_may_take_the_applications_only_connection_beside_its_transaction() {
    let database = Database::postgres().await;
    let (port, _pool) = application(&database, false).await;
    let pays = [(); 8].map(|()| Pay::new("second"));
    let answers = join_all(pays.iter().map(|pay| pay.send(port))).await;
    for (pay, answer) in pays.iter().zip(answers) {
        assert_eq!(answer.unwrap().status, 201);
        assert_eq!(notes(&database, &pay.key).await, 1);
    }
    database.is_clean().await;
}

/// The transaction is the one connection that there is: an error, when the pool gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d09_on_a_shared_pool_of_one_a_handler_that_wants_two_fails_and_leaves_nothing() {
    let database = Database::postgres().await;
    let (port, pool) = application(&database, true).await;
    let pay = Pay::new("second");
    let sent = Instant::now();
    let failed = pay.send(port).await.unwrap();
    assert_eq!(failed.status, 500, "{}", failed.text());
    assert!(
        sent.elapsed() < Duration::from_secs(10),
        "{:?}",
        sent.elapsed()
    );
    assert_eq!(notes(&database, &pay.key).await, 0);
    assert_eq!(database.state(&pay.key).await, None);
    // The same request without it, and the next ones, on that one connection.
    for pay in [pay.behaving(""), Pay::new(""), Pay::new("")] {
        let answer = pay.send(port).await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_replays(&pay.send(port).await.unwrap(), &answer);
        assert_eq!(notes(&database, &pay.key).await, 1);
    }
    assert_eq!(pool.size(), 1);
    database.is_clean().await;
}
