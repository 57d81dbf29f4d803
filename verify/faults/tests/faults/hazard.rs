//! sqlx 0.9.0 loses count of a transaction whose `begin` is cancelled, and hands the next borrower a
//! connection inside of it ([#4385](https://github.com/launchbadge/sqlx/issues/4385),
//! [#4393](https://github.com/launchbadge/sqlx/issues/4393)). A record that is written there is gone.

use std::time::Duration;

use faults::database::Database;
use faults::ledger::Ledger;
use faults::proxy::{Action, Proxy, reply};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower_idempotency::store::{
    Begun, Claim, ClaimRequest, Claimed, Completion, Entry, Token, Writes,
};
use tower_idempotency::{
    Envelope, Fingerprint, Identity, Lost, PgStore, PgStoreBuilder, References, Store as _,
    TransactionalStore,
};

use faults::random::fresh_key;
use faults::wait::until;

const SECOND: Duration = Duration::from_secs(1);

/// A pool of one connection, which a proxy leads to the server.
struct Place {
    pool: PgPool,
    proxy: Proxy,
    database: Database,
}

impl Place {
    async fn new() -> Self {
        let database = Database::postgres().await;
        let proxy = Proxy::start(&database.url).await;
        let pool = PgPoolOptions::new().max_connections(1);
        let pool = pool.connect(proxy.url()).await.unwrap();
        PgStore::new(pool.clone()).migrate().await.unwrap();
        Self {
            pool,
            proxy,
            database,
        }
    }

    fn store(&self, change: impl FnOnce(PgStoreBuilder) -> PgStoreBuilder) -> PgStore {
        let builder = PgStore::builder(self.pool.clone());
        let builder = builder.with_max_connections(1).unwrap();
        change(builder.with_max_transactions(1).unwrap()).build()
    }

    /// Cancels a future when the server has begun a transaction for it, before it hears of that.
    async fn cancel_at_begin<T: Send + 'static>(
        &self,
        statement: &str,
        future: impl Future<Output = T> + Send + 'static,
    ) {
        let begun = self.proxy.on(reply(statement)).does(Action::Hold);
        let cancelled = tokio::spawn(future);
        begun.has_fired(1).await;
        cancelled.abort();
        assert!(cancelled.await.is_err_and(|error| error.is_cancelled()));
        begun.release();
    }

    /// What a pool's connection says of the transaction it is in: whether time stands still there.
    async fn is_poisoned(&self) -> bool {
        let mut connection = self.pool.acquire().await.unwrap();
        let now = async |connection: &mut sqlx::PgConnection| -> String {
            let now = sqlx::query_scalar("select now()::text");
            now.fetch_one(connection).await.unwrap()
        };
        let before = now(&mut connection).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        before == now(&mut connection).await
    }

    /// Past the pool and the proxy.
    async fn records(&self) -> i64 {
        let Ledger::Postgres(pool) = &self.database.ledger else {
            panic!("it is PostgreSQL");
        };
        let count = sqlx::query_scalar("select count(*) from idempotency.record");
        count.fetch_one(pool).await.unwrap()
    }
}

fn request() -> ClaimRequest {
    ClaimRequest {
        identity: Identity::new("acme", "pay", fresh_key()),
        fingerprint: Fingerprint::of_bytes(b"body"),
        token: Token::random().unwrap(),
        lost: Lost::Hold,
        lease: 30 * SECOND,
        ttl: 3600 * SECOND,
    }
}

async fn claim(store: &PgStore) -> Claim {
    match store.claim(&request()).await.unwrap() {
        Claimed::Acquired(claim) => claim,
        other => panic!("{other:?}"),
    }
}

