use std::env;
use std::fs;
use std::path::PathBuf;
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use tower_idempotency::store::conformance::Subject;
use tower_idempotency::store::{ClaimRequest, Claimed, Completion, Existing, Resolution, Token};
use tower_idempotency::{
    Envelope, Fingerprint, Identity, Lost, References, SqliteStore, Store, StoreErrorKind,
};

const AGE: &str = "
update idempotency_record set
    claimed_at = claimed_at - ?1,
    leased_until = leased_until - ?1,
    expires_at = expires_at - ?1,
    sweep_at = sweep_at - ?1";

/// A file of its own, deleted with the value.
struct TestFile(PathBuf);

impl TestFile {
    fn new() -> Self {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("tower-idempotency-{}-{count}", process::id());
        let directory = env::temp_dir().join(name);
        fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    async fn pool(&self) -> SqlitePool {
        let file = SqliteConnectOptions::new()
            .filename(self.0.join("test.db"))
            .create_if_missing(true)
            .busy_timeout(Duration::from_secs(10));
        let options = SqlitePoolOptions::new().max_connections(1);
        options.connect_with(file).await.unwrap()
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub struct Sqlite {
    store: SqliteStore,
    pub pool: SqlitePool,
    file: TestFile,
}

impl Sqlite {
    pub async fn new() -> Self {
        let file = TestFile::new();
        let pool = file.pool().await;
        let store = SqliteStore::new(pool.clone());
        store.migrate().await.unwrap();
        Self { store, pool, file }
    }

    async fn sql(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
    }
}

impl Subject for Sqlite {
    type Store = SqliteStore;

    fn store(&self) -> &SqliteStore {
        &self.store
    }

    async fn age(&self, by: Duration) {
        let age = sqlx::query(AGE).bind(by.as_secs_f64());
        age.execute(&self.pool).await.unwrap();
    }
}

mod rules {
    tower_idempotency::conformance_tests!(super::Sqlite::new().await);
}

fn request() -> ClaimRequest {
    ClaimRequest {
        identity: Identity::new("acme", "POST /charges", "key"),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: Token::random().unwrap(),
        lost: Lost::Rerun,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    }
}

fn completion() -> Completion {
    Completion {
        answer: Envelope::new(http::Response::new("answer".into())),
        references: References::default(),
    }
}

/// The row is there when the statement has run, and gone when its commit fails.
const FAILING_COMMIT: &str = "
create table parent (id integer primary key);
create table child (id integer references parent (id) deferrable initially deferred);
create trigger orphan after insert on idempotency_record begin insert into child values (1); end";

#[tokio::test]
async fn a_claim_whose_commit_fails_is_not_acquired() {
    let sqlite = Sqlite::new().await;
    sqlite.sql(FAILING_COMMIT).await;
    let refused = sqlite.store.claim(&request()).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);

    sqlite.sql("drop trigger orphan").await;
    let claimed = sqlite.store.claim(&request()).await.unwrap();
    assert!(matches!(claimed, Claimed::Acquired(_)), "{claimed:?}");
}

#[tokio::test]
async fn a_file_is_durable_and_memory_is_not() {
    let file = TestFile::new();
    assert!(SqliteStore::new(file.pool().await).is_durable());
    for url in ["sqlite::memory:", "sqlite://?mode=memory"] {
        let memory = SqlitePoolOptions::new().connect_lazy(url).unwrap();
        assert!(!SqliteStore::new(memory).is_durable(), "{url}");
    }
    let temporary = SqliteConnectOptions::new().filename("");
    let temporary = SqlitePoolOptions::new().connect_lazy_with(temporary);
    assert!(!SqliteStore::new(temporary).is_durable());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nodes_that_start_at_once_all_migrate() {
    let file = TestFile::new();
    let mut nodes = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = SqliteStore::new(file.pool().await);
        nodes.spawn(async move { store.migrate().await });
    }
    for migrated in nodes.join_all().await {
        migrated.unwrap();
    }
}

#[tokio::test]
async fn migrating_again_leaves_the_records_alone() {
    let sqlite = Sqlite::new().await;
    let request = request();
    sqlite.store.claim(&request).await.unwrap();
    sqlite.store.migrate().await.unwrap();
    let again = SqliteStore::new(sqlite.file.pool().await);
    again.migrate().await.unwrap();
    let found = again.lookup(&request.identity, &request.fingerprint).await;
    assert!(matches!(found, Ok(Some(Existing::InProgress { .. }))));
}

#[tokio::test]
async fn a_table_of_a_newer_version_is_refused_by_name() {
    let sqlite = Sqlite::new().await;
    sqlite
        .sql("insert into _idempotency_migrations values (99, 'later', current_timestamp, true, x'00', 0)")
        .await;
    let refused = sqlite.store.migrate().await.unwrap_err();
    assert!(refused.to_string().contains("migration 99"), "{refused}");
}

#[tokio::test]
async fn files_that_were_applied_by_hand_are_found_in_place() {
    let file = TestFile::new();
    let pool = file.pool().await;
    for by_hand in [
        include_str!("../../migrations/sqlite/0001_record.sql"),
        include_str!("../../migrations/sqlite/0003_progress.sql"),
    ] {
        sqlx::raw_sql(by_hand).execute(&pool).await.unwrap();
    }
    let store = SqliteStore::new(pool);
    store.migrate().await.unwrap();
    store.migrate().await.unwrap();
    store.claim(&request()).await.unwrap();
}

/// Or the handler would run, and its answer could not be recorded.
#[tokio::test]
async fn on_a_table_of_an_older_version_nothing_is_claimed() {
    let file = TestFile::new();
    let pool = file.pool().await;
    for sql in [
        include_str!("../../migrations/sqlite/0001_record.sql"),
        include_str!("../../migrations/sqlite/0002_reference.sql"),
    ] {
        sqlx::raw_sql(sql).execute(&pool).await.unwrap();
    }
    let store = SqliteStore::new(pool);
    let refused = store.claim(&request()).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_corrupt() {
    for damage in [
        "update idempotency_record set answer = x'00'",
        "update idempotency_record set answer = x'ff' || substr(answer, 2)",
        "update idempotency_record set fingerprint = x'01'",
        "update idempotency_record set token = x'01'",
        "update idempotency_record set refs = '{'",
        "update idempotency_record set digest = x'01'",
        "update idempotency_record set attempt = -1",
        "update idempotency_record set expires_at = 9e999",
        "update idempotency_record set leased_until = 9e999",
        "update idempotency_record set leased_until = -9e999",
        "pragma ignore_check_constraints = on; update idempotency_record set state = 'lost'",
        "pragma ignore_check_constraints = on; update idempotency_record set lost = 'other'",
        "pragma ignore_check_constraints = on; update idempotency_record set answer = null",
    ] {
        let sqlite = Sqlite::new().await;
        let request = request();
        let claim = request.claim(1, SystemTime::UNIX_EPOCH);
        sqlite.store.claim(&request).await.unwrap();
        sqlite.store.complete(&claim, &completion()).await.unwrap();
        sqlite.sql(damage).await;
        let found = sqlite.store.claim(&request).await;
        let error = found.expect_err(damage);
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{damage}");
    }
}

#[tokio::test]
async fn a_held_record_that_cannot_be_read_hides_no_other() {
    let none = References::default();
    for (damage, resolvable) in [
        ("update idempotency_record set refs = '{'", true),
        ("update idempotency_record set refs = x'ff'", true),
        ("update idempotency_record set attempt = -1", true),
        ("update idempotency_record set claimed_at = 9e999", true),
        ("update idempotency_record set token = x'01'", false),
        ("update idempotency_record set scope = x'ff'", false),
    ] {
        let sqlite = Sqlite::new().await;
        let whole = ClaimRequest {
            identity: Identity::new("acme", "POST /charges", "whole"),
            ..request()
        };
        for (request, damage) in [(request(), damage), (whole, "select 1")] {
            let claim = request.claim(1, SystemTime::UNIX_EPOCH);
            sqlite.store.claim(&request).await.unwrap();
            sqlite.store.hold(&claim, &none).await.unwrap();
            sqlite.sql(damage).await;
        }
        let listed = sqlite.store.list_held(None, 10).await.expect(damage);
        assert_eq!(listed.len(), 1 + usize::from(resolvable), "{damage}");
        for held in listed {
            let free = Resolution::Release;
            let resolved = sqlite.store.resolve(&held.identity, held.token, &free);
            resolved.await.expect(damage);
        }
    }
}

#[tokio::test]
async fn a_page_of_held_records_that_cannot_be_read_is_not_the_end() {
    let sqlite = Sqlite::new().await;
    for key in ["1", "2", "3", "4", "5"] {
        let request = ClaimRequest {
            identity: Identity::new("acme", "POST /charges", key),
            ..request()
        };
        let claim = request.claim(1, SystemTime::UNIX_EPOCH);
        sqlite.store.claim(&request).await.unwrap();
        sqlite
            .store
            .hold(&claim, &References::default())
            .await
            .unwrap();
    }
    let damage = "update idempotency_record set token = x'01'
        where id <> (select max(id) from idempotency_record)";
    sqlite.sql(damage).await;
    for limit in 1..=5 {
        let listed = sqlite.store.list_held(None, limit).await.unwrap();
        assert_eq!(listed.len(), 1, "{limit}");
        let after = Some(listed[0].identity.id());
        assert!(
            sqlite
                .store
                .list_held(after, limit)
                .await
                .unwrap()
                .is_empty()
        );
    }
    assert!(sqlite.store.list_held(None, 0).await.unwrap().is_empty());
}

/// Polls a future up to `polls` times, then drops it; whether it was done before.
async fn cancel_after<F: Future>(polls: usize, future: F) -> bool {
    let mut future = std::pin::pin!(future);
    let mut count = 0;
    std::future::poll_fn(|context| {
        count += 1;
        match future.as_mut().poll(context) {
            std::task::Poll::Ready(_) => std::task::Poll::Ready(true),
            std::task::Poll::Pending if count >= polls => std::task::Poll::Ready(false),
            std::task::Poll::Pending => std::task::Poll::Pending,
        }
    })
    .await
}

#[tokio::test]
async fn a_call_cancelled_at_any_point_leaves_the_store_usable() {
    let sqlite = Sqlite::new().await;
    let store = &sqlite.store;
    for polls in 1..200 {
        let request = ClaimRequest {
            identity: Identity::new("acme", "POST /charges", polls.to_string()),
            ..request()
        };
        let claim = request.claim(1, SystemTime::UNIX_EPOCH);
        let renewal = tower_idempotency::store::LeaseRenewal {
            claim: claim.clone(),
            lease: Duration::from_secs(30),
        };
        let mut done = cancel_after(polls, store.claim(&request)).await;
        store.claim(&request).await.unwrap();
        done &= cancel_after(polls, store.extend(&[renewal.clone(), renewal])).await;
        done &= cancel_after(polls, store.complete(&claim, &completion())).await;
        store.complete(&claim, &completion()).await.unwrap();
        if done {
            assert!(polls > 3, "nothing was cancelled");
            return;
        }
    }
    panic!("the calls never finish");
}

#[tokio::test]
async fn a_file_locked_by_somebody_else_is_waited_for() {
    let sqlite = Sqlite::new().await;
    let mut other = sqlite.pool.acquire().await.unwrap();
    sqlx::raw_sql("begin immediate")
        .execute(&mut *other)
        .await
        .unwrap();
    let store = sqlite.store.clone();
    let claiming = tokio::spawn(async move { store.claim(&request()).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!claiming.is_finished());
    sqlx::raw_sql("commit").execute(&mut *other).await.unwrap();
    let claimed = claiming.await.unwrap().unwrap();
    assert!(matches!(claimed, Claimed::Acquired(_)));
}
