//! What becomes of an attempt whose lease is over.

use super::super::Renewed;
use super::*;

pub async fn a_lost_attempt_to_be_rerun_is_taken_over<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Rerun);
    acquire(store, &request).await;
    subject.age(LEASE).await;
    let next = again(&request);
    let second = acquire(store, &next).await;
    assert_eq!(second.attempt, 2);
    assert_eq!(second.token, next.token);
    must_be_held_by(store, &second, &next).await;
}

pub async fn each_takeover_is_the_next_attempt<S: Subject>(subject: S) {
    let store = subject.store();
    for attempt in 1..=4 {
        let claim = acquire(store, &request("key")).await;
        assert_eq!(claim.attempt, attempt);
        subject.age(LEASE).await;
    }
}

pub async fn a_takeover_sent_again_with_its_token_is_acquired_again<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    acquire(store, &request).await;
    subject.age(LEASE).await;
    // Its own policy must not be taken for the one that made it abandoned.
    let next = ClaimRequest {
        lost: Lost::Answer,
        ..again(&request)
    };
    let second = acquire(store, &next).await;
    let repeated = acquire(store, &next).await;
    assert_eq!((second.attempt, repeated.attempt), (2, 2));
}

pub async fn a_record_is_not_taken_over_before_its_lease_is_over<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    acquire(store, &request).await;
    subject.age(LEASE - LEASE / 10).await;
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::InProgress { .. })
    );
}

pub async fn after_a_takeover_the_old_attempt_is_fenced<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let old = acquire(store, &request).await;
    subject.age(LEASE).await;
    let next = again(&request);
    let new = acquire(store, &next).await;
    must_be_refused(store.complete(&old, &completion("late")).await);
    must_be_refused(store.release(&old).await);
    must_be_refused(store.hold(&old, &References::default()).await);
    let renewed = store.extend(&[renewal(&old)]).await.unwrap();
    assert_eq!(renewed, [Renewed::Lost]);
    must_be_held_by(store, &new, &next).await;
}

pub async fn a_lost_attempt_to_be_answered_is_abandoned<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Answer);
    let old = acquire(store, &request).await;
    subject.age(LEASE).await;
    let next = again(&request);
    let taken = abandoned(store, &next).await;
    assert_eq!((taken.attempt, taken.token), (2, next.token));
    must_be_refused(store.complete(&old, &completion("late")).await);
    must_be_held_by(store, &taken, &next).await;
}

pub async fn an_abandoned_claim_sent_again_is_abandoned_again<S: Subject>(subject: S) {
    let store = subject.store();
    acquire(store, &request_with("key", Lost::Answer)).await;
    subject.age(LEASE).await;
    let next = request("key");
    let first = abandoned(store, &next).await;
    let second = abandoned(store, &next).await;
    assert_eq!((first.attempt, second.attempt), (2, 2));
}

pub async fn an_abandoned_claim_that_is_lost_leaves_the_operation_abandoned<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    acquire(store, &request_with("key", Lost::Answer)).await;
    for attempt in 2..=3 {
        subject.age(LEASE).await;
        let taken = abandoned(store, &request_with("key", Lost::Rerun)).await;
        assert_eq!(taken.attempt, attempt);
    }
}

pub async fn an_abandoned_claim_that_is_released_leaves_the_operation_abandoned<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    acquire(store, &request_with("key", Lost::Answer)).await;
    subject.age(LEASE).await;
    let taken = abandoned(store, &request("key")).await;
    store.release(&taken).await.unwrap();
    store.release(&taken).await.unwrap();
    let next = abandoned(store, &request("key")).await;
    must_be_refused(store.release(&taken).await);
    must_be_held_by(store, &next, &request("key")).await;
}

pub async fn a_lost_attempt_to_be_held_is_held<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Hold);
    acquire(store, &request).await;
    subject.age(LEASE).await;
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::Held)
    );
    assert_eq!(list(store, None, 10).await.len(), 1);
}

pub async fn a_late_completion_wins_over_the_hold_of_a_lost_attempt<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Hold);
    let first = acquire(store, &request).await;
    subject.age(LEASE).await;
    claim(store, &again(&request)).await;
    let late = completion("late");
    store.complete(&first, &late).await.unwrap();
    assert_eq!(completed(store, &request).await.answer, late.answer);
}

pub async fn the_policy_of_the_lost_attempt_decides_not_that_of_the_next_request<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    for (key, lost) in [
        ("rerun", Lost::Rerun),
        ("answer", Lost::Answer),
        ("hold", Lost::Hold),
    ] {
        acquire(store, &request_with(key, lost)).await;
    }
    subject.age(LEASE).await;
    acquire(store, &request_with("rerun", Lost::Hold)).await;
    abandoned(store, &request_with("answer", Lost::Rerun)).await;
    must_be!(
        claim(store, &request_with("hold", Lost::Rerun)).await,
        Claimed::Existing(Existing::Held)
    );
}

pub async fn a_takeover_is_lost_by_its_own_policy<S: Subject>(subject: S) {
    let store = subject.store();
    acquire(store, &request_with("key", Lost::Rerun)).await;
    subject.age(LEASE).await;
    acquire(store, &request_with("key", Lost::Hold)).await;
    subject.age(LEASE).await;
    must_be!(
        claim(store, &request_with("key", Lost::Rerun)).await,
        Claimed::Existing(Existing::Held)
    );
}

pub async fn another_request_does_not_take_over_a_lost_attempt<S: Subject>(subject: S) {
    let store = subject.store();
    for (key, lost) in [
        ("rerun", Lost::Rerun),
        ("answer", Lost::Answer),
        ("hold", Lost::Hold),
    ] {
        let request = request_with(key, lost);
        let first = acquire(store, &request).await;
        subject.age(LEASE).await;
        must_be!(
            claim(store, &other(&request)).await,
            Claimed::Existing(Existing::Mismatch)
        );
        store.complete(&first, &completion("late")).await.unwrap();
    }
}
