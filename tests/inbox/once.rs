//! Messages that are told apart by their ids.

use tokio::task::JoinSet;
use tower_idempotency::inbox::{InboxErrorKind, Once, once};

use crate::common::fired::fired;

use super::{Fixture, effect};

/// One delivery, as a consumer handles it.
async fn deliver(pool: sqlx::PgPool, source: &'static str, id: &'static str) -> Once {
    let mut transaction = pool.begin().await.unwrap();
    let taken = once(&mut transaction, source, id).await.unwrap();
    if taken == Once::First {
        effect(&mut transaction, 1).await;
    }
    transaction.commit().await.unwrap();
    taken
}

#[tokio::test]
async fn t9_two_deliveries_at_once_have_one_effect_and_the_other_is_a_duplicate() {
    let fixture = Fixture::new().await;
    let mut first = fixture.pool.begin().await.unwrap();
    assert_eq!(once(&mut first, "queue", "m1").await.unwrap(), Once::First);
    effect(&mut first, 1).await;
    let second = tokio::spawn(deliver(fixture.pool.clone(), "queue", "m1"));
    fixture.somebody_waits().await;
    first.commit().await.unwrap();
    assert_eq!(second.await.unwrap(), Once::Duplicate);
    assert_eq!(fixture.effects().await, 1);
}

#[tokio::test]
async fn the_second_delivery_runs_when_the_first_was_rolled_back() {
    let fixture = Fixture::new().await;
    let mut first = fixture.pool.begin().await.unwrap();
    assert_eq!(once(&mut first, "queue", "m1").await.unwrap(), Once::First);
    effect(&mut first, 1).await;
    let second = tokio::spawn(deliver(fixture.pool.clone(), "queue", "m1"));
    fixture.somebody_waits().await;
    first.rollback().await.unwrap();
    assert_eq!(second.await.unwrap(), Once::First);
    assert_eq!(fixture.effects().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h01_a_hundred_deliveries_at_once_have_one_effect() {
    let fixture = Fixture::new().await;
    let mut deliveries = JoinSet::new();
    for _ in 0..100 {
        deliveries.spawn(deliver(fixture.pool.clone(), "queue", "m1"));
    }
    let taken = deliveries.join_all().await;
    fired("deliveries at once");
    let firsts = taken.iter().filter(|taken| **taken == Once::First).count();
    assert_eq!((firsts, fixture.effects().await), (1, 1));
}

#[tokio::test]
async fn h02_a_crash_before_the_commit_leaves_the_message_to_the_next_delivery() {
    let fixture = Fixture::new().await;
    let mut crashed = fixture.pool.begin().await.unwrap();
    assert_eq!(
        once(&mut crashed, "queue", "m1").await.unwrap(),
        Once::First
    );
    effect(&mut crashed, 1).await;
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(&mut *crashed)
        .await
        .unwrap();
    fixture
        .execute(&format!("select pg_terminate_backend({pid})"))
        .await;
    fired("backend ends");
    let again = deliver(fixture.pool.clone(), "queue", "m1").await;
    assert_eq!(again, Once::First);
    drop(crashed);
    // Acknowledged too late: the effect has been committed.
    let again = deliver(fixture.pool.clone(), "queue", "m1").await;
    assert_eq!(again, Once::Duplicate);
    assert_eq!(fixture.effects().await, 1);
}

#[tokio::test]
async fn one_id_of_two_sources_is_two_messages() {
    let fixture = Fixture::new().await;
    for source in ["stripe", "adyen"] {
        let taken = deliver(fixture.pool.clone(), source, "m1").await;
        assert_eq!(taken, Once::First);
    }
}

#[tokio::test]
async fn a_connection_outside_a_transaction_is_refused() {
    let fixture = Fixture::new().await;
    let mut connection = fixture.pool.acquire().await.unwrap();
    let refused = once(&mut connection, "queue", "m1").await.unwrap_err();
    assert_eq!(refused.kind(), InboxErrorKind::NotInTransaction);
    let rows = "select count(*) from idempotency.inbox";
    assert_eq!(fixture.number(rows).await, 0);
}

#[tokio::test]
async fn an_id_over_its_limit_is_refused_with_both_numbers() {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let refused = once(&mut transaction, "queue", &"m".repeat(256)).await;
    assert_eq!(
        refused.unwrap_err().to_string(),
        "message id must be 1 to 255 bytes without control characters, and has 256"
    );
    let longest = once(&mut transaction, &"s".repeat(255), &"m".repeat(255)).await;
    assert_eq!(longest.unwrap(), Once::First);
}

#[tokio::test]
async fn an_empty_source_is_refused() {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let refused = once(&mut transaction, "", "m1").await.unwrap_err();
    let name = InboxErrorKind::Name {
        field: "source",
        max: 255,
        len: 0,
    };
    assert_eq!(refused.kind(), name);
}

#[tokio::test]
async fn under_a_stricter_isolation_the_second_delivery_fails_and_has_no_effect() {
    let fixture = Fixture::new().await;
    let begin = "begin isolation level repeatable read";
    let mut late = fixture.pool.begin_with(begin).await.unwrap();
    sqlx::query("select count(*) from effect")
        .execute(&mut *late)
        .await
        .unwrap();
    let first = deliver(fixture.pool.clone(), "queue", "m1").await;
    assert_eq!(first, Once::First);
    let failed = once(&mut late, "queue", "m1").await.unwrap_err();
    assert_eq!(failed.kind(), InboxErrorKind::Database);
    late.rollback().await.unwrap();
    assert_eq!(fixture.effects().await, 1);
}

#[tokio::test]
async fn a_service_needs_the_rights_that_the_readme_says_and_no_more() {
    let fixture = Fixture::new().await;
    let pool = fixture.database.service_pool(1).await;
    fixture
        .execute("grant insert on effect to ti_test_service")
        .await;
    assert_eq!(deliver(pool.clone(), "queue", "m1").await, Once::First);
    assert_eq!(deliver(pool, "queue", "m1").await, Once::Duplicate);
    assert_eq!(fixture.effects().await, 1);
}