/// The fault of sqlx, without this crate. When this fails, the store may begin where it is called, and
/// a shared pool is as good as one of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upstream_a_cancelled_begin_hands_the_next_borrower_its_transaction() {
    let place = Place::new().await;
    assert!(!place.is_poisoned().await);
    let pool = place.pool.clone();
    place
        .cancel_at_begin("begin", async move { pool.begin().await })
        .await;
    assert!(place.is_poisoned().await);
    assert_eq!(place.database.open_transactions().await, 1);
    // What the next borrower writes is acknowledged, and nobody sees it.
    sqlx::raw_sql("create table note ()")
        .execute(&place.pool)
        .await
        .unwrap();
    let Ledger::Postgres(pool) = &place.database.ledger else {
        panic!("it is PostgreSQL");
    };
    let seen = sqlx::query_scalar("select to_regclass('note') is not null");
    let seen: bool = seen.fetch_one(pool).await.unwrap();
    assert!(!seen);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b04_a_transaction_of_the_store_that_is_cancelled_at_its_begin_is_rolled_back() {
    let place = Place::new().await;
    let store = place.store(|builder| builder);
    for _ in 0..3 {
        let cancelled = request();
        let begin = {
            let (store, request) = (store.clone(), cancelled.clone());
            async move { store.begin(&request, SECOND * 60).await }
        };
        place
            .cancel_at_begin("select idempotency.enter(", begin)
            .await;
        place.database.is_clean().await;
        // The identity is free again, and its transaction one of its own, on the one connection.
        let begun = until("the identity to be free", async || {
            match store.begin(&cancelled, SECOND * 60).await.unwrap() {
                Begun::Open(transaction) => Some(transaction),
                Begun::Locked => None,
                Begun::Recorded => panic!("nobody recorded it"),
            }
        });
        let rolled_back = store.rollback(begun.await, cancelled.token).await;
        rolled_back.unwrap();
    }
    place.database.is_clean().await;
    assert_eq!(place.records().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b04_a_claim_that_is_cancelled_at_a_begin_poisons_no_connection() {
    let place = Place::new().await;
    // Behind a pooler each statement has a transaction. That of a writer is nobody's to cancel.
    let store = place.store(|builder| builder.with_pgbouncer(true).with_group_commit(false));
    for n in 1..4 {
        let cancelled = store.clone();
        let claiming = async move { cancelled.claim(&request()).await };
        place
            .cancel_at_begin("begin isolation level", claiming)
            .await;
        claim(&store).await;
        assert_eq!(place.records().await, n, "a claim was lost");
    }
    place.database.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_is_not_hurt_by_a_pool_that_its_application_poisons() {
    let place = Place::new().await;
    let store = place.store(|builder| builder);
    let pool = place.pool.clone();
    place
        .cancel_at_begin("begin", async move { pool.begin().await })
        .await;
    assert!(place.is_poisoned().await);
    claim(&store).await;
    assert_eq!(place.records().await, 1);
}

/// Why [`with_shared_pool`](PgStoreBuilder::with_shared_pool) is for applications that never cancel a
/// `begin`: a claim is acknowledged, and lost with the transaction that it fell into.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_shares_a_pool_loses_claims_to_a_begin_that_its_application_cancels() {
    let place = Place::new().await;
    let store = place.store(|builder| builder.with_shared_pool(true));
    let pool = place.pool.clone();
    place
        .cancel_at_begin("begin", async move { pool.begin().await })
        .await;
    let lost = claim(&store).await;
    assert_eq!(lost.attempt, 1);
    assert_eq!(place.records().await, 0);
}

/// A transaction of the store commits the one that it fell into, effect and record together.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transactional_route_on_a_shared_pool_commits_the_transaction_that_it_fell_into() {
    let place = Place::new().await;
    let store = place.store(|builder| builder.with_shared_pool(true));
    let pool = place.pool.clone();
    place
        .cancel_at_begin("begin", async move { pool.begin().await })
        .await;
    let request = request();
    let begun = store.begin(&request, SECOND * 60).await.unwrap();
    let Begun::Open(transaction) = begun else {
        panic!("nobody has it");
    };
    let entry = Entry {
        writes: Writes::Keep,
        held: false,
        completion: Completion {
            answer: Envelope::new(http::Response::new("paid".into())),
            references: References::default(),
        },
    };
    store.commit(transaction, &request, &entry).await.unwrap();
    assert_eq!(place.records().await, 1);
    assert!(!place.is_poisoned().await);
}
