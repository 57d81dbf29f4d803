//! A completion that the store can never write.
use std::time::Duration;

use bytes::Bytes;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use tower_idempotency::store::{ClaimRequest, Claimed, Completion, Token};
use tower_idempotency::{
    Envelope, Fingerprint, IdempotencyLayer, Identity, Lost, MemoryStore, Policy, References,
    Scope, SqliteStore, Store, StoreErrorKind,
};

#[tokio::test]
async fn an_answer_within_the_largest_response_limit_can_be_stored() {
    let limit = 1 << 30;
    let policy = Policy::high().with_response_limit(limit);
    let layer = IdempotencyLayer::new(MemoryStore::new(), Scope::global());
    if layer.with_policy(policy).is_err() {
        return;
    }
    let path = std::env::temp_dir().join(format!("idempotency-size-{}.db", std::process::id()));
    let file = SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true);
    let store = SqliteStore::new(SqlitePoolOptions::new().connect_with(file).await.unwrap());
    store.migrate().await.unwrap();
    let request = ClaimRequest {
        identity: Identity::new("s", "o", "k"),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: Token::from_bytes([1; 16]),
        lost: Lost::Hold,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    };
    let Claimed::Acquired(claim) = store.claim(&request).await.unwrap() else {
        panic!("not acquired");
    };
    let completion = Completion {
        answer: Envelope::new(http::Response::new(Bytes::from(vec![0; 1_000_000_100]))),
        references: References::default(),
    };
    let error = store.complete(&claim, &completion).await.err();
    std::fs::remove_file(&path).unwrap();
    if let Some(error) = error {
        // The layer writes again for as long as the store is unavailable.
        assert_ne!(error.kind(), StoreErrorKind::Unavailable, "{error:?}");
    }
}
