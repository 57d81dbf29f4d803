//! Prints what a request costs, transactional, leased, and with the handler's transaction alone: one
//! line a figure. `shape [ROUNDS]`, on a server of its own that waits for its disk.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a measurement that cannot be made ends by a panic"
)]

use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use faults::client::{Answer, Connection, Pay};
use faults::cluster::Cluster;
use http::{HeaderMap, StatusCode};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::net::TcpListener;
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::{IdempotencyLayer, PgStore, Scope};

const WRITE: &str = "insert into payment (key) values ($1)";

fn key(headers: &HeaderMap) -> &str {
    let key = headers.get("idempotency-key").and_then(|v| v.to_str().ok());
    key.unwrap_or_default()
}

async fn transactional(mut tx: Tx, headers: HeaderMap) -> Result<StatusCode, TxError> {
    let write = sqlx::query(WRITE).bind(key(&headers));
    write.execute(&mut *tx).await?;
    Ok(StatusCode::CREATED)
}

/// The handler's own transaction; under a leased layer, too.
async fn own(State(pool): State<PgPool>, headers: HeaderMap) -> Result<StatusCode, TxError> {
    let mut transaction = pool.begin().await?;
    let write = sqlx::query(WRITE).bind(key(&headers));
    write.execute(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(StatusCode::CREATED)
}

/// One route on a connection that is kept.
struct Route {
    name: &'static str,
    client: Connection,
    fresh: Vec<Duration>,
    replay: Vec<Duration>,
}

impl Route {
    async fn open(name: &'static str, router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self {
            name,
            client: Connection::open(port).await.expect("it listens"),
            fresh: Vec::new(),
            replay: Vec::new(),
        }
    }

    async fn send(&mut self, pay: &Pay) -> (Answer, Duration) {
        let sent = Instant::now();
        self.client.write(&pay.bytes()).await.expect("it reads");
        let answer = self.client.answer().await.expect("it answers");
        assert_eq!(answer.status, 201, "{}", answer.text());
        (answer, sent.elapsed())
    }

    fn is_protected(&self) -> bool {
        self.name != "bare"
    }

    async fn round(&mut self) {
        let pay = Pay::new("");
        let (answer, took) = self.send(&pay).await;
        assert!(!answer.is_replayed());
        self.fresh.push(took);
        if self.is_protected() {
            let (answer, took) = self.send(&pay).await;
            assert!(answer.is_replayed());
            self.replay.push(took);
        }
    }

    fn print(&mut self) {
        let name = self.name;
        for (kind, times) in [("fresh", &mut self.fresh), ("replay", &mut self.replay)] {
            times.sort_unstable();
            let Some(last) = times.len().checked_sub(1) else {
                continue;
            };
            let (median, high) = (times[last / 2], times[last * 99 / 100]);
            println!(
                "{name} {kind} p50_us={} p99_us={}",
                median.as_micros(),
                high.as_micros()
            );
        }
    }
}

/// The next transaction id, and where the log of the server ends.
async fn ends(pool: &PgPool) -> (i64, i64) {
    let ends = "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
        (pg_current_wal_insert_lsn() - '0/0')::bigint";
    let ends = sqlx::query_as(ends).fetch_one(pool).await;
    ends.expect("the server can be asked")
}

/// Ids and bytes of the server's log for each request.
async fn count(route: &mut Route, pool: &PgPool, rounds: u32) {
    let pays: Vec<_> = (0..rounds).map(|_| Pay::new("")).collect();
    for kind in ["fresh", "replay"] {
        if kind == "replay" && !route.is_protected() {
            return;
        }
        // The first write to a page after a checkpoint takes all of the page into the log.
        let checkpoint = sqlx::raw_sql("checkpoint").execute(pool).await;
        checkpoint.expect("a superuser may");
        for pay in &pays[..pays.len() / 10] {
            let warm = if kind == "fresh" { &Pay::new("") } else { pay };
            route.send(warm).await;
        }
        let before = ends(pool).await;
        for pay in &pays {
            route.send(pay).await;
        }
        let after = ends(pool).await;
        let each = |after: i64, before: i64| (after - before) as f64 / f64::from(rounds);
        let (ids, bytes) = (each(after.0, before.0), each(after.1, before.1));
        println!("{} {kind} ids={ids:.2} wal_bytes={bytes:.0}", route.name);
    }
}

#[tokio::main]
async fn main() {
    let rounds = std::env::args()
        .nth(1)
        .and_then(|rounds| rounds.parse().ok());
    let rounds: u32 = rounds.unwrap_or(500);
    let cluster = Cluster::start_durable().await;
    let pool = PgPoolOptions::new().connect(&cluster.url()).await;
    let pool = pool.expect("it runs");
    let store = PgStore::new(pool.clone());
    store.migrate().await.expect("it is empty");
    let setup = "alter system set autovacuum = off;
        alter system set full_page_writes = off;
        create table payment (id bigint generated always as identity primary key, key text not null)";
    for sql in setup.split(';').chain(["select pg_reload_conf()"]) {
        let done = sqlx::raw_sql(sql).execute(&pool).await;
        done.expect("a superuser may");
    }
    let layer = IdempotencyLayer::new(store, Scope::fixed("acme"));
    let leased = Router::new().route("/pay", post(own).layer(layer.clone()));
    let transactional = post(transactional).layer(layer.transactional());
    let mut routes = [
        Route::open(
            "bare",
            Router::new()
                .route("/pay", post(own))
                .with_state(pool.clone()),
        )
        .await,
        Route::open("leased", leased.with_state(pool.clone())).await,
        Route::open("transactional", Router::new().route("/pay", transactional)).await,
    ];
    // In turns, so that whatever else happens to the machine happens to all of them.
    for _ in 0..rounds / 10 {
        for route in &mut routes {
            route.round().await;
            route.fresh.clear();
            route.replay.clear();
        }
    }
    for _ in 0..rounds {
        for route in &mut routes {
            route.round().await;
        }
    }
    for route in &mut routes {
        route.print();
    }
    for route in &mut routes {
        count(route, &pool, rounds).await;
    }
}
