//! Those who wait for what another process runs.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::http::{Request, Response};
use sqlx::postgres::PgListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tower::{Layer, ServiceExt, service_fn};
use tower_idempotency::store::{Claim, ClaimRequest};
use tower_idempotency::{Duplicates, IdempotencyLayer, PgStore, Policy, References, Scope, Store};

use super::{Fixture, acquire, backends, claim_of, completion, number, request, sql, text, until};

/// Longer than anything takes: whoever is not woken fails the test.
const FOR_EVER: Duration = Duration::from_secs(600);
const PATIENCE: Duration = Duration::from_secs(20);

const LISTENING: &str = "application_name = 'tower-idempotency waits'";
const FLAGGED: &str = "select count(*) from idempotency.record where waited";

fn wait(store: &PgStore, request: &ClaimRequest) -> JoinHandle<()> {
    let (store, identity) = (store.clone(), request.identity.clone());
    tokio::spawn(async move { store.wait_for_change(&identity, FOR_EVER).await })
}

async fn flagged(fixture: &Fixture) {
    until("the record is flagged", async || {
        number(&fixture.pool, FLAGGED).await == 1
    })
    .await;
}

async fn woken(waiting: JoinHandle<()>) {
    timeout(PATIENCE, waiting).await.unwrap().unwrap();
}

#[derive(Debug, Clone, Copy)]
enum End {
    Complete,
    Release,
    Hold,
}

impl End {
    async fn of(self, store: &PgStore, claim: &Claim) {
        let none = References::default();
        match self {
            Self::Complete => store.complete(claim, &completion()).await.unwrap(),
            Self::Release => store.release(claim).await.unwrap(),
            Self::Hold => store.hold(claim, &none).await.unwrap(),
        }
    }
}

#[tokio::test]
async fn whoever_waits_for_another_process_is_woken_by_whatever_ends_the_attempt() {
    let fixture = Fixture::new().await;
    let elsewhere = PgStore::new(fixture.pool.clone());
    let pooled = PgStore::builder(fixture.pool.clone()).with_pgbouncer(true);
    let pooled = pooled.build();
    for (n, runs) in [&fixture.store, &pooled].into_iter().enumerate() {
        for end in [End::Complete, End::Release, End::Hold] {
            let request = request(&format!("{n} {end:?}"));
            let claim = acquire(runs, &request).await;
            let waiting = [wait(&elsewhere, &request), wait(&elsewhere, &request)];
            flagged(&fixture).await;
            end.of(runs, &claim).await;
            for waiting in waiting {
                woken(waiting).await;
            }
            sql(&fixture.pool, "delete from idempotency.record").await;
        }
    }
    assert_eq!(backends(&fixture.pool, LISTENING).await, 1);
}

/// The notification of the last, which is flagged, comes after all others there are.
#[tokio::test]
async fn no_notification_is_sent_where_nobody_waits() {
    let fixture = Fixture::new().await;
    let store = &fixture.store;
    let mut listener = PgListener::connect(&fixture.database.url).await.unwrap();
    listener.listen("idempotency_changed").await.unwrap();
    for n in 0..60 {
        let request = request(&n.to_string());
        let claim = acquire(store, &request).await;
        let end = [End::Complete, End::Release, End::Hold][n % 3];
        end.of(store, &claim).await;
    }
    let last = request("last");
    let claim = acquire(store, &last).await;
    let flag = "update idempotency.record set waited = true where key = 'last'";
    sql(&fixture.pool, flag).await;
    store.complete(&claim, &completion()).await.unwrap();
    let first = timeout(PATIENCE, listener.recv()).await.unwrap().unwrap();
    let id = text(
        &fixture.pool,
        "select id::text from idempotency.record where key = 'last'",
    );
    assert_eq!(first.payload(), id.await);
}

#[tokio::test]
async fn a_record_that_ends_while_it_is_flagged_is_looked_at_again_soon() {
    let fixture = Fixture::new().await;
    let request = request("key");
    let claim = acquire(&fixture.store, &request).await;
    fixture.store.complete(&claim, &completion()).await.unwrap();
    woken(wait(&fixture.store, &request)).await;
}

#[tokio::test]
async fn flagging_is_a_hot_update_and_so_is_completing_what_is_flagged() {
    let mut fixture = Fixture::new().await;
    let request = request("key");
    let claim = acquire(&fixture.store, &request).await;
    let waiting = wait(&fixture.store, &request);
    flagged(&fixture).await;
    fixture.store.complete(&claim, &completion()).await.unwrap();
    woken(waiting).await;
    fixture.end_sessions();
    let updates = "select n_tup_upd * 10 + n_tup_hot_upd from pg_stat_user_tables
        where schemaname = 'idempotency' and relname = 'record'";
    until("both updates were HOT", async || {
        number(&fixture.pool, updates).await == 22
    })
    .await;
}

#[tokio::test]
async fn nobody_waits_for_the_disk_to_flag_a_record() {
    let fixture = Fixture::new().await;
    let request = request("key");
    acquire(&fixture.store, &request).await;
    sql(
        &fixture.pool,
        "create table seen (setting text);
        create function note() returns trigger language plpgsql as $$
        begin insert into public.seen values (current_setting('synchronous_commit')); return new; end $$;
        create trigger note before update on idempotency.record
        for each row execute function note()",
    )
    .await;
    let waiting = wait(&fixture.store, &request);
    flagged(&fixture).await;
    assert_eq!(text(&fixture.pool, "select setting from seen").await, "off");
    waiting.abort();
}

