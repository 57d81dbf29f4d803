//! What a sweep of many records costs, and that it finds all of them.

use std::time::Duration;

use tower_idempotency::store::Swept;
use tower_idempotency::{Lost, PgStore, Store, Sweeper};

use super::{Fixture, acquire, completion, number, request, sql, text, until};

/// Records that are over, one every microsecond.
async fn fill(fixture: &Fixture, records: u32) {
    let fill = format!(
        r"insert into idempotency.record
        select gen_random_uuid(), '\x00', 's', 'o', n::text, 'completed', gen_random_uuid(), 1, 'rerun',
            false, '\x00', over, over, over, over, null, '\x010000c9'
        from (select n, now() - interval '1 hour' + n * interval '1 us' as over
            from generate_series(1, {records}) as n) as old;
        analyze idempotency.record"
    );
    sql(&fixture.pool, &fill).await;
}

fn sweeper(fixture: &Fixture, batch: u32) -> Sweeper<PgStore> {
    Sweeper::new(fixture.store.clone())
        .with_batch(batch)
        .unwrap()
}

/// What is deleted stays in the index as long as the reader may look at it.
#[tokio::test]
async fn a_sweep_does_not_walk_over_what_it_has_deleted_with_each_batch() {
    const RECORDS: u32 = 20_000;
    let mut fixture = Fixture::new().await;
    fill(&fixture, RECORDS).await;
    sql(&fixture.pool, "select pg_stat_reset()").await;
    let reader = fixture.database.pool(1).await;
    let mut reading = reader
        .begin_with("begin isolation level repeatable read")
        .await
        .unwrap();
    let count = sqlx::query_scalar("select count(*) from idempotency.record");
    let count: i64 = count.fetch_one(&mut *reading).await.unwrap();
    assert_eq!(count, i64::from(RECORDS));

    let swept = sweeper(&fixture, 100).sweep().await.unwrap();
    assert_eq!(swept.deleted, u64::from(RECORDS));
    fixture.end_sessions();
    let deleted = "select n_tup_del from pg_stat_user_tables where relname = 'record'";
    until("the statistics show the sweep", async || {
        number(&fixture.pool, deleted).await == i64::from(RECORDS)
    })
    .await;
    let walked = "select idx_tup_read from pg_stat_user_indexes
        where indexrelname = 'record_sweep_at'";
    let walked = number(&fixture.pool, walked).await;
    // Once to find where a batch ends, and once to delete it.
    assert!(walked < 3 * i64::from(RECORDS), "{walked}");
}

#[tokio::test]
async fn the_next_sweep_finds_what_was_locked_when_one_came_by() {
    let fixture = Fixture::new().await;
    fill(&fixture, 5).await;
    let mut locked = fixture.pool.begin().await.unwrap();
    let lock = sqlx::raw_sql("select 1 from idempotency.record where key = '1' for update");
    lock.execute(&mut *locked).await.unwrap();
    let deleted = |deleted| Swept { deleted, held: 0 };
    let sweep = async || fixture.store.delete_expired(2).await.unwrap();
    assert_eq!(sweep().await, deleted(2));
    locked.rollback().await.unwrap();
    assert_eq!(sweep().await, deleted(2));
    assert_eq!(sweep().await, deleted(0), "the walk is at its end");
    assert_eq!(sweep().await, deleted(1), "and begins anew");
    assert_eq!(sweep().await, deleted(0));
}

/// A sweep of two records of three is held up after its snapshot, and before it comes to them, when one of them
/// is claimed again.
async fn left_alone_once_claimed_again(fixture: &Fixture, store: PgStore) {
    fill(fixture, 3).await;
    let slow = "
        create sequence held_up;
        create function hold_up() returns trigger language plpgsql as $$ begin
            if nextval('public.held_up') = 1 then perform pg_sleep(1); end if;
            return null;
        end $$;
        create trigger hold_up before delete on idempotency.record
        for each statement execute function hold_up()";
    sql(&fixture.pool, slow).await;
    let sweep = tokio::spawn(async move { store.delete_expired(2).await.unwrap() });
    until("the sweep is held up", async || {
        number(
            &fixture.pool,
            "select count(*) from held_up where is_called",
        )
        .await
            == 1
    })
    .await;
    let claim = "update idempotency.record set state = 'running', expires_at = now() + interval '1 hour',
        leased_until = now() + interval '1 hour', sweep_at = now() + interval '1 hour' where key = '2'";
    sql(&fixture.pool, claim).await;
    assert!(!sweep.is_finished(), "it was to be held up for longer");
    let swept = sweep.await.unwrap();
    let both = Swept {
        deleted: 2,
        held: 0,
    };
    assert_eq!(swept, both, "the first and the third");
    let left = "select string_agg(key || state, ' ') from idempotency.record";
    assert_eq!(text(&fixture.pool, left).await, "2running");
    let statements = number(&fixture.pool, "select last_value from held_up").await;
    assert_eq!(
        statements, 2,
        "one that met the claim, and one that went around"
    );
}

