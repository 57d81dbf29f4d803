//! What a sweep deletes, and what never.

use super::super::Swept;
use super::*;

async fn sweep(store: &impl Store, limit: u32) -> Swept {
    let swept = store.delete_expired(limit).await;
    swept.expect("expired records can be deleted")
}

fn deleted(deleted: u64) -> Swept {
    Swept { deleted, held: 0 }
}

pub async fn a_sweep_deletes_answers_whose_retention_is_over<S: Subject>(subject: S) {
    let store = subject.store();
    answered(store, &request("old")).await;
    subject.age(TTL / 2).await;
    let young = request("young");
    answered(store, &young).await;
    subject.age(TTL / 2).await;
    assert_eq!(sweep(store, 100).await, deleted(1));
    completed(store, &young).await;
    assert_eq!(sweep(store, 100).await, deleted(0));
}

pub async fn a_sweep_deletes_lost_attempts_whose_retention_is_over<S: Subject>(subject: S) {
    let store = subject.store();
    acquire(store, &request_with("rerun", Lost::Rerun)).await;
    acquire(store, &request_with("answer", Lost::Answer)).await;
    subject.age(TTL).await;
    assert_eq!(sweep(store, 100).await, deleted(2));
}

pub async fn a_sweep_leaves_a_lost_attempt_within_its_retention<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Answer);
    acquire(store, &request).await;
    subject.age(LEASE * 2).await;
    assert_eq!(sweep(store, 100).await, deleted(0));
    abandoned(store, &again(&request)).await;
}

pub async fn a_sweep_never_touches_a_live_lease<S: Subject>(subject: S) {
    let store = subject.store();
    for lost in [Lost::Rerun, Lost::Answer, Lost::Hold] {
        let request = request_with(&format!("{lost:?}"), lost);
        let claim = acquire(store, &request).await;
        subject.age(TTL * 2).await;
        store.extend(&[renewal(&claim)]).await.unwrap();
        assert_eq!(sweep(store, 100).await, Swept::default());
        must_be!(
            lookup(store, &request).await,
            Some(Existing::InProgress { .. })
        );
        store.release(&claim).await.unwrap();
    }
}

pub async fn a_sweep_never_deletes_a_held_record<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    held(store, &request).await;
    subject.age(TTL * 10).await;
    assert_eq!(sweep(store, 100).await, Swept::default());
    must_be!(lookup(store, &request).await, Some(Existing::Held));
}

pub async fn a_sweep_holds_lost_attempts_whose_policy_says_so<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Hold);
    acquire(store, &request).await;
    assert_eq!(sweep(store, 100).await, Swept::default());
    subject.age(LEASE).await;
    let swept = sweep(store, 100).await;
    assert_eq!((swept.deleted, swept.held), (0, 1));
    assert_eq!(list(store, None, 10).await.len(), 1);
    assert_eq!(sweep(store, 100).await, Swept::default());
}

pub async fn a_lost_attempt_to_be_held_is_held_even_past_its_retention<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Hold);
    acquire(store, &request).await;
    subject.age(TTL * 2).await;
    let swept = sweep(store, 100).await;
    assert_eq!((swept.deleted, swept.held), (0, 1));
    must_be!(
        claim(store, &other(&request)).await,
        Claimed::Existing(Existing::Mismatch)
    );
    must_be!(lookup(store, &request).await, Some(Existing::Held));
}

pub async fn a_sweep_deletes_no_more_than_its_limit<S: Subject>(subject: S) {
    let store = subject.store();
    for n in 0..5 {
        answered(store, &request(&n.to_string())).await;
    }
    subject.age(TTL).await;
    for expected in [2, 2, 1, 0] {
        assert_eq!(sweep(store, 2).await, deleted(expected));
    }
}

pub async fn a_sweep_holds_no_more_than_its_limit<S: Subject>(subject: S) {
    let store = subject.store();
    for n in 0..3 {
        acquire(store, &request_with(&n.to_string(), Lost::Hold)).await;
    }
    subject.age(LEASE).await;
    for expected in [2, 1, 0] {
        assert_eq!(sweep(store, 2).await.held, expected);
    }
}

pub async fn an_answer_given_after_a_hold_is_swept_like_any<S: Subject>(subject: S) {
    let store = subject.store();
    let late = request_with("late", Lost::Hold);
    let claim = held(store, &late).await;
    store.complete(&claim, &completion("late")).await.unwrap();
    let resolved = held(store, &request_with("resolved", Lost::Hold)).await;
    let answer = super::super::Resolution::Answer(envelope("by a person"));
    let result = store.resolve(&resolved.identity, resolved.token, &answer);
    result.await.unwrap();
    assert_eq!(sweep(store, 100).await, deleted(0));
    subject.age(TTL).await;
    assert_eq!(sweep(store, 100).await, deleted(2));
}
