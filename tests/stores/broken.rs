//! The rules can fail: stores that break one each.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tower_idempotency::store::conformance::{
    Subject, claiming, completing, expiring, extending, finding, holding, isolation, losing, races,
    releasing, sweeping,
};
use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completion, Existing, HeldRecord, LeaseRenewal, RecordSummary,
    Renewed, Resolution, Swept, Token, Within,
};
use tower_idempotency::{
    Fingerprint, Identity, MemoryStore, RecordId, References, Store, StoreError,
};

use super::memory::Memory;

#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    CompletesUnderAnyToken,
    ComparesNoFingerprints,
    ReleasesForeignClaims,
    HoldsNothing,
    SweepsHeldRecords,
    ForgetsReferences,
    ForgetsItsOwnToken,
    ReadsThenWrites,
    TakesLiveLeases,
    KeepsEveryLease,
    RerunsAbandonedOperations,
    MixesScopes,
    IgnoresPages,
    FindsEverybodys,
    FindsNothing,
    TellsTheWholeRetention,
}

/// A store around another one, with one fault, and what it has to remember to commit it.
pub struct Broken<S> {
    store: S,
    fault: Fault,
    last: Mutex<HashMap<RecordId, ClaimRequest>>,
}

impl<S> Broken<S> {
    fn has(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn last(&self, identity: &Identity) -> Option<ClaimRequest> {
        self.last.lock().unwrap().get(&identity.id()).cloned()
    }

    /// The claim as whoever holds the record would make it.
    fn stolen(&self, claim: &Claim) -> Claim {
        let token = self.last(&claim.identity).map(|request| request.token);
        Claim {
            token: token.unwrap_or(claim.token),
            ..claim.clone()
        }
    }
}

impl<S: Store> Store for Broken<S> {
    fn is_durable(&self) -> bool {
        self.store.is_durable()
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, StoreError> {
        let mut request = request.clone();
        if self.has(Fault::ForgetsItsOwnToken) {
            request.token = Token::random()?;
        }
        if self.has(Fault::MixesScopes) {
            request.identity =
                Identity::new("any", request.identity.operation(), request.identity.key());
        }
        if let Some(last) = self.last(&request.identity)
            && self.has(Fault::ComparesNoFingerprints)
        {
            request.fingerprint = last.fingerprint;
        }
        if self.has(Fault::ReadsThenWrites) {
            let found = self
                .store
                .lookup(&request.identity, &request.fingerprint)
                .await?;
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(1)).await;
            if found.is_none() {
                self.store.claim(&request).await?;
                let expires_at = std::time::SystemTime::now() + request.ttl;
                return Ok(Claimed::Acquired(request.claim(1, expires_at)));
            }
        }
        let mut claimed = self.store.claim(&request).await?;
        if let Claimed::Existing(Existing::InProgress { .. }) = claimed
            && self.has(Fault::TakesLiveLeases)
        {
            let running = self.last(&request.identity).expect("somebody claimed it");
            let running = running.claim(1, std::time::SystemTime::UNIX_EPOCH);
            self.store.release(&running).await?;
            claimed = self.store.claim(&request).await?;
        }
        if matches!(claimed, Claimed::Acquired(_)) {
            let mut last = self.last.lock().unwrap();
            last.insert(request.identity.id(), request);
        }
        Ok(match claimed {
            Claimed::Abandoned(claim) if self.has(Fault::RerunsAbandonedOperations) => {
                Claimed::Acquired(claim)
            }
            claimed => claimed,
        })
    }

    async fn complete(&self, claim: &Claim, completion: &Completion) -> Result<(), StoreError> {
        let mut completion = completion.clone();
        if self.has(Fault::ForgetsReferences) {
            completion.references = References::default();
        }
        if self.has(Fault::CompletesUnderAnyToken) {
            let stolen = self.stolen(claim);
            return self.store.complete(&stolen, &completion).await;
        }
        self.store.complete(claim, &completion).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), StoreError> {
        if self.has(Fault::ReleasesForeignClaims) {
            return self.store.release(&self.stolen(claim)).await;
        }
        self.store.release(claim).await
    }

