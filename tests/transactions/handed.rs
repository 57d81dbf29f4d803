//! PostgreSQL: what a transaction inherits from the one whose connection it got.

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use futures_util::future::{join, join_all};
use sqlx::{AssertSqlSafe, Row as _};
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::{IdempotencyLayer, PgStore, Scope};

use crate::bank::Banking;
use crate::bank::postgres::Bank;
use crate::site::{Answer, Sent, Site, policy};

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
    let store = PgStore::builder(bank.pool.clone())
        .with_max_transactions(1)
        .unwrap()
        .build();
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap()).transactional();
    let layer = layer.with_policy(policy()).unwrap();
    Site::start(Router::new().route("/x", post(leaves)).layer(layer)).await
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
