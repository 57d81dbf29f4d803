//! Which attempt it is.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test may panic"
)]

use std::time::Duration;

use tower_idempotency::store::{ClaimRequest, Claimed, Token};
use tower_idempotency::{Fingerprint, Identity, Lost, MemoryStore, Store};

fn request(token: u8, lost: Lost) -> ClaimRequest {
    ClaimRequest {
        identity: Identity::new("s", "o", "k"),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: Token::from_bytes([token; 16]),
        lost,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    }
}

/// A takeover whose caller gave up is released by token; the lost attempt before it is forgotten.
#[tokio::test]
async fn a_takeover_that_is_withdrawn_leaves_the_count_of_attempts() {
    let store = MemoryStore::new();
    store.claim(&request(1, Lost::Rerun)).await.unwrap();
    store.advance(Duration::from_secs(31));
    let Claimed::Acquired(second) = store.claim(&request(2, Lost::Rerun)).await.unwrap() else {
        panic!("not acquired");
    };
    assert_eq!(second.attempt, 2);
    store.release(&second).await.unwrap();
    let Claimed::Acquired(third) = store.claim(&request(3, Lost::Rerun)).await.unwrap() else {
        panic!("not acquired");
    };
    assert!(
        third.attempt > 1,
        "an attempt was lost, and the handler is told that it is the first"
    );
}
