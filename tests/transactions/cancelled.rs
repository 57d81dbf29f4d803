//! B08: a transactional request that is dropped at each point at which it waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use tower::ServiceExt as _;
use tower_idempotency::store::{Begun, ClaimRequest, Completion, Entry, Token, Verdict, Writes};
use tower_idempotency::{
    Detached, Envelope, Fingerprint, Identity, Lost, References, TransactionalStore as _,
};

use crate::bank::postgres::Bank;
use crate::bank::{Banking, Sinks};
use crate::common::cut::Cut;
use crate::site::{Runs, eventually};

fn request(key: &str) -> Request<Body> {
    let request = Request::post("/pay")
        .header("x-tenant", "acme")
        .header("idempotency-key", key);
    request.body(Body::from("a line")).unwrap()
}

async fn open_transactions(bank: &Bank) -> i64 {
    let open = "select count(*) from pg_stat_activity
        where datname = current_database() and state like 'idle in transaction%'";
    sqlx::query_scalar(open)
        .fetch_one(&bank.pool)
        .await
        .unwrap()
}

/// Effects without a record in the same transaction, and records without an effect.
async fn unpaired(bank: &Bank) -> i64 {
    let unpaired = "select count(*) from (select xmin as id from ledger) as effect
        full join (select xmin as id from idempotency.record) as record on record.id = effect.id
        where effect.id is null or record.id is null";
    sqlx::query_scalar(unpaired)
        .fetch_one(&bank.pool)
        .await
        .unwrap()
}

/// How often it waits depends on how fast the server is: a request has to be through this often in a row.
const DONE: usize = 10;

/// After each cut: no transaction is left, and a retry finds the one effect, or makes it.
async fn holds_after_each_cut(
    bank: &Bank,
    layer: impl Fn(usize) -> crate::bank::Layer<tower_idempotency::PgStore>,
    send: impl AsyncFn(axum::Router, usize, &str) -> bool,
) {
    let runs = Runs::free();
    let (mut cuts, mut done_in_a_row, mut executed_again) = (0, 0, 0);
    for polls in 1..200 {
        let router = bank.routes(&runs).route_layer(layer(polls));
        let router = router.with_state(Sinks::default());
        let before = bank.ledger().await;
        let key = format!("key-{polls}");
        let is_cut = send(router, polls, &key).await;
        let retry = async || {
            let router = bank.routes(&runs).route_layer(bank.layer());
            let router = router.with_state(Sinks::default());
            router.oneshot(request(&key)).await.unwrap()
        };
        let mut answer = retry().await;
        eventually("the cut one is over", async || {
            let is_running = answer.status() == StatusCode::CONFLICT;
            if is_running {
                answer = retry().await;
            }
            !is_running
        })
        .await;
        assert_eq!(answer.status(), StatusCode::CREATED, "after {polls} polls");
        let is_replay = answer.headers().contains_key("idempotent-replayed");
        executed_again += usize::from(!is_replay);
        assert_eq!(bank.ledger().await, before + 1, "after {polls} polls");
        assert_eq!(unpaired(bank).await, 0, "after {polls} polls");
        cuts += usize::from(is_cut);
        done_in_a_row = if is_cut { 0 } else { done_in_a_row + 1 };
        if done_in_a_row == DONE {
            break;
        }
    }
    println!("cut {cuts} times, executed again {executed_again} times");
    assert!(cuts > 0, "nothing was cut");
    assert_eq!(done_in_a_row, DONE, "it never finishes");
    eventually("no transaction is open", async || {
        open_transactions(bank).await == 0
    })
    .await;
    // More than the store has connections: one that was lost would be missed.
    let router = bank.routes(&runs).route_layer(bank.layer());
    let router = router.with_state(Sinks::default());
    for n in 0..12 {
        let answer = router.clone().oneshot(request(&format!("after-{n}"))).await;
        assert_eq!(answer.unwrap().status(), StatusCode::CREATED);
    }
}

