//! What retention means.

use super::*;

pub async fn an_answer_is_shown_until_its_retention_is_over<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    answered(store, &request).await;
    subject.age(TTL - LEASE).await;
    completed(store, &request).await;
    subject.age(LEASE).await;
    assert!(lookup(store, &request).await.is_none());
}

pub async fn the_retention_that_is_left_shrinks_as_time_passes<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    answered(store, &request).await;
    let left = completed(store, &request).await.retention_left;
    assert!(left <= TTL && left > TTL - LEASE, "{left:?}");
    subject.age(LEASE).await;
    let less = completed(store, &request).await.retention_left;
    assert!(less <= left - LEASE + TICK, "{less:?} after {left:?}");
    assert!(less > TTL - LEASE * 2, "{less:?}");
}

pub async fn retention_counts_from_the_claim<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    subject.age(TTL / 2).await;
    store.complete(&claim, &completion("late")).await.unwrap();
    completed(store, &request).await;
    subject.age(TTL / 2).await;
    assert!(lookup(store, &request).await.is_none());
}

pub async fn an_answer_that_comes_after_the_retention_is_kept_as_long_as_any<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let (held, running) = (request("held"), request("running"));
    let claims = [
        super::held(store, &held).await,
        acquire(store, &running).await,
    ];
    subject.age(TTL * 2).await;
    for claim in &claims {
        store.complete(claim, &completion("late")).await.unwrap();
    }
    subject.age(TTL - LEASE).await;
    completed(store, &held).await;
    completed(store, &running).await;
    subject.age(LEASE).await;
    assert!(lookup(store, &held).await.is_none());
    assert!(lookup(store, &running).await.is_none());
}

pub async fn an_expired_record_is_claimed_as_if_absent<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let (old, _) = answered(store, &request).await;
    subject.age(TTL).await;
    let next = again(&request);
    let new = acquire(store, &next).await;
    assert_eq!(new.attempt, 1);
    assert!(new.expires_at > old.expires_at - TICK);
    must_be_refused(store.complete(&old, &completion("late")).await);
    must_be_held_by(store, &new, &next).await;
}

pub async fn an_expired_record_is_free_for_another_request<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    answered(store, &request).await;
    subject.age(TTL).await;
    let other = other(&request);
    assert!(lookup(store, &other).await.is_none());
    let claim = acquire(store, &other).await;
    assert_eq!(claim.attempt, 1);
}

pub async fn nothing_of_an_expired_answer_is_shown_again<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    let old = Completion {
        answer: envelope("old"),
        references: references("charge", "ch_old"),
    };
    store.complete(&claim, &old).await.unwrap();
    subject.age(TTL).await;
    let next = again(&request);
    let second = acquire(store, &next).await;
    must_be!(
        lookup(store, &next).await,
        Some(Existing::InProgress { .. })
    );
    store.complete(&second, &completion("new")).await.unwrap();
    let found = completed(store, &next).await;
    assert_eq!(found.answer, envelope("new"));
    assert_eq!(found.references, References::default());
}

pub async fn a_lost_attempt_past_its_retention_is_as_good_as_absent<S: Subject>(subject: S) {
    let store = subject.store();
    for (key, lost) in [("rerun", Lost::Rerun), ("answer", Lost::Answer)] {
        let request = request_with(key, lost);
        let old = acquire(store, &request).await;
        subject.age(TTL).await;
        assert!(lookup(store, &request).await.is_none());
        let new = acquire(store, &other(&request)).await;
        assert_eq!(new.attempt, 1);
        must_be_refused(store.complete(&old, &completion("late")).await);
    }
}

pub async fn a_live_lease_outlasts_the_retention<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let first = acquire(store, &request).await;
    subject.age(TTL).await;
    store.extend(&[renewal(&first)]).await.unwrap();
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::InProgress { .. })
    );
}

pub async fn a_takeover_begins_its_own_retention<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    acquire(store, &request).await;
    subject.age(TTL / 2).await;
    let second = acquire(store, &again(&request)).await;
    store.complete(&second, &completion("2")).await.unwrap();
    subject.age(TTL - LEASE).await;
    completed(store, &request).await;
}
