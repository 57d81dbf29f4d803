//! Calls that are dropped half-way.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tower_idempotency::store::ClaimRequest;
use tower_idempotency::{PgStore, References, Store};

use super::{Fixture, acquire, backends, claim_of, completion, renewal, request, until};

/// Polls a future up to `polls` times, then drops it; whether it was done before.
async fn cancel_after<F: Future>(polls: usize, future: F) -> bool {
    let mut future = pin!(future);
    let mut count = 0;
    poll_fn(|context| {
        count += 1;
        match future.as_mut().poll(context) {
            Poll::Ready(_) => Poll::Ready(true),
            Poll::Pending if count >= polls => {
                crate::common::fired::fired("cancelled");
                Poll::Ready(false)
            }
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Cancels a call at each point at which it can be, until it ran to its end several times in a row:
/// how often it waits depends on how fast the server is.
async fn cancel_everywhere(
    fixture: &Fixture,
    pooled: bool,
    call: impl AsyncFn(&PgStore, usize) -> bool,
) {
    let builder = PgStore::builder(fixture.pool.clone()).with_pgbouncer(pooled);
    let store = builder.with_max_connections(1).unwrap().build();
    let (mut cancelled, mut done_in_a_row) = (0, 0);
    for polls in 1..300 {
        if call(&store, polls).await {
            done_in_a_row += 1;
        } else {
            (cancelled, done_in_a_row) = (cancelled + 1, 0);
        }
        // A poisoned connection would show here: there is only one.
        let probe = request(&format!("probe-{polls}"));
        let claim = acquire(&store, &probe).await;
        store.release(&claim).await.unwrap();
        if done_in_a_row == 3 {
            break;
        }
    }
    assert!(cancelled > 0, "nothing was cancelled");
    assert_eq!(done_in_a_row, 3, "the call never finishes");
    until("nothing is left in a transaction", async || {
        backends(&fixture.pool, "state like 'idle in transaction%'").await == 0
    })
    .await;
}

fn nth(polls: usize) -> ClaimRequest {
    request(&polls.to_string())
}

#[tokio::test]
async fn b08_a_claim_cancelled_at_any_point_leaves_the_pool_whole() {
    let fixture = Fixture::new().await;
    for pooled in [false, true] {
        cancel_everywhere(&fixture, pooled, async |store, polls| {
            let request = ClaimRequest {
                identity: nth(polls + 1000 * usize::from(pooled)).identity,
                ..nth(polls)
            };
            let done = cancel_after(polls, store.claim(&request)).await;
            // Whether or not it was made, the same claim sent again is acquired.
            acquire(store, &request).await;
            done
        })
        .await;
    }
}

#[tokio::test]
async fn b08_a_completion_cancelled_at_any_point_leaves_the_pool_whole() {
    let fixture = Fixture::new().await;
    for pooled in [false, true] {
        cancel_everywhere(&fixture, pooled, async |store, polls| {
            let request = nth(polls + 1000 * usize::from(pooled));
            let claim = acquire(store, &request).await;
            let done = cancel_after(polls, store.complete(&claim, &completion())).await;
            store.complete(&claim, &completion()).await.unwrap();
            done
        })
        .await;
    }
}

#[tokio::test]
async fn b08_a_renewal_cancelled_at_any_point_leaves_the_pool_whole() {
    let fixture = Fixture::new().await;
    let held = request("held");
    let claim = acquire(&fixture.store, &held).await;
    // The lost one is asked for once more, in a transaction of its own.
    let due = [renewal(&claim), renewal(&claim_of(&request("lost")))];
    for pooled in [false, true] {
        cancel_everywhere(&fixture, pooled, async |store, polls| {
            cancel_after(polls, store.extend(&due)).await
        })
        .await;
    }
}

#[tokio::test]
async fn b08_other_calls_cancelled_at_any_point_leave_the_pool_whole() {
    let fixture = Fixture::new().await;
    cancel_everywhere(&fixture, false, async |store, polls| {
        let claim = acquire(store, &nth(polls)).await;
        let none = References::default();
        let mut done = cancel_after(polls, store.hold(&claim, &none)).await;
        done &= cancel_after(polls, store.list_held(None, 10)).await;
        done &= cancel_after(polls, store.delete_expired(10)).await;
        done &= cancel_after(polls, store.release(&claim)).await;
        done
    })
    .await;
}

#[tokio::test]
async fn b08_a_migration_cancelled_at_any_point_leaves_the_pool_whole() {
    let fixture = Fixture::new().await;
    cancel_everywhere(&fixture, false, async |store, polls| {
        cancel_after(polls, async { store.migrate().await.unwrap() }).await
    })
    .await;
}

#[tokio::test]
async fn a_cancelled_call_gives_its_place_to_the_next() {
    let fixture = Fixture::new().await;
    let claim = acquire(&fixture.store, &request("key")).await;
    let mut locked = fixture.pool.begin().await.unwrap();
    let lock = sqlx::raw_sql("select 1 from idempotency.record for update");
    lock.execute(&mut *locked).await.unwrap();

    // The sessions of the application wait for as long as it takes.
    let builder = PgStore::builder(fixture.database.pool(1).await);
    let store = builder.with_shared_pool(true).build();
    let completion = completion();
    let stuck = store.complete(&claim, &completion);
    assert!(
        tokio::time::timeout(Duration::from_millis(300), stuck)
            .await
            .is_err()
    );
    // Its backend still waits for the lock, but not in the way of anybody.
    let next = request("next");
    let next = tokio::time::timeout(Duration::from_secs(3), store.claim(&next));
    next.await.unwrap().unwrap();
    locked.rollback().await.unwrap();
}
