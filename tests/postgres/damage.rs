//! Records that cannot be read, or are not what they seem.

use tower_idempotency::store::{
    ClaimRequest, Claimed, Completion, Existing, PhasedStore, Resolution, Within,
};
use tower_idempotency::{Identity, RecordId, References, Store, StoreErrorKind};

use super::{Fixture, acquire, completion, request, sql};

/// A completion that made this charge.
fn charge(id: &str) -> Completion {
    let mut references = References::default();
    references.push("charge", id).unwrap();
    Completion {
        references,
        ..completion()
    }
}

#[tokio::test]
async fn x9_a_record_that_cannot_be_read_is_corrupt() {
    for damage in [
        r"answer = '\x00'",
        r"answer = '\xff'::bytea || substr(answer, 2)",
        r"answer = set_byte(answer, 9, get_byte(answer, 9) # 1)",
        r"fingerprint = '\x01'",
        r"fingerprint = ''",
        "refs = '{'",
        r"digest = '\x01'",
        "attempt = -1",
        "expires_at = '-infinity', state = 'held'",
        "expires_at = 'infinity'",
    ] {
        let fixture = Fixture::new().await;
        let request = request("key");
        let claim = acquire(&fixture.store, &request).await;
        fixture.store.complete(&claim, &completion()).await.unwrap();
        let update = format!("update idempotency.record set {damage}");
        sql(&fixture.pool, &update).await;
        let found = fixture.store.claim(&request).await;
        let error = found.expect_err(damage);
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{damage}: {error:?}");
    }
}

#[tokio::test]
async fn a_lease_without_end_is_told_as_corrupt_not_as_over() {
    for end in ["infinity", "-infinity"] {
        let fixture = Fixture::new().await;
        let request = request("key");
        acquire(&fixture.store, &request).await;
        let update = format!("update idempotency.record set leased_until = '{end}'");
        sql(&fixture.pool, &update).await;
        let found = fixture
            .store
            .lookup(&request.identity, &request.fingerprint);
        assert_eq!(found.await.unwrap_err().kind(), StoreErrorKind::Corrupt);
    }
}

#[tokio::test]
async fn a_held_record_that_cannot_be_read_hides_no_other_and_can_be_resolved() {
    let fixture = Fixture::new().await;
    let none = References::default();
    for key in ["refs", "attempt", "claimed_at", "whole"] {
        let claim = acquire(&fixture.store, &request(key)).await;
        fixture.store.hold(&claim, &none).await.unwrap();
    }
    sql(
        &fixture.pool,
        "update idempotency.record set refs = '{' where key = 'refs';
        update idempotency.record set attempt = -1 where key = 'attempt';
        update idempotency.record set claimed_at = 'infinity' where key = 'claimed_at'",
    )
    .await;
    let listed = fixture.store.list_held(None, 10).await.unwrap();
    assert_eq!(listed.len(), 4);
    for held in listed {
        assert_eq!(held.references, none);
        let free = Resolution::Release;
        let resolved = fixture.store.resolve(&held.identity, held.token, &free);
        resolved.await.unwrap();
    }
}

/// Nor one whose id is of other names: whoever asks for what follows it names that of these.
#[tokio::test]
async fn a_page_of_records_that_cannot_be_read_is_not_the_end() {
    let operations = ["POST /charges".to_owned()];
    for (state, damage) in [
        ("running", r"fingerprint = '\xff'"),
        ("running", "key = 'other' || key"),
        ("held", "key = 'other' || key"),
    ] {
        let fixture = Fixture::new().await;
        for key in ["1", "2", "3", "4", "5"] {
            acquire(&fixture.store, &request(key)).await;
        }
        let damage = format!(
            "update idempotency.record set state = '{state}', progress = '[[\"paid\",1]]',
                leased_until = now(), sweep_at = case '{state}' when 'held' then 'infinity' else sweep_at end;
            update idempotency.record set {damage}
            where id <> (select id from idempotency.record order by id desc limit 1)"
        );
        sql(&fixture.pool, &damage).await;
        let list = async |after, limit| -> Vec<_> {
            let store = &fixture.store;
            if state == "held" {
                let held = store.list_held(after, limit).await.unwrap();
                return held.iter().map(|held| held.identity.id()).collect();
            }
            let abandoned = store
                .list_abandoned(&operations, after, limit)
                .await
                .unwrap();
            abandoned
                .iter()
                .map(|abandoned| abandoned.identity.id())
                .collect()
        };
        for limit in 1..=5 {
            let listed = list(None, limit).await;
            assert_eq!(listed.len(), 1, "{damage} {limit}");
            assert!(list(Some(listed[0]), limit).await.is_empty());
        }
    }
}

#[tokio::test]
async fn a_damaged_record_that_made_something_is_told_as_corrupt_not_as_absent() {
    for damage in [
        "attempt = -1",
        r"answer = '\xff'",
        "claimed_at = 'infinity'",
    ] {
        let fixture = Fixture::new().await;
        let request = request("key");
        let claim = acquire(&fixture.store, &request).await;
        let completion = charge("ch_1");
        fixture.store.complete(&claim, &completion).await.unwrap();
        let update = format!("update idempotency.record set {damage}");
        sql(&fixture.pool, &update).await;
        let any = Within::AllScopes;
        let found = fixture
            .store
            .find_by_reference(any, "charge", "ch_1", None, 10);
        let error = found.await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{damage}");
        let error = fixture.store.inspect(&request.identity).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Corrupt, "{damage}");
    }
}

#[tokio::test]
async fn references_that_cannot_be_read_keep_no_record_from_being_written_or_swept() {
    for refs in ["{", "[1]", r#"["a"]"#, r#"[["a\u0000", "b"]]"#, "null"] {
        let fixture = Fixture::new().await;
        let claim = acquire(&fixture.store, &request("key")).await;
        fixture
            .store
            .complete(&claim, &charge("ch_1"))
            .await
            .unwrap();
        let update = format!(
            "update idempotency.record set refs = '{refs}',
            expires_at = now() - interval '1 day', sweep_at = now() - interval '1 day'"
        );
        sql(&fixture.pool, &update).await;
        let swept = fixture.store.delete_expired(10).await.unwrap();
        assert_eq!(swept.deleted, 1, "{refs}");
    }
}

#[tokio::test]
async fn two_identities_under_one_id_are_corrupt_and_the_first_is_left_alone() {
    let fixture = Fixture::new().await;
    let first = request("first");
    let claim = acquire(&fixture.store, &first).await;
    fixture.store.complete(&claim, &completion()).await.unwrap();

    // The same row under the id that another key has.
    let second = Identity::new("acme", "POST /charges", "second");
    let update = format!("update idempotency.record set id = '{}'", second.id());
    sql(&fixture.pool, &update).await;
    let colliding = ClaimRequest {
        identity: second.clone(),
        ..request("second")
    };
    let refused = fixture.store.claim(&colliding).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Corrupt);
    let first = ClaimRequest {
        identity: first.identity.with_id(second.id()),
        ..first
    };
    let found = fixture.store.claim(&first).await.unwrap();
    assert!(matches!(found, Claimed::Existing(Existing::Completed(_))));
}

#[tokio::test]
async fn an_id_is_stored_as_the_uuid_it_shows() {
    let fixture = Fixture::new().await;
    let request = request("01890a5d-ac96-774b-bcce-b302099a8057");
    acquire(&fixture.store, &request).await;
    let id: String = super::text(&fixture.pool, "select id::text from idempotency.record").await;
    assert_eq!(id, RecordId::to_string(&request.identity.id()));
    assert!(id.starts_with("01890a5d-ac96-"), "{id}");
}
