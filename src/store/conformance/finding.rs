//! How a person finds the record that made something, and sees what it is like.

use http::{HeaderMap, StatusCode};

use super::super::{RecordState, RecordSummary, Resolution, Within};
use super::*;

const ACME: Within<'_> = Within::Scope("acme");

/// The keys of the records that carry a reference.
async fn find(store: &impl Store, within: Within<'_>, kind: &str, id: &str) -> Vec<String> {
    let found = page(store, within, (kind, id), None, 100).await;
    let keys = found.iter().map(|record| record.identity.key().to_owned());
    keys.collect()
}

async fn page(
    store: &impl Store,
    within: Within<'_>,
    (kind, id): (&str, &str),
    after: Option<RecordId>,
    limit: u32,
) -> Vec<RecordSummary> {
    let page = store.find_by_reference(within, kind, id, after, limit);
    page.await.expect("records can be found")
}

async fn inspect(store: &impl Store, request: &ClaimRequest) -> Option<RecordSummary> {
    let found = store.inspect(&request.identity).await;
    found.expect("a record can be inspected")
}

fn made(references: References) -> Completion {
    Completion {
        references,
        ..completion("made")
    }
}

/// A record that was claimed, and completed with a reference.
async fn charged(store: &impl Store, request: &ClaimRequest, charge: &str) -> Claim {
    let claim = acquire(store, request).await;
    let completion = made(references("charge", charge));
    store.complete(&claim, &completion).await.unwrap();
    claim
}

fn in_scope(scope: &str, key: &str) -> ClaimRequest {
    ClaimRequest {
        identity: Identity::new(scope, "POST /charges", key),
        ..request("")
    }
}

pub async fn a_record_is_found_by_its_reference<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = charged(store, &request, "ch_1").await;
    answered(store, &self::request("without any")).await;
    charged(store, &self::request("with another"), "ch_2").await;
    let found = page(store, ACME, ("charge", "ch_1"), None, 10).await;
    assert_eq!(found.len(), 1);
    let status = StatusCode::OK;
    assert_eq!(found[0].identity, request.identity);
    assert_eq!(found[0].state, RecordState::Completed { status });
    assert_eq!(found[0].attempt, 1);
    assert_eq!(found[0].references, references("charge", "ch_1"));
    assert_eq!(found[0].expires_at, claim.expires_at);
    assert_eq!(Some(&found[0]), inspect(store, &request).await.as_ref());
}

pub async fn each_reference_of_a_record_finds_it<S: Subject>(subject: S) {
    let store = subject.store();
    let mut references = References::default();
    for n in 0..16 {
        references.push("charge", &format!("ch_{n}")).unwrap();
    }
    let claim = acquire(store, &request("key")).await;
    store.complete(&claim, &made(references)).await.unwrap();
    for n in 0..16 {
        let found = find(store, ACME, "charge", &format!("ch_{n}")).await;
        assert_eq!(found, ["key"], "by reference {n}");
    }
}

pub async fn a_reference_is_a_kind_and_an_id_and_never_a_part_of_them<S: Subject>(subject: S) {
    let store = subject.store();
    let mut references = references("charge", "ch_1");
    references.push("refund", "re_1").unwrap();
    let claim = acquire(store, &request("key")).await;
    store.complete(&claim, &made(references)).await.unwrap();
    for (kind, id) in [
        ("charge", "re_1"),
        ("ch_1", "charge"),
        ("charge", "ch_"),
        ("charge", "ch_11"),
        ("charge", "CH_1"),
        ("Charge", "ch_1"),
        ("charge", "ch%"),
        ("charge", "ch_1 "),
        ("chargec", "h_1"),
        ("charg", "ech_1"),
    ] {
        let found = find(store, Within::AllScopes, kind, id).await;
        assert!(found.is_empty(), "found by {kind} {id}");
    }
}

