//! What the next attempt finds.

use std::time::Duration;

use axum::http::StatusCode;
use tower_idempotency::store::Resolution;
use tower_idempotency::{Lost, Policy, Store};

use crate::shop::{Node, Script, Shopping, WHOLE, order, resuming};
use crate::site::{Sent, eventually};

on_both_stores!(
    t6_a_lost_attempt_is_resumed_after_its_last_finished_phase,
    t6_a_zombies_phase_is_refused,
    t6_a_zombies_phase_is_refused_before_its_successor_has_done_anything,
    t6_an_answer_that_frees_the_key_keeps_the_finished_phases,
    t6_what_a_person_releases_is_resumed,
    i03_a_call_whose_reply_was_lost_is_made_again_under_the_same_key,
    a_resumed_key_is_bound_to_its_request,
    a_new_operation_under_an_old_key_begins_from_the_start,
    a_policy_that_holds_lost_attempts_holds_those_with_phases,
    a_policy_that_answers_lost_attempts_answers_those_with_phases,
    what_was_noted_before_a_phase_outlives_the_attempt,
    sweeping_leaves_what_can_be_resumed,
);

/// The first attempt of an order ends at this point, and its lease with it.
pub async fn crashed_at(
    shop: &impl Shopping,
    script: &Script,
    point: &'static str,
    policy: Policy,
) -> Node {
    let node = shop.node(script, policy).await;
    script.halt_at(point);
    let crash = async {
        script.reached().await;
        node.crash();
        crate::common::fired::fired("attempt ends");
    };
    let (answer, ()) = tokio::join!(node.order(""), crash);
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    shop.lease_is_over().await;
    node
}

async fn t6_a_lost_attempt_is_resumed_after_its_last_finished_phase(shop: impl Shopping) {
    let points = [
        ("start", [1, 1, 1]),
        ("in ordered", [2, 1, 1]),
        ("after ordered", [1, 1, 1]),
        ("after charge", [1, 1, 1]),
        ("in charged", [1, 2, 1]),
        ("after charged", [1, 1, 1]),
        ("in mailed", [1, 1, 2]),
        ("after mailed", [1, 1, 1]),
    ];
    for (round, (point, worked)) in points.into_iter().enumerate() {
        let script = Script::default();
        let key = format!("order-{round}");
        let node = shop.node(&script, resuming()).await;
        let send = || node.site.send(Sent::order(&key));
        script.halt_at(point);
        let crash = async {
            script.reached().await;
            node.crash();
        };
        tokio::join!(send(), crash);
        shop.lease_is_over().await;
        let resumed = send().await;
        assert_eq!(resumed.status, StatusCode::CREATED, "{point}");
        send().await.assert_replay_of(&resumed);

        assert_eq!(WHOLE.map(|phase| script.worked(phase)), worked, "{point}");
        assert_eq!(script.charges(), 1, "{point}");
        let ledger = shop.ledger().await;
        assert_eq!(ledger[round * 3..], WHOLE, "{point}");
        // What a finished phase returned is what its first run did.
        let run = format!("ordered by run {}", worked[0]);
        assert_eq!(resumed.json()["order"], run, "{point}");
    }
}

async fn t6_a_zombies_phase_is_refused(shop: impl Shopping) {
    let script = Script::default();
    let (zombie, node) = (
        shop.node(&script, resuming()).await,
        shop.node(&script, resuming()).await,
    );
    script.halt_at("after charge");
    let successor = async {
        script.reached().await;
        shop.lease_is_over().await;
        let answer = node.order("").await;
        assert_eq!(answer.status, StatusCode::CREATED);
        script.let_go();
        answer
    };
    let (late, answer) = tokio::join!(zombie.order(""), successor);
    late.assert_replay_of(&answer);
    assert_eq!(script.refused(), ["another attempt has taken over"]);
    assert_eq!(shop.ledger().await, WHOLE);
    zombie.order("").await.assert_replay_of(&answer);
}

async fn t6_a_zombies_phase_is_refused_before_its_successor_has_done_anything(shop: impl Shopping) {
    let script = Script::default();
    let zombie = shop.node(&script, resuming()).await;
    let node = shop.node(&script, resuming()).await;
    script.halt_at("after charge");
    let late = async {
        let late = zombie.order("").await;
        late.assert_problem(409, "request-in-progress");
        assert_eq!(shop.ledger().await, ["ordered"]);
        script.let_go();
    };
    let successor = async {
        script.reached().await;
        shop.lease_is_over().await;
        script.halt_at("start");
        node.order("").await
    };
    let wake = async {
        eventually("both wait", async || script.waiting() == 2).await;
        script.let_go();
    };
    let ((), answer, ()) = tokio::join!(late, successor, wake);
    assert_eq!(answer.status, StatusCode::CREATED);
    assert_eq!(shop.ledger().await, WHOLE);
    assert_eq!(script.refused(), ["another attempt has taken over"]);
}

