//! A bank whose `POST /pay` writes a line into its ledger, then does what the request tells it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::from_extractor;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use tokio::sync::oneshot;
use tower_idempotency::{IdempotencyLayer, Outcome, Policy, Scope, TransactionalStore};

use crate::site::{Answer, Runs, Sent, Site, channel_body};

pub type Layer<S> = IdempotencyLayer<S, tower_idempotency::Transactional>;

pub trait Banking: Send + Sync + Sized + 'static {
    type Store: TransactionalStore + Clone;

    /// Whether the database can tell a commit of the handler's from a rollback.
    const TELLS_COMMITS: bool;

    fn start() -> impl Future<Output = Self> + Send;

    fn store(&self) -> Self::Store;

    /// `POST /pay` takes the transaction, `POST /plain` does not.
    fn routes(&self, runs: &Runs) -> Router<Sinks>;

    /// Lines of the ledger.
    fn ledger(&self) -> impl Future<Output = i64> + Send;

    fn records(&self) -> impl Future<Output = i64> + Send;

    /// Closes the store's connections, for good.
    fn close_store(&self) -> impl Future<Output = ()> + Send;

    /// Makes every record older.
    fn age(&self, by: Duration) -> impl Future<Output = ()> + Send;

    fn layer(&self) -> Layer<Self::Store> {
        let scope = Scope::header("x-tenant").unwrap();
        IdempotencyLayer::new(self.store(), scope).transactional()
    }

    /// A site whose routes have this policy.
    fn open(&self, runs: &Runs, policy: Policy) -> impl Future<Output = Site> + Send {
        async move {
            let layer = self.layer().with_policy(policy).unwrap();
            self.open_with(runs, layer).await
        }
    }

    fn open_with(
        &self,
        runs: &Runs,
        layer: Layer<Self::Store>,
    ) -> impl Future<Output = Site> + Send {
        async move {
            let routes = self.routes(runs).route_layer(layer);
            Site::start(routes.with_state(Sinks::default())).await
        }
    }
}

/// `POST /pay` under a key, and what the handler is to do after its write.
pub fn pay(key: &str, then: &str) -> Sent {
    Sent::post("/pay").key(key).header("x-then", then)
}

pub async fn paid(site: &Site, key: &str, then: &str) -> Answer {
    site.send(pay(key, then)).await
}

/// Where a handler leaves what has to outlive it.
#[derive(Clone, Default)]
pub struct Sinks(Arc<Mutex<Vec<oneshot::Sender<()>>>>);

impl Sinks {
    fn keep<T: Send + 'static>(&self, value: T) {
        let (sender, receiver) = oneshot::channel::<()>();
        self.0.lock().unwrap().push(sender);
        tokio::spawn(async move {
            let _ = receiver.await;
            drop(value);
        });
    }
}

/// The answer a request asks for.
pub fn answer(then: &str, run: usize) -> Response {
    let body = axum::Json(serde_json::json!({ "run": run }));
    let (status, outcome) = then.split_once(' ').unwrap_or((then, ""));
    let status = StatusCode::from_bytes(status.as_bytes()).unwrap_or(StatusCode::CREATED);
    let response = (status, [("location", format!("/payments/{run}"))], body);
    match outcome {
        "store" => (Outcome::Store, response).into_response(),
        "release" => (Outcome::Release, response).into_response(),
        "hold" => (Outcome::Hold, response).into_response(),
        "conflict" => (Outcome::Conflict, response).into_response(),
        _ => response.into_response(),
    }
}

