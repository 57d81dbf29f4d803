//! Group commit: what concurrent callers ask travels together, and each gets its own answer.

use std::future::Future;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use sqlx::{AssertSqlSafe, PgPool};
use tokio::runtime;
use tokio::task::JoinSet;
use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completion, Existing, LeaseRenewal, Renewed,
};
use tower_idempotency::{Envelope, PgStore, References, Store, StoreError, StoreErrorKind};

use super::{Fixture, acquire, backends, claim_of, completion, number, request, sql, until};
use crate::common::fired::fired;

const WRITERS: &str = "application_name like 'tower-idempotency writer %'";

/// Whatever went alone did: the connection for heartbeats has only been set up so far.
const ALONE: &str =
    "application_name ~ '^tower-idempotency [0-9a-f]{8}$' and query not like '%set_config%'";

/// On one thread, all of them are queued before a writer looks: none of them yields for its budget.
async fn at_once<F: Future>(all: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    tokio::task::unconstrained(futures_util::future::join_all(all)).await
}

async fn claim_all(store: &PgStore, keys: &[String]) -> Vec<Result<Claimed, StoreError>> {
    let claims = keys.iter().map(|key| {
        let (store, request) = (store.clone(), request(key));
        async move { store.claim(&request).await }
    });
    at_once(claims).await
}

fn keys(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("key-{n}")).collect()
}

fn acquired(claimed: &[Result<Claimed, StoreError>]) -> usize {
    let is_acquired = |claimed: &&Result<_, _>| matches!(claimed, Ok(Claimed::Acquired(_)));
    claimed.iter().filter(is_acquired).count()
}

/// How many transactions have written the records as they are.
async fn transactions(pool: &PgPool) -> i64 {
    let sql = "select count(distinct xmin::text) from idempotency.record";
    number(pool, sql).await
}

#[tokio::test]
async fn a_hundred_claims_at_once_are_one_transaction_and_their_completions_another() {
    let mut fixture = Fixture::new().await;
    fixture.end_sessions();
    let claimed = claim_all(&fixture.store, &keys(100)).await;
    assert_eq!(acquired(&claimed), 100);
    assert_eq!(transactions(&fixture.pool).await, 1);
    let completions = claimed.into_iter().map(|claimed| async {
        let Ok(Claimed::Acquired(claim)) = claimed else {
            panic!("{claimed:?}");
        };
        fixture.store.complete(&claim, &completion()).await.unwrap();
    });
    at_once(completions).await;
    assert_eq!(transactions(&fixture.pool).await, 1);
    let replayed = claim_all(&fixture.store, &keys(100)).await;
    let is_replay =
        |claimed: &Result<_, _>| matches!(claimed, Ok(Claimed::Existing(Existing::Completed(_))));
    assert!(replayed.iter().all(is_replay), "{replayed:?}");
    assert_eq!(
        number(&fixture.pool, "select count(*) from idempotency.record").await,
        100
    );
    until("the sessions of the migration are over", async || {
        backends(&fixture.pool, ALONE).await == 0
    })
    .await;
}