pub async fn any_text_can_be_the_kind_and_the_id_of_a_reference<S: Subject>(subject: S) {
    let store = subject.store();
    // Six bytes each in JSON.
    let controls = "\u{1}".repeat(255);
    let unicode = "tenant-ü-\u{1f9ff}-\u{202e}-\u{0301}-日本";
    let texts = [
        &controls,
        unicode,
        r#"'"\%_$1?;--"#,
        "[]",
        "null",
        "a\tb\nc",
    ];
    let mut references = References::default();
    for text in texts {
        references.push(text, text).unwrap();
    }
    let claim = acquire(store, &request("key")).await;
    store.complete(&claim, &made(references)).await.unwrap();
    for text in texts {
        assert_eq!(find(store, ACME, text, text).await, ["key"], "by {text:?}");
    }
}

pub async fn what_cannot_be_a_reference_is_found_nowhere<S: Subject>(subject: S) {
    let store = subject.store();
    charged(store, &request("key"), "ch_1").await;
    let long = "c".repeat(10_000);
    for text in ["", "\0", "ch_1\0", &long] {
        assert!(find(store, ACME, "charge", text).await.is_empty());
        assert!(find(store, ACME, text, "ch_1").await.is_empty());
        let scope = Within::Scope(text);
        assert!(find(store, scope, "charge", "ch_1").await.is_empty());
    }
}

pub async fn a_lookup_within_a_scope_never_shows_another_scope<S: Subject>(subject: S) {
    let store = subject.store();
    charged(store, &in_scope("acme", "a"), "ch_1").await;
    held(store, &in_scope("zenith", "b")).await;
    assert_eq!(find(store, ACME, "charge", "ch_1").await, ["a"]);
    let zenith = Within::Scope("zenith");
    assert_eq!(find(store, zenith, "charge", "ch_1").await, ["b"]);
    for scope in ["Acme", "acm", "acme ", "%", "*", ""] {
        let found = find(store, Within::Scope(scope), "charge", "ch_1").await;
        assert!(found.is_empty(), "found within {scope:?}");
    }
}

pub async fn a_lookup_over_all_scopes_shows_every_one<S: Subject>(subject: S) {
    let store = subject.store();
    for scope in ["acme", "zenith", ""] {
        charged(store, &in_scope(scope, scope), "ch_1").await;
    }
    let mut found = find(store, Within::AllScopes, "charge", "ch_1").await;
    found.sort_unstable();
    assert_eq!(found, ["", "acme", "zenith"]);
}

pub async fn two_records_may_carry_one_reference<S: Subject>(subject: S) {
    let store = subject.store();
    let first = request("first");
    let claim = charged(store, &first, "ch_1").await;
    let second = acquire(store, &request("second")).await;
    let completion = made(references("charge", "ch_1"));
    store.complete(&second, &completion).await.unwrap();
    store.complete(&claim, &completion).await.unwrap();
    let mut found = find(store, ACME, "charge", "ch_1").await;
    found.sort_unstable();
    assert_eq!(found, ["first", "second"]);
}

pub async fn records_are_found_page_by_page_in_the_order_of_their_ids<S: Subject>(subject: S) {
    let store = subject.store();
    let mut all = Vec::new();
    for n in 0..7 {
        let request = request(&format!("key-{n}"));
        charged(store, &request, "ch_1").await;
        all.push(request.identity.id());
    }
    all.sort_unstable();
    let (mut after, mut seen) = (None, Vec::new());
    for expected in [3, 3, 1, 0] {
        let page = page(store, ACME, ("charge", "ch_1"), after, 3).await;
        assert_eq!(page.len(), expected);
        seen.extend(page.iter().map(|record| record.identity.id()));
        after = seen.last().copied();
    }
    assert_eq!(seen, all);
}

pub async fn a_held_record_is_found_by_its_reference<S: Subject>(subject: S) {
    let store = subject.store();
    held(store, &request("key")).await;
    let found = page(store, ACME, ("charge", "ch_1"), None, 10).await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].state, RecordState::Held);
}

pub async fn a_held_record_is_found_however_old_it_is<S: Subject>(subject: S) {
    let store = subject.store();
    held(store, &request("key")).await;
    subject.age(TTL * 10).await;
    store.delete_expired(10).await.unwrap();
    assert_eq!(find(store, ACME, "charge", "ch_1").await, ["key"]);
}