    async fn hold(&self, claim: &Claim, references: &References) -> Result<(), StoreError> {
        if self.has(Fault::HoldsNothing) {
            return Ok(());
        }
        self.store.hold(claim, references).await
    }

    async fn extend(&self, leases: &[LeaseRenewal]) -> Result<Vec<Renewed>, StoreError> {
        let renewed = self.store.extend(leases).await?;
        if self.has(Fault::KeepsEveryLease) {
            return Ok(vec![Renewed::Kept; renewed.len()]);
        }
        Ok(renewed)
    }

    async fn lookup(
        &self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        let mut found = match self.last(identity) {
            Some(last) if self.has(Fault::ComparesNoFingerprints) => {
                self.store.lookup(identity, &last.fingerprint).await
            }
            _ => self.store.lookup(identity, fingerprint).await,
        };
        if let (Ok(Some(Existing::Completed(completed))), Some(last)) =
            (&mut found, self.last(identity))
            && self.has(Fault::TellsTheWholeRetention)
        {
            completed.retention_left = last.ttl;
        }
        found
    }

    async fn resolve(
        &self,
        identity: &Identity,
        token: Token,
        resolution: &Resolution,
    ) -> Result<(), StoreError> {
        self.store.resolve(identity, token, resolution).await
    }

    async fn list_held(
        &self,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<HeldRecord>, StoreError> {
        let after = after.filter(|_| !self.has(Fault::IgnoresPages));
        self.store.list_held(after, limit).await
    }

    async fn inspect(&self, identity: &Identity) -> Result<Option<RecordSummary>, StoreError> {
        self.store.inspect(identity).await
    }

    async fn find_by_reference(
        &self,
        within: Within<'_>,
        kind: &str,
        id: &str,
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<RecordSummary>, StoreError> {
        let within = match within {
            _ if self.has(Fault::FindsNothing) => return Ok(Vec::new()),
            Within::Scope(_) if self.has(Fault::FindsEverybodys) => Within::AllScopes,
            within => within,
        };
        let after = after.filter(|_| !self.has(Fault::IgnoresPages));
        self.store
            .find_by_reference(within, kind, id, after, limit)
            .await
    }

    async fn delete_expired(&self, limit: u32) -> Result<Swept, StoreError> {
        if self.has(Fault::SweepsHeldRecords) {
            for held in self.store.list_held(None, limit).await? {
                let release = Resolution::Release;
                self.resolve(&held.identity, held.token, &release).await?;
            }
        }
        self.store.delete_expired(limit).await
    }

    async fn wait_for_change(&self, identity: &Identity, limit: Duration) {
        self.store.wait_for_change(identity, limit).await;
    }
}

pub struct BrokenSubject {
    memory: Memory,
    store: Broken<MemoryStore>,
}

impl Subject for BrokenSubject {
    type Store = Broken<MemoryStore>;

    fn store(&self) -> &Self::Store {
        &self.store
    }

    async fn age(&self, by: Duration) {
        self.memory.age(by).await;
    }
}

pub fn with(fault: Fault) -> BrokenSubject {
    let memory = Memory::new();
    let store = Broken {
        store: memory.store().clone(),
        fault,
        last: Mutex::default(),
    };
    BrokenSubject { memory, store }
}

/// The rule, run on the broken store, panics.
async fn is_broken(rule: impl Future<Output = ()> + Send + 'static) {
    let ended = tokio::spawn(rule).await;
    assert!(ended.is_err_and(|error| error.is_panic()));
}

#[tokio::test]
async fn a_completion_under_any_token_is_found() {
    use completing::*;
    let broken = || with(Fault::CompletesUnderAnyToken);
    is_broken(a_completion_with_a_foreign_token_is_refused_and_changes_nothing(broken())).await;
    is_broken(losing::after_a_takeover_the_old_attempt_is_fenced(broken())).await;
}

#[tokio::test]
async fn fingerprints_that_are_not_compared_are_found() {
    use claiming::*;
    let broken = || with(Fault::ComparesNoFingerprints);
    is_broken(another_request_under_the_key_of_a_completed_one_is_a_mismatch(broken())).await;
    is_broken(losing::another_request_does_not_take_over_a_lost_attempt(
        broken(),
    ))
    .await;
}

#[tokio::test]
async fn a_release_of_foreign_claims_is_found() {
    use releasing::*;
    let broken = || with(Fault::ReleasesForeignClaims);
    is_broken(a_release_with_a_foreign_token_is_refused_and_changes_nothing(broken())).await;
    is_broken(a_release_sent_again_does_not_free_the_next_claim(broken())).await;
}

#[tokio::test]
async fn a_hold_that_does_nothing_is_found() {
    let broken = || with(Fault::HoldsNothing);
    is_broken(holding::a_duplicate_of_a_held_record_is_told_so(broken())).await;
}

#[tokio::test]
async fn a_sweep_of_held_records_is_found() {
    let broken = || with(Fault::SweepsHeldRecords);
    is_broken(sweeping::a_sweep_never_deletes_a_held_record(broken())).await;
}

#[tokio::test]
async fn forgotten_references_are_found() {
    let broken = || with(Fault::ForgetsReferences);
    is_broken(completing::references_come_back_with_the_answer(broken())).await;
    is_broken(finding::a_record_is_found_by_its_reference(broken())).await;
}

#[tokio::test]
async fn a_store_that_forgets_its_own_token_is_found() {
    let broken = || with(Fault::ForgetsItsOwnToken);
    is_broken(claiming::a_claim_sent_again_with_its_token_is_acquired_again(broken())).await;
}

#[tokio::test]
async fn a_claim_that_reads_and_then_writes_is_found() {
    let broken = || with(Fault::ReadsThenWrites);
    is_broken(races::of_fifty_claims_at_once_exactly_one_is_acquired(
        broken(),
    ))
    .await;
}

#[tokio::test]
async fn a_takeover_of_a_live_lease_is_found() {
    let broken = || with(Fault::TakesLiveLeases);
    is_broken(losing::a_record_is_not_taken_over_before_its_lease_is_over(
        broken(),
    ))
    .await;
}

#[tokio::test]
async fn leases_that_are_always_kept_are_found() {
    let broken = || with(Fault::KeepsEveryLease);
    is_broken(extending::renewals_of_several_are_told_apart_in_the_order_given(broken())).await;
}

#[tokio::test]
async fn an_abandoned_operation_that_is_rerun_is_found() {
    let broken = || with(Fault::RerunsAbandonedOperations);
    is_broken(losing::a_lost_attempt_to_be_answered_is_abandoned(broken())).await;
    is_broken(losing::an_abandoned_claim_sent_again_is_abandoned_again(
        broken(),
    ))
    .await;
}

#[tokio::test]
async fn scopes_that_meet_are_found() {
    let broken = || with(Fault::MixesScopes);
    is_broken(isolation::two_scopes_never_share_a_record(broken())).await;
}

#[tokio::test]
async fn pages_that_repeat_are_found() {
    use holding::*;
    let broken = || with(Fault::IgnoresPages);
    is_broken(held_records_are_listed_page_by_page_in_the_order_of_their_ids(broken())).await;
    is_broken(finding::records_are_found_page_by_page_in_the_order_of_their_ids(broken())).await;
}

#[tokio::test]
async fn a_reference_that_is_found_in_another_scope_is_found() {
    let broken = || with(Fault::FindsEverybodys);
    is_broken(finding::a_lookup_within_a_scope_never_shows_another_scope(
        broken(),
    ))
    .await;
}

#[tokio::test]
async fn references_that_find_nothing_are_found() {
    let broken = || with(Fault::FindsNothing);
    is_broken(finding::a_held_record_is_found_by_its_reference(broken())).await;
    is_broken(finding::a_lookup_over_all_scopes_shows_every_one(broken())).await;
}

#[tokio::test]
async fn a_retention_that_is_told_without_its_age_is_found() {
    let broken = || with(Fault::TellsTheWholeRetention);
    is_broken(expiring::the_retention_that_is_left_shrinks_as_time_passes(
        broken(),
    ))
    .await;
}
