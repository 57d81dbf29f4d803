//! Rows that somebody else has locked.

use std::time::{Duration, Instant};

use sqlx::AssertSqlSafe;
use tower_idempotency::store::{Claimed, Existing, Renewed};
use tower_idempotency::{PgStore, Store, StoreErrorKind};

use super::{Fixture, acquire, completion, renewal, request, sql};

/// A transaction that has locked one record until it is dropped.
pub(crate) async fn lock(
    fixture: &Fixture,
    key: &str,
) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let mut transaction = fixture.pool.begin().await.unwrap();
    let sql = format!("select 1 from idempotency.record where key = '{key}' for update");
    let done = sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(&mut *transaction)
        .await
        .unwrap();
    assert_eq!(done.rows_affected(), 1);
    crate::common::fired::fired("record lock");
    transaction
}

#[tokio::test]
async fn c13_one_locked_record_does_not_keep_other_leases_from_being_renewed() {
    let fixture = Fixture::new().await;
    let mut due = Vec::new();
    for key in ["a", "b", "c"] {
        due.push(renewal(&acquire(&fixture.store, &request(key)).await));
    }
    let locked = lock(&fixture, "b").await;
    let begun = Instant::now();
    let renewed = fixture.store.extend(&due).await.unwrap();
    assert_eq!(renewed, [Renewed::Kept, Renewed::Busy, Renewed::Kept]);
    assert!(begun.elapsed() < Duration::from_secs(1));
    drop(locked);
    super::until("the lock is gone", async || {
        fixture.store.extend(&due).await.unwrap() == [Renewed::Kept; 3]
    })
    .await;
}

#[tokio::test]
async fn renewals_wait_for_a_lock_in_no_order_that_can_deadlock() {
    let fixture = Fixture::new().await;
    let mut due = Vec::new();
    for n in 0..50 {
        let claim = acquire(&fixture.store, &request(&n.to_string())).await;
        due.push(renewal(&claim));
    }
    let reversed: Vec<_> = due.iter().rev().cloned().collect();
    for _ in 0..20 {
        let (a, b) = tokio::join!(fixture.store.extend(&due), fixture.store.extend(&reversed));
        for renewed in [a.unwrap(), b.unwrap()] {
            assert!(renewed.iter().all(|renewed| *renewed != Renewed::Lost));
        }
    }
}

#[tokio::test]
async fn a_completion_that_waits_for_a_lock_ends_and_is_unavailable() {
    let fixture = Fixture::new().await;
    let claim = acquire(&fixture.store, &request("key")).await;
    let locked = lock(&fixture, "key").await;
    for pooled in [false, true] {
        let builder = PgStore::builder(fixture.pool.clone()).with_pgbouncer(pooled);
        let store = builder.build();
        let begun = Instant::now();
        let refused = store.complete(&claim, &completion()).await.unwrap_err();
        assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
        assert!(begun.elapsed() < Duration::from_secs(4));
    }
    locked.rollback().await.unwrap();
    let store = &fixture.store;
    store.complete(&claim, &completion()).await.unwrap();
}

#[tokio::test]
async fn a_statement_that_takes_too_long_ends_and_is_unavailable() {
    let fixture = Fixture::new().await;
    sql(
        &fixture.pool,
        "create function dawdle() returns trigger language plpgsql as $$
        begin perform pg_sleep(10); return new; end $$;
        create trigger dawdle before insert on idempotency.record
        for each row execute function dawdle()",
    )
    .await;
    let timeout = Duration::from_millis(300);
    for pooled in [false, true] {
        let builder = PgStore::builder(fixture.pool.clone()).with_pgbouncer(pooled);
        let store = builder.with_statement_timeout(timeout).unwrap().build();
        let begun = Instant::now();
        let refused = store.claim(&request("key")).await.unwrap_err();
        assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
        assert!(begun.elapsed() >= timeout && begun.elapsed() < Duration::from_secs(4));
    }
}