async fn t6_an_answer_that_frees_the_key_keeps_the_finished_phases(shop: impl Shopping) {
    for policy in [resuming(), Policy::critical(), Policy::high()] {
        let script = Script::default();
        let node = shop.node(&script, policy).await;
        let key = format!("order-{}", shop.ledger().await.len());
        let sent = |code| Sent::order(&key).header("x-code", code);
        let freed = node.site.send(sent("busy")).await;
        assert_eq!(freed.status, StatusCode::SERVICE_UNAVAILABLE);
        let resumed = node.site.send(sent("")).await;
        assert_eq!(resumed.status, StatusCode::CREATED);
        assert_eq!(script.worked("ordered"), 1);
    }
}

async fn t6_what_a_person_releases_is_resumed(shop: impl Shopping) {
    let script = Script::default();
    let node = shop.node(&script, Policy::critical()).await;
    node.order("held").await;
    node.order("").await.assert_problem(409, "outcome-unknown");
    let store = shop.store();
    let held = store.list_held(None, 10).await.unwrap().remove(0);
    let release = store.resolve(&held.identity, held.token, &Resolution::Release);
    release.await.unwrap();
    // The old token is worth nothing any more.
    let again = store.resolve(&held.identity, held.token, &Resolution::Release);
    assert!(again.await.is_err());

    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(script.worked("ordered"), 1);
    assert_eq!(shop.ledger().await, WHOLE);
}

async fn i03_a_call_whose_reply_was_lost_is_made_again_under_the_same_key(shop: impl Shopping) {
    let script = Script::default();
    let node = crashed_at(&shop, &script, "after charge", resuming()).await;
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!((script.calls(), script.charges()), (2, 1));
}

async fn a_resumed_key_is_bound_to_its_request(shop: impl Shopping) {
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    node.order("busy").await;
    let other = node.site.send(order("").body(r#"{"item":"gold"}"#)).await;
    other.assert_problem(409, "key-reused");
    assert_eq!(shop.ledger().await, ["ordered"]);
}

async fn a_new_operation_under_an_old_key_begins_from_the_start(shop: impl Shopping) {
    let script = Script::default();
    let node = crashed_at(&shop, &script, "after ordered", resuming()).await;
    shop.age(Duration::from_secs(72 * 3600)).await;
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    let both = ["ordered", "ordered", "charged", "mailed"];
    assert_eq!(shop.ledger().await, both);
}

async fn a_policy_that_holds_lost_attempts_holds_those_with_phases(shop: impl Shopping) {
    let script = Script::default();
    let node = crashed_at(&shop, &script, "after ordered", Policy::critical()).await;
    node.order("").await.assert_problem(409, "outcome-unknown");
    assert_eq!(shop.ledger().await, ["ordered"]);
    let held = shop.store().list_held(None, 10).await.unwrap().remove(0);
    let noted = [("order".to_owned(), "o_1".to_owned())];
    assert_eq!(held.references.as_slice(), noted);
}

async fn a_policy_that_answers_lost_attempts_answers_those_with_phases(shop: impl Shopping) {
    let script = Script::default();
    let policy = Policy::critical().with_lost(Lost::Answer);
    let node = crashed_at(&shop, &script, "after ordered", policy).await;
    node.order("").await.assert_problem(500, "attempt-lost");
    assert_eq!(shop.ledger().await, ["ordered"]);
    assert_eq!(shop.references().await, r#"[["order","o_1"]]"#);
}

async fn what_was_noted_before_a_phase_outlives_the_attempt(shop: impl Shopping) {
    let script = Script::default();
    let node = crashed_at(&shop, &script, "after ordered", resuming()).await;
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(shop.references().await, r#"[["order","o_1"]]"#);
}

async fn sweeping_leaves_what_can_be_resumed(shop: impl Shopping) {
    let script = Script::default();
    let node = shop.node(&script, Policy::critical()).await;
    node.order("busy").await;
    shop.lease_is_over().await;
    let swept = shop.store().delete_expired(100).await.unwrap();
    assert_eq!((swept.deleted, swept.held), (0, 0));
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(script.worked("ordered"), 1);
}
