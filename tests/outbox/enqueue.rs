//! What is written, and what is refused.

use tower_idempotency::outbox::{self, Limit, Message, OPERATION_HEADER, OutboxErrorKind};

use super::{Fixture, Recorder, message};

const GRACE: std::time::Duration = std::time::Duration::from_secs(20);

#[tokio::test]
async fn g01_what_was_rolled_back_is_never_published() {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let lost = outbox::enqueue(&mut transaction, message("a", 1)).await;
    transaction.rollback().await.unwrap();
    crate::common::fired::fired("rollback");
    let kept = fixture.commit(message("a", 2)).await;

    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_ne!(lost.unwrap(), kept);
    assert_eq!(recorder.ids(), [kept]);
}

#[tokio::test]
async fn a_message_keeps_every_part_of_it() {
    let fixture = Fixture::new().await;
    let message = Message::new(
        "charge.created",
        &serde_json::json!({"z": 1, "a": "ü\u{0}"}),
    )
    .with_aggregate("charge", "ch_1")
    .with_partition_key("account-7")
    .with_header("schema-version", "1");
    let id = fixture.commit(message).await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let published = &recorder.published()[0];
    assert_eq!(published.id(), id);
    assert_eq!(published.topic(), "charge.created");
    assert_eq!(published.aggregate_type(), "charge");
    assert_eq!(published.aggregate_id(), "ch_1");
    assert_eq!(published.partition_key(), "account-7");
    assert_eq!(published.payload(), r#"{"a":"ü\u0000","z":1}"#);
    assert_eq!(
        published.headers().collect::<Vec<_>>(),
        [("schema-version", "1")]
    );
    assert_eq!(published.attempt(), 1);
}

#[tokio::test]
async fn the_operation_that_wrote_a_message_travels_in_its_headers() {
    let fixture = Fixture::new().await;
    let operation = "8e03978e-40d5-43dd-bc93-6894a57f9324";
    let mut transaction = fixture.pool.begin().await.unwrap();
    sqlx::query("select set_config('idempotency.identity', $1, true)")
        .bind(operation)
        .execute(&mut *transaction)
        .await
        .unwrap();
    let enqueued = outbox::enqueue(&mut transaction, message("a", 1)).await;
    enqueued.unwrap();
    transaction.commit().await.unwrap();

    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let published = &recorder.published()[0];
    let headers: Vec<_> = published.headers().collect();
    assert_eq!(headers, [(OPERATION_HEADER, operation)]);
    assert_eq!(published.operation().unwrap().to_string(), operation);
}

#[tokio::test]
async fn ids_are_uuids_of_version_7() {
    let fixture = Fixture::new().await;
    let id = fixture.commit(message("a", 1)).await.to_string();
    assert_eq!(&id[14..15], "7", "{id}");
    assert!("89ab".contains(&id[19..20]), "{id}");
}

#[tokio::test]
async fn the_columns_are_those_of_debeziums_router() {
    let fixture = Fixture::new().await;
    fixture.commit(Message::new("ping", &1)).await;
    // Of a message about nothing else, the message is the aggregate.
    let same = "select count(*) from idempotency.outbox
        where aggregatetype = 'ping' and aggregateid = id::text and type = 'ping' and payload::text = '1'";
    assert_eq!(fixture.number(same).await, 1);
}

#[tokio::test]
async fn a_connection_outside_a_transaction_is_refused() {
    let fixture = Fixture::new().await;
    let mut connection = fixture.pool.acquire().await.unwrap();
    let refused = outbox::enqueue(&mut connection, message("a", 1)).await;
    let kind = refused.unwrap_err().kind();
    assert_eq!(kind, OutboxErrorKind::NotInTransaction);
    let rows = "select count(*) from idempotency.outbox";
    assert_eq!(fixture.number(rows).await, 0);
}

async fn refused(message: Message) -> String {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let error = outbox::enqueue(&mut transaction, message).await;
    let error = error.unwrap_err();
    assert!(matches!(error.kind(), OutboxErrorKind::Invalid { .. }));
    // The transaction is as good as before.
    fixture.commit(super::message("a", 1)).await;
    let more = outbox::enqueue(&mut transaction, super::message("b", 1)).await;
    more.unwrap();
    transaction.commit().await.unwrap();
    error.to_string()
}

#[tokio::test]
async fn a_payload_over_its_limit_is_refused_with_both_numbers() {
    let large = Message::new("topic", &"x".repeat(100)).with_max_payload(100);
    let text = refused(large).await;
    assert_eq!(text, "payload must be 1 to 100 bytes, not 102");
}

#[tokio::test]
async fn the_limit_of_a_payload_is_256_kib() {
    let fixture = Fixture::new().await;
    fixture
        .commit(Message::new("topic", &"x".repeat(256 * 1024 - 2)))
        .await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let larger = Message::new("topic", &"x".repeat(256 * 1024 - 1));
    let error = outbox::enqueue(&mut transaction, larger).await.unwrap_err();
    let expected = OutboxErrorKind::Invalid {
        field: "payload",
        limit: Limit::Length(256 * 1024),
        len: 256 * 1024 + 1,
    };
    assert_eq!(error.kind(), expected);
}

#[tokio::test]
async fn a_topic_with_spaces_is_refused() {
    let text = refused(Message::new("charge created", &1)).await;
    assert_eq!(text, "topic has characters it may not have");
}

#[tokio::test]
async fn a_reserved_header_is_refused() {
    let text = refused(Message::new("topic", &1).with_header("content-length", "3")).await;
    assert_eq!(text, "header name is reserved");
}

#[tokio::test]
async fn a_header_that_breaks_its_line_is_refused() {
    let text = refused(Message::new("topic", &1).with_header("a", "b\r\nc: d")).await;
    assert_eq!(text, "header value has characters it may not have");
}

#[tokio::test]
async fn a_partition_key_over_its_limit_is_refused() {
    let text = refused(Message::new("topic", &1).with_partition_key("k".repeat(513))).await;
    assert_eq!(text, "partition key must be 1 to 512 bytes, not 513");
}

#[tokio::test]
async fn the_longest_partition_key_is_taken() {
    let fixture = Fixture::new().await;
    let key: String = (0..128)
        .map(|n| char::from_u32(0x1f300 + n).unwrap())
        .collect();
    assert_eq!(key.len(), 512);
    fixture
        .commit(Message::new("topic", &1).with_partition_key(key))
        .await;
}

#[tokio::test]
async fn a_payload_that_is_no_json_is_refused() {
    let fixture = Fixture::new().await;
    let mut transaction = fixture.pool.begin().await.unwrap();
    let map = std::collections::BTreeMap::from([(vec![1], 1)]);
    let error = outbox::enqueue(&mut transaction, Message::new("topic", &map)).await;
    assert_eq!(error.unwrap_err().kind(), OutboxErrorKind::Payload);
}