macro_rules! handlers {
    ($insert:literal) => {
        fn routes(runs: &Runs) -> Router<Sinks> {
            let (paying, plain) = (runs.clone(), runs.clone());
            Router::new()
                .route(
                    "/pay",
                    post(
                        |State(sinks): State<Sinks>, tx: Tx, headers: HeaderMap, body: String| {
                            pay(paying, sinks, tx, headers, body)
                        },
                    ),
                )
                .route(
                    "/plain",
                    post(async move |headers: HeaderMap, _body: String| {
                        let then = headers.get("x-then").map_or("201", |v| v.to_str().unwrap());
                        answer(then, plain.run().await)
                    }),
                )
                .route("/twice", post(async |_first: Tx, _second: Tx| {}))
                // The middleware takes the transaction first, and gives it back.
                .route("/again", post(again).layer(from_extractor::<Tx>()))
        }

        async fn again(mut tx: Tx) -> StatusCode {
            let insert = sqlx::query($insert).bind("again");
            insert.execute(&mut *tx).await.unwrap();
            StatusCode::CREATED
        }

        async fn pay(
            runs: Runs,
            sinks: Sinks,
            mut tx: Tx,
            headers: HeaderMap,
            body: String,
        ) -> Response {
            let then = headers.get("x-then").map_or("201", |v| v.to_str().unwrap());
            sqlx::query($insert)
                .bind(body)
                .execute(&mut *tx)
                .await
                .unwrap();
            let run = runs.run().await;
            match then {
                "panic" => panic!("as asked"),
                "hang" => std::future::pending().await,
                "leak" => sinks.keep(tx),
                "fail" => match sqlx::query("insert into nowhere values (1)")
                    .execute(&mut *tx)
                    .await
                {
                    Ok(_) => panic!("there is no such table"),
                    Err(_) => return answer("201", run),
                },
                "give-up" => {
                    let failed = sqlx::query("insert into nowhere values (1)")
                        .execute(&mut *tx)
                        .await;
                    return TxError::from(failed.unwrap_err()).into_response();
                }
                "savepoint" => {
                    use sqlx::Connection as _;
                    let mut inner = tx.begin().await.unwrap();
                    sqlx::query($insert)
                        .bind("inner")
                        .execute(&mut *inner)
                        .await
                        .unwrap();
                    inner.rollback().await.unwrap();
                }
                "forget" => {
                    use sqlx::Connection as _;
                    let inner = tx.begin().await.unwrap();
                    std::mem::forget(inner);
                }
                "commit" | "rollback" | "commit; begin" => {
                    let sql = sqlx::AssertSqlSafe(then.to_owned());
                    sqlx::raw_sql(sql).execute(&mut *tx).await.unwrap();
                }
                // Statements one after the other, which may fail, and then the answer.
                _ if then.starts_with("commit") => {
                    let (sql, then) = then.rsplit_once(' ').unwrap();
                    for statement in sql.split("; ") {
                        let statement = sqlx::AssertSqlSafe(statement.to_owned());
                        sqlx::raw_sql(statement).execute(&mut *tx).await.ok();
                    }
                    if then == "conflict" {
                        return Outcome::Conflict.into_response();
                    }
                    return answer(then, run);
                }
                "deferred" => {
                    let orphan = sqlx::query("insert into child (parent) values (7)");
                    orphan.execute(&mut *tx).await.unwrap();
                }
                "endless" => {
                    drop(tx);
                    let (sender, body) = channel_body();
                    sender.send(Ok("begun".into())).await.unwrap();
                    sinks.keep(sender);
                    return (Outcome::Stream, body).into_response();
                }
                "break-off" => {
                    drop(tx);
                    let (sender, body) = channel_body();
                    sender.send(Ok("begun".into())).await.unwrap();
                    sender
                        .send(Err(std::io::Error::other("as asked")))
                        .await
                        .unwrap();
                    return body.into_response();
                }
                _ => {}
            }
            answer(then, run)
        }
    };
}

pub mod postgres {
    use super::*;
    use crate::common::database::TestDatabase;
    use sqlx::PgPool;
    use tower_idempotency::PgStore;
    use tower_idempotency::postgres::{Tx, TxError};

    pub struct Bank {
        pub store: PgStore,
        pub pool: PgPool,
        pub database: TestDatabase,
    }

    handlers!("insert into ledger (note) values ($1)");

    impl Banking for Bank {
        type Store = PgStore;

        const TELLS_COMMITS: bool = true;

