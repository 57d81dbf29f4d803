//! How an answer is stored, and that it comes back byte for byte.

use http::header::{HeaderMap, HeaderValue, LOCATION, SET_COOKIE};
use http::{Response, StatusCode};

use super::*;

async fn comes_back(store: &impl Store, completion: Completion) {
    let request = request("key");
    let claim = acquire(store, &request).await;
    let result = store.complete(&claim, &completion).await;
    result.expect("the completion is written");
    let found = completed(store, &request).await;
    assert!(found.answer.encode() == completion.answer.encode());
    assert_eq!(found.references, completion.references);
}

fn with_answer(answer: Envelope) -> Completion {
    Completion {
        answer,
        references: References::default(),
    }
}

pub async fn a_completed_record_shows_the_answer_it_was_given<S: Subject>(subject: S) {
    comes_back(subject.store(), completion("hello")).await;
}

pub async fn a_binary_body_comes_back_byte_for_byte<S: Subject>(subject: S) {
    let body: Vec<u8> = (0..=u8::MAX).chain([0, b'\\', 0xff, 0]).collect();
    let answer = Envelope::new(Response::new(body.into()));
    comes_back(subject.store(), with_answer(answer)).await;
}

pub async fn status_and_headers_come_back_unsplit_and_in_order<S: Subject>(subject: S) {
    let mut answer = Response::new(Bytes::from_static(b"{}"));
    *answer.status_mut() = StatusCode::IM_A_TEAPOT;
    let headers = answer.headers_mut();
    headers.append(SET_COOKIE, HeaderValue::from_static("a=1, b"));
    headers.append("x-bytes", HeaderValue::from_bytes(b"\xe9\xff").unwrap());
    headers.append(SET_COOKIE, HeaderValue::from_static("a=2"));
    headers.append("x-empty", HeaderValue::from_static(""));
    comes_back(subject.store(), with_answer(Envelope::new(answer))).await;
}

pub async fn an_empty_body_is_no_tombstone<S: Subject>(subject: S) {
    let store = subject.store();
    comes_back(store, completion("")).await;
    let found = completed(store, &request("key")).await;
    assert_eq!(found.answer.body(), Some(&Bytes::new()));
}

pub async fn a_tombstone_comes_back_with_its_status_and_location<S: Subject>(subject: S) {
    let mut headers = HeaderMap::new();
    headers.insert(LOCATION, HeaderValue::from_static("/charges/1"));
    let answer = Envelope::tombstone(StatusCode::CREATED, &headers);
    let store = subject.store();
    comes_back(store, with_answer(answer)).await;
    let found = completed(store, &request("key")).await;
    assert_eq!(found.answer.body(), None);
    assert!(found.answer.header(&LOCATION).is_some());
}

pub async fn a_body_of_1_mib_comes_back_byte_for_byte<S: Subject>(subject: S) {
    // No compression makes less of it.
    let mut state = 1_u64;
    let mut body = Vec::with_capacity(1 << 20);
    while body.len() < 1 << 20 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        body.extend(state.to_be_bytes());
    }
    let answer = Envelope::new(Response::new(body.into()));
    comes_back(subject.store(), with_answer(answer)).await;
}

pub async fn references_come_back_with_the_answer<S: Subject>(subject: S) {
    let mut references = references("charge", "ch_\"1\"\\ü");
    references.push("refund", "re_1").unwrap();
    let completion = Completion {
        answer: envelope("made"),
        references,
    };
    comes_back(subject.store(), completion).await;
}

pub async fn a_completion_sent_again_succeeds<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let (claim, completion) = answered(store, &request).await;
    let result = store.complete(&claim, &completion).await;
    result.expect("its own record is found");
    assert_eq!(completed(store, &request).await.answer, completion.answer);
}

pub async fn a_completion_with_a_foreign_token_is_refused_and_changes_nothing<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    let forged = completion("forged");
    must_be_refused(store.complete(&foreign(&claim), &forged).await);
    must_be_held_by(store, &claim, &request).await;
}

pub async fn a_completed_record_is_not_overwritten_by_a_foreign_token<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let (claim, original) = answered(store, &request).await;
    let forged = completion("forged");
    must_be_refused(store.complete(&foreign(&claim), &forged).await);
    assert_eq!(completed(store, &request).await.answer, original.answer);
}

pub async fn a_completion_of_an_absent_record_is_refused_and_makes_none<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    store.release(&claim).await.unwrap();
    must_be_refused(store.complete(&claim, &completion("late")).await);
    assert!(lookup(store, &request).await.is_none());
}

pub async fn a_completion_after_the_lease_is_over_wins_if_nobody_took_over<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    subject.age(LEASE * 2).await;
    let late = completion("late");
    store.complete(&claim, &late).await.unwrap();
    assert_eq!(completed(store, &request).await.answer, late.answer);
}
