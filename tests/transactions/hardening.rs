//! PostgreSQL: nodes that die and connections that are cut between two steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use sqlx::Connection as _;
use tower_idempotency::postgres::{Tx, TxError};
use tower_idempotency::store::{
    Begun, Claim, ClaimRequest, Claimed, CommitError, Completion, Entry, Existing, HeldRecord,
    LeaseRenewal, RecordSummary, Renewed, Resolution, Swept, Token, Verdict, Within,
};
use tower_idempotency::{
    Fingerprint, IdempotencyLayer, Identity, Outcome, PgStore, Policy, RecordId, References, Scope,
    Store, StoreError, TransactionalStore,
};

use crate::bank::postgres::Bank;
use crate::bank::{Banking, Sinks, paid};
use crate::site::{Runs, Sent, Site, policy};

/// A node that dies, or goes deaf, before it can take back a claim, or hold what it has claimed.
#[derive(Clone)]
struct Dying {
    store: PgStore,
    releases: Arc<AtomicUsize>,
    holds: Arc<AtomicUsize>,
    lookups: Arc<AtomicUsize>,
}

impl Dying {
    fn new(store: PgStore) -> Self {
        Self {
            store,
            releases: Arc::default(),
            holds: Arc::default(),
            lookups: Arc::default(),
        }
    }
}

impl Store for Dying {
    fn is_durable(&self) -> bool {
        true
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        self.store.claim(request).await
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        self.store.complete(claim, completion).await
    }

    async fn release(&self, _: &Claim) -> Result<(), StoreError> {
        self.releases.fetch_add(1, Ordering::SeqCst);
        std::future::pending().await
    }