#[tokio::test]
async fn one_key_many_times_in_one_batch_is_acquired_once() {
    let fixture = Fixture::new().await;
    let same = vec!["same".to_owned(); 100];
    let claimed = claim_all(&fixture.store, &same).await;
    assert_eq!(acquired(&claimed), 1);
    let in_progress = |claimed: &&Result<_, _>| {
        matches!(claimed, Ok(Claimed::Existing(Existing::InProgress { .. })))
    };
    assert_eq!(claimed.iter().filter(in_progress).count(), 99);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn stores_that_claim_the_same_keys_in_opposite_order_never_deadlock() {
    let fixture = Fixture::new().await;
    let stores = [&fixture.pool; 4].map(|pool| PgStore::new(pool.clone()));
    for round in 0..20 {
        let mut claims = JoinSet::new();
        for (index, store) in stores.iter().enumerate() {
            let mut keys: Vec<_> = (0..100).map(|n| format!("{round}-{n}")).collect();
            if index % 2 == 0 {
                keys.reverse();
            }
            let store = store.clone();
            claims.spawn(async move { claim_all(&store, &keys).await });
        }
        let claimed: Vec<_> = claims.join_all().await.into_iter().flatten().collect();
        assert_eq!(acquired(&claimed), 100);
        assert!(claimed.iter().all(Result::is_ok), "{claimed:?}");
    }
    let sql = "select deadlocks from pg_stat_database where datname = current_database()";
    assert_eq!(number(&fixture.pool, sql).await, 0);
}

/// A transaction that has inserted the record of a key, and goes on.
async fn insert_undecided(
    fixture: &Fixture,
    key: &str,
) -> sqlx::Transaction<'static, sqlx::Postgres> {
    let id = request(key).identity.id();
    let mut transaction = fixture.pool.begin().await.unwrap();
    let insert = format!(
        "insert into idempotency.record (id, digest, scope, operation, key, state, token, attempt,
            lost, fingerprint, claimed_at, leased_until, expires_at, sweep_at)
        values ('{id}', '', '', '', '', 'running', '{id}', 1, 'rerun', '', now(), now(), now(), now())"
    );
    let insert = sqlx::raw_sql(AssertSqlSafe(insert));
    insert.execute(&mut *transaction).await.unwrap();
    fired("undecided record");
    transaction
}

#[tokio::test]
async fn c15_a_key_that_is_not_decided_holds_up_only_itself() {
    let fixture = Fixture::new().await;
    let undecided = insert_undecided(&fixture, "key-7").await;
    let claimed = claim_all(&fixture.store, &keys(50)).await;
    assert_eq!(acquired(&claimed), 49);
    let blocked = claimed[7].as_ref().unwrap();
    let is_in_progress = matches!(blocked, Claimed::Existing(Existing::InProgress { .. }));
    assert!(is_in_progress, "{blocked:?}");
    undecided.rollback().await.unwrap();
    acquire(&fixture.store, &request("key-7")).await;
}

async fn a_locked_record_holds_up_only_its_own_completion(fixture: Fixture) {
    let requests: Vec<_> = keys(50).iter().map(|key| request(key)).collect();
    for request in &requests {
        acquire(&fixture.store, request).await;
    }
    let locked = super::locks::lock(&fixture, "key-7").await;
    let complete = |request: &ClaimRequest| {
        let (store, claim) = (fixture.store.clone(), claim_of(request));
        async move { store.complete(&claim, &completion()).await }
    };
    let sql = format!(
        "select sum(pid) from pg_stat_activity where datname = current_database() and {WRITERS}"
    );
    let writer = number(&fixture.pool, &sql).await;
    let completed = at_once(requests.iter().map(complete)).await;
    for (index, completed) in completed.iter().enumerate() {
        let kind = completed.as_ref().err().map(StoreError::kind);
        let expected = (index == 7).then_some(StoreErrorKind::Unavailable);
        assert_eq!(kind, expected, "{index}");
    }
    assert_eq!(number(&fixture.pool, &sql).await, writer);
    locked.rollback().await.unwrap();
    complete(&requests[7]).await.unwrap();
}

#[tokio::test]
async fn c13_a_locked_record_holds_up_only_its_own_completion() {
    a_locked_record_holds_up_only_its_own_completion(Fixture::new().await).await;
}

#[tokio::test]
async fn c13_a_locked_record_holds_up_only_its_own_completion_behind_a_pooler() {
    let mut fixture = Fixture::new().await;
    let builder = PgStore::builder(fixture.pool.clone()).with_pgbouncer(true);
    fixture.store = builder.build();
    a_locked_record_holds_up_only_its_own_completion(fixture).await;
}

#[tokio::test]
async fn what_was_asked_before_a_store_is_closed_is_done() {
    let fixture = Fixture::new().await;
    let claim = acquire(&fixture.store, &request("key")).await;
    let completion = completion();
    let mut completing = std::pin::pin!(fixture.store.complete(&claim, &completion));
    assert!(futures_util::poll!(&mut completing).is_pending());
    let (completed, ()) = tokio::join!(completing, fixture.store.close());
    completed.unwrap();
}