pub async fn an_answer_given_by_a_person_keeps_the_references<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = held(store, &request("key")).await;
    let answer = Resolution::Answer(envelope("by a person"));
    let resolved = store.resolve(&claim.identity, claim.token, &answer).await;
    resolved.unwrap();
    let found = page(store, ACME, ("charge", "ch_1"), None, 10).await;
    must_be!(found[0].state, RecordState::Completed { .. });
}

pub async fn a_late_completion_replaces_the_references_of_the_hold<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = held(store, &request("key")).await;
    let late = made(references("charge", "ch_2"));
    store.complete(&claim, &late).await.unwrap();
    assert_eq!(find(store, ACME, "charge", "ch_2").await, ["key"]);
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
}

pub async fn the_last_word_of_a_held_attempt_replaces_its_references<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = held(store, &request("key")).await;
    let last = references("charge", "ch_2");
    store.hold(&claim, &last).await.unwrap();
    assert_eq!(find(store, ACME, "charge", "ch_2").await, ["key"]);
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
}

pub async fn a_hold_or_completion_without_references_keeps_those_of_the_hold_before<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let claim = held(store, &request("key")).await;
    store.hold(&claim, &References::default()).await.unwrap();
    assert_eq!(find(store, ACME, "charge", "ch_1").await, ["key"]);
    let late = store.complete(&claim, &completion("late")).await;
    late.unwrap();
    assert_eq!(find(store, ACME, "charge", "ch_1").await, ["key"]);
}

pub async fn a_takeover_clears_the_references_of_the_record<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    charged(store, &request, "ch_1").await;
    subject.age(TTL).await;
    let next = again(&request);
    let claim = acquire(store, &next).await;
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
    let running = inspect(store, &next).await.expect("it is there");
    assert_eq!(running.references, References::default());
    store.complete(&claim, &completion("none")).await.unwrap();
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
}

pub async fn a_refused_completion_leaves_no_reference<S: Subject>(subject: S) {
    let store = subject.store();
    let claim = acquire(store, &request("key")).await;
    let forged = made(references("charge", "ch_1"));
    must_be_refused(store.complete(&foreign(&claim), &forged).await);
    must_be_refused(store.hold(&foreign(&claim), &forged.references).await);
    store
        .complete(&claim, &completion("by the owner"))
        .await
        .unwrap();
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
}

pub async fn a_released_record_is_not_found<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    store.release(&claim).await.unwrap();
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
    assert!(inspect(store, &request).await.is_none());
    acquire(store, &again(&request)).await;
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
}

pub async fn a_record_that_a_person_released_is_not_found<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = held(store, &request).await;
    let resolved = store.resolve(&claim.identity, claim.token, &Resolution::Release);
    resolved.await.unwrap();
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
    assert!(inspect(store, &request).await.is_none());
}

pub async fn a_reference_is_over_with_the_retention_of_its_record<S: Subject>(subject: S) {
    let store = subject.store();
    charged(store, &request("key"), "ch_1").await;
    subject.age(TTL - LEASE).await;
    assert_eq!(find(store, ACME, "charge", "ch_1").await, ["key"]);
    subject.age(LEASE).await;
    // Swept or not.
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
}

pub async fn a_record_that_is_claimed_anew_has_none_of_the_old_references<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    charged(store, &request, "ch_1").await;
    subject.age(TTL).await;
    assert_eq!(store.delete_expired(10).await.unwrap().deleted, 1);
    charged(store, &again(&request), "ch_2").await;
    assert!(find(store, ACME, "charge", "ch_1").await.is_empty());
    assert_eq!(find(store, ACME, "charge", "ch_2").await, ["key"]);
}

pub async fn a_swept_record_is_not_found<S: Subject>(subject: S) {
    let store = subject.store();
    for n in 0..5 {
        charged(store, &request(&n.to_string()), "ch_1").await;
    }
    subject.age(TTL).await;
    let kept = request("kept");
    charged(store, &kept, "ch_1").await;
    assert_eq!(store.delete_expired(10).await.unwrap().deleted, 5);
    assert_eq!(find(store, ACME, "charge", "ch_1").await, ["kept"]);
}

