//! PostgreSQL: the record is locked for as long as its progress is written, and no longer.

use std::time::Duration;

use axum::http::StatusCode;
use tower_idempotency::store::{
    ClaimRequest, Claimed, CommitError, PhasedStore, Progress, Step, Token,
};
use tower_idempotency::{Fingerprint, Identity, Lost, Policy, References, Store};

use crate::shop::postgres::Shop;
use crate::shop::{Script, Shopping, WHOLE, resuming};
use crate::site::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_heartbeat_keeps_the_lease_while_a_phase_works() {
    let shop = Shop::start().await;
    let script = Script::default();
    let policy = resuming().with_lease(Duration::from_millis(600));
    let node = shop.node(&script, policy).await;
    script.halt_at("in charged");
    let beats = async {
        script.reached().await;
        let store = &shop.store.store;
        let calls = store.calls();
        // Three beats make a lease: after nine the first three leases are over.
        eventually("the heart has beaten", async || store.calls() >= calls + 9).await;
        let other = node.order("").await;
        other.assert_problem(409, "request-in-progress");
        let is_kept = "select leased_until > clock_timestamp() from idempotency.record";
        let is_kept: bool = sqlx::query_scalar(is_kept)
            .fetch_one(&shop.pool)
            .await
            .unwrap();
        assert!(is_kept);
        script.let_go();
    };
    let (answer, ()) = tokio::join!(node.order(""), beats);
    assert_eq!(answer.status, StatusCode::CREATED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t6_a_zombie_in_the_middle_of_a_phase_stops_nobody_and_is_rolled_back() {
    let shop = Shop::start().await;
    let script = Script::default();
    let zombie = shop.node(&script, resuming()).await;
    let node = shop.node(&script, resuming()).await;
    script.halt_at("in charged");
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
    assert_eq!(script.worked("charged"), 2);
    assert_eq!(shop.ledger().await, WHOLE);
}

/// As when one was cancelled while it was committed, and its successor has read too early.
#[tokio::test]
async fn of_two_phases_that_began_with_the_same_progress_one_is_saved() {
    let shop = Shop::start().await;
    let store = shop.store.store.inner();
    let request = ClaimRequest {
        identity: Identity::new("acme", "POST /orders", "order-1"),
        fingerprint: Fingerprint::of_bytes(b"tea"),
        token: Token::random().unwrap(),
        lost: Lost::Rerun,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    };
    let Ok(Claimed::Acquired(claim)) = store.claim(&request).await else {
        panic!("the key is free");
    };
    let limit = Duration::from_secs(30);
    let step = Step {
        before: Progress::default(),
        after: Progress::from_json(Some(r#"[["ordered",1]]"#.into())).unwrap(),
        references: References::default(),
    };
    let first = store.begin_phase(&claim, limit).await.unwrap();
    let second = store.begin_phase(&claim, limit).await.unwrap();
    store.save_phase(first, &claim, &step).await.unwrap();
    let refused = store.save_phase(second, &claim, &step).await;
    assert!(matches!(refused, Err(CommitError::Recorded)), "{refused:?}");
}

/// Cuts the connection of the phase that has stopped, and lets it go on.
async fn cut(shop: &Shop, script: &Script) {
    script.reached().await;
    let cut = "select pg_terminate_backend(pid) from pg_stat_activity
        where state = 'idle in transaction' and datname = current_database()";
    let cut = sqlx::query(cut).execute(&shop.pool).await.unwrap();
    assert_eq!(cut.rows_affected(), 1);
    script.let_go();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phase_whose_connection_is_cut_is_run_again() {
    let shop = Shop::start().await;
    let script = Script::default();
    let node = shop.node(&script, resuming()).await;
    script.halt_at("in charged");
    let (first, ()) = tokio::join!(node.order(""), cut(&shop, &script));
    assert_eq!(first.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(shop.ledger().await, WHOLE);
    assert_eq!(WHOLE.map(|phase| script.worked(phase)), [1, 2, 1]);
}

/// Its work fails of that; the error is not an answer to keep.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phase_whose_work_fails_of_a_cut_connection_is_run_again() {
    let shop = Shop::start().await;
    let script = Script::default();
    let node = shop.node(&script, Policy::critical()).await;
    script.halt_at("in ordered");
    let (first, ()) = tokio::join!(node.order("fail"), cut(&shop, &script));
    assert_eq!(first.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(node.order("").await.status, StatusCode::CREATED);
    assert_eq!(shop.ledger().await, WHOLE);
    assert_eq!(WHOLE.map(|phase| script.worked(phase)), [2, 1, 1]);
}