    async fn hold(&self, _: &Claim, _: &References) -> Result<(), StoreError> {
        self.holds.fetch_add(1, Ordering::SeqCst);
        std::future::pending().await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        self.store.extend(leases).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        self.store.lookup(identity, fingerprint).await
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.store.resolve(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        self.store.list_held(after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        self.store.inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        let found = self.store.find_by_reference(within, kind, id, after, limit);
        found.await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.store.delete_expired(limit).await
    }

    async fn wait_for_change(&self, identity: &Identity, limit: Duration) {
        self.store.wait_for_change(identity, limit).await;
    }
}

impl TransactionalStore for Dying {
    type Transaction = <PgStore as TransactionalStore>::Transaction;

    const EXECUTION_LIMIT: Duration = PgStore::EXECUTION_LIMIT;

    async fn begin(
        &self,
        request: &ClaimRequest,
        limit: Duration,
    ) -> Result<Begun<Self::Transaction>, StoreError> {
        self.store.begin(request, limit).await
    }

    async fn commit(
        &self,
        transaction: Self::Transaction,
        request: &ClaimRequest,
        entry: &Entry,
    ) -> Result<SystemTime, CommitError> {
        self.store.commit(transaction, request, entry).await
    }

    async fn rollback(
        &self,
        transaction: Self::Transaction,
        token: Token,
    ) -> Result<(), CommitError> {
        self.store.rollback(transaction, token).await
    }

    fn lock_ends_with_writes(&self) -> bool {
        self.store.lock_ends_with_writes()
    }

    async fn confirm(&self, request: &ClaimRequest) -> Result<Verdict, StoreError> {
        self.store.confirm(request).await
    }
}

async fn node(bank: &Bank, runs: &Runs, dying: &Dying, policy: Policy) -> Site {
    let layer = IdempotencyLayer::new(dying.clone(), Scope::header("x-tenant").unwrap())
        .with_store_timeout(Duration::from_secs(1))
        .unwrap()
        .with_policy(policy)
        .unwrap()
        .transactional();
    let routes = bank.routes(runs).route_layer(layer);
    Site::start(routes.with_state(Sinks::default())).await
}

async fn dies_while_it_clears_an_expired_record(policy: Policy) {
    let bank = Bank::start().await;
    let runs = Runs::free();
    let site = bank.open(&runs, policy.clone()).await;
    paid(&site, "a", "201").await.assert_run(1);
    bank.age(Duration::from_secs(73 * 3600)).await;

    let dying = Dying::new(bank.store());
    let dead = node(&bank, &runs, &dying, policy).await;
    paid(&dead, "a", "201")
        .await
        .assert_problem(503, "store-unavailable");
    assert!(dying.releases.load(Ordering::SeqCst) > 0);
    assert_eq!(runs.count(), 1);

    bank.age(Duration::from_secs(3600)).await;
    paid(&site, "a", "201").await.assert_run(2);
    assert_eq!((bank.ledger().await, bank.records().await), (2, 1));
}

#[tokio::test]
async fn a_node_that_dies_before_a_transaction_leaves_nothing_to_hold() {
    dies_while_it_clears_an_expired_record(Policy::critical()).await;
}

#[tokio::test]
async fn a_node_that_dies_before_a_transaction_leaves_nothing_to_answer() {
    dies_while_it_clears_an_expired_record(Policy::high()).await;
}

/// sqlx takes a savepoint whose beginning is cancelled for the transaction, and rolls it back.
async fn cancels(State(cancelled): State<Arc<AtomicUsize>>, mut tx: Tx) -> StatusCode {
    let insert = "insert into ledger (note) values ('stray')";
    {
        let mut begin = Box::pin(tx.begin());
        if futures_util::poll!(&mut begin).is_ready() {
            return StatusCode::INTERNAL_SERVER_ERROR;
        }
        cancelled.fetch_add(1, Ordering::SeqCst);
    }
    match sqlx::raw_sql(insert).execute(&mut *tx).await {
        Ok(_) => StatusCode::CREATED,
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[tokio::test]
async fn a_write_after_a_cancelled_savepoint_is_never_committed_alone() {
    let bank = Bank::start().await;
    let layer = bank.layer().with_policy(policy()).unwrap();
    let cancelled = Arc::new(AtomicUsize::new(0));
    let routes = Router::new().route("/x", post(cancels)).layer(layer);
    let site = Site::start(routes.with_state(cancelled.clone())).await;
    for _ in 0..12 {
        let answer = site.send(Sent::post("/x").key("a")).await;
        assert_eq!(answer.status, 500);
    }
    assert!(cancelled.load(Ordering::SeqCst) > 0);
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
}

async fn cancels_and_refuses(cancelled: State<Arc<AtomicUsize>>, tx: Tx) -> StatusCode {
    cancels(cancelled, tx).await;
    StatusCode::PAYMENT_REQUIRED
}

#[tokio::test]
async fn a_refusal_after_a_cancelled_savepoint_is_neither_recorded_nor_held() {
    let bank = Bank::start().await;
    let layer = bank.layer().with_policy(policy()).unwrap();
    let cancelled = Arc::new(AtomicUsize::new(0));
    let routes = Router::new()
        .route("/x", post(cancels_and_refuses))
        .layer(layer);
    let site = Site::start(routes.with_state(cancelled.clone())).await;
    let mut refused = 0;
    for round in 0..6 {
        let before = cancelled.load(Ordering::SeqCst);
        let answer = site.send(Sent::post("/x").key(&format!("{round}"))).await;
        if cancelled.load(Ordering::SeqCst) > before {
            answer.assert_problem(500, "transaction-aborted");
        } else {
            assert_eq!(answer.status, 402);
            refused += 1;
        }
    }
    assert!(cancelled.load(Ordering::SeqCst) > 0);
    assert_eq!((bank.ledger().await, bank.records().await), (0, refused));
}

/// Commits, begins again, and gives up a statement whose error looks like that of a record in the way.
async fn commits_and_gives_up(mut tx: Tx) -> StatusCode {
    let sql = "insert into ledger (note) values ('once'); commit; begin read write";
    sqlx::raw_sql(sql).execute(&mut *tx).await.unwrap();
    let twice = "create temporary table twice (id integer constraint record_pkey primary key);
        insert into twice values (1); insert into twice values (1)";
    let mut given_up = Box::pin(sqlx::raw_sql(twice).execute(&mut *tx));
    assert!(futures_util::poll!(&mut given_up).is_pending());
    StatusCode::CREATED
}

#[tokio::test]
async fn a_handler_that_commits_by_itself_and_gives_up_a_statement_is_held() {
    let bank = Bank::start().await;
    let layer = bank.layer().with_policy(policy().with_reruns(1)).unwrap();
    let site = Site::start(
        Router::new()
            .route("/x", post(commits_and_gives_up))
            .layer(layer),
    )
    .await;
    let ended = site.send(Sent::post("/x").key("a")).await;
    ended.assert_problem(500, "transaction-ended");
    let again = site.send(Sent::post("/x").key("a")).await;
    again.assert_problem(409, "outcome-unknown");
    assert_eq!(bank.ledger().await, 1);
}

/// Refuses a hold that comes when the transaction of its handler has no lock any more.
const WATCHED: &str = "
create function watched() returns trigger language plpgsql as $$
begin
    if new.state = 'held' and not exists (
        select from pg_locks where locktype = 'advisory' and granted and pid <> pg_backend_pid()
            and database = (select oid from pg_database where datname = current_database())
    ) then
        raise exception 'anybody may run it';
    end if;
    return new;
end
$$;
create trigger watched before insert or update on idempotency.record
    for each row execute function watched()";

#[tokio::test]
async fn what_is_to_be_held_is_held_before_its_transaction_ends() {
    let bank = Bank::start().await;
    sqlx::raw_sql(WATCHED).execute(&bank.pool).await.unwrap();
    let site = bank.open(&Runs::free(), policy()).await;
    let first = paid(&site, "a", "201 hold").await;
    assert_eq!(first.status, 201);
    let again = paid(&site, "a", "201").await;
    again.assert_problem(409, "outcome-unknown");
    assert_eq!(bank.ledger().await, 0);
}

/// Another node cannot enter while this one runs, so a leased one of an earlier deploy does.
#[derive(Clone)]
struct Other(Arc<tokio::sync::Mutex<Site>>);

impl Other {
    async fn start(bank: &Bank, policy: Policy) -> Self {
        let scope = Scope::header("x-tenant").unwrap();
        let leased = IdempotencyLayer::new(bank.store(), scope);
        let leased = leased.with_policy(policy).unwrap();
        let routes = Router::new().route("/x", Runs::free().handler().layer(leased));
        Self(Arc::new(tokio::sync::Mutex::new(Site::start(routes).await)))
    }

    async fn answers(&self) {
        let answer = self.0.lock().await.send(Sent::post("/x").key("a")).await;
        assert_eq!(answer.status, 201);
    }
}

async fn overtaken(State(other): State<Other>, mut tx: Tx) -> StatusCode {
    let insert = "insert into ledger (note) values ('tea')";
    sqlx::raw_sql(insert).execute(&mut *tx).await.unwrap();
    other.answers().await;
    StatusCode::ACCEPTED
}

#[tokio::test]
async fn a_transaction_whose_operation_got_a_record_from_elsewhere_is_rolled_back() {
    let bank = Bank::start().await;
    let policy = policy().with_operation("x");
    let other = Other::start(&bank, policy.clone()).await;
    let layer = bank.layer().with_policy(policy).unwrap();
    let routes = Router::new().route("/x", post(overtaken)).layer(layer);
    let site = Site::start(routes.with_state(other)).await;
    for _ in 0..2 {
        let answer = site.send(Sent::post("/x").key("a")).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        assert!(answer.is_replay());
    }
    assert_eq!((bank.ledger().await, bank.records().await), (0, 1));
}

async fn beaten(State((runs, other)): State<(Runs, Other)>, _tx: Tx) -> Response {
    if runs.run().await == 1 {
        other.answers().await;
        return Outcome::Conflict.into_response();
    }
    StatusCode::CREATED.into_response()
}

#[tokio::test]
async fn a_rerun_that_is_answered_by_another_node_is_counted_once() {
    let bank = Bank::start().await;
    let policy = policy().with_operation("x").with_reruns(1);
    let other = Other::start(&bank, policy.clone()).await;
    let runs = Runs::free();
    let layer = bank.layer().with_policy(policy).unwrap();
    let routes = Router::new()
        .route("/x", post(beaten))
        .route_layer(layer.clone())
        .with_state((runs.clone(), other));
    let site = Site::start(routes).await;
    let answer = site.send(Sent::post("/x").key("a")).await;
    assert!(answer.is_replay(), "{answer:?}");
    let stats = layer.stats();
    assert_eq!((stats.executed, stats.replayed), (1, 0));
    assert_eq!(runs.count(), 1);
}

/// All connections of transactions are taken, and the database is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_is_answered_while_handlers_take_every_transaction() {
    let bank = Bank::start().await;
    let store = PgStore::builder(bank.pool.clone())
        .with_max_transactions(1)
        .unwrap()
        .build();
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap())
        .with_store_timeout(Duration::from_secs(1))
        .unwrap()
        .transactional();
    let runs = Runs::gated();
    let routes = bank.routes(&runs).route_layer(layer);
    let site = Site::start(routes.with_state(Sinks::default())).await;
    runs.let_go();
    let first = paid(&site, "first", "201").await;
    runs.entered().await;
    let busy = async {
        runs.entered().await;
        let keys = ["b", "c", "d", "e", "f", "g", "h", "i"];
        let full = futures_util::future::join_all(keys.map(|key| paid(&site, key, "201"))).await;
        for answer in full {
            assert_eq!(answer.status, 503);
            assert_eq!(answer.headers["retry-after"], "1");
        }
        paid(&site, "first", "201").await.assert_replay_of(&first);
        runs.let_go();
    };
    let (answer, ()) = tokio::join!(paid(&site, "a", "201"), busy);
    answer.assert_run(2);
}

/// A savepoint is left open, and the handler fails.
async fn forgets(mut tx: Tx) -> StatusCode {
    std::mem::forget(tx.begin().await.unwrap());
    StatusCode::INTERNAL_SERVER_ERROR
}

#[tokio::test]
async fn a_shared_pool_gets_its_connection_back_out_of_the_transaction() {
    let bank = Bank::start().await;
    let pool = bank.database.pool(1).await;
    let store = PgStore::builder(pool.clone())
        .with_shared_pool(true)
        .build();
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap()).transactional();
    let site = Site::start(Router::new().route("/x", post(forgets)).layer(layer)).await;
    for _ in 0..3 {
        let answer = site.send(Sent::post("/x").key("a")).await;
        assert_eq!(answer.status, 500);
        sqlx::raw_sql("insert into ledger (note) values ('of the application')")
            .execute(&pool)
            .await
            .unwrap();
    }
    assert_eq!(bank.ledger().await, 3);
}

/// Nothing but the mark tells that the transaction is over: the session may write.
#[tokio::test]
async fn a_handler_that_ends_its_transaction_on_a_shared_pool_is_told_apart() {
    let bank = Bank::start().await;
    let store = PgStore::builder(bank.database.pool(1).await)
        .with_shared_pool(true)
        .build();
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap()).transactional();
    let routes = bank.routes(&Runs::free()).route_layer(layer);
    let site = Site::start(routes.with_state(Sinks::default())).await;
    for (key, then) in [("a", "commit"), ("b", "rollback"), ("c", "commit; begin")] {
        let ended = paid(&site, key, then).await;
        ended.assert_problem(500, "transaction-ended");
        let again = paid(&site, key, "201").await;
        again.assert_problem(409, "outcome-unknown");
    }
    assert_eq!((bank.ledger().await, bank.records().await), (2, 3));
}

