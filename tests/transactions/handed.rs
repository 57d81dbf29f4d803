//! PostgreSQL: what a transaction inherits from the one whose connection it got.

use std::sync::atomic::Ordering;

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use futures_util::future::{join, join_all};
use sqlx::{AssertSqlSafe, PgPool, Row as _};
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::{IdempotencyLayer, PgStore, Scope};

use crate::bank::Banking;
use crate::bank::postgres::Bank;
use crate::cuts::{Cut, far};
use crate::site::{Answer, Sent, Site, eventually, policy};

/// What it is like, and whether it was entered in the transaction that another has left.
const LIKE: &str = "
select concat_ws(' ', current_setting('transaction_isolation'), current_setting('transaction_read_only'),
    current_setting('statement_timeout'), current_setting('idempotency.attempt') <> ''),
    exists (select from pg_prepared_statements where statement like 'select idempotency.enter($1%')";

/// Runs the statements of its request, whatever becomes of them, and answers what the transaction was like.
async fn leaves(mut tx: Tx, headers: HeaderMap) -> Result<(StatusCode, String), TxError> {
    let row = sqlx::query(LIKE).fetch_one(&mut *tx).await?;
    let (like, is_handed): (String, bool) = (row.try_get(0)?, row.try_get(1)?);
    let insert = "insert into ledger (note) values ('tea')";
    sqlx::raw_sql(insert).execute(&mut *tx).await?;
    for sql in headers["x-sql"].to_str().unwrap().split(';') {
        let _ = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *tx).await;
    }
    let status: StatusCode = headers["x-then"].to_str().unwrap().parse().unwrap();
    Ok((status, format!("{like} {is_handed}")))
}

async fn one_at_a_time(bank: &Bank) -> Site {
    one_at_a_time_over(bank.pool.clone()).await
}

async fn one_at_a_time_over(pool: PgPool) -> Site {
    let store = PgStore::builder(pool)
        .with_max_transactions(1)
        .unwrap()
        .build();
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap()).transactional();
    let layer = layer.with_policy(policy()).unwrap();
    let routes = Router::new()
        .route("/x", post(leaves))
        .route("/now", post(tells))
        .route("/copy", post(gives_up_a_copy));
    Site::start(routes.layer(layer)).await
}

fn leaving(key: &str, sql: &str, then: &str) -> Sent {
    Sent::post("/x")
        .key(key)
        .header("x-sql", sql)
        .header("x-then", then)
}