#[tokio::test]
async fn a_sweep_does_not_delete_what_was_claimed_again_since_it_was_found() {
    let fixture = Fixture::new().await;
    left_alone_once_claimed_again(&fixture, fixture.store.clone()).await;
}

/// There, what has changed since it was found is an error.
#[tokio::test]
async fn a_sweep_goes_around_what_was_claimed_again_in_the_stricter_sessions_of_an_application() {
    let fixture = Fixture::new().await;
    let server = fixture.pool.connect_options().as_ref().clone();
    let strict = server.options([("default_transaction_isolation", "serializable")]);
    let pool = sqlx::postgres::PgPoolOptions::new().connect_lazy_with(strict);
    let isolation = text(&pool, "show transaction_isolation").await;
    assert_eq!(isolation, "serializable");
    let store = PgStore::builder(pool).with_shared_pool(true).build();
    left_alone_once_claimed_again(&fixture, store).await;
}

/// Of four, two are deleted by one statement, and the next, which is to hold the second, fails.
#[tokio::test]
async fn what_a_sweep_has_deleted_is_told_where_it_fails_after_that() {
    let fixture = Fixture::new().await;
    fill(&fixture, 4).await;
    let refuse = "update idempotency.record set state = 'running', lost = 'hold' where key = '2';
        create function refuse() returns trigger language plpgsql as $$
        begin raise exception 'planted'; end $$;
        create trigger refuse before update on idempotency.record
        for each row execute function refuse()";
    sql(&fixture.pool, refuse).await;
    let swept = fixture.store.delete_expired(3).await.unwrap();
    assert_eq!((swept.deleted, swept.held), (2, 0));
    let left = "select string_agg(key, ' ' order by key) from idempotency.record";
    assert_eq!(text(&fixture.pool, left).await, "2 4");
    let failed = fixture.store.delete_expired(3).await.unwrap_err();
    let cause = std::error::Error::source(&failed).map(ToString::to_string);
    assert!(cause.is_some_and(|cause| cause.contains("planted")));
}

/// However many records share a moment, and whatever is to be held among them.
#[tokio::test]
async fn a_batch_takes_no_more_than_it_may() {
    let fixture = Fixture::new().await;
    for moments in [1, 2, 4, 7, 30] {
        for lost in ["false", "n % 5 = 0", "n < 9", "n > 20"] {
            fill(&fixture, 30).await;
            let gather = format!(
                "with old as (
                    select id, key::int as n, min(sweep_at) over () as first from idempotency.record
                )
                update idempotency.record as record set
                    sweep_at = first + n / (30 / {moments}) * interval '1 s',
                    state = case when {lost} then 'running' else 'completed' end,
                    lost = 'hold'
                from old where old.id = record.id"
            );
            sql(&fixture.pool, &gather).await;
            let mut left = 30;
            for batch in [4, 1, 7, 9, 3, 5, 1] {
                let swept = fixture.store.delete_expired(batch).await.unwrap();
                assert_eq!(
                    swept.deleted + swept.held,
                    u64::from(batch),
                    "{moments} {lost}"
                );
                left -= batch;
            }
            assert_eq!(left, 0);
            assert_eq!(
                fixture.store.delete_expired(9).await.unwrap(),
                Swept::default()
            );
            let held = format!(
                "select count(*) from (
                select n from generate_series(1, 30) as n where {lost}) as lost"
            );
            let held = number(&fixture.pool, &held).await;
            let records = "select count(*) from idempotency.record where state = 'held'";
            assert_eq!(number(&fixture.pool, records).await, held);
            sql(&fixture.pool, "truncate idempotency.record").await;
        }
    }
}

#[tokio::test]
async fn a_lock_undoes_nothing_of_a_sweep() {
    let fixture = Fixture::new().await;
    let builder = || PgStore::builder(fixture.pool.clone());
    let stores = [
        builder().build(),
        builder().with_pgbouncer(true).build(),
        builder().with_shared_pool(true).build(),
    ];
    for store in stores {
        fill(&fixture, 8).await;
        let lost = "update idempotency.record set state = 'running', lost = 'hold' where key > '4'";
        sql(&fixture.pool, lost).await;
        let mut locked = fixture.pool.begin().await.unwrap();
        let lock = "select 1 from idempotency.record where key in ('2', '7') for update";
        sqlx::raw_sql(lock).execute(&mut *locked).await.unwrap();
        let swept = |deleted, held| Swept { deleted, held };
        assert_eq!(store.delete_expired(3).await.unwrap(), swept(3, 0));
        assert_eq!(store.delete_expired(3).await.unwrap(), swept(0, 3));
        assert_eq!(store.delete_expired(3).await.unwrap(), swept(0, 0));
        locked.rollback().await.unwrap();
        assert_eq!(store.delete_expired(3).await.unwrap(), swept(1, 1));
        sql(&fixture.pool, "truncate idempotency.record").await;
    }
}

