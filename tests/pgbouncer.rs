//! Every rule of a store, behind PgBouncer in transaction mode: run by `./scripts/pgbouncer`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

mod common;

use std::env;
use std::time::{Duration, SystemTime};

use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode};
use axum::routing::post;
use axum::{Router, http};
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::task::JoinSet;
use tower::ServiceExt as _;
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::store::conformance::Subject;
use tower_idempotency::store::{ClaimRequest, Completion, LeaseRenewal, Renewed, Token};
use tower_idempotency::{
    Envelope, Fingerprint, IdempotencyLayer, Identity, Lost, PgStore, References, Scope, Store,
    StoreError,
};

use common::database::TestDatabase;

const NEEDED: &str = "this test needs PgBouncer: run ./scripts/pgbouncer";

const AGE: &str = "
update idempotency.record set
    claimed_at = claimed_at - make_interval(secs => $1),
    leased_until = leased_until - make_interval(secs => $1),
    expires_at = expires_at - make_interval(secs => $1),
    sweep_at = sweep_at - make_interval(secs => $1)";

struct Pooled {
    store: PgStore,
    direct: PgPool,
    _database: TestDatabase,
}

impl Pooled {
    /// `option` is what the application says of its pool; it leads to PgBouncer in any case.
    async fn new(option: bool) -> Self {
        let port = env::var("PGBOUNCER_PORT").expect(NEEDED);
        let database = TestDatabase::create().await;
        let direct = database.pool(1).await;
        PgStore::new(direct.clone()).migrate().await.unwrap();
        let url: PgConnectOptions = database.url.parse().unwrap();
        let pooled = url.host("127.0.0.1").port(port.parse().expect(NEEDED));
        let pool = PgPoolOptions::new().connect_lazy_with(pooled);
        let builder = PgStore::builder(pool).with_max_connections(16).unwrap();
        Self {
            store: builder.with_pgbouncer(option).build(),
            direct,
            _database: database,
        }
    }

    async fn backends(&self) -> i64 {
        let query = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
            where datname = current_database() and pid <> pg_backend_pid()",
        );
        query.fetch_one(&self.direct).await.unwrap()
    }
}

impl Subject for Pooled {
    type Store = PgStore;

    fn store(&self) -> &PgStore {
        &self.store
    }

    async fn age(&self, by: Duration) {
        let age = sqlx::query(AGE).bind(by.as_secs_f64());
        age.execute(&self.direct).await.unwrap();
    }
}

mod rules {
    tower_idempotency::conformance_tests!(super::Pooled::new(true).await);
}

/// Statements of every kind and one shape of arguments, so that one taken for another would show.
async fn work(store: PgStore, worker: usize) -> Result<(), StoreError> {
    for n in 0..20 {
        let request = ClaimRequest {
            identity: Identity::new("acme", "POST /charges", format!("{worker}-{n}")),
            fingerprint: Fingerprint::of_bytes(b"request"),
            token: Token::random()?,
            lost: Lost::Rerun,
            lease: Duration::from_secs(30),
            ttl: Duration::from_secs(3600),
        };
        store.claim(&request).await?;
        let claim = request.claim(1, SystemTime::UNIX_EPOCH);
        let lease = request.lease;
        let renewal = LeaseRenewal {
            claim: claim.clone(),
            lease,
        };
        assert_eq!(store.extend(&[renewal]).await?, [Renewed::Kept]);
        match n % 3 {
            0 => {
                let completion = Completion {
                    answer: Envelope::new(http::Response::new("answer".into())),
                    references: References::default(),
                };
                store.complete(&claim, &completion).await?;
            }
            1 => store.release(&claim).await?,
            _ => store.hold(&claim, &References::default()).await?,
        }
        let found = store
            .lookup(&request.identity, &request.fingerprint)
            .await?;
        assert_eq!(found.is_none(), n % 3 == 1);
    }
    Ok(())
}

