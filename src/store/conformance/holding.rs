//! How a record waits for a person.

use std::collections::BTreeSet;

use super::*;

pub async fn a_held_record_is_listed_with_what_a_person_needs<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    let listed = list(store, None, 10).await;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].identity, request.identity);
    assert_eq!(listed[0].identity.scope(), "acme");
    assert_eq!(listed[0].identity.operation(), "POST /charges");
    assert_eq!(listed[0].identity.key(), "key");
    assert_eq!(listed[0].references, references("charge", "ch_1"));
    assert_eq!(listed[0].attempt, 1);
    assert_eq!(listed[0].token, claim.token);
    let kept = claim.expires_at.duration_since(listed[0].claimed_at);
    let kept = kept.expect("a record expires after it was claimed");
    assert!(kept < TTL + TICK && TTL < kept + TICK, "kept {kept:?}");
}

pub async fn a_duplicate_of_a_held_record_is_told_so<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    held(store, &request).await;
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::Held)
    );
    must_be!(lookup(store, &request).await, Some(Existing::Held));
}

pub async fn a_hold_sent_again_succeeds<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = held(store, &request("key")).await;
    let references = references("charge", "ch_1");
    store.hold(&claim, &references).await.unwrap();
    assert_eq!(list(store, None, 10).await.len(), 1);
}

pub async fn a_lost_attempt_that_is_held_can_still_show_its_references<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request_with("key", Lost::Hold);
    let first = acquire(store, &request).await;
    subject.age(LEASE).await;
    claim(store, &again(&request)).await;
    assert_eq!(
        list(store, None, 10).await[0].references,
        References::default()
    );
    let references = references("charge", "ch_1");
    store.hold(&first, &references).await.unwrap();
    assert_eq!(list(store, None, 10).await[0].references, references);
}

pub async fn a_hold_with_a_foreign_token_is_refused_and_changes_nothing<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    let references = References::default();
    must_be_refused(store.hold(&foreign(&claim), &references).await);
    assert!(list(store, None, 10).await.is_empty());
    must_be_held_by(store, &claim, &request).await;
}

pub async fn a_hold_of_a_completed_record_is_refused_and_changes_nothing<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let (claim, completion) = answered(store, &request).await;
    must_be_refused(store.hold(&claim, &References::default()).await);
    assert_eq!(completed(store, &request).await.answer, completion.answer);
}

pub async fn a_hold_of_an_absent_record_is_refused<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = acquire(store, &request("key")).await;
    store.release(&claim).await.unwrap();
    must_be_refused(store.hold(&claim, &References::default()).await);
    assert!(list(store, None, 10).await.is_empty());
}

pub async fn a_late_completion_wins_over_the_hold<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    let late = completion("late");
    store.complete(&claim, &late).await.unwrap();
    assert_eq!(completed(store, &request).await.answer, late.answer);
    assert!(list(store, None, 10).await.is_empty());
}

pub async fn a_held_record_is_not_kept_alive<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = held(store, &request("key")).await;
    let renewed = store.extend(&[renewal(&claim)]).await.unwrap();
    assert_eq!(renewed, [super::super::Renewed::Lost]);
}

pub async fn a_held_record_never_expires<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    held(store, &request).await;
    subject.age(TTL * 10).await;
    must_be!(
        claim(store, &again(&request)).await,
        Claimed::Existing(Existing::Held)
    );
    assert_eq!(list(store, None, 10).await.len(), 1);
}

pub async fn running_and_completed_records_are_not_listed_as_held<S: Subject>(subject: S) {
    let store = subject.store();
    acquire(store, &request("running")).await;
    answered(store, &request("completed")).await;
    held(store, &request("held")).await;
    let listed = list(store, None, 10).await;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].identity.key(), "held");
}

pub async fn held_records_are_listed_page_by_page_in_the_order_of_their_ids<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let mut all = BTreeSet::new();
    for n in 0..7 {
        let request = request(&format!("key-{n}"));
        held(store, &request).await;
        all.insert(request.identity.id());
    }
    let (mut after, mut seen) = (None, Vec::new());
    for expected in [3, 3, 1, 0] {
        let page = list(store, after, 3).await;
        assert_eq!(page.len(), expected);
        seen.extend(page.iter().map(|record| record.identity.id()));
        after = seen.last().copied();
    }
    assert!(seen.iter().eq(&all), "{seen:?} are not {all:?}");
}