#[tokio::test]
async fn a_new_attempt_begins_with_nobody_waiting() {
    let fixture = Fixture::new().await;
    let first = request("key");
    acquire(&fixture.store, &first).await;
    sql(
        &fixture.pool,
        "update idempotency.record set waited = true,
        leased_until = clock_timestamp() - interval '1 second'",
    )
    .await;
    let second = acquire(&fixture.store, &request("key")).await;
    assert_eq!(second.attempt, 2);
    assert_eq!(number(&fixture.pool, FLAGGED).await, 0);
}

#[tokio::test]
async fn over_the_applications_connections_and_a_pooler_nobody_listens() {
    let fixture = Fixture::new().await;
    let request = request("key");
    acquire(&fixture.store, &request).await;
    let builder = || PgStore::builder(fixture.pool.clone());
    let pooled = builder().with_pgbouncer(true).build();
    let shared = builder().with_shared_pool(true).build();
    let limit = Duration::from_millis(300);
    for store in [pooled, shared] {
        let begun = Instant::now();
        store.wait_for_change(&request.identity, limit).await;
        assert!(begun.elapsed() >= limit);
    }
    assert_eq!(number(&fixture.pool, FLAGGED).await, 0);
    assert_eq!(backends(&fixture.pool, LISTENING).await, 0);
}

#[tokio::test]
async fn the_connection_that_listens_ends_with_the_store() {
    let fixture = Fixture::new().await;
    let request = request("key");
    let claim = acquire(&fixture.store, &request).await;
    for close in [true, false] {
        let elsewhere = PgStore::new(fixture.pool.clone());
        let limit = Duration::from_millis(100);
        until("it listens", async || {
            elsewhere.wait_for_change(&request.identity, limit).await;
            backends(&fixture.pool, LISTENING).await == 1
        })
        .await;
        if close {
            elsewhere.close().await;
        } else {
            drop(elsewhere);
        }
        until("nobody listens", async || {
            backends(&fixture.pool, LISTENING).await == 0
        })
        .await;
    }
    fixture.store.complete(&claim, &completion()).await.unwrap();
}

/// One request, to a process of its own, whose handler waits at the gate.
fn order(store: PgStore, gate: Arc<Semaphore>) -> JoinHandle<Response<Body>> {
    let patient = Policy::high().with_duplicates(Duplicates::Wait(PATIENCE));
    let layer = IdempotencyLayer::new(store, Scope::global())
        .with_policy(patient)
        .unwrap();
    let service = layer.layer(service_fn(move |_: Request<Body>| {
        let gate = gate.clone();
        async move {
            gate.acquire().await.unwrap().forget();
            Ok::<_, Infallible>(Response::new(Body::from("tea")))
        }
    }));
    let order = Request::post("/orders").header("idempotency-key", "key");
    let order = order.body(Body::empty()).unwrap();
    tokio::spawn(async move { service.oneshot(order).await.unwrap() })
}

async fn is_replayed(answer: JoinHandle<Response<Body>>) {
    let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
    assert_eq!(answer.headers()["idempotent-replayed"], "true");
    assert_eq!(to_bytes(answer.into_body(), 10).await.unwrap(), "tea");
}

#[tokio::test]
async fn a_duplicate_in_another_process_gets_the_answer_also_when_nobody_listens_any_more() {
    let fixture = Fixture::new().await;
    for is_lost in [false, true] {
        let gate = Arc::new(Semaphore::new(0));
        let first = order(PgStore::new(fixture.pool.clone()), gate.clone());
        until("it runs", async || {
            number(&fixture.pool, "select count(*) from idempotency.record").await == 1
        })
        .await;
        let duplicate = order(PgStore::new(fixture.pool.clone()), gate.clone());
        flagged(&fixture).await;
        if is_lost {
            let end = format!(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity
                where datname = current_database() and {LISTENING}"
            );
            assert_eq!(number(&fixture.pool, &end).await, 1);
        }
        gate.add_permits(1);
        first.await.unwrap();
        is_replayed(duplicate).await;
        until("nobody listens", async || {
            backends(&fixture.pool, LISTENING).await == 0
        })
        .await;
        sql(&fixture.pool, "delete from idempotency.record").await;
    }
}

#[tokio::test]
async fn a_connection_that_is_lost_is_opened_again_while_somebody_waits() {
    let fixture = Fixture::new().await;
    let request = request("key");
    acquire(&fixture.store, &request).await;
    let waiting = wait(&fixture.store, &request);
    flagged(&fixture).await;
    let end = format!(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity
        where datname = current_database() and {LISTENING}"
    );
    assert_eq!(number(&fixture.pool, &end).await, 1);
    until("it is lost", async || {
        backends(&fixture.pool, LISTENING).await == 0
    })
    .await;
    until("it listens again", async || {
        backends(&fixture.pool, LISTENING).await == 1
    })
    .await;
    let claim = claim_of(&request);
    fixture.store.complete(&claim, &completion()).await.unwrap();
    woken(waiting).await;
}