        async fn start() -> Self {
            let database = TestDatabase::create().await;
            let pool = database.pool(4).await;
            let store = PgStore::new(pool.clone());
            store.migrate().await.unwrap();
            sqlx::raw_sql(
                "create table ledger (
                    id bigint generated always as identity, note text not null,
                    xid xid8 not null default pg_current_xact_id()
                );
                create table parent (id int primary key);
                create table child (parent int references parent deferrable initially deferred)",
            )
            .execute(&pool)
            .await
            .unwrap();
            Self {
                store,
                pool,
                database,
            }
        }

        fn store(&self) -> PgStore {
            self.store.clone()
        }

        fn routes(&self, runs: &Runs) -> Router<Sinks> {
            routes(runs)
        }

        async fn ledger(&self) -> i64 {
            let count = sqlx::query_scalar("select count(*) from ledger");
            count.fetch_one(&self.pool).await.unwrap()
        }

        async fn records(&self) -> i64 {
            let count = sqlx::query_scalar("select count(*) from idempotency.record");
            count.fetch_one(&self.pool).await.unwrap()
        }

        async fn close_store(&self) {
            self.store.close().await;
        }

        async fn age(&self, by: Duration) {
            sqlx::query(
                "update idempotency.record set claimed_at = claimed_at - by,
                 leased_until = leased_until - by, expires_at = expires_at - by,
                 sweep_at = sweep_at - by
                 from make_interval(secs => $1) as t (by)",
            )
            .bind(by.as_secs_f64())
            .execute(&self.pool)
            .await
            .unwrap();
        }
    }
}

pub mod sqlite {
    use super::*;
    use sqlx::SqlitePool;
    use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tower_idempotency::SqliteStore;
    use tower_idempotency::sqlite::{Tx, TxError};

    pub struct Bank {
        pub store: SqliteStore,
        pub pool: SqlitePool,
        directory: PathBuf,
    }

    handlers!("insert into ledger (note) values (?)");

    impl Banking for Bank {
        type Store = SqliteStore;

        const TELLS_COMMITS: bool = false;

        async fn start() -> Self {
            static COUNTER: AtomicUsize = AtomicUsize::new(0);
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = format!("idempotency-bank-{}-{number}", std::process::id());
            let directory = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&directory).unwrap();
            let file = SqliteConnectOptions::new()
                .filename(directory.join("bank.db"))
                .busy_timeout(Duration::from_secs(5))
                .create_if_missing(true);
            let pool = SqlitePoolOptions::new().connect_with(file).await.unwrap();
            let store = SqliteStore::new(pool.clone());
            store.migrate().await.unwrap();
            sqlx::raw_sql(
                "create table ledger (id integer primary key, note text not null);
                create table parent (id int primary key);
                create table child (parent int references parent deferrable initially deferred)",
            )
            .execute(&pool)
            .await
            .unwrap();
            Self {
                store,
                pool,
                directory,
            }
        }

        fn store(&self) -> SqliteStore {
            self.store.clone()
        }

        fn routes(&self, runs: &Runs) -> Router<Sinks> {
            routes(runs)
        }

        async fn ledger(&self) -> i64 {
            let count = sqlx::query_scalar("select count(*) from ledger");
            count.fetch_one(&self.pool).await.unwrap()
        }

        async fn records(&self) -> i64 {
            let count = sqlx::query_scalar("select count(*) from idempotency_record");
            count.fetch_one(&self.pool).await.unwrap()
        }

        async fn close_store(&self) {
            self.store.close().await;
        }

        async fn age(&self, by: Duration) {
            sqlx::query(
                "update idempotency_record set claimed_at = claimed_at - ?1,
                 leased_until = leased_until - ?1, expires_at = expires_at - ?1,
                 sweep_at = sweep_at - ?1",
            )
            .bind(by.as_secs_f64())
            .execute(&self.pool)
            .await
            .unwrap();
        }
    }

    impl Drop for Bank {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.directory));
        }
    }
}
