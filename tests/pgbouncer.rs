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

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::task::JoinSet;
use tower_idempotency::store::conformance::Subject;
use tower_idempotency::store::{ClaimRequest, Completion, LeaseRenewal, Renewed, Token};
use tower_idempotency::{
    Envelope, Fingerprint, Identity, Lost, PgStore, References, Store, StoreError,
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