/// Keys that somebody's transaction has in its hands: one inserted, one deleted while it ran, and
/// one deleted after it was answered.
async fn undecided(fixture: &Fixture) -> sqlx::Transaction<'static, sqlx::Postgres> {
    for key in ["inserted", "running"] {
        acquire(&fixture.store, &request(key)).await;
    }
    let answered = acquire(&fixture.store, &request("answered")).await;
    let store = &fixture.store;
    store.complete(&answered, &completion()).await.unwrap();
    sql(
        &fixture.pool,
        "create table copy (like idempotency.record including all);
        insert into copy select * from idempotency.record where key = 'inserted';
        delete from idempotency.record where key = 'inserted'",
    )
    .await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let change = sqlx::raw_sql(
        "insert into idempotency.record select * from copy;
        delete from idempotency.record where key <> 'inserted'",
    );
    change.execute(&mut *transaction).await.unwrap();
    transaction
}

#[tokio::test]
async fn a_key_in_somebodys_transaction_is_told_by_what_is_committed() {
    let fixture = Fixture::new().await;
    let transaction = undecided(&fixture).await;
    for pooled in [false, true] {
        let builder = PgStore::builder(fixture.pool.clone()).with_pgbouncer(pooled);
        let store = builder.build();
        for key in ["inserted", "running"] {
            let claimed = store.claim(&request(key)).await.unwrap();
            let running = matches!(claimed, Claimed::Existing(Existing::InProgress { .. }));
            assert!(running, "{key}: {claimed:?}");
        }
        let claimed = store.claim(&request("answered")).await.unwrap();
        let replayed = matches!(claimed, Claimed::Existing(Existing::Completed(_)));
        assert!(replayed, "{claimed:?}");
    }
    transaction.rollback().await.unwrap();
    acquire(&fixture.store, &request("inserted")).await;
}

#[tokio::test]
async fn claims_of_a_key_in_somebodys_transaction_do_not_hold_up_other_keys() {
    let fixture = Fixture::new().await;
    let transaction = undecided(&fixture).await;
    let mut claims = tokio::task::JoinSet::new();
    for key in ["inserted", "running"].repeat(16) {
        let store = fixture.store.clone();
        claims.spawn(async move { store.claim(&request(key)).await });
    }
    super::until("claims wait", async || {
        super::backends(&fixture.pool, "wait_event_type = 'Lock'").await > 0
    })
    .await;
    let other = request("other");
    let other = tokio::time::timeout(Duration::from_secs(2), fixture.store.claim(&other));
    let other = other.await.expect("in time").unwrap();
    assert!(matches!(other, Claimed::Acquired(_)), "{other:?}");
    let claimed = claims.join_all().await;
    assert!(claimed.iter().all(Result::is_ok), "{claimed:?}");
    transaction.rollback().await.unwrap();
}

#[tokio::test]
async fn completions_of_a_locked_record_do_not_hold_up_other_keys() {
    let fixture = Fixture::new().await;
    let claim = acquire(&fixture.store, &request("key")).await;
    let locked = lock(&fixture, "key").await;
    let mut completions = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (store, claim) = (fixture.store.clone(), claim.clone());
        completions.spawn(async move { store.complete(&claim, &completion()).await });
    }
    super::until("completions wait", async || {
        super::backends(&fixture.pool, "wait_event_type = 'Lock'").await > 0
    })
    .await;
    let other = request("other");
    let other = tokio::time::timeout(Duration::from_secs(2), fixture.store.claim(&other));
    other.await.expect("in time").unwrap();
    for refused in completions.join_all().await {
        assert_eq!(refused.unwrap_err().kind(), StoreErrorKind::Unavailable);
    }
    locked.rollback().await.unwrap();
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused_by_name() {
    let fixture = Fixture::new().await;
    let builder = || PgStore::builder(fixture.pool.clone());
    let too_short = Duration::from_micros(999);
    let too_long = Duration::from_secs(24 * 3600 + 1);
    for timeout in [Duration::ZERO, too_short, too_long] {
        let refused = builder().with_statement_timeout(timeout).unwrap_err();
        assert_eq!(refused.field(), "statement_timeout");
    }
    let refused = builder().with_max_connections(0).unwrap_err();
    assert_eq!(refused.field(), "max_connections");
}

