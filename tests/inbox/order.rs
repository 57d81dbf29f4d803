//! Messages that are numbered.

use tokio::task::JoinSet;
use tower_idempotency::inbox::{InOrder, InboxErrorKind, forget, in_order, start_at};

use super::{Fixture, effect};

/// One delivery, as a consumer handles it.
async fn deliver(pool: sqlx::PgPool, entity: &'static str, n: i64) -> InOrder {
    let mut transaction = pool.begin().await.unwrap();
    let place = in_order(&mut transaction, "queue", entity, n).await;
    let place = place.unwrap();
    if place == InOrder::Next {
        effect(&mut transaction, n).await;
    }
    transaction.commit().await.unwrap();
    place
}

#[tokio::test]
async fn messages_take_effect_in_the_order_of_their_numbers() {
    let fixture = Fixture::new().await;
    let deliver = |n| deliver(fixture.pool.clone(), "e", n);
    let gap = |expected, found| InOrder::Gap { expected, found };
    assert_eq!(deliver(2).await, gap(1, 2));
    assert_eq!(deliver(1).await, InOrder::Next);
    assert_eq!(deliver(1).await, InOrder::Stale);
    assert_eq!(deliver(4).await, gap(2, 4));
    assert_eq!(deliver(2).await, InOrder::Next);
    assert_eq!(deliver(3).await, InOrder::Next);
    assert_eq!(deliver(2).await, InOrder::Stale);
    assert_eq!(fixture.effects().await, 3);
}

#[tokio::test]
async fn entities_are_numbered_apart() {
    let fixture = Fixture::new().await;
    for entity in ["a", "b"] {
        let place = deliver(fixture.pool.clone(), entity, 1).await;
        assert_eq!(place, InOrder::Next);
    }
}

#[tokio::test]
async fn what_was_rolled_back_was_not_taken_in() {
    let fixture = Fixture::new().await;
    for n in [1, 2] {
        let mut transaction = fixture.pool.begin().await.unwrap();
        let place = in_order(&mut transaction, "queue", "e", n).await.unwrap();
        assert_eq!(place, InOrder::Next);
        transaction.rollback().await.unwrap();
        let place = deliver(fixture.pool.clone(), "e", n).await;
        assert_eq!(place, InOrder::Next);
    }
}

#[tokio::test]
async fn a_delivery_waits_for_its_predecessor_to_commit() {
    let fixture = Fixture::new().await;
    let place = deliver(fixture.pool.clone(), "e", 1).await;
    assert_eq!(place, InOrder::Next);
    let mut second = fixture.pool.begin().await.unwrap();
    let place = in_order(&mut second, "queue", "e", 2).await.unwrap();
    assert_eq!(place, InOrder::Next);
    // Looks for its predecessor, and finds it locked.
    let third = tokio::spawn(deliver(fixture.pool.clone(), "e", 3));
    fixture.somebody_waits().await;
    second.commit().await.unwrap();
    assert_eq!(third.await.unwrap(), InOrder::Next);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_deliveries_at_once_have_one_effect_each_in_order() {
    let fixture = Fixture::new().await;
    let mut consumers = JoinSet::new();
    for _ in 0..8 {
        let pool = fixture.pool.clone();
        consumers.spawn(async move {
            for n in 1..=20 {
                while let InOrder::Gap { .. } = deliver(pool.clone(), "e", n).await {}
            }
        });
    }
    consumers.join_all().await;
    let in_order = "select count(*) from (
            select n, row_number() over (order by ctid) as place from effect
        ) as effect where n = place";
    assert_eq!(fixture.number(in_order).await, 20);
    assert_eq!(fixture.effects().await, 20);
}

#[tokio::test]
async fn a_numbering_begins_where_it_is_said_to() {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    start_at(&mut transaction, "queue", "e", 500).await.unwrap();
    transaction.commit().await.unwrap();
    let place = deliver(fixture.pool.clone(), "e", 499).await;
    assert_eq!(place, InOrder::Stale);
    let place = deliver(fixture.pool.clone(), "e", 500).await;
    assert_eq!(place, InOrder::Next);
}

#[tokio::test]
async fn an_entity_that_was_forgotten_begins_anew() {
    let fixture = Fixture::new().await;
    let place = deliver(fixture.pool.clone(), "e", 1).await;
    assert_eq!(place, InOrder::Next);
    let mut transaction = fixture.pool.begin().await.unwrap();
    forget(&mut transaction, "queue", "e").await.unwrap();
    transaction.commit().await.unwrap();
    let place = deliver(fixture.pool.clone(), "e", 1).await;
    assert_eq!(place, InOrder::Next);
}

#[tokio::test]
async fn a_number_below_one_is_refused() {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let refused = in_order(&mut transaction, "queue", "e", 0).await;
    assert_eq!(refused.unwrap_err().kind(), InboxErrorKind::Sequence);
}

#[tokio::test]
async fn the_largest_number_is_taken() {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let last = i64::MAX;
    start_at(&mut transaction, "queue", "e", last)
        .await
        .unwrap();
    let place = in_order(&mut transaction, "queue", "e", last).await;
    assert_eq!(place.unwrap(), InOrder::Next);
    let place = in_order(&mut transaction, "queue", "e", last).await;
    assert_eq!(place.unwrap(), InOrder::Stale);
}

#[tokio::test]
async fn a_connection_outside_a_transaction_is_refused() {
    let fixture = Fixture::new().await;
    let mut connection = fixture.pool.acquire().await.unwrap();
    let refused = in_order(&mut connection, "queue", "e", 1).await;
    assert_eq!(
        refused.unwrap_err().kind(),
        InboxErrorKind::NotInTransaction
    );
}