pub async fn an_inspection_shows_what_a_running_record_is_like<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    let claim = acquire(store, &request).await;
    let found = inspect(store, &request).await.expect("it is there");
    assert_eq!(found.identity, request.identity);
    assert_eq!(found.identity.scope(), "acme");
    assert_eq!(found.identity.operation(), "POST /charges");
    assert_eq!(found.identity.key(), "key");
    assert_eq!(found.state, RecordState::Running);
    assert_eq!(found.attempt, 1);
    assert_eq!(found.references, References::default());
    assert_eq!(found.expires_at, claim.expires_at);
    let kept = found.expires_at.duration_since(found.claimed_at);
    let kept = kept.expect("a record expires after it was claimed");
    assert!(kept < TTL + TICK && TTL < kept + TICK, "kept {kept:?}");
}

async fn status_of(store: &impl Store, key: &str, answer: Envelope) -> RecordState {
    let request = request(key);
    let claim = acquire(store, &request).await;
    let references = References::default();
    let completion = Completion { answer, references };
    store.complete(&claim, &completion).await.unwrap();
    let found = inspect(store, &request).await;
    found.expect("it is there").state
}

pub async fn an_inspection_shows_the_status_of_the_answer<S: Subject>(subject: S) {
    for status in [StatusCode::CREATED, StatusCode::PAYMENT_REQUIRED] {
        let mut answer = Response::new(Bytes::from_static(b"body"));
        *answer.status_mut() = status;
        let answer = Envelope::new(answer);
        let shown = status_of(subject.store(), status.as_str(), answer).await;
        assert_eq!(shown, RecordState::Completed { status });
    }
}

pub async fn an_inspection_shows_the_status_of_a_tombstone<S: Subject>(subject: S) {
    let status = StatusCode::CREATED;
    let tombstone = Envelope::tombstone(status, &HeaderMap::new());
    let shown = status_of(subject.store(), "key", tombstone).await;
    assert_eq!(shown, RecordState::Completed { status });
}

pub async fn an_inspection_shows_that_a_record_is_held<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    held(store, &request).await;
    subject.age(TTL).await;
    let found = inspect(store, &request).await.expect("it is there");
    assert_eq!(found.state, RecordState::Held);
    assert_eq!(found.references, references("charge", "ch_1"));
}

pub async fn an_inspection_counts_attempts<S: Subject>(subject: S) {
    let store = subject.store();
    let request = request("key");
    acquire(store, &request).await;
    subject.age(LEASE).await;
    acquire(store, &again(&request)).await;
    let found = inspect(store, &request).await.expect("it is there");
    assert_eq!((found.state, found.attempt), (RecordState::Running, 2));
}

pub async fn an_inspection_finds_what_a_lookup_finds<S: Subject>(subject: S) {
    let store = subject.store();
    assert!(inspect(store, &request("absent")).await.is_none());
    let (completed, lost) = (request("completed"), request("lost"));
    let to_be_held = request_with("to be held", Lost::Hold);
    answered(store, &completed).await;
    acquire(store, &lost).await;
    acquire(store, &to_be_held).await;
    for by in [Duration::ZERO, TTL - LEASE, LEASE] {
        subject.age(by).await;
        for request in [&completed, &lost, &to_be_held] {
            let is_found = inspect(store, request).await.is_some();
            assert_eq!(is_found, lookup(store, request).await.is_some());
        }
    }
    assert!(inspect(store, &completed).await.is_none());
    assert!(inspect(store, &to_be_held).await.is_some());
}

pub async fn an_inspection_that_meets_another_identity_under_its_id_is_corrupt<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let first = request("first");
    answered(store, &first).await;
    let second = identity("second").with_id(first.identity.id());
    let found = store.inspect(&second).await;
    assert_eq!(kind(found), StoreErrorKind::Corrupt);
}
