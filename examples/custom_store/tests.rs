//! Every rule of a store, run against this one, and what the suite says when one is broken.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::atomic::{AtomicU32, Ordering};

use axum::body::Bytes;
use tower_idempotency::StoreErrorKind;
use tower_idempotency::store::conformance::{Subject, completing};

use super::*;

mod rules {
    tower_idempotency::conformance_tests!(super::TestFile::new().subject());
}

/// A directory of its own for each test.
struct TestFile(PathBuf);

impl TestFile {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("custom-store-test-{}-{count}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(&directory).unwrap();
        Self(directory)
    }

    fn journal(&self) -> PathBuf {
        self.0.join("records.jsonl")
    }

    fn open(&self) -> FileStore {
        FileStore::open(&self.journal(), 10_000).unwrap()
    }

    fn subject(self) -> OwnFile {
        let store = self.open();
        OwnFile { store, _file: self }
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

struct OwnFile {
    store: FileStore,
    _file: TestFile,
}

impl FileStore {
    fn advance(&self, by: Duration) {
        let mut table = self.0.lock().unwrap();
        table.ahead += millis(by);
    }
}

impl Subject for OwnFile {
    type Store = FileStore;

    fn store(&self) -> &FileStore {
        &self.store
    }

    async fn age(&self, by: Duration) {
        self.store.advance(by);
    }
}

fn request(key: &str) -> ClaimRequest {
    ClaimRequest {
        identity: Identity::new("acme", "POST /charges", key),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: Token::random().unwrap(),
        lost: Lost::Rerun,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    }
}

async fn answer(store: &FileStore, request: &ClaimRequest) {
    let Claimed::Acquired(claim) = store.claim(request).await.unwrap() else {
        panic!("expected an absent record");
    };
    let completion = Completion {
        answer: Envelope::new(axum::http::Response::new(Bytes::from_static(b"paid"))),
        references: References::default(),
    };
    store.complete(&claim, &completion).await.unwrap();
}

#[tokio::test]
async fn an_answer_is_found_again_after_the_file_is_opened_again() {
    let file = TestFile::new();
    answer(&file.open(), &request("k")).await;
    let found = file.open().claim(&request("k")).await.unwrap();
    assert!(matches!(found, Claimed::Existing(Existing::Completed(_))));
}

#[tokio::test]
async fn a_line_that_was_cut_off_is_as_if_it_was_never_written() {
    let file = TestFile::new();
    answer(&file.open(), &request("k")).await;
    let text = fs::read(file.journal()).unwrap();
    let first = text.iter().position(|b| *b == b'\n').unwrap();
    fs::write(file.journal(), &text[..first + 20]).unwrap();
    let found = file.open().claim(&request("k")).await.unwrap();
    assert!(matches!(
        found,
        Claimed::Existing(Existing::InProgress { .. })
    ));
}

#[tokio::test]
async fn a_second_store_of_the_same_file_is_refused() {
    let file = TestFile::new();
    let _first = file.open();
    assert!(FileStore::open(&file.journal(), 1).is_err());
}

#[tokio::test]
async fn a_full_store_refuses_claims_and_keeps_its_records() {
    let file = TestFile::new();
    let store = FileStore::open(&file.journal(), 1).unwrap();
    answer(&store, &request("k")).await;
    let refused = store.claim(&request("other")).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
    assert!(matches!(
        store.claim(&request("k")).await,
        Ok(Claimed::Existing(_))
    ));
}

#[tokio::test]
async fn a_journal_of_old_lines_is_rewritten_and_loses_nothing() {
    let file = TestFile::new();
    let store = file.open();
    answer(&store, &request("kept")).await;
    let Claimed::Acquired(claim) = store.claim(&request("k")).await.unwrap() else {
        panic!("expected an absent record");
    };
    let lease = Duration::from_secs(30);
    let renewals = vec![LeaseRenewal { claim, lease }; 500];
    for _ in 0..4 {
        store.extend(&renewals).await.unwrap();
    }
    let lines = fs::read_to_string(file.journal()).unwrap().lines().count();
    assert!(lines < 1_600, "{lines}");
    drop(store);
    let found = file.open().claim(&request("kept")).await.unwrap();
    assert!(matches!(found, Claimed::Existing(Existing::Completed(_))));
}

/// The same store with one mistake: it forgets what the handler noted.
struct Forgetful(OwnFile);

impl Subject for Forgetful {
    type Store = Self;

    fn store(&self) -> &Self {
        self
    }

    async fn age(&self, by: Duration) {
        self.0.age(by).await;
    }
}

impl Store for Forgetful {
    fn is_durable(&self) -> bool {
        self.0.store.is_durable()
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        self.0.store.claim(request).await
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        let forgetful = Completion {
            references: References::default(),
            ..completion.clone()
        };
        self.0.store.complete(claim, &forgetful).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        self.0.store.release(claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        self.0.store.hold(claim, references).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        self.0.store.extend(leases).await
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        self.0.store.lookup(identity, fingerprint).await
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.0.store.resolve(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        self.0.store.list_held(after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        self.0.store.inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        self.0
            .store
            .find_by_reference(within, kind, id, after, limit)
            .await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        self.0.store.delete_expired(limit).await
    }
}

/// Runs the rules of a module, and says which are broken.
macro_rules! broken_rules {
    ($($rule:ident)*) => {{
        let mut broken = Vec::new();
        $(
            let rule = tokio::spawn(completing::$rule(Forgetful(TestFile::new().subject())));
            if rule.await.is_err() {
                broken.push(stringify!($rule));
            }
        )*
        broken
    }};
}

#[tokio::test]
async fn a_store_that_breaks_a_rule_is_told_which() {
    let broken = broken_rules! {
        a_completed_record_shows_the_answer_it_was_given
        a_binary_body_comes_back_byte_for_byte
        a_tombstone_comes_back_with_its_status_and_location
        references_come_back_with_the_answer
        a_completion_sent_again_succeeds
        a_completion_with_a_foreign_token_is_refused_and_changes_nothing
        a_completion_of_an_absent_record_is_refused_and_makes_none
    };
    assert_eq!(broken, ["references_come_back_with_the_answer"]);
}
