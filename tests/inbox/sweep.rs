//! How long a message is remembered.

use std::time::Duration;

use tower_idempotency::inbox::{InboxSweeper, Once, once};

use super::Fixture;

async fn filled(fixture: &Fixture, count: u32, age: &str) {
    let sql = format!(
        "insert into idempotency.inbox select 'queue', '{age}' || n, now() - interval '{age}'
        from generate_series(1, {count}) as n"
    );
    fixture.execute(&sql).await;
}

#[tokio::test]
async fn h05_a_message_is_remembered_for_longer_than_webhooks_are_repeated() {
    let fixture = Fixture::new().await;
    filled(&fixture, 1, "76 hours").await;
    crate::common::fired::fired("76 hours");
    let sweeper = InboxSweeper::new(fixture.store.clone());
    assert_eq!(sweeper.sweep().await.unwrap(), 0);
    let mut transaction = fixture.pool.begin().await.unwrap();
    let taken = once(&mut transaction, "queue", "76 hours1").await;
    assert_eq!(taken.unwrap(), Once::Duplicate);
}

#[tokio::test]
async fn a_sweep_forgets_what_is_older_than_the_retention_batch_by_batch() {
    let fixture = Fixture::new().await;
    filled(&fixture, 25, "15 days").await;
    filled(&fixture, 25, "13 days").await;
    let sweeper = InboxSweeper::new(fixture.store.clone()).with_batch(10);
    assert_eq!(sweeper.unwrap().sweep().await.unwrap(), 25);
    let left = fixture.number("select count(*) from idempotency.inbox");
    assert_eq!(left.await, 25);
}

#[tokio::test]
async fn a_sweep_keeps_to_the_retention_it_is_given() {
    let fixture = Fixture::new().await;
    filled(&fixture, 2, "13 days").await;
    let sweeper = InboxSweeper::new(fixture.store.clone());
    let sweeper = sweeper.with_retention(Duration::from_secs(24 * 3600));
    assert_eq!(sweeper.unwrap().sweep().await.unwrap(), 2);
}

#[tokio::test]
async fn how_far_an_entity_has_come_is_never_swept() {
    let fixture = Fixture::new().await;
    fixture
        .execute("insert into idempotency.inbox_order values ('queue', 'e', 7, now() - interval '9 years')")
        .await;
    let sweeper = InboxSweeper::new(fixture.store.clone());
    sweeper.sweep().await.unwrap();
    let rows = fixture.number("select count(*) from idempotency.inbox_order");
    assert_eq!(rows.await, 1);
}