/// It would be run again, and what it has committed done twice.
#[tokio::test]
async fn a_handler_that_commits_by_itself_and_fails_is_held() {
    let bank = Bank::start().await;
    let runs = Runs::free();
    let site = bank.open(&runs, policy().with_reruns(1)).await;
    let failing = [
        ("a", "commit 500"),
        ("b", "commit; begin conflict"),
        ("c", "commit; select 1 / 0 500"),
        ("d", "commit; begin; select 1 / 0 500"),
        ("e", "commit; begin; select 1 / 0 201"),
        ("f", "commit; select 1 / 0 conflict"),
    ];
    for (key, then) in failing {
        let ended = paid(&site, key, then).await;
        ended.assert_problem(500, "transaction-ended");
        let again = paid(&site, key, "201").await;
        again.assert_problem(409, "outcome-unknown");
    }
    assert_eq!((bank.ledger().await, runs.count()), (6, 6));
}

/// Between the claim that keeps the key and what makes it held.
#[tokio::test]
async fn a_handler_that_commits_by_itself_is_held_where_its_node_dies_before_it_can_be() {
    for policy in [Policy::critical(), Policy::high(), Policy::medium()] {
        let (bank, runs) = (Bank::start().await, Runs::free());
        let policy = policy.with_settle_timeout(Duration::from_secs(1));
        let dying = Dying::new(bank.store());
        let dead = node(&bank, &runs, &dying, policy.clone()).await;
        let ended = paid(&dead, "a", "commit 500").await;
        ended.assert_problem(500, "transaction-ended");
        assert!(dying.holds.load(Ordering::SeqCst) > 0);

        let site = bank.open(&runs, policy).await;
        let running = paid(&site, "a", "201").await;
        running.assert_problem(409, "request-in-progress");
        bank.age(Duration::from_secs(3600)).await;
        let held = paid(&site, "a", "201").await;
        held.assert_problem(409, "outcome-unknown");
        assert_eq!((bank.ledger().await, runs.count()), (1, 1));
    }
}

