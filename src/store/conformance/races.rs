//! What holds when several act at once.

use std::sync::Arc;

use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::super::Resolution;
use super::*;

const ROUNDS: usize = 20;

/// Calls until the store is available: under load it may say that it is not, and every step can be
/// taken again.
async fn patiently<T, F>(mut step: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    for _ in 0..100 {
        match step().await {
            Err(error) if error.kind() == StoreErrorKind::Unavailable => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            result => return result,
        }
    }
    step().await
}

/// Sends all requests in the same moment, each from a task of its own.
async fn claims_at_once<S: Subject>(subject: &Arc<S>, requests: Vec<ClaimRequest>) -> Vec<Claimed> {
    let together = Arc::new(Barrier::new(requests.len()));
    let mut tasks = JoinSet::new();
    for request in requests {
        let (subject, together) = (subject.clone(), together.clone());
        tasks.spawn(async move {
            together.wait().await;
            let claimed = patiently(|| subject.store().claim(&request)).await;
            claimed.expect("a claim is answered")
        });
    }
    tasks.join_all().await
}

fn acquired(claimed: &[Claimed]) -> usize {
    let acquired = claimed.iter();
    acquired
        .filter(|claimed| matches!(claimed, Claimed::Acquired(_)))
        .count()
}

pub async fn of_fifty_claims_at_once_exactly_one_is_acquired<S: Subject>(subject: S) {
    let subject = Arc::new(subject);
    let requests = (0..50).map(|_| request("key")).collect();
    let claimed = claims_at_once(&subject, requests).await;
    assert_eq!(acquired(&claimed), 1);
    for claimed in claimed {
        must_be!(
            claimed,
            Claimed::Acquired(_) | Claimed::Existing(Existing::InProgress { .. })
        );
    }
}

pub async fn of_many_takeovers_at_once_exactly_one_is_acquired<S: Subject>(subject: S) {
    let subject = Arc::new(subject);
    acquire(subject.store(), &request("key")).await;
    subject.age(LEASE).await;
    let requests = (0..30).map(|_| request("key")).collect();
    let claimed = claims_at_once(&subject, requests).await;
    assert_eq!(acquired(&claimed), 1);
}

pub async fn of_many_claims_of_an_expired_record_exactly_one_is_acquired<S: Subject>(subject: S) {
    let subject = Arc::new(subject);
    answered(subject.store(), &request("key")).await;
    subject.age(TTL).await;
    let requests = (0..30).map(|_| request("key")).collect();
    let claimed = claims_at_once(&subject, requests).await;
    assert_eq!(acquired(&claimed), 1);
}

pub async fn of_many_claims_of_an_abandoned_operation_exactly_one_answers_it<S: Subject>(
    subject: S,
) {
    let subject = Arc::new(subject);
    acquire(subject.store(), &request_with("key", Lost::Answer)).await;
    subject.age(LEASE).await;
    let requests = (0..30).map(|_| request("key")).collect();
    let claimed = claims_at_once(&subject, requests).await;
    assert_eq!(acquired(&claimed), 0);
    let abandoned = |claimed: &&Claimed| matches!(claimed, Claimed::Abandoned(_));
    assert_eq!(claimed.iter().filter(abandoned).count(), 1);
}

pub async fn a_claim_sent_twice_at_once_is_acquired_both_times<S: Subject>(subject: S) {
    let subject = Arc::new(subject);
    let request = request("key");
    let claimed = claims_at_once(&subject, vec![request.clone(), request]).await;
    assert_eq!(acquired(&claimed), 2);
}

pub async fn of_a_completion_and_a_takeover_at_once_one_wins<S: Subject>(subject: S) {
    for round in 0..ROUNDS {
        let store = subject.store();
        let request = request(&round.to_string());
        let old = acquire(store, &request).await;
        subject.age(LEASE).await;
        let (next, late) = (again(&request), completion("late"));
        let (completed, claimed) = tokio::join!(
            patiently(|| store.complete(&old, &late)),
            patiently(|| store.claim(&next)),
        );
        match (completed, claimed.expect("a claim is answered")) {
            (Ok(()), Claimed::Existing(Existing::Completed(found))) => {
                assert_eq!(found.answer, late.answer);
            }
            (Err(refused), Claimed::Acquired(new)) => {
                assert_eq!(refused.kind(), StoreErrorKind::ClaimLost);
                must_be_held_by(store, &new, &next).await;
            }
            both => panic!("not one of them won: {both:?}"),
        }
    }
}

pub async fn of_a_late_completion_and_a_resolution_at_once_one_wins<S: Subject>(subject: S) {
    for round in 0..ROUNDS {
        let store = subject.store();
        let request = request(&round.to_string());
        let claim = held(store, &request).await;
        let late = completion("late");
        let answer = Resolution::Answer(envelope("by a person"));
        let (completion, resolution) = tokio::join!(
            store.complete(&claim, &late),
            store.resolve(&claim.identity, claim.token, &answer),
        );
        let expected = match (completion.is_ok(), resolution.is_ok()) {
            (true, false) => envelope("late"),
            (false, true) => envelope("by a person"),
            both => panic!("not one of them won: {both:?}"),
        };
        assert_eq!(completed(store, &request).await.answer, expected);
    }
}

pub async fn sweeps_at_once_delete_each_record_once<S: Subject>(subject: S) {
    let subject = Arc::new(subject);
    for n in 0..40 {
        answered(subject.store(), &request(&n.to_string())).await;
    }
    subject.age(TTL).await;
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let subject = subject.clone();
        tasks.spawn(async move { patiently(|| subject.store().delete_expired(100)).await });
    }
    let swept = tasks.join_all().await;
    let deleted: u64 = swept.into_iter().map(|swept| swept.unwrap().deleted).sum();
    assert_eq!(deleted, 40);
}

pub async fn a_sweep_never_deletes_a_record_that_is_claimed_anew_at_once<S: Subject>(subject: S) {
    for round in 0..ROUNDS {
        let store = subject.store();
        let request = request(&round.to_string());
        answered(store, &request).await;
        subject.age(TTL).await;
        let next = again(&request);
        let (swept, claimed) = tokio::join!(
            patiently(|| store.delete_expired(100)),
            patiently(|| store.claim(&next)),
        );
        swept.expect("the sweep is answered");
        match claimed.expect("a claim is answered") {
            Claimed::Acquired(claim) => must_be_held_by(store, &claim, &next).await,
            other => panic!("expected the claim to be acquired, not {other:?}"),
        }
    }
}