/// How many of 16 workers failed.
async fn failures(pooled: &Pooled) -> usize {
    let mut workers = JoinSet::new();
    for worker in 0..16 {
        workers.spawn(work(pooled.store.clone(), worker));
    }
    let mut failed = 0;
    while let Some(worked) = workers.join_next().await {
        failed += usize::from(!matches!(worked, Ok(Ok(()))));
    }
    failed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_option_connections_are_shared_and_nothing_fails() {
    let pooled = Pooled::new(true).await;
    assert_eq!(failures(&pooled).await, 0);
    // Sixteen connections of the store, and these to the server.
    let backends = pooled.backends().await;
    assert!((1..=4).contains(&backends), "{backends} server connections");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_option_statements_fail() {
    let pooled = Pooled::new(false).await;
    assert!(failures(&pooled).await > 0);
}

/// Statements with arguments, prepared by sqlx, between two nested savepoints.
async fn pay(mut tx: Tx, body: String) -> Result<(StatusCode, String), TxError> {
    use sqlx::Connection as _;
    let insert = "insert into ledger (note) values ($1) returning id";
    let id: i64 = sqlx::query_scalar(insert)
        .bind(&body)
        .fetch_one(&mut *tx)
        .await?;
    let mut inner = tx.begin().await?;
    sqlx::query("update ledger set note = note || $2 where id = $1")
        .bind(id)
        .bind("!")
        .execute(&mut *inner)
        .await?;
    inner.commit().await?;
    let note: String = sqlx::query_scalar("select note from ledger where id = $1")
        .bind(id)
        .fetch_one(&mut *tx)
        .await?;
    let status = match body.ends_with('9') {
        true => StatusCode::PAYMENT_REQUIRED,
        false => StatusCode::CREATED,
    };
    Ok((status, format!("{id} {note}")))
}

async fn paid(app: Router, key: String) -> (StatusCode, String) {
    let request = Request::post("/pay").header("idempotency-key", &key);
    let answer = app.oneshot(request.body(Body::from(key)).unwrap()).await;
    let (parts, body) = answer.unwrap().into_parts();
    let body = to_bytes(body, 4096).await.unwrap();
    (parts.status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transactional_route_writes_and_answers_once() {
    let pooled = Pooled::new(true).await;
    let table = "create table ledger (id bigint generated always as identity, note text not null)";
    sqlx::raw_sql(table).execute(&pooled.direct).await.unwrap();
    let layer = IdempotencyLayer::new(pooled.store.clone(), Scope::global())
        .with_store_timeout(Duration::from_secs(10))
        .unwrap()
        .transactional();
    let app = Router::new().route("/pay", post(pay).layer(layer.clone()));
    for round in 0..2 {
        let mut workers = JoinSet::new();
        for worker in 0..8 {
            let app = app.clone();
            workers.spawn(async move {
                for n in 0..10 {
                    let key = format!("{worker}-{n}");
                    let (status, body) = paid(app.clone(), key.clone()).await;
                    let expected = if n == 9 { 402 } else { 201 };
                    assert_eq!(status, expected, "{body}");
                    assert!(body.ends_with(&format!(" {key}!")), "{body}");
                }
            });
        }
        while let Some(worked) = workers.join_next().await {
            worked.unwrap();
        }
        let stats = layer.stats();
        assert_eq!((stats.executed, stats.replayed), (80, round * 80));
    }
    let ledger: i64 = sqlx::query_scalar("select count(*) from ledger")
        .fetch_one(&pooled.direct)
        .await
        .unwrap();
    assert_eq!(ledger, 72);
    let open = "select count(*) from pg_stat_activity
        where datname = current_database() and state like 'idle in transaction%'";
    let open: i64 = sqlx::query_scalar(open)
        .fetch_one(&pooled.direct)
        .await
        .unwrap();
    assert_eq!(open, 0);
}

/// sqlx takes a savepoint whose beginning is cancelled for the transaction, and rolls it back; what is written
/// next is committed alone.
async fn gives_up(mut tx: Tx) -> StatusCode {
    use sqlx::Connection as _;
    let is_ready = {
        let mut begin = Box::pin(tx.begin());
        futures_util::poll!(&mut begin).is_ready()
    };
    assert!(!is_ready, "the savepoint is there at once");
    let insert = sqlx::raw_sql("insert into ledger (note) values ('stray')");
    match insert.execute(&mut *tx).await {
        Ok(_) => StatusCode::CREATED,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_after_a_cancelled_savepoint_is_not_written_twice() {
    let pooled = Pooled::new(true).await;
    let table = "create table ledger (note text not null)";
    sqlx::raw_sql(table).execute(&pooled.direct).await.unwrap();
    let layer = IdempotencyLayer::new(pooled.store.clone(), Scope::global()).transactional();
    let app = Router::new().route("/pay", post(gives_up).layer(layer));
    let (status, body) = paid(app.clone(), "a".into()).await;
    assert_eq!(status, 500, "{body}");
    assert!(body.contains("transaction-ended"), "{body}");
    for _ in 0..3 {
        let (status, body) = paid(app.clone(), "a".into()).await;
        assert_eq!(status, 409, "{body}");
        assert!(body.contains("outcome-unknown"), "{body}");
    }
    let ledger: i64 = sqlx::query_scalar("select count(*) from ledger")
        .fetch_one(&pooled.direct)
        .await
        .unwrap();
    assert_eq!(ledger, 1);
}
