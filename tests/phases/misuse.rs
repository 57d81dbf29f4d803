//! Phases that cannot be, and code that changed since.

use axum::http::StatusCode;
use tower_idempotency::Policy;

use crate::shop::{Script, Shopping, WHOLE, resuming};

on_both_stores!(
    a_phase_too_many_is_refused_by_name_and_limit,
    phases_that_save_too_much_are_refused_by_name_limit_and_size,
    a_name_is_of_one_phase_only,
    a_phase_within_a_phase_is_refused,
    a_phase_that_was_renamed_is_refused_and_the_old_code_resumes,
    data_of_another_type_is_refused_and_the_old_code_resumes,
    a_phase_whose_work_fails_is_rolled_back,
    a_phase_that_ends_its_transaction_has_no_recovery_point,
);

/// What an order by this version of the code is refused with.
async fn refused(shop: &impl Shopping, code: &str) -> Vec<String> {
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    let answer = node.order(code).await;
    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
    script.refused()
}

async fn a_phase_too_many_is_refused_by_name_and_limit(shop: impl Shopping) {
    let said = refused(&shop, "many").await;
    assert_eq!(said, ["`phases` must be at most 16: one more was begun"]);
    assert_eq!(shop.ledger().await, ["ordered"]);
}

async fn phases_that_save_too_much_are_refused_by_name_limit_and_size(shop: impl Shopping) {
    let said = refused(&shop, "large").await;
    let said = said[0].strip_prefix("`progress` must be at most 65536 bytes, not 700");
    assert!(said.is_some());
    assert_eq!(shop.ledger().await, ["ordered"]);
}

async fn a_name_is_of_one_phase_only(shop: impl Shopping) {
    let said = refused(&shop, "twice").await;
    assert_eq!(said, ["`name` must be of one phase only: `ordered` is not"]);
    assert_eq!(shop.ledger().await, ["ordered"]);
}

async fn a_phase_within_a_phase_is_refused(shop: impl Shopping) {
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    assert_eq!(node.order("nested").await.status, StatusCode::CREATED);
    let said = script.refused();
    assert_eq!(said, ["another phase of the operation is running"]);
}

/// The order was begun by the code of today; that of tomorrow cannot go on, and is taken back.
async fn deploy(shop: &impl Shopping, code: &str) -> Vec<String> {
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    node.order("busy").await;
    let tomorrow = node.order(code).await;
    assert_eq!(tomorrow.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(shop.ledger().await, ["ordered"]);

    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(shop.ledger().await, WHOLE);
    assert_eq!(script.worked("ordered"), 1);
    script.refused()
}

async fn a_phase_that_was_renamed_is_refused_and_the_old_code_resumes(shop: impl Shopping) {
    let said = deploy(&shop, "renamed").await;
    let diverged = "phase `placed` was asked for where `ordered` was finished before";
    assert_eq!(said, [diverged]);
}

async fn data_of_another_type_is_refused_and_the_old_code_resumes(shop: impl Shopping) {
    let said = deploy(&shop, "retyped").await;
    let retyped = "what phase `ordered` saves is not of the expected type";
    assert_eq!(said, [retyped]);
}

async fn a_phase_whose_work_fails_is_rolled_back(shop: impl Shopping) {
    let said = refused(&shop, "fail").await;
    assert_eq!(said, ["the work of a phase failed"]);
    assert!(shop.ledger().await.is_empty());
    assert_eq!(shop.progress().await, None);
}

async fn a_phase_that_ends_its_transaction_has_no_recovery_point(shop: impl Shopping) {
    // Other failures of such a route free the key.
    let script = Script::default();
    let node = shop.node(&script, Policy::low()).await;
    let ended = node.order("end").await;
    assert_eq!(ended.status, StatusCode::INTERNAL_SERVER_ERROR);
    let said = script.refused();
    assert_eq!(said, ["a phase ended its transaction by itself"]);
    assert_eq!(shop.progress().await, None);
    // What it committed by itself stays, and is not done again.
    assert_eq!(node.order("").await.status, StatusCode::CONFLICT);
    assert_eq!(shop.ledger().await, ["ordered"]);
}