/// The savepoint fails, and sqlx takes it for the transaction.
async fn commits_and_begins(mut tx: Tx, headers: HeaderMap) -> StatusCode {
    let sql = "insert into ledger (note) values ('once'); commit";
    sqlx::raw_sql(sql).execute(&mut *tx).await.unwrap();
    assert!(tx.begin().await.is_err(), "there is no transaction");
    let status = headers["x-then"].to_str().unwrap();
    status.parse().unwrap()
}

#[tokio::test]
async fn a_handler_that_commits_by_itself_and_begins_again_is_held() {
    let bank = Bank::start().await;
    let layer = bank.layer().with_policy(policy().with_reruns(1)).unwrap();
    let router = Router::new().route("/x", post(commits_and_begins));
    let site = Site::start(router.layer(layer)).await;
    for status in ["201", "402", "500"] {
        let sent = || Sent::post("/x").key(status).header("x-then", status);
        let ended = site.send(sent()).await;
        ended.assert_problem(500, "transaction-ended");
        let again = site.send(sent()).await;
        again.assert_problem(409, "outcome-unknown");
    }
    assert_eq!(bank.ledger().await, 3);
}

/// The release of a savepoint is given up, and sqlx rolls back to it though it is gone: everything is
/// undone by that, and nothing is to be held.
async fn gives_up_a_release(State(runs): State<Runs>, mut tx: Tx) -> StatusCode {
    let insert = "insert into ledger (note) values ('tea')";
    sqlx::raw_sql(insert).execute(&mut *tx).await.unwrap();
    let inner = tx.begin().await.unwrap();
    if runs.run().await == 1 {
        let mut release = Box::pin(inner.commit());
        assert!(futures_util::poll!(&mut release).is_pending());
    } else {
        inner.commit().await.unwrap();
    }
    StatusCode::CREATED
}

