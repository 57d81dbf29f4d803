//! That records of different identities never meet.

use super::*;

async fn are_apart(store: &impl Store, a: Identity, b: Identity) {
    let [a, b] = [a, b].map(|identity| ClaimRequest {
        identity,
        ..request("")
    });
    let first = acquire(store, &a).await;
    let second = acquire(store, &b).await;
    store.complete(&first, &completion("a")).await.unwrap();
    must_be!(lookup(store, &b).await, Some(Existing::InProgress { .. }));
    store.complete(&second, &completion("b")).await.unwrap();
    assert_eq!(completed(store, &a).await.answer, envelope("a"));
    assert_eq!(completed(store, &b).await.answer, envelope("b"));
}

pub async fn two_scopes_never_share_a_record<S: Subject>(subject: S) {
    let identity = |scope: &str| Identity::new(scope, "POST /", "key");
    are_apart(subject.store(), identity("acme"), identity("Acme")).await;
}

pub async fn two_operations_never_share_a_record<S: Subject>(subject: S) {
    let identity = |operation: &str| Identity::new("acme", operation, "key");
    are_apart(subject.store(), identity("POST /a"), identity("POST /a/")).await;
}

pub async fn two_keys_never_share_a_record<S: Subject>(subject: S) {
    let identity = |key: &str| Identity::new("acme", "POST /", key);
    are_apart(subject.store(), identity("key"), identity("KEY")).await;
    are_apart(subject.store(), identity("a%"), identity("ab")).await;
}

pub async fn any_text_can_be_scope_operation_and_key<S: Subject>(subject: S) {
    let store = subject.store();
    let printable: String = (b' '..=b'~').map(char::from).cycle().take(255).collect();
    let unicode = "tenant-ü-\u{1f9ff}-\u{202e}-\u{0301}-日本";
    let texts = [&printable, unicode, r#"'"\%_$1?;--"#, "", "a\tb\nc"];
    for text in texts {
        let request = ClaimRequest {
            identity: Identity::new(text, text, text),
            ..request("")
        };
        held(store, &request).await;
        must_be!(lookup(store, &request).await, Some(Existing::Held));
    }
    let mut listed = Vec::new();
    for record in list(store, None, 10).await {
        assert_eq!(record.identity.scope(), record.identity.key());
        assert_eq!(record.identity.operation(), record.identity.key());
        listed.push(record.identity.key().to_owned());
    }
    listed.sort_unstable();
    let mut texts = texts.map(str::to_owned);
    texts.sort_unstable();
    assert_eq!(listed, texts);
}

/// Two identities with one id, and the first one's answer.
async fn collided(store: &impl Store) -> (ClaimRequest, ClaimRequest, Completion) {
    let first = request("first");
    let (_, completion) = answered(store, &first).await;
    let second = ClaimRequest {
        identity: identity("second").with_id(first.identity.id()),
        ..request("")
    };
    (first, second, completion)
}

pub async fn a_claim_that_meets_another_identity_under_its_id_is_corrupt<S: Subject>(subject: S) {
    let store = subject.store();
    let (first, second, completion) = collided(store).await;
    assert_eq!(kind(store.claim(&second).await), StoreErrorKind::Corrupt);
    assert_eq!(completed(store, &first).await.answer, completion.answer);
}

pub async fn a_lookup_that_meets_another_identity_under_its_id_is_corrupt<S: Subject>(subject: S) {
    let store = subject.store();
    let (first, second, completion) = collided(store).await;
    let found = store.lookup(&second.identity, &second.fingerprint).await;
    assert_eq!(kind(found), StoreErrorKind::Corrupt);
    assert_eq!(completed(store, &first).await.answer, completion.answer);
}

pub async fn a_lost_attempt_of_another_identity_under_the_id_is_not_taken_over<S: Subject>(
    subject: S,
) {
    let store = subject.store();
    let first = request("first");
    let claim = acquire(store, &first).await;
    subject.age(LEASE).await;
    let second = ClaimRequest {
        identity: identity("second").with_id(first.identity.id()),
        ..request("")
    };
    assert_eq!(kind(store.claim(&second).await), StoreErrorKind::Corrupt);
    must_be_held_by(store, &claim, &first).await;
}