#[tokio::test]
async fn a_sweep_ends_when_nothing_that_is_found_can_be_deleted() {
    let fixture = Fixture::new().await;
    fill(&fixture, 3).await;
    sql(
        &fixture.pool,
        "create function keep() returns trigger language plpgsql as $$ begin return null; end $$;
        create trigger keep before delete on idempotency.record
        for each row execute function keep()",
    )
    .await;
    let sweeper = sweeper(&fixture, 1);
    let sweep = tokio::time::timeout(Duration::from_secs(30), sweeper.sweep());
    assert_eq!(sweep.await.unwrap().unwrap(), Swept::default());
}

#[tokio::test]
async fn a_sweep_ends_when_nothing_is_left_to_delete_or_to_hold() {
    let fixture = Fixture::new().await;
    for n in 0..6 {
        let mut request = request(&n.to_string());
        request.lost = Lost::Hold;
        let claim = acquire(&fixture.store, &request).await;
        if n % 2 == 0 {
            fixture.store.complete(&claim, &completion()).await.unwrap();
        }
    }
    let age = "update idempotency.record set leased_until = leased_until - interval '2 days',
        expires_at = expires_at - interval '2 days', sweep_at = claimed_at - interval '1 day'";
    sql(&fixture.pool, age).await;
    let swept = sweeper(&fixture, 2).sweep().await.unwrap();
    assert_eq!(
        swept,
        Swept {
            deleted: 3,
            held: 3
        }
    );
}

/// By the statement of a batch that is followed by more, and by that of the last one.
#[tokio::test]
async fn a_sweep_does_not_wait_for_the_disk() {
    let fixture = Fixture::new().await;
    fill(&fixture, 5).await;
    // A deferred trigger sees what the commit does.
    sql(
        &fixture.pool,
        "create table seen (setting text);
        create function note() returns trigger language plpgsql as $$
        begin insert into public.seen values (current_setting('synchronous_commit')); return old; end $$;
        create constraint trigger note after delete on idempotency.record
        deferrable initially deferred for each row execute function note()",
    )
    .await;
    let settings = "select string_agg(setting, ' ' order by setting) from seen";
    assert_eq!(fixture.store.delete_expired(4).await.unwrap().deleted, 4);
    assert_eq!(text(&fixture.pool, settings).await, "off off off off");
    assert_eq!(fixture.store.delete_expired(4).await.unwrap().deleted, 1);
    assert_eq!(text(&fixture.pool, settings).await, "off off off off off");
    let claim = acquire(&fixture.store, &request("key")).await;
    fixture.store.release(&claim).await.unwrap();
    assert_eq!(
        text(&fixture.pool, settings).await,
        "off off off off off on"
    );
}

/// In batches that are followed by more, and in the last one.
#[tokio::test]
async fn a_sweep_takes_nothing_that_is_not_over() {
    const KINDS: &str = "update idempotency.record set
        state = case key::int % 7 when 0 then 'completed' when 1 then 'completed' when 6 then 'held' else 'running' end,
        lost = case when key::int % 7 in (4, 5) then 'hold' else 'rerun' end,
        expires_at = expires_at + case key::int % 7 when 1 then interval '1 day' else interval '0' end,
        leased_until = leased_until + case when key::int % 7 in (2, 4) then interval '1 day' else interval '0' end,
        sweep_at = case key::int % 7 when 6 then 'infinity' else sweep_at end";
    for batch in [3, 10, 140] {
        let fixture = Fixture::new().await;
        fill(&fixture, 70).await;
        sql(&fixture.pool, KINDS).await;
        let mut swept = Swept::default();
        for _ in 0..70 {
            let round = fixture.store.delete_expired(batch).await.unwrap();
            assert!(round.deleted + round.held <= u64::from(batch));
            swept.deleted += round.deleted;
            swept.held += round.held;
        }
        let all = Swept {
            deleted: 20,
            held: 10,
        };
        assert_eq!(swept, all, "{batch}");
        let left = "select string_agg(kind || state || count, ' ' order by kind) from (
            select key::int % 7 as kind, state, count(*) from idempotency.record group by 1, 2) as kinds";
        assert_eq!(
            text(&fixture.pool, left).await,
            "1completed10 2running10 4running10 5held10 6held10",
            "{batch}"
        );
    }
}

#[test]
fn a_sweep_pauses_for_less_where_there_are_many_writers() {
    let pool = sqlx::postgres::PgPoolOptions::new();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _entered = runtime.enter();
    let pool = pool.connect_lazy("postgres://localhost/none").unwrap();
    let store = PgStore::new(pool);
    let took = Duration::from_secs(1);
    assert_eq!(store.pause_after_sweep(took), took / 2);
    let one_writer = tower_idempotency::MemoryStore::new();
    assert_eq!(one_writer.pause_after_sweep(took), took);
}