#[tokio::test]
async fn a_handler_that_gives_up_a_savepoint_is_not_held() {
    let bank = Bank::start().await;
    let layer = bank.layer().with_policy(policy()).unwrap();
    let router = Router::new().route("/x", post(gives_up_a_release));
    let router = router.layer(layer).with_state(Runs::free());
    let site = Site::start(router).await;
    let first = site.send(Sent::post("/x").key("a")).await;
    let second = site.send(Sent::post("/x").key("a")).await;
    assert_eq!(second.status, 201, "{first:?}, {second:?}");
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

/// The sessions cannot be told to refuse what is written then.
#[tokio::test]
async fn a_write_after_a_cancelled_savepoint_on_a_shared_pool_is_not_done_twice() {
    let bank = Bank::start().await;
    let store = PgStore::builder(bank.database.pool(1).await)
        .with_shared_pool(true)
        .build();
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap()).transactional();
    let cancelled = Arc::new(AtomicUsize::new(0));
    let routes = Router::new().route("/x", post(cancels)).layer(layer);
    let site = Site::start(routes.with_state(cancelled.clone())).await;
    for _ in 0..12 {
        site.send(Sent::post("/x").key("a")).await;
    }
    assert_eq!(cancelled.load(Ordering::SeqCst), 1);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
    let last = site.send(Sent::post("/x").key("a")).await;
    last.assert_problem(409, "outcome-unknown");
}

