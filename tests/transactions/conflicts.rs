//! PostgreSQL: transactions that are aborted, and what becomes of their requests.

use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Router, extract::State};
use sqlx::PgPool;
use tower_idempotency::postgres::{Tx, TxError};

use crate::bank::postgres::Bank;
use crate::bank::{Banking, paid, pay};
use crate::common::fired::fired;
use crate::site::{Runs, Sent, Site, policy};

/// Raises a serialization failure on the first `x-fails` runs; `x-swallow` makes it 201 all the same.
async fn clash(State(runs): State<Runs>, mut tx: Tx, headers: HeaderMap) -> Response {
    let run = runs.run().await;
    let insert = sqlx::query("insert into ledger (note) values ('clash')");
    insert.execute(&mut *tx).await.unwrap();
    let number = |name| {
        headers
            .get(name)
            .map_or(0, |v| v.to_str().unwrap().parse().unwrap())
    };
    if run <= number("x-fails") {
        let raise = "do $$ begin raise exception using errcode = '40001'; end $$";
        let failed = sqlx::raw_sql(raise).execute(&mut *tx).await.unwrap_err();
        if !headers.contains_key("x-swallow") {
            return TxError::from(failed).into_response();
        }
    }
    (
        StatusCode::CREATED,
        axum::Json(serde_json::json!({ "run": run })),
    )
        .into_response()
}

async fn clashing(bank: &Bank, runs: &Runs, reruns: u32) -> Site {
    let layer = bank
        .layer()
        .with_policy(policy().with_reruns(reruns))
        .unwrap();
    let router = Router::new()
        .route("/clash", post(clash))
        .route_layer(layer);
    Site::start(router.with_state(runs.clone())).await
}

fn clash_times(fails: &str) -> Sent {
    Sent::post("/clash").key("a").header("x-fails", fails)
}

#[tokio::test]
async fn t5_a_serialization_failure_is_a_503_with_retry_after_and_the_key_is_free() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let site = clashing(&bank, &runs, 0).await;
    let answer = site.send(clash_times("1")).await;
    answer.assert_problem(503, "transaction-conflict");
    assert_eq!(answer.headers["retry-after"], "1");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    site.send(clash_times("1")).await.assert_run(2);
}

#[tokio::test]
async fn t5_it_is_run_again_as_often_as_the_policy_says() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let site = clashing(&bank, &runs, 2).await;
    site.send(clash_times("2")).await.assert_run(3);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

#[tokio::test]
async fn t5_after_the_last_rerun_it_is_a_503() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let site = clashing(&bank, &runs, 2).await;
    let answer = site.send(clash_times("3")).await;
    answer.assert_problem(503, "transaction-conflict");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    assert_eq!(runs.count(), 3);
}

/// The failure is not seen where the handler keeps it to itself: the transaction is found aborted.
#[tokio::test]
async fn t5_a_swallowed_failure_is_never_answered_as_success() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let site = clashing(&bank, &runs, 0).await;
    let answer = site.send(clash_times("1").header("x-swallow", "yes")).await;
    answer.assert_problem(500, "transaction-aborted");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    site.send(clash_times("1")).await.assert_run(2);
}

#[tokio::test]
async fn t5_a_swallowed_failure_is_run_again_where_the_policy_says() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let site = clashing(&bank, &runs, 1).await;
    let answer = site.send(clash_times("1").header("x-swallow", "yes")).await;
    answer.assert_run(2);
}

#[tokio::test]
async fn t10_an_aborted_transaction_is_a_500_whatever_the_handler_answers() {
    let bank = Bank::start().await;
    let site = bank.open(&Runs::free(), policy()).await;
    let answer = paid(&site, "a", "fail").await;
    answer.assert_problem(500, "transaction-aborted");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    paid(&site, "a", "201").await.assert_run(2);
}

async fn lock_in_order(
    State((pool, met)): State<(PgPool, std::sync::Arc<tokio::sync::Barrier>)>,
    mut tx: Tx,
    body: String,
) -> Result<StatusCode, TxError> {
    let (first, second) = body.split_once(' ').unwrap();
    let update = "update ledger set note = note || '!' where note like $1 || '%'";
    sqlx::query(update).bind(first).execute(&mut *tx).await?;
    // Only the first two meet; who comes again after a deadlock does not wait.
    let waiters = met.wait();
    let _ = tokio::time::timeout(Duration::from_secs(2), waiters).await;
    let locked = sqlx::query(update).bind(second).execute(&mut *tx).await;
    locked.inspect_err(|error| {
        let error = error.as_database_error().and_then(|error| error.code());
        if error.as_deref() == Some("40P01") {
            fired("deadlock");
        }
    })?;
    drop(pool);
    Ok(StatusCode::CREATED)
}

/// C09: two operations lock two rows in opposite order, and PostgreSQL ends one of them (40P01).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c09_one_of_two_that_deadlock_is_run_again() {
    let bank = Bank::start().await;
    sqlx::raw_sql("insert into ledger (note) values ('x'), ('y')")
        .execute(&bank.pool)
        .await
        .unwrap();
    let layer = bank.layer().with_policy(policy().with_reruns(3)).unwrap();
    let met = std::sync::Arc::new(tokio::sync::Barrier::new(2));
    let router = Router::new()
        .route("/lock", post(lock_in_order))
        .route_layer(layer)
        .with_state((bank.pool.clone(), met));
    let site = Site::start(router).await;
    let lock = |key: &str, order: &'static str| site.send(Sent::post("/lock").key(key).body(order));
    let (left, right) = tokio::join!(lock("a", "x y"), lock("b", "y x"));
    assert_eq!(
        (left.status, right.status),
        (StatusCode::CREATED, StatusCode::CREATED)
    );
    let notes: Vec<String> = sqlx::query_scalar("select note from ledger order by note")
        .fetch_all(&bank.pool)
        .await
        .unwrap();
    assert_eq!(notes, ["x!!", "y!!"]);
    // The deadlock happened: it is in the database's own count.
    let deadlocks = async || {
        let count = "select deadlocks from pg_stat_database where datname = current_database()";
        let count: i64 = sqlx::query_scalar(count)
            .fetch_one(&bank.pool)
            .await
            .unwrap();
        count == 1
    };
    crate::site::eventually("the deadlock is counted", deadlocks).await;
}

/// A connection lost in the middle of the handler: nothing can have been committed.
#[tokio::test]
async fn x10_a_backend_that_dies_under_the_handler_is_a_retryable_answer() {
    let bank = Bank::start().await;
    let runs = Runs::gated();
    let site = bank.open(&runs, policy()).await;
    let test = async {
        runs.entered().await;
        let killed: i64 = sqlx::query_scalar(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity
             where datname = current_database() and state = 'idle in transaction'",
        )
        .fetch_one(&bank.pool)
        .await
        .unwrap();
        assert_eq!(killed, 1);
        runs.let_go();
    };
    let (answer, ()) = tokio::join!(site.send(pay("a", "201")), test);
    answer.assert_problem(503, "transaction-conflict");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    runs.let_go();
    paid(&site, "a", "201").await.assert_run(2);
}
