//! A record that was held for longer than its retention.

use std::time::Duration;

use bytes::Bytes;
use tower_idempotency::store::{ClaimRequest, Claimed, Completion, Existing, Token};
use tower_idempotency::{Envelope, Fingerprint, Identity, Lost, MemoryStore, References, Store};

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

/// "The original attempt's late completion wins over hold", and a held record does not expire.
#[tokio::test]
async fn a_late_completion_of_a_record_held_for_longer_than_its_retention_is_replayed() {
    let store = MemoryStore::new();
    let Claimed::Acquired(first) = store.claim(&request(1, Lost::Hold)).await.unwrap() else {
        panic!("not acquired");
    };
    store.advance(Duration::from_secs(31));
    let second = store.claim(&request(2, Lost::Hold)).await.unwrap();
    assert!(matches!(second, Claimed::Existing(Existing::Held)));
    store.advance(Duration::from_secs(3600));
    let completion = Completion {
        answer: Envelope::new(http::Response::new(Bytes::from_static(b"charged"))),
        references: References::default(),
    };
    store.complete(&first, &completion).await.unwrap();
    let third = store.claim(&request(3, Lost::Hold)).await.unwrap();
    assert!(
        matches!(third, Claimed::Existing(Existing::Completed(_))),
        "charged, recorded, and run again: {third:?}"
    );
}
