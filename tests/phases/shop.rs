//! A shop whose `POST /orders` writes an order, charges it at a gateway, and writes the charge and a
//! mail, in three phases; and which stops where the test wants it to.

use std::collections::HashSet;
use std::ops::DerefMut;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures_util::future::{AbortHandle, Abortable};
use tokio::sync::Semaphore;
use tower_idempotency::store::{
    Begun, Claim, ClaimRequest, CommitError, Entry, PhaseError, PhasedStore, Phases, Progress,
    Step, Token, TransactionalStore, Verdict,
};
use tower_idempotency::{
    Detached, IdempotencyContext, IdempotencyLayer, Lost, Outcome, Policy, References, Scope,
    Store, StoreError,
};

use crate::flaky::Flaky;
use crate::site::{Answer, PATIENCE, Sent, Site};

/// What becomes of the next commits of a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    Heard = 0,
    /// They are committed.
    Lost = 1,
    /// They are rolled back, which nobody hears either.
    Broken = 2,
}

/// A store whose commits of phases may not be acknowledged.
#[derive(Debug, Clone)]
pub struct Deaf<S> {
    pub store: Flaky<S>,
    ack: Arc<AtomicU8>,
}

impl<S: Store> Deaf<S> {
    pub fn new(store: S) -> Self {
        Self {
            store: Flaky::new(store),
            ack: Arc::default(),
        }
    }

    pub fn set(&self, ack: Ack) {
        self.ack.store(ack as u8, Ordering::SeqCst);
    }
}

impl<S: Store> Store for Deaf<S> {
    fn is_durable(&self) -> bool {
        self.store.is_durable()
    }

    async fn inspect(
        &self,
        identity: &tower_idempotency::Identity,
    ) -> Result<Option<tower_idempotency::store::RecordSummary>, StoreError> {
        self.store.inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: tower_idempotency::store::Within<'_>,
        kind: &str,
        id: &str,
        after: Option<tower_idempotency::RecordId>,
        limit: u32,
    ) -> Result<Vec<tower_idempotency::store::RecordSummary>, StoreError> {
        let found = self.store.find_by_reference(within, kind, id, after, limit);
        found.await
    }

    async fn claim(
        &self,
        request: &ClaimRequest,
    ) -> Result<tower_idempotency::store::Claimed, StoreError> {
        self.store.claim(request).await
    }