#[tokio::test]
async fn a_sweep_passes_over_records_that_are_locked() {
    let fixture = Fixture::new().await;
    for key in ["a", "b"] {
        let claim = acquire(&fixture.store, &request(key)).await;
        fixture.store.complete(&claim, &completion()).await.unwrap();
    }
    sql(
        &fixture.pool,
        "update idempotency.record set expires_at = now(), sweep_at = now()",
    )
    .await;
    let locked = lock(&fixture, "a").await;
    let sweep = tokio::time::timeout(Duration::from_secs(3), fixture.store.delete_expired(10));
    assert_eq!(sweep.await.unwrap().unwrap().deleted, 1);
    locked.rollback().await.unwrap();
    assert_eq!(fixture.store.delete_expired(10).await.unwrap().deleted, 1);
}

/// Two claims of one key in transactions that overlap: the second finds the row only once the first
/// has committed, and a statement that both inserts and reads would see neither.
#[tokio::test]
async fn c5_a_claim_that_waited_for_another_insert_sees_its_record() {
    let fixture = Fixture::new().await;
    let first = request("key");
    let mut transaction = fixture.pool.begin().await.unwrap();
    sql(
        &fixture.pool,
        "create table copy (like idempotency.record including all)",
    )
    .await;
    acquire(&fixture.store, &first).await;
    sql(
        &fixture.pool,
        "insert into copy select * from idempotency.record; delete from idempotency.record",
    )
    .await;
    let insert = sqlx::raw_sql("insert into idempotency.record select * from copy");
    insert.execute(&mut *transaction).await.unwrap();

    // The sessions of the application wait for as long as it takes.
    let builder = PgStore::builder(fixture.database.pool(1).await);
    let (store, second) = (builder.with_shared_pool(true).build(), request("key"));
    let waiting = tokio::spawn(async move { store.claim(&second).await });
    super::until("the second claim waits", async || {
        super::backends(&fixture.pool, "wait_event_type = 'Lock'").await == 1
    })
    .await;
    transaction.commit().await.unwrap();
    let claimed = waiting.await.unwrap().unwrap();
    assert!(matches!(claimed, Claimed::Existing(_)), "{claimed:?}");
}

/// Commits of these records take a while.
const SLOW_COMMIT: &str = "
create function dawdle() returns trigger language plpgsql as $$
begin perform pg_sleep(1.5); return null; end $$;
create constraint trigger dawdle after insert or update on idempotency.record
deferrable initially deferred for each row execute function dawdle()";

/// Nobody sees a claim that is being committed; a release that took it for absent would leave it to its
/// lease.
async fn a_claim_that_is_being_committed_is_released(fixture: &Fixture, store: PgStore) {
    let late = request("key");
    let claim = super::claim_of(&late);
    let claiming = store.clone();
    let claimed = tokio::spawn(async move { claiming.claim(&late).await });
    super::until("the commit takes long", async || {
        super::backends(&fixture.pool, "wait_event = 'PgSleep'").await == 1
    })
    .await;
    let refused = store.release(&claim).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
    super::until("it is released", async || {
        store.release(&claim).await.is_ok()
    })
    .await;
    let claimed = claimed.await.unwrap().unwrap();
    assert!(matches!(claimed, Claimed::Acquired(_)), "{claimed:?}");
    let records = "select count(*) from idempotency.record";
    assert_eq!(super::number(&fixture.pool, records).await, 0);
}

#[tokio::test]
async fn a_claim_that_is_being_committed_is_not_taken_for_absent() {
    let fixture = Fixture::new().await;
    sql(&fixture.pool, SLOW_COMMIT).await;
    for group in [false, true] {
        let store = PgStore::builder(fixture.pool.clone()).with_group_commit(group);
        a_claim_that_is_being_committed_is_released(&fixture, store.build()).await;
    }
}

#[tokio::test]
async fn a_takeover_that_is_being_committed_is_not_taken_for_lost() {
    let fixture = Fixture::new().await;
    acquire(&fixture.store, &request("key")).await;
    let late = "update idempotency.record set leased_until = now()";
    sql(&fixture.pool, late).await;
    sql(&fixture.pool, SLOW_COMMIT).await;
    a_claim_that_is_being_committed_is_released(&fixture, fixture.store.clone()).await;
}