/// The first call finds no mark, the second fails.
const BROKEN: &str = "
create schema broken;
create sequence broken.calls;
create function broken.current_setting(text, boolean) returns text language plpgsql as $$
begin
    if nextval('broken.calls') > 1 then
        raise exception 'cannot tell';
    end if;
    return null;
end
$$";

async fn commits_and_breaks(mut tx: Tx) -> Result<StatusCode, TxError> {
    let sql = "insert into ledger (note) values ('once'); commit;
        set search_path = broken, pg_catalog, public";
    sqlx::raw_sql(sql).execute(&mut *tx).await?;
    Ok(StatusCode::CREATED)
}

/// Or what it has committed would be done twice.
#[tokio::test]
async fn a_handler_of_which_cannot_be_told_whether_it_has_committed_runs_no_second_time() {
    let bank = Bank::start().await;
    sqlx::raw_sql(BROKEN).execute(&bank.pool).await.unwrap();
    let store = PgStore::builder(bank.database.pool(1).await)
        .with_shared_pool(true)
        .build();
    let policy = Policy::high().with_reruns(1);
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap())
        .with_policy(policy)
        .unwrap()
        .transactional();
    let router = Router::new().route("/x", post(commits_and_breaks));
    let site = Site::start(router.layer(layer)).await;
    let answer = site.send(Sent::post("/x").key("a")).await;
    answer.assert_problem(500, "transaction-ended");
    let calls: i64 = sqlx::query_scalar("select last_value from broken.calls")
        .fetch_one(&bank.pool)
        .await
        .unwrap();
    assert!(calls >= 2, "{calls}");
    assert_eq!(bank.ledger().await, 1);
}

/// One connection of transactions, which is taken: the first of the duplicates waits for it, and the
/// others for the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn duplicates_of_a_request_that_waits_for_a_transaction_leave_the_database_alone() {
    let bank = Bank::start().await;
    let store = PgStore::builder(bank.pool.clone())
        .with_max_transactions(1)
        .unwrap()
        .build();
    let counting = Dying::new(store);
    let layer = IdempotencyLayer::new(counting.clone(), Scope::header("x-tenant").unwrap())
        .with_store_timeout(Duration::from_secs(1))
        .unwrap()
        .transactional();
    let runs = Runs::gated();
    let routes = bank.routes(&runs).route_layer(layer);
    let site = Site::start(routes.with_state(Sinks::default())).await;
    let duplicates = async {
        runs.entered().await;
        let before = counting.lookups.load(Ordering::SeqCst);
        let duplicates = (0..8).map(|_| paid(&site, "b", "201"));
        futures_util::future::join_all(duplicates).await;
        runs.let_go();
        counting.lookups.load(Ordering::SeqCst) - before
    };
    let (answer, lookups) = tokio::join!(paid(&site, "a", "201"), duplicates);
    answer.assert_run(1);
    // Each looks when it comes, and once more for each that gives up before it.
    assert!(lookups <= 8 * 8, "{lookups} lookups");
}