    async fn complete(
        &self,
        claim: &Claim,
        completion: &tower_idempotency::store::Completion,
    ) -> Result<(), StoreError> {
        self.store.complete(claim, completion).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        self.store.release(claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        self.store.hold(claim, references).await
    }

    async fn extend(
        &self,
        leases: &[tower_idempotency::store::LeaseRenewal],
    ) -> Result<Vec<tower_idempotency::store::Renewed>, StoreError> {
        self.store.extend(leases).await
    }

    async fn lookup(
        &self,
        identity: &tower_idempotency::Identity,
        fingerprint: &tower_idempotency::Fingerprint,
    ) -> Result<Option<tower_idempotency::store::Existing>, StoreError> {
        self.store.lookup(identity, fingerprint).await
    }

    async fn resolve(
        &self,
        identity: &tower_idempotency::Identity,
        token: tower_idempotency::store::Token,
        resolution: &tower_idempotency::store::Resolution,
    ) -> Result<(), StoreError> {
        self.store.resolve(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<tower_idempotency::RecordId>,
        limit: u32,
    ) -> Result<Vec<tower_idempotency::HeldRecord>, StoreError> {
        self.store.list_held(after, limit).await
    }

    async fn delete_expired(&self, limit: u32) -> Result<tower_idempotency::Swept, StoreError> {
        self.store.delete_expired(limit).await
    }

    async fn wait_for_change(&self, identity: &tower_idempotency::Identity, limit: Duration) {
        self.store.wait_for_change(identity, limit).await;
    }
}

impl<S: TransactionalStore> TransactionalStore for Deaf<S> {
    type Transaction = S::Transaction;

    const EXECUTION_LIMIT: Duration = S::EXECUTION_LIMIT;

    async fn begin(
        &self,
        request: &ClaimRequest,
        limit: Duration,
    ) -> Result<Begun<S::Transaction>, StoreError> {
        self.store.inner().begin(request, limit).await
    }

    async fn commit(
        &self,
        transaction: S::Transaction,
        request: &ClaimRequest,
        entry: &Entry,
    ) -> Result<std::time::SystemTime, CommitError> {
        self.store.inner().commit(transaction, request, entry).await
    }

    async fn rollback(&self, transaction: S::Transaction, token: Token) -> Result<(), CommitError> {
        self.store.inner().rollback(transaction, token).await
    }

    fn lock_ends_with_writes(&self) -> bool {
        self.store.inner().lock_ends_with_writes()
    }

    async fn confirm(&self, request: &ClaimRequest) -> Result<Verdict, StoreError> {
        self.store.inner().confirm(request).await
    }
}

impl<S: PhasedStore> PhasedStore for Deaf<S> {
    async fn begin_phase(
        &self,
        claim: &Claim,
        limit: Duration,
    ) -> Result<S::Transaction, StoreError> {
        self.store.inner().begin_phase(claim, limit).await
    }

    async fn save_phase(
        &self,
        transaction: S::Transaction,
        claim: &Claim,
        step: &Step,
    ) -> Result<(), CommitError> {
        let unknown = CommitError::Unknown(StoreError::unavailable("planted"));
        let store = self.store.inner();
        match self.ack.load(Ordering::SeqCst) {
            0 => store.save_phase(transaction, claim, step).await,
            1 => {
                store.save_phase(transaction, claim, step).await?;
                Err(unknown)
            }
            _ => {
                store.rollback(transaction, claim.token).await?;
                Err(unknown)
            }
        }
    }

    async fn progress(&self, claim: &Claim) -> Result<Option<(Progress, References)>, StoreError> {
        self.store.inner().progress(claim).await
    }

    async fn list_abandoned(
        &self,
        operations: &[String],
        after: Option<tower_idempotency::RecordId>,
        limit: u32,
    ) -> Result<Vec<tower_idempotency::store::Abandoned>, StoreError> {
        let store = self.store.inner();
        store.list_abandoned(operations, after, limit).await
    }
}

/// Where handlers stop, and what they did.
#[derive(Clone, Default)]
pub struct Script(Arc<Inner>);

struct Inner {
    halt: Mutex<Option<&'static str>>,
    reached: Semaphore,
    waited: AtomicUsize,
    go: Semaphore,
    worked: Mutex<Vec<&'static str>>,
    keys: Mutex<Vec<String>>,
    refused: Mutex<Vec<String>>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            halt: Mutex::default(),
            reached: Semaphore::new(0),
            waited: AtomicUsize::new(0),
            go: Semaphore::new(0),
            worked: Mutex::default(),
            keys: Mutex::default(),
            refused: Mutex::default(),
        }
    }
}

impl Script {
    /// The next handler that comes by this point waits there.
    pub fn halt_at(&self, point: &'static str) {
        *self.0.halt.lock().unwrap() = Some(point);
    }

    pub async fn reached(&self) {
        let reached = tokio::time::timeout(PATIENCE, self.0.reached.acquire()).await;
        reached.expect("the point is reached").unwrap().forget();
    }

    /// How many handlers were stopped so far.
    pub fn waiting(&self) -> usize {
        self.0.waited.load(Ordering::SeqCst)
    }

    /// Lets the one go on that has waited longest.
    pub fn let_go(&self) {
        self.0.go.add_permits(1);
    }

    async fn at(&self, point: &'static str) {
        let halts = self.0.halt.lock().unwrap().take_if(|halt| *halt == point);
        if halts.is_some() {
            self.0.waited.fetch_add(1, Ordering::SeqCst);
            self.0.reached.add_permits(1);
            self.0.go.acquire().await.unwrap().forget();
        }
    }

    /// The gateway charges once for each key.
    pub async fn charge(&self, key: String) -> String {
        let charge = format!("ch_{key}");
        self.0.keys.lock().unwrap().push(key);
        charge
    }

    /// How often the work of a phase was begun.
    pub fn worked(&self, phase: &str) -> usize {
        let worked = self.0.worked.lock().unwrap();
        worked.iter().filter(|name| **name == phase).count()
    }

    pub fn calls(&self) -> usize {
        self.0.keys.lock().unwrap().len()
    }

    pub fn charges(&self) -> usize {
        let keys = self.0.keys.lock().unwrap();
        keys.iter().collect::<HashSet<_>>().len()
    }

    /// What handlers said of phases that failed.
    pub fn refused(&self) -> Vec<String> {
        self.0.refused.lock().unwrap().clone()
    }
}

