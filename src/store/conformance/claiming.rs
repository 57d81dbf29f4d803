//! How a claim is made, and what a duplicate sees.

use std::time::Duration;

use super::*;

pub async fn a_claim_of_an_absent_record_is_acquired_as_attempt_1<S: Subject>(subject: S) {
    let request = request("key");
    let claim = acquire(subject.store(), &request).await;
    assert_eq!(claim.attempt, 1);
    assert_eq!(claim.token, request.token);
    assert_eq!(claim.identity, request.identity);
}

pub async fn a_duplicate_of_a_running_request_is_told_the_lease_that_is_left<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let request = request("key");
    acquire(store, &request).await;
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::InProgress { lease_left })
            if !lease_left.is_zero() && *lease_left <= LEASE + TICK
    );
}

pub async fn the_lease_that_is_left_shrinks_as_time_passes<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    acquire(store, &request).await;
    subject.age(LEASE / 2).await;
    must_be!(
        lookup(store, &request).await,
        Some(Existing::InProgress { lease_left })
            if !lease_left.is_zero() && *lease_left <= LEASE / 2 + TICK
    );
}

pub async fn a_claim_sent_again_with_its_token_is_acquired_again<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    let second = acquire(store, &request).await;
    assert_eq!(second.attempt, first.attempt);
    assert_eq!(second.expires_at, first.expires_at);
    must_be_held_by(store, &second, &request).await;
}

pub async fn another_request_under_the_key_of_a_running_one_is_a_mismatch<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    mismatches(store, &request).await;
    must_be_held_by(store, &first, &request).await;
}

pub async fn another_request_under_the_key_of_a_completed_one_is_a_mismatch<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let request = request("key");
    let (_, completion) = answered(store, &request).await;
    mismatches(store, &request).await;
    assert_eq!(completed(store, &request).await.answer, completion.answer);
}

pub async fn another_request_under_the_key_of_a_held_one_is_a_mismatch<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    held(store, &request).await;
    mismatches(store, &request).await;
    must_be!(lookup(store, &request).await, Some(Existing::Held));
}

async fn mismatches(store: &impl Store, request: &ClaimRequest) {
    let other = other(request);
    must_be!(
        claim(store, &other).await,
        Claimed::Existing(Existing::Mismatch)
    );
    must_be!(lookup(store, &other).await, Some(Existing::Mismatch));
}

pub async fn a_claim_of_a_completed_record_gets_its_answer<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let (_, completion) = answered(store, &request).await;
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::Completed(found)) if found.answer == completion.answer
    );
}

pub async fn a_claim_sent_again_after_its_completion_gets_the_answer<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    answered(store, &request).await;
    must_be!(
        claim(store, &request).await,
        Claimed::Existing(Existing::Completed(_))
    );
}

pub async fn a_lookup_of_an_absent_record_finds_nothing<S: Subject>(subject: S) {
    assert!(lookup(subject.store(), &request("key")).await.is_none());
}

pub async fn a_lookup_claims_nothing<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    lookup(store, &request).await;
    acquire(store, &request).await;
}

pub async fn the_end_of_retention_is_the_same_on_claim_and_replay<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let (claim, _) = answered(store, &request).await;
    let replayed = completed(store, &request).await.expires_at;
    let apart = match replayed.duration_since(claim.expires_at) {
        Ok(apart) => apart,
        Err(earlier) => earlier.duration(),
    };
    assert!(apart < TICK, "{apart:?} apart");
}

pub async fn leases_and_retention_keep_fractions_of_a_second<S: Subject>(subject: S) {
    let store = subject.store();
    let short = ClaimRequest {
        lease: Duration::from_millis(60_500),
        ttl: Duration::from_millis(120_500),
        ..request("key")
    };
    let first = acquire(store, &short).await;
    subject.age(Duration::from_millis(60_000)).await;
    must_be!(
        lookup(store, &short).await,
        Some(Existing::InProgress { lease_left })
            if *lease_left <= Duration::from_millis(500) + TICK
    );
    subject.age(Duration::from_millis(500)).await;
    let second = acquire(store, &again(&short)).await;
    assert_eq!((first.attempt, second.attempt), (1, 2));
}