/// The caller's future: whoever waits for the answer goes away.
#[tokio::test]
async fn b08_a_request_whose_caller_goes_away_at_any_point_holds() {
    for late in [false, true] {
        let bank = Bank::start().await;
        let send = async |router: axum::Router, polls, key: &str| {
            let cut = Cut::new(Box::pin(router.oneshot(request(key))), polls, late);
            cut.await.is_none()
        };
        holds_after_each_cut(&bank, |_| bank.layer(), send).await;
    }
}

/// The task that does the work, as at the end of a runtime: nobody goes on with it.
#[tokio::test]
async fn b08_a_request_whose_task_ends_at_any_point_holds() {
    for late in [false, true] {
        let bank = Bank::start().await;
        let is_cut = Arc::new(AtomicBool::new(false));
        let layer = |polls| {
            let is_cut = is_cut.clone();
            bank.layer().with_spawn_hook(move |task| {
                let is_cut = is_cut.clone();
                Detached::new(async move {
                    let cut = Cut::new(task, polls, late);
                    is_cut.store(cut.await.is_none(), Ordering::SeqCst);
                })
            })
        };
        let send = async |router: axum::Router, _, key: &str| {
            let answer = router.oneshot(request(key)).await.unwrap();
            let is_cut = is_cut.load(Ordering::SeqCst);
            // Where there is an answer it is the one, and otherwise nobody says that there is.
            assert!(is_cut || answer.status() == StatusCode::CREATED);
            is_cut
        };
        holds_after_each_cut(&bank, layer, send).await;
    }
}

on_both_stores!(a_commit_that_is_cancelled_at_any_point_is_what_its_confirmation_says);

/// A record that appears after its transaction was said to be rolled back would be an effect that
/// nobody expects.
async fn a_commit_that_is_cancelled_at_any_point_is_what_its_confirmation_says(bank: impl Banking) {
    let store = bank.store();
    let (mut committed, mut rolled_back) = (0, 0);
    for round in 0..60 {
        let request = claim_request(&format!("key-{round}"));
        let limit = Duration::from_secs(60);
        let begin = async || store.begin(&request, limit).await.unwrap();
        let Begun::Open(transaction) = begin().await else {
            panic!("nobody has it");
        };
        let entry = entry();
        let commit = Cut::new(
            Box::pin(store.commit(transaction, &request, &entry)),
            1 + round % 6,
            false,
        );
        let done = commit.await;
        let mut verdict = store.confirm(&request).await;
        eventually("it is known", async || {
            if verdict.is_err() {
                verdict = store.confirm(&request).await;
            }
            verdict.is_ok()
        })
        .await;
        let verdict = verdict.unwrap();
        let mut after = begin().await;
        eventually("it is over", async || {
            if matches!(after, Begun::Locked) {
                after = begin().await;
            }
            !matches!(after, Begun::Locked)
        })
        .await;
        match (verdict, after) {
            (Verdict::Committed(_), Begun::Recorded) => committed += usize::from(done.is_none()),
            (Verdict::RolledBack, Begun::Open(transaction)) => {
                assert!(done.is_none(), "it was acknowledged");
                rolled_back += 1;
                store.rollback(transaction, request.token).await.unwrap();
            }
            (verdict, _) => panic!(
                "it is otherwise, after {} polls: {verdict:?}",
                1 + round % 6
            ),
        }
    }
    println!("cancelled: {committed} committed, {rolled_back} rolled back");
    assert!(rolled_back > 0, "nothing was cancelled");
}

fn claim_request(key: &str) -> ClaimRequest {
    ClaimRequest {
        identity: Identity::new("acme", "POST /pay", key),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token: Token::random().unwrap(),
        lost: Lost::Hold,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    }
}

fn entry() -> Entry {
    let answer = axum::http::Response::new(bytes::Bytes::from("paid"));
    Entry {
        writes: Writes::Keep,
        held: false,
        completion: Completion {
            answer: Envelope::new(answer),
            references: References::default(),
        },
    }
}