pub trait Shopping: Send + Sync + Sized + 'static {
    type Store: PhasedStore<Transaction: DerefMut<Target: Send>> + Clone;

    fn start() -> impl Future<Output = Self> + Send;

    fn store(&self) -> &Deaf<Self::Store>;

    fn routes(script: &Script) -> Router;

    /// What finished phases wrote, in order.
    fn ledger(&self) -> impl Future<Output = Vec<String>> + Send;

    /// What is saved in the only record.
    fn progress(&self) -> impl Future<Output = Option<String>> + Send;

    /// What is noted in the only record.
    fn references(&self) -> impl Future<Output = String> + Send;

    /// Makes every record older.
    fn age(&self, by: Duration) -> impl Future<Output = ()> + Send;

    fn layer(&self, policy: Policy) -> IdempotencyLayer<Deaf<Self::Store>> {
        let scope = Scope::header("x-tenant").unwrap();
        let layer = IdempotencyLayer::new(self.store().clone(), scope);
        layer.with_policy(policy).unwrap()
    }

    /// A node of the service.
    fn node(&self, script: &Script, policy: Policy) -> impl Future<Output = Node> + Send {
        let (task, registration) = AbortHandle::new_pair();
        let registration = Mutex::new(Some(registration));
        let layer = self.layer(policy).with_spawn_hook(move |running| {
            match registration.lock().unwrap().take() {
                Some(registration) => Detached::new(async move {
                    let _ = Abortable::new(running, registration).await;
                }),
                None => running,
            }
        });
        let router = Self::routes(script).route_layer(layer);
        async move {
            let site = Site::start(router).await;
            Node { site, task }
        }
    }

    fn lease_is_over(&self) -> impl Future<Output = ()> + Send {
        self.age(Duration::from_secs(31))
    }
}

pub struct Node {
    pub site: Site,
    task: AbortHandle,
}

impl Node {
    /// The first request's task ends in the middle, as with its process.
    pub fn crash(&self) {
        self.task.abort();
    }

    /// `POST /orders` of the same order, by a version of the code.
    pub async fn order(&self, code: &str) -> Answer {
        self.site.send(order(code)).await
    }
}

pub fn order(code: &str) -> Sent {
    Sent::order("order-1").header("x-code", code)
}

/// Lost attempts are resumed.
pub fn resuming() -> Policy {
    Policy::critical().with_lost(Lost::Rerun)
}

pub const WHOLE: [&str; 3] = ["ordered", "charged", "mailed"];

macro_rules! handlers {
    ($database:ty, $insert:literal) => {
        type Failure = PhaseError<TxError>;

        fn routes<S>(script: &Script) -> Router
        where
            S: PhasedStore<Transaction = sqlx::Transaction<'static, $database>>,
        {
            let script = script.clone();
            let handler = post(
                async move |phases: Phases<S>, context: IdempotencyContext, headers: HeaderMap| {
                    let code = headers.get("x-code").map_or("", |v| v.to_str().unwrap());
                    match order(code, &script, &phases, &context).await {
                        Ok(response) => response,
                        Err(error) => {
                            script.0.refused.lock().unwrap().push(error.to_string());
                            error.into_response()
                        }
                    }
                },
            );
            Router::new().route("/orders", handler)
        }

        async fn order<S>(
            code: &str,
            script: &Script,
            phases: &Phases<S>,
            context: &IdempotencyContext,
        ) -> Result<Response, Failure>
        where
            S: PhasedStore<Transaction = sqlx::Transaction<'static, $database>>,
        {
            script.at("start").await;
            let first = if code == "renamed" { "placed" } else { "ordered" };
            if code == "retyped" {
                phases
                    .run(first, async |db| write(db, script, "ordered").await.map(|_| 7_u8))
                    .await?;
            }
            let order: String = phases
                .run(first, async |db| {
                    context.reference("order", "o_1").unwrap();
                    let order = write(db, script, "ordered").await?;
                    script.at("in ordered").await;
                    if code == "fail" {
                        sqlx::query("insert into nowhere values (1)").execute(db).await?;
                    } else if code == "end" {
                        sqlx::raw_sql("commit").execute(db).await?;
                    } else if code == "nested" {
                        let inner = phases.run("inner", async |_| Ok::<_, TxError>(()));
                        let inner = inner.await.unwrap_err();
                        script.0.refused.lock().unwrap().push(inner.to_string());
                    }
                    Ok(order)
                })
                .await?;
            script.at("after ordered").await;
            match code {
                "busy" => return Ok((StatusCode::SERVICE_UNAVAILABLE, Outcome::Release).into_response()),
                "held" => return Ok((StatusCode::ACCEPTED, Outcome::Hold).into_response()),
                "twice" => {
                    phases.run("ordered", async |db| write(db, script, "ordered").await).await?;
                }
                "large" => {
                    let large = async |_: &mut _| Ok("x".repeat(70_000));
                    phases.run("large", large).await?;
                }
                "many" => {
                    for number in 2..=17 {
                        let name = number.to_string();
                        phases.run(&name, async |_| Ok(())).await?;
                    }
                }
                _ => {}
            }
            let charge = script.charge(phases.downstream_key("charge")).await;
            script.at("after charge").await;
            phases
                .run("charged", async |db| {
                    write(db, script, "charged").await?;
                    script.at("in charged").await;
                    Ok(())
                })
                .await?;
            script.at("after charged").await;
            phases
                .run("mailed", async |db| {
                    write(db, script, "mailed").await?;
                    script.at("in mailed").await;
                    Ok(())
                })
                .await?;
            script.at("after mailed").await;
            let body = axum::Json(serde_json::json!({ "order": order, "charge": charge }));
            Ok((StatusCode::CREATED, body).into_response())
        }

        async fn write(
            db: &mut <$database as sqlx::Database>::Connection,
            script: &Script,
            phase: &'static str,
        ) -> Result<String, TxError> {
            script.0.worked.lock().unwrap().push(phase);
            sqlx::query($insert).bind(phase).execute(db).await?;
            Ok(format!("{phase} by run {}", script.worked(phase)))
        }
    };
}

