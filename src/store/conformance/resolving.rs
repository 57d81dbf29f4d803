//! How a hold ends.

use super::super::Resolution;
use super::*;

async fn resolve(store: &impl Store, claim: &Claim, with: &Resolution) -> Result<(), StoreError> {
    store.resolve(&claim.identity, claim.token, with).await
}

fn an_answer() -> Resolution {
    Resolution::Answer(envelope("by a person"))
}

pub async fn an_answer_given_by_a_person_is_replayed<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    resolve(store, &claim, &an_answer()).await.unwrap();
    let found = completed(store, &request).await;
    assert_eq!(found.answer, envelope("by a person"));
    assert_eq!(found.references, references("charge", "ch_1"));
    assert!(list(store, None, 10).await.is_empty());
}

pub async fn an_answer_given_by_a_person_fences_the_attempt<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    resolve(store, &claim, &an_answer()).await.unwrap();
    must_be_refused(store.complete(&claim, &completion("late")).await);
    must_be_refused(store.release(&claim).await);
    must_be_refused(store.hold(&claim, &References::default()).await);
    let found = completed(store, &request).await;
    assert_eq!(found.answer, envelope("by a person"));
}

pub async fn an_answer_given_by_a_person_is_kept_as_long_as_any<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    subject.age(TTL * 3).await;
    resolve(store, &claim, &an_answer()).await.unwrap();
    subject.age(TTL - LEASE).await;
    completed(store, &request).await;
    subject.age(LEASE).await;
    assert!(lookup(store, &request).await.is_none());
}

pub async fn a_release_by_a_person_lets_the_next_request_run<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    resolve(store, &claim, &Resolution::Release).await.unwrap();
    assert!(lookup(store, &request).await.is_none());
    let next = again(&request);
    let second = acquire(store, &next).await;
    must_be_refused(store.complete(&claim, &completion("late")).await);
    must_be_held_by(store, &second, &next).await;
}

pub async fn a_resolution_with_a_foreign_token_is_refused_and_changes_nothing<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    for resolution in [an_answer(), Resolution::Release] {
        must_be_refused(resolve(store, &foreign(&claim), &resolution).await);
        must_be!(lookup(store, &request).await, Some(Existing::Held));
    }
    assert_eq!(list(store, None, 10).await[0].token, claim.token);
}

pub async fn a_hold_is_resolved_once<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    resolve(store, &claim, &an_answer()).await.unwrap();
    let second = Resolution::Answer(envelope("by another person"));
    for resolution in [second, Resolution::Release] {
        must_be_refused(resolve(store, &claim, &resolution).await);
    }
    let found = completed(store, &request).await;
    assert_eq!(found.answer, envelope("by a person"));
}

pub async fn a_running_record_cannot_be_resolved<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    for resolution in [an_answer(), Resolution::Release] {
        must_be_refused(resolve(store, &claim, &resolution).await);
    }
    must_be_held_by(store, &claim, &request).await;
}

pub async fn a_completed_record_cannot_be_resolved<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let (claim, original) = answered(store, &request).await;
    for resolution in [an_answer(), Resolution::Release] {
        must_be_refused(resolve(store, &claim, &resolution).await);
    }
    assert_eq!(completed(store, &request).await.answer, original.answer);
}

pub async fn an_absent_record_cannot_be_resolved<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let absent = request.claim(1, std::time::SystemTime::UNIX_EPOCH);
    for resolution in [an_answer(), Resolution::Release] {
        must_be_refused(resolve(store, &absent, &resolution).await);
    }
    assert!(lookup(store, &request).await.is_none());
}