#[tokio::test]
async fn what_the_server_refuses_is_refused_alone() {
    let fixture = Fixture::new().await;
    let mut keys = keys(50);
    // PostgreSQL has no text with it.
    keys[7] = "nul \0".to_owned();
    let claimed = claim_all(&fixture.store, &keys).await;
    assert_eq!(acquired(&claimed), 49);
    assert_eq!(
        claimed[7].as_ref().unwrap_err().kind(),
        StoreErrorKind::Unavailable
    );
}

#[tokio::test]
async fn a_damaged_record_is_damaged_alone() {
    let fixture = Fixture::new().await;
    for request in keys(10).iter().map(|key| request(key)) {
        let claim = acquire(&fixture.store, &request).await;
        fixture.store.complete(&claim, &completion()).await.unwrap();
    }
    let damage = "update idempotency.record set answer = '\\x07' where key = 'key-7'";
    sql(&fixture.pool, damage).await;
    let lookups = keys(10).into_iter().map(|key| {
        let (store, request) = (fixture.store.clone(), request(&key));
        async move { store.lookup(&request.identity, &request.fingerprint).await }
    });
    let found = futures_util::future::join_all(lookups).await;
    for (index, found) in found.iter().enumerate() {
        match (index, found) {
            (7, Err(error)) => assert_eq!(error.kind(), StoreErrorKind::Corrupt),
            (_, Ok(Some(Existing::Completed(_)))) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Ends the writers' connections as often as it finds any, until the work is done.
async fn terminate_writers(pool: &PgPool) -> u64 {
    let sql = "with writer as materialized (
            select pid from pg_stat_activity where datname = current_database()
                and application_name like 'tower-idempotency writer %'
        )
        select count(*) from writer where pg_terminate_backend(pid)";
    let ended = u64::try_from(number(pool, sql).await).unwrap();
    (0..ended).for_each(|_| fired("writer ended"));
    ended
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn c11_a_writer_that_loses_its_connection_loses_no_claim_and_no_answer() {
    let fixture = Fixture::new().await;
    let pool = fixture.pool.clone();
    let killer = tokio::spawn(async move {
        let mut ended = 0;
        while ended < 50 {
            ended += terminate_writers(&pool).await;
        }
    });
    let mut workers = JoinSet::new();
    for worker in 0..16 {
        let store = fixture.store.clone();
        let killer = killer.abort_handle();
        workers.spawn(async move {
            let mut done = 0;
            while !killer.is_finished() {
                let request = request(&format!("{worker}-{done}"));
                let claim = persist(|| store.claim(&request)).await;
                assert!(matches!(claim, Claimed::Acquired(_)), "{claim:?}");
                persist(|| async { store.complete(&claim_of(&request), &completion()).await })
                    .await;
                done += 1;
            }
            done
        });
    }
    let done: i64 = workers.join_all().await.into_iter().sum();
    killer.await.unwrap();
    let completed = "select count(*) from idempotency.record where state = 'completed'";
    assert_eq!(number(&fixture.pool, completed).await, done);
    assert!(done > 0);
}

/// Asks until it is heard, as the layer does.
async fn persist<T, F>(mut ask: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, StoreError>>,
{
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => assert_eq!(error.kind(), StoreErrorKind::Unavailable, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn more_than_the_queue_takes_waits_for_a_place() {
    let fixture = Fixture::new().await;
    let claimed = claim_all(&fixture.store, &keys(5000)).await;
    assert_eq!(acquired(&claimed), 5000);
}

/// A table that nobody counts the records of, and no session of the store, whose plans are yet to be made.
async fn uncounted() -> Fixture {
    let mut fixture = Fixture::new().await;
    let keep_stale = "alter table idempotency.record set (autovacuum_enabled = off)";
    sql(&fixture.pool, keep_stale).await;
    fixture.end_sessions();
    sessions_end(&fixture).await;
    sql(&fixture.pool, "select pg_stat_reset()").await;
    fixture
}

/// What a session did is known at the latest when it ends.
async fn sessions_end(fixture: &Fixture) {
    let sessions = "application_name like 'tower-idempotency%'";
    until("the sessions are over", async || {
        backends(&fixture.pool, sessions).await == 0
    })
    .await;
}

#[tokio::test]
async fn a_table_that_grows_after_the_plans_were_made_is_not_read_from_end_to_end() {
    let fixture = uncounted().await;
    for round in 0..12 {
        let keys: Vec<_> = (0..10).map(|n| format!("{round}-{n}")).collect();
        let requests: Vec<_> = keys.iter().map(|key| request(key)).collect();
        let works = requests.iter().map(|request| async {
            let claim = acquire(&fixture.store, request).await;
            fixture.store.complete(&claim, &completion()).await.unwrap();
            fixture.store.claim(request).await.unwrap();
        });
        join_all(works).await;
    }
    fixture.store.close().await;
    sessions_end(&fixture).await;
    let scans = "select seq_scan from pg_stat_user_tables
        where schemaname = 'idempotency' and relname = 'record'";
    assert_eq!(number(&fixture.pool, scans).await, 0);
    let found = "select idx_scan from pg_stat_user_tables
        where schemaname = 'idempotency' and relname = 'record'";
    assert!(number(&fixture.pool, found).await >= 12 * 20);
}

/// Its statistics say that nothing is in its pages, rather than that nobody has counted.
#[tokio::test]
async fn a_table_that_was_counted_after_all_was_swept_is_not_walked_from_end_to_end() {
    const ROUNDS: usize = 30;
    const AT_ONCE: usize = 20;
    let fixture = uncounted().await;
    let store = &fixture.store;
    let swept = acquire(store, &request("swept")).await;
    store.release(&swept).await.unwrap();
    sql(&fixture.pool, "analyze idempotency.record").await;
    let counted = "select count(*) from pg_class
        where oid = 'idempotency.record'::regclass and reltuples = 0 and relpages > 0";
    assert_eq!(number(&fixture.pool, counted).await, 1);
    let mut claims: Vec<Claim> = Vec::new();
    for round in 0..=ROUNDS {
        let renewal = |claim: &Claim| LeaseRenewal {
            claim: claim.clone(),
            lease: Duration::from_secs(30),
        };
        let renewals: Vec<_> = claims.iter().map(renewal).collect();
        let renewed = store.extend(&renewals).await.unwrap();
        assert_eq!(renewed, vec![Renewed::Kept; claims.len()]);
        // Towards the end, the writers lock what they write before they write it.
        let locked = match round {
            20 => Some(super::locks::lock(&fixture, &format!("{}-0", round - 1)).await),
            _ => None,
        };
        let ends = claims.iter().enumerate().map(async |(index, claim)| {
            if index % 4 == 3 {
                store.release(claim).await
            } else {
                store.complete(claim, &completion()).await
            }
        });
        // Those of the next round come along with them.
        let requests: Vec<_> = (0..AT_ONCE)
            .map(|n| request(&format!("{round}-{n}")))
            .collect();
        let next = requests.iter().map(|request| acquire(store, request));
        let (ended, next) = tokio::join!(join_all(ends), join_all(next));
        let refused = ended.iter().filter(|ended| ended.is_err()).count();
        assert_eq!(refused, usize::from(locked.is_some()), "{ended:?}");
        claims = next;
    }
    store.close().await;
    sessions_end(&fixture).await;
    // Each is locked and renewed, and ended, and before that locked where the writers do so.
    let read = "select idx_tup_read from pg_stat_user_indexes
        where schemaname = 'idempotency' and indexrelname = 'record_pkey'";
    let read = number(&fixture.pool, read).await;
    let records = i64::try_from(ROUNDS * AT_ONCE).unwrap();
    assert!(
        (3 * records..5 * records).contains(&read),
        "{read} of {records}"
    );
}

#[tokio::test]
async fn connections_of_writers_end_with_the_store() {
    let mut fixture = Fixture::new().await;
    claim_all(&fixture.store, &keys(10)).await;
    assert!((1..=4).contains(&backends(&fixture.pool, WRITERS).await));
    fixture.end_sessions();
    until("the writers are gone", async || {
        backends(&fixture.pool, WRITERS).await == 0
    })
    .await;
}

#[tokio::test]
async fn a_closed_store_is_unavailable_at_once() {
    let fixture = Fixture::new().await;
    claim_all(&fixture.store, &keys(10)).await;
    let begun = Instant::now();
    fixture.store.close().await;
    let refused = fixture.store.claim(&request("late")).await.unwrap_err();
    assert_eq!(refused.kind(), StoreErrorKind::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(1));
}

/// Nothing of it waits for a lock, so that nothing of it goes alone.
#[tokio::test]
async fn a_claim_of_a_record_that_is_being_changed_holds_up_no_answer() {
    let mut fixture = Fixture::new().await;
    let requests: Vec<_> = keys(20).iter().map(|key| request(key)).collect();
    for request in &requests {
        acquire(&fixture.store, request).await;
    }
    fixture.end_sessions();
    let mut changing = fixture.pool.begin().await.unwrap();
    let change = "update idempotency.record set refs = refs where key = 'key-0'";
    sqlx::raw_sql(change).execute(&mut *changing).await.unwrap();
    fired("record change");
    let answers = requests[1..].iter().map(|request| {
        let (store, claim) = (fixture.store.clone(), claim_of(request));
        async move { store.complete(&claim, &completion()).await }
    });
    let duplicate = request("key-0");
    let (completed, claimed) = tokio::join!(at_once(answers), fixture.store.claim(&duplicate),);
    assert!(completed.iter().all(Result::is_ok), "{completed:?}");
    let claimed = claimed.unwrap();
    let is_in_progress = matches!(claimed, Claimed::Existing(Existing::InProgress { .. }));
    assert!(is_in_progress, "{claimed:?}");
    until("the sessions of the migration are over", async || {
        backends(&fixture.pool, ALONE).await == 0
    })
    .await;
    changing.rollback().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_are_large_together_are_recorded() {
    let fixture = Fixture::new().await;
    let requests: Vec<_> = keys(64).iter().map(|key| request(key)).collect();
    let works = requests.iter().map(|request| async {
        let claim = acquire(&fixture.store, request).await;
        let answer = Envelope::new(http::Response::new(vec![7; 1 << 20].into()));
        let references = References::default();
        let large = Completion { answer, references };
        fixture.store.complete(&claim, &large).await.unwrap();
    });
    join_all(works).await;
    let completed = "select count(*) from idempotency.record where state = 'completed'";
    assert_eq!(number(&fixture.pool, completed).await, 64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_is_closed_while_it_is_asked() {
    let fixture = Fixture::new().await;
    let mut workers = JoinSet::new();
    for worker in 0..16 {
        let store = fixture.store.clone();
        workers.spawn(async move {
            let mut done = 0;
            while store
                .claim(&request(&format!("{worker}-{done}")))
                .await
                .is_ok()
            {
                done += 1;
            }
            done
        });
    }
    until("it is asked", async || {
        let sql = "select count(*) from idempotency.record";
        number(&fixture.pool, sql).await > 100
    })
    .await;
    let closed = tokio::time::timeout(Duration::from_secs(20), fixture.store.close()).await;
    closed.expect("it is closed");
    assert!(workers.join_all().await.iter().sum::<i32>() > 100);
}

/// Nobody else asks for anything, so that only the caller can look after itself.
#[tokio::test]
async fn a_writer_in_a_runtime_that_does_something_else_is_not_waited_for() {
    let fixture = Fixture::new().await;
    let store = fixture.store.clone();
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let busy = std::thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.unwrap();
        runtime.block_on(claim_all(&store, &keys(1)));
        begun.send(()).unwrap();
        // It is not polled, nor dropped, until then.
        ends.recv().unwrap();
    });
    has_begun.await.unwrap();
    fired("busy runtime");
    let next = request("next");
    let claimed = tokio::time::timeout(Duration::from_secs(5), fixture.store.claim(&next)).await;
    end.send(()).unwrap();
    busy.join().unwrap();
    let claimed = claimed.expect("it is answered").unwrap();
    assert!(matches!(claimed, Claimed::Acquired(_)), "{claimed:?}");
}

#[tokio::test]
async fn a_store_outlives_the_runtime_in_which_its_writer_began() {
    let fixture = Fixture::new().await;
    let store = fixture.store.clone();
    let first = std::thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build().unwrap();
        runtime.block_on(claim_all(&store, &keys(10)))
    });
    let claimed = tokio::task::spawn_blocking(|| first.join().unwrap()).await;
    assert_eq!(acquired(&claimed.unwrap()), 10);
    let next = request("next");
    let claim = persist(|| fixture.store.claim(&next)).await;
    assert!(matches!(claim, Claimed::Acquired(_)), "{claim:?}");
}

/// Whoever asked has taken its claim back meanwhile, and would not hear of this one.
#[tokio::test]
async fn a_claim_that_was_given_up_is_not_sent_after_a_slow_commit() {
    let fixture = Fixture::new().await;
    let (store, pool) = (&fixture.store, &fixture.pool);
    let slow = "create function slow() returns trigger language plpgsql as $$
        begin perform pg_sleep(1.5); return null; end $$;
        create constraint trigger slow after update on idempotency.record deferrable initially deferred
        for each row when (new.key = 'slow' and new.state = 'completed') execute function slow()";
    sql(pool, slow).await;
    let done = [
        acquire(store, &request("locked")).await,
        acquire(store, &request("slow")).await,
    ];
    let mut lock = pool.begin().await.unwrap();
    let lock_it = "select 1 from idempotency.record where key = 'locked' for update";
    sqlx::raw_sql(lock_it).execute(&mut *lock).await.unwrap();

    // All three are in one round: the locked one keeps it from being one statement.
    let asked = request("new");
    let complete = |claim| async move { store.complete(claim, &completion()).await };
    let ends = join_all(done.iter().map(complete));
    let claim = tokio::time::timeout(Duration::from_millis(500), store.claim(&asked));
    let others = async {
        until("the commit to be slow", async || {
            backends(pool, "wait_event = 'PgSleep'").await == 1
        })
        .await;
        until("it to be over", async || {
            backends(pool, "wait_event = 'PgSleep'").await == 0
        })
        .await;
        fired("slow commit");
        lock.rollback().await.unwrap();
    };
    let all = tokio::task::unconstrained(async { tokio::join!(claim, ends, others) });
    let (given_up, ends, ()) = all.await;
    assert!(given_up.is_err(), "{given_up:?}");
    assert!(ends.iter().all(Result::is_ok), "{ends:?}");
    // The writer has come round again.
    acquire(store, &request("next")).await;
    let made = "select count(*) from idempotency.record where key = 'new'";
    assert_eq!(number(pool, made).await, 0);
}

/// Nobody would have any of them before all have come.
#[tokio::test]
async fn large_answers_are_looked_up_alone() {
    let mut fixture = Fixture::new().await;
    let answer = |n: usize| {
        let size = if n < 3 { 70_000 } else { 60_000 };
        vec![u8::try_from(n).unwrap(); size]
    };
    for n in 0..12 {
        let claim = acquire(&fixture.store, &request(&format!("key-{n}"))).await;
        let completion = Completion {
            answer: Envelope::new(http::Response::new(answer(n).into())),
            references: References::default(),
        };
        fixture.store.complete(&claim, &completion).await.unwrap();
    }
    fixture.end_sessions();
    let replayed = claim_all(&fixture.store, &keys(12)).await;
    for (n, replayed) in replayed.into_iter().enumerate() {
        let Ok(Claimed::Existing(Existing::Completed(completed))) = replayed else {
            panic!("{n}: {replayed:?}");
        };
        assert_eq!(completed.answer.body().unwrap(), &answer(n), "{n}");
    }
    let alone = format!("{ALONE} and query like '%from idempotency.record where id = $1'");
    assert_ne!(backends(&fixture.pool, &alone).await, 0);
}
