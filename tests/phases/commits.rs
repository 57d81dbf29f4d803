//! Commits that nobody hears of.

use axum::http::StatusCode;

use crate::shop::{Ack, Script, Shopping, WHOLE, resuming};

on_both_stores!(
    t6_a_phase_whose_commit_was_not_heard_is_not_run_again,
    t6_a_phase_that_was_rolled_back_unheard_is_run_by_the_next_attempt,
);

async fn t6_a_phase_whose_commit_was_not_heard_is_not_run_again(shop: impl Shopping) {
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    shop.store().set(Ack::Lost);
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(shop.ledger().await, WHOLE);
    assert_eq!(WHOLE.map(|phase| script.worked(phase)), [1; 3]);
}

async fn t6_a_phase_that_was_rolled_back_unheard_is_run_by_the_next_attempt(shop: impl Shopping) {
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    shop.store().set(Ack::Broken);
    let first = node.order("").await;
    assert_eq!(first.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(first.headers["retry-after"], "1");
    shop.store().set(Ack::Heard);
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(shop.ledger().await, WHOLE);
}
