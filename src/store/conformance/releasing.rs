//! How a key is freed.

use super::*;

pub async fn a_released_key_can_be_claimed_by_another_request<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    store.release(&first).await.unwrap();
    assert!(lookup(store, &request).await.is_none());
    let next = acquire(store, &other(&request)).await;
    assert_eq!(next.attempt, 1);
}

pub async fn a_release_sent_again_succeeds<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = acquire(store, &request("key")).await;
    store.release(&claim).await.unwrap();
    store.release(&claim).await.unwrap();
}

pub async fn a_release_of_a_claim_that_was_never_made_succeeds<S: Subject>(subject: S) {
    let request = request("key");
    let unseen = request.claim(0, std::time::SystemTime::UNIX_EPOCH);
    subject.store().release(&unseen).await.unwrap();
}

pub async fn a_release_with_a_foreign_token_is_refused_and_changes_nothing<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    must_be_refused(store.release(&foreign(&claim)).await);
    must_be_held_by(store, &claim, &request).await;
}

pub async fn a_release_of_a_completed_record_is_refused_and_changes_nothing<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let request = request("key");
    let (claim, completion) = answered(store, &request).await;
    must_be_refused(store.release(&claim).await);
    assert_eq!(completed(store, &request).await.answer, completion.answer);
}

pub async fn a_release_sent_again_does_not_free_the_next_claim<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    store.release(&first).await.unwrap();
    let next = again(&request);
    let second = acquire(store, &next).await;
    must_be_refused(store.release(&first).await);
    must_be_held_by(store, &second, &next).await;
}

pub async fn a_release_after_a_hold_frees_the_key<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    store.release(&claim).await.unwrap();
    assert!(lookup(store, &request).await.is_none());
    assert!(list(store, None, 10).await.is_empty());
}
