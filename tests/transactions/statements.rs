//! PostgreSQL: what a request costs the database, and what its transaction is like.

use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use sqlx::{PgPool, Row as _};
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::{IdempotencyLayer, PgStore, Scope};

use crate::bank::postgres::Bank;
use crate::bank::{Banking, paid};
use crate::common::fired::fired;
use crate::site::{Runs, Sent, Site, policy};

/// I-2: effect if and only if record.
#[tokio::test]
async fn the_handlers_write_and_the_record_carry_one_transaction_id() {
    let bank = Bank::start().await;
    let site = bank.open(&Runs::free(), policy()).await;
    paid(&site, "a", "201").await.assert_run(1);
    let same: bool =
        sqlx::query_scalar("select ledger.xmin = record.xmin from ledger, idempotency.record")
            .fetch_one(&bank.pool)
            .await
            .unwrap();
    assert!(same);
}

async fn settings(mut tx: Tx) -> Result<(StatusCode, String), TxError> {
    let names = "select current_setting('transaction_isolation') || ' ' ||
        current_setting('synchronous_commit') || ' ' || current_setting('statement_timeout') || ' '
        || current_setting('idle_in_transaction_session_timeout')";
    let row = sqlx::query(names).fetch_one(&mut *tx).await?;
    Ok((StatusCode::CREATED, row.try_get(0)?))
}

/// What a session gets that asks for nothing.
async fn count_defaults(pool: &PgPool) {
    let defaults = "select current_setting('transaction_isolation') || ' ' ||
        current_setting('synchronous_commit')";
    let defaults: String = sqlx::query_scalar(defaults).fetch_one(pool).await.unwrap();
    match defaults.as_str() {
        "serializable on" => fired("isolation serializable"),
        "read committed off" => fired("synchronous_commit off"),
        _ => {}
    }
}

async fn settings_under(sql: &'static str) -> String {
    let bank = Bank::start().await;
    let alter = sql.replace("DB", &format!("database \"{}\"", bank.database.name));
    sqlx::raw_sql(sqlx::AssertSqlSafe(alter))
        .execute(&bank.pool)
        .await
        .unwrap();
    // Connections of its own read the new defaults.
    let pool = bank.database.pool(1).await;
    count_defaults(&pool).await;
    let store = PgStore::new(pool);
    let scope = tower_idempotency::Scope::header("x-tenant").unwrap();
    let layer = tower_idempotency::IdempotencyLayer::new(store, scope).transactional();
    let site = Site::start(
        Router::new()
            .route("/settings", post(settings))
            .layer(layer),
    )
    .await;
    let answer = site.send(Sent::post("/settings").key("a")).await;
    assert_eq!(answer.status, StatusCode::CREATED);
    String::from_utf8(answer.body.to_vec()).unwrap()
}

#[tokio::test]
async fn d15_a_transaction_is_durable_where_the_server_is_not() {
    let shown = settings_under("alter DB set synchronous_commit = off").await;
    assert_eq!(shown, "read committed on 1min 1min");
}

#[tokio::test]
async fn d18_a_transaction_is_read_committed_whatever_the_default_is() {
    let shown = settings_under("alter DB set default_transaction_isolation = serializable").await;
    assert_eq!(shown, "read committed on 1min 1min");
}

#[tokio::test]
async fn a_stricter_time_limit_of_the_application_is_kept() {
    let shown = settings_under(
        "alter DB set statement_timeout = '5s';
         alter DB set idle_in_transaction_session_timeout = '2h'",
    )
    .await;
    assert_eq!(shown, "read committed on 5s 1min");
}

/// The table is counted while nothing is left in it, and nobody counts again.
#[tokio::test]
async fn a_table_that_was_counted_while_it_was_empty_is_not_read_from_end_to_end() {
    const REQUESTS: usize = 40;
    let bank = Bank::start().await;
    let site = bank.open(&Runs::free(), policy()).await;
    paid(&site, "swept", "201").await.assert_run(1);
    let empty = "alter table idempotency.record set (autovacuum_enabled = off);
        delete from idempotency.record; analyze idempotency.record";
    for sql in [empty, "select pg_stat_reset()"] {
        sqlx::raw_sql(sql).execute(&bank.pool).await.unwrap();
    }
    let counted = "select count(*) from pg_class
        where oid = 'idempotency.record'::regclass and reltuples = 0 and relpages > 0";
    let counted = sqlx::query_scalar::<_, i64>(counted);
    assert_eq!(counted.fetch_one(&bank.pool).await.unwrap(), 1);
    for request in 0..REQUESTS {
        paid(&site, &format!("key-{request}"), "201")
            .await
            .assert_run(request + 2);
    }
    bank.close_store().await;
    // What a session did is known at the latest when it ends.
    let sessions = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name like 'tower-idempotency%'";
    let closed = Instant::now();
    let left = || sqlx::query_scalar::<_, i64>(sessions);
    while left().fetch_one(&bank.pool).await.unwrap() > 0 {
        assert!(closed.elapsed() < Duration::from_secs(10), "{sessions}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let scans = "select seq_scan from pg_stat_user_tables
        where schemaname = 'idempotency' and relname = 'record'";
    let scans = sqlx::query_scalar::<_, i64>(scans);
    let scans = scans.fetch_one(&bank.pool).await.unwrap();
    // Those of what set it up may have been told late; each request would be one more.
    assert!(scans < 10, "{scans} scans");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_needs_the_rights_that_the_readme_says_and_no_more() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let pool = bank.database.service_pool(1).await;
    let grant = "grant insert on ledger to ti_test_service";
    sqlx::raw_sql(grant).execute(&bank.pool).await.unwrap();
    let layer = IdempotencyLayer::new(PgStore::new(pool), Scope::header("x-tenant").unwrap());
    let layer = layer.transactional().with_policy(policy()).unwrap();
    let site = bank.open_with(&runs, layer).await;
    let first = paid(&site, "a", "201").await;
    first.assert_run(1);
    paid(&site, "a", "201").await.assert_replay_of(&first);
    let refused = paid(&site, "b", "402").await;
    assert_eq!(refused.status.as_u16(), 402);
    paid(&site, "b", "402").await.assert_replay_of(&refused);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 2));
}
