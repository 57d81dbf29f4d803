//! Group commit: the same rules where no statement ever travels alone, and where each does.

use std::time::{Duration, SystemTime};

use tower_idempotency::store::conformance::Subject;
use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, RecordSummary,
    Renewed, Resolution, Swept, Token, Within,
};
use tower_idempotency::{
    Envelope, Fingerprint, Identity, Lost, PgStore, RecordId, References, Store, StoreError,
};

use super::postgres::Postgres;

/// A store whose every statement shares one with those of strangers, who leave nothing behind. On a
/// runtime of one thread, what is asked for at once is queued before a writer looks.
pub struct Crowd(PgStore);

fn stranger() -> ClaimRequest {
    let token = Token::random().unwrap();
    ClaimRequest {
        identity: Identity::new(
            "strangers",
            "POST /strange",
            format!("{:?}", token.as_bytes()),
        ),
        fingerprint: Fingerprint::of_bytes(b"strange"),
        token,
        lost: Lost::Rerun,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    }
}

fn unknown_claim() -> Claim {
    stranger().claim(1, SystemTime::UNIX_EPOCH)
}

impl Crowd {
    async fn stranger_claims(&self) {
        let request = stranger();
        let claimed = self.0.claim(&request).await.unwrap();
        let Claimed::Acquired(claim) = claimed else {
            panic!("a stranger got {claimed:?}");
        };
        self.0.release(&claim).await.unwrap();
    }

    async fn stranger_looks(&self) {
        let request = stranger();
        let found = self.0.lookup(&request.identity, &request.fingerprint);
        assert!(found.await.unwrap().is_none());
    }

    async fn stranger_completes(&self) {
        let completion = Completion {
            answer: Envelope::new(http::Response::new("strange".into())),
            references: References::default(),
        };
        let refused = self.0.complete(&unknown_claim(), &completion).await;
        assert!(refused.is_err());
    }

    async fn stranger_releases(&self) {
        self.0.release(&unknown_claim()).await.unwrap();
    }
}

impl Store for Crowd {
    fn is_durable(&self) -> bool {
        self.0.is_durable()
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        let (claimed, ..) = tokio::join!(
            self.0.claim(request),
            self.stranger_claims(),
            self.stranger_looks(),
            self.stranger_claims(),
        );
        claimed
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        let (_, completed, ..) = tokio::join!(
            self.stranger_completes(),
            self.0.complete(claim, completion),
            self.stranger_completes(),
            self.stranger_claims(),
        );
        completed
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        let (_, released, ..) = tokio::join!(
            self.stranger_releases(),
            self.0.release(claim),
            self.stranger_releases(),
            self.stranger_looks(),
        );
        released
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        self.0.hold(claim, references).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        self.0.extend(leases).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        let (_, found, _) = tokio::join!(
            self.stranger_looks(),
            self.0.lookup(identity, fingerprint),
            self.stranger_looks(),
        );
        found
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.0.resolve(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        self.0.list_held(after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        self.0.inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        let found = self.0.find_by_reference(within, kind, id, after, limit);
        found.await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.0.delete_expired(limit).await
    }
}

struct Crowded {
    postgres: Postgres,
    crowd: Crowd,
}

impl Crowded {
    async fn new() -> Self {
        let postgres = Postgres::new().await;
        let crowd = Crowd(postgres.store().clone());
        Self { postgres, crowd }
    }
}

impl Subject for Crowded {
    type Store = Crowd;

    fn store(&self) -> &Crowd {
        &self.crowd
    }

    async fn age(&self, by: Duration) {
        self.postgres.age(by).await;
    }
}

/// Without group commit.
struct Single {
    postgres: Postgres,
    store: PgStore,
}

impl Single {
    async fn new() -> Self {
        let postgres = Postgres::new().await;
        let builder = PgStore::builder(postgres.pool.clone());
        let store = builder.with_group_commit(false).build();
        Self { postgres, store }
    }
}

impl Subject for Single {
    type Store = PgStore;

    fn store(&self) -> &PgStore {
        &self.store
    }

    async fn age(&self, by: Duration) {
        self.postgres.age(by).await;
    }
}

mod together {
    tower_idempotency::conformance_tests!(super::Crowded::new().await);
}

mod alone {
    tower_idempotency::conformance_tests!(super::Single::new().await);
}