pub mod postgres {
    use super::*;
    use crate::common::database::TestDatabase;
    use sqlx::PgPool;
    use tower_idempotency::PgStore;
    use tower_idempotency::postgres::TxError;

    pub struct Shop {
        pub store: Deaf<PgStore>,
        pub pool: PgPool,
        database: TestDatabase,
    }

    handlers!(sqlx::Postgres, "insert into ledger (note) values ($1)");

    impl Shopping for Shop {
        type Store = PgStore;

        async fn start() -> Self {
            let database = TestDatabase::create().await;
            let pool = database.pool(4).await;
            let store = PgStore::new(pool.clone());
            store.migrate().await.unwrap();
            sqlx::raw_sql(
                "create table ledger (id bigint generated always as identity, note text not null)",
            )
            .execute(&pool)
            .await
            .unwrap();
            Self {
                store: Deaf::new(store),
                pool,
                database,
            }
        }

        fn store(&self) -> &Deaf<PgStore> {
            &self.store
        }

        fn routes(script: &Script) -> Router {
            routes::<Deaf<PgStore>>(script)
        }

        async fn ledger(&self) -> Vec<String> {
            let notes = sqlx::query_scalar("select note from ledger order by id");
            notes.fetch_all(&self.pool).await.unwrap()
        }

        async fn progress(&self) -> Option<String> {
            let progress = sqlx::query_scalar("select progress from idempotency.record");
            progress.fetch_one(&self.pool).await.unwrap()
        }

        async fn references(&self) -> String {
            let references = sqlx::query_scalar("select refs from idempotency.record");
            references.fetch_one(&self.pool).await.unwrap()
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
    use tower_idempotency::SqliteStore;
    use tower_idempotency::sqlite::TxError;

    pub struct Shop {
        store: Deaf<SqliteStore>,
        pool: SqlitePool,
        directory: PathBuf,
    }

    handlers!(sqlx::Sqlite, "insert into ledger (note) values (?)");

    impl Shopping for Shop {
        type Store = SqliteStore;

        async fn start() -> Self {
            static COUNTER: AtomicUsize = AtomicUsize::new(0);
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = format!("idempotency-shop-{}-{number}", std::process::id());
            let directory = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&directory).unwrap();
            let file = SqliteConnectOptions::new()
                .filename(directory.join("shop.db"))
                .busy_timeout(Duration::from_secs(5))
                .create_if_missing(true);
            let pool = SqlitePoolOptions::new().connect_with(file).await.unwrap();
            let store = SqliteStore::new(pool.clone());
            store.migrate().await.unwrap();
            let create = "create table ledger (id integer primary key, note text not null)";
            sqlx::raw_sql(create).execute(&pool).await.unwrap();
            Self {
                store: Deaf::new(store),
                pool,
                directory,
            }
        }

        fn store(&self) -> &Deaf<SqliteStore> {
            &self.store
        }

        fn routes(script: &Script) -> Router {
            routes::<Deaf<SqliteStore>>(script)
        }

        async fn ledger(&self) -> Vec<String> {
            let notes = sqlx::query_scalar("select note from ledger order by id");
            notes.fetch_all(&self.pool).await.unwrap()
        }

        async fn progress(&self) -> Option<String> {
            let progress = sqlx::query_scalar("select progress from idempotency_record");
            progress.fetch_one(&self.pool).await.unwrap()
        }

        async fn references(&self) -> String {
            let references = sqlx::query_scalar("select refs from idempotency_record");
            references.fetch_one(&self.pool).await.unwrap()
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

    impl Drop for Shop {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.directory));
        }
    }
}