const LEFT: [(&str, &str); 8] = [
    ("select 1", "201"),
    ("set transaction isolation level serializable", "402"),
    ("set transaction read only", "201"),
    ("select 1 / 0", "402"),
    ("select 1 / 0", "500"),
    ("set local statement_timeout = '3s'", "201"),
    ("commit;begin isolation level serializable", "201"),
    ("rollback;begin isolation level repeatable read", "402"),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_is_like_any_other_whatever_the_one_before_it_has_left() {
    let bank = Bank::start().await;
    let site = one_at_a_time(&bank).await;
    let mut handed = 0;
    for (left, (sql, then)) in LEFT.iter().enumerate() {
        let key = |it: usize| format!("{left}-{it}");
        let first = (0..4).map(|it| site.send(leaving(&key(it), sql, then)));
        let then = (4..8).map(|it| site.send(leaving(&key(it), "select 1", "201")));
        let then = then.collect::<Vec<_>>();
        let (_, answers) = join(join_all(first.collect::<Vec<_>>()), join_all(then)).await;
        for answer in &answers {
            assert_eq!(answer.status, 201, "after {sql}: {answer:?}");
            let (like, is_handed) = said(answer);
            assert_eq!(like, "read committed off 1min t", "after {sql}");
            handed += usize::from(is_handed);
        }
    }
    assert!(handed >= LEFT.len(), "{handed} were handed over");
}

fn said(answer: &Answer) -> (String, bool) {
    let body = String::from_utf8(answer.body.to_vec()).unwrap();
    let (like, is_handed) = body.rsplit_once(' ').unwrap();
    (like.to_owned(), is_handed == "true")
}

const SLOW: &str = "
create table slow (id integer);
create function slow() returns trigger language plpgsql as $$
begin
    perform pg_sleep(0.7);
    return null;
end
$$;
create constraint trigger slow after insert on slow deferrable initially deferred
    for each row execute function slow()";

/// What is written at `now()` is not older than what was answered before its request.
async fn tells(mut tx: Tx) -> Result<(StatusCode, String), TxError> {
    let now = sqlx::query("select now()::text")
        .fetch_one(&mut *tx)
        .await?;
    let row = sqlx::query(LIKE).fetch_one(&mut *tx).await?;
    let (now, is_handed): (String, bool) = (now.try_get(0)?, row.try_get(1)?);
    Ok((StatusCode::CREATED, format!("{now} {is_handed}")))
}

/// Until the commit is under way of a handler that wrote into the slow table.
async fn commits(bank: &Bank) {
    eventually("the commit is under way", async || {
        let committing = "select exists (select from pg_stat_activity
            where datname = current_database() and state = 'active' and query = 'commit and chain')";
        sqlx::query_scalar(committing)
            .fetch_one(&bank.pool)
            .await
            .unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_handed_over_is_not_older_than_its_request() {
    let bank = Bank::start().await;
    sqlx::raw_sql(SLOW).execute(&bank.pool).await.unwrap();
    let site = one_at_a_time(&bank).await;
    // All later ones have prepared what they ask.
    let first = site.send(leaving("first", "select 1", "201"));
    let second = site.send(leaving("second", "select 1", "201"));
    let (first, second) = join(first, second).await;
    assert_eq!(
        (first.status, second.status),
        (StatusCode::CREATED, StatusCode::CREATED)
    );

    let slow = site.send(leaving("slow", "insert into slow values (1)", "201"));
    let next = async {
        commits(&bank).await;
        let came = sqlx::query_scalar("select clock_timestamp()::text");
        let came: String = came.fetch_one(&bank.pool).await.unwrap();
        let told = site.send(Sent::post("/now").key("next")).await;
        (came, told)
    };
    let (slow, (came, told)) = join(slow, next).await;
    assert_eq!(
        (slow.status, told.status),
        (StatusCode::CREATED, StatusCode::CREATED)
    );
    let (now, is_handed) = said(&told);
    assert!(is_handed);
    let later = sqlx::query_scalar("select $1::text::timestamptz >= $2::text::timestamptz");
    let later: bool = later
        .bind(&now)
        .bind(&came)
        .fetch_one(&bank.pool)
        .await
        .unwrap();
    assert!(later, "now() is {now}, and the request came after {came}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_handed_over_and_cut_off_before_it_is_entered_is_begun_elsewhere() {
    let bank = Bank::start().await;
    sqlx::raw_sql(SLOW).execute(&bank.pool).await.unwrap();
    let (pool, wire) = far(&bank, Cut::Restart).await;
    let site = one_at_a_time_over(pool).await;
    let slow = site.send(leaving("slow", "insert into slow values (1)", "201"));
    let next = async {
        commits(&bank).await;
        site.send(leaving("next", "select 1", "201")).await
    };
    let (slow, next) = join(slow, next).await;
    assert_eq!(slow.status, StatusCode::CREATED);
    assert_eq!(wire.cuts.load(Ordering::SeqCst), 1);
    assert_eq!(next.status, StatusCode::CREATED);
    let (_, is_handed) = said(&next);
    assert!(!is_handed);
    assert_eq!((bank.ledger().await, bank.records().await), (2, 2));
}

/// sqlx takes the answer to what is left of it for that of the next statement.
async fn gives_up_a_copy(mut tx: Tx) -> StatusCode {
    let mut copy = tx
        .copy_in_raw("copy ledger (note) from stdin")
        .await
        .unwrap();
    copy.send("tea\n".as_bytes()).await.unwrap();
    drop(copy);
    StatusCode::INTERNAL_SERVER_ERROR
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_whose_copy_was_given_up_is_not_used_again() {
    let bank = Bank::start().await;
    let site = one_at_a_time(&bank).await;
    let mut written = 0;
    for round in 0..4 {
        let given_up = Sent::post("/copy").key(&format!("copy-{round}"));
        let others: Vec<_> = (0..4)
            .map(|it| site.send(leaving(&format!("{round}-{it}"), "select 1", "201")))
            .collect();
        let (given_up, others) = join(site.send(given_up), join_all(others)).await;
        assert_eq!(given_up.status, 500);
        for answer in others {
            match answer.status.as_u16() {
                201 => {
                    assert_eq!(said(&answer).0, "read committed off 1min t");
                    written += 1;
                }
                _ => answer.assert_problem(503, "store-unavailable"),
            }
        }
    }
    assert!(written >= 8, "{written}");
    assert_eq!(
        (bank.ledger().await, bank.records().await),
        (written, written)
    );
}
