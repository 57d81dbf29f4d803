//! Renewals of two attempts of one operation in one call.

use std::time::Duration;

use crate::common::database::TestDatabase;
use tower_idempotency::store::{ClaimRequest, Claimed, LeaseRenewal, Renewed, Token};
use tower_idempotency::{Fingerprint, Identity, Lost, MemoryStore, PgStore, Store};

async fn renewed(store: &impl Store) -> Vec<Renewed> {
    let request = |token: u8| ClaimRequest {
        identity: Identity::new("s", "o", "k"),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: Token::from_bytes([token; 16]),
        lost: Lost::Rerun,
        lease: Duration::from_millis(100),
        ttl: Duration::from_secs(3600),
    };
    let mut leases = Vec::new();
    for token in [1, 2] {
        let Claimed::Acquired(claim) = store.claim(&request(token)).await.unwrap() else {
            panic!("not acquired");
        };
        leases.push(LeaseRenewal {
            claim,
            lease: Duration::from_secs(30),
        });
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    store.extend(&leases).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lost_one_is_told_so() {
    let expected = [Renewed::Lost, Renewed::Kept];
    assert_eq!(renewed(&MemoryStore::new()).await, expected);
    let database = TestDatabase::create().await;
    let store = PgStore::new(database.pool(2).await);
    store.migrate().await.unwrap();
    assert_eq!(renewed(&store).await, expected);
}
