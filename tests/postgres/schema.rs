//! How the schema is made, and what the table is like.

use std::time::Duration;

use tokio::task::JoinSet;
use tower_idempotency::store::{Existing, Resolution, Within};
use tower_idempotency::{PgStore, Store, TransactionalStore};

use super::common::database::TestDatabase;
use super::{Fixture, acquire, claim_of, completion, number, request, sql, text, until};

/// The files of `migrations/postgres`, in their order.
fn files() -> Vec<String> {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/postgres");
    let mut paths: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    paths.sort();
    let files = paths.iter().map(std::fs::read_to_string);
    files.collect::<Result<_, _>>().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_nodes_that_start_at_once_all_migrate() {
    let database = TestDatabase::create().await;
    let pool = database.pool(1).await;
    let mut nodes = JoinSet::new();
    for _ in 0..8 {
        let store = PgStore::new(pool.clone());
        nodes.spawn(async move { store.migrate().await });
    }
    for migrated in nodes.join_all().await {
        migrated.unwrap();
    }
    let applied = number(&pool, "select count(*) from idempotency._migrations").await;
    assert_eq!(applied, i64::try_from(files().len()).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nodes_of_a_serializable_database_all_migrate() {
    let database = TestDatabase::create().await;
    let name = &database.name;
    let alter =
        format!(r#"alter database "{name}" set default_transaction_isolation = 'serializable'"#);
    sql(&database.pool(1).await, &alter).await;
    let pool = database.pool(8).await;
    let mut nodes = JoinSet::new();
    for _ in 0..8 {
        // The session's settings are the application's here.
        let store = PgStore::builder(pool.clone())
            .with_shared_pool(true)
            .build();
        nodes.spawn(async move { store.migrate().await });
    }
    for migrated in nodes.join_all().await {
        migrated.unwrap();
    }
}

#[tokio::test]
async fn migrating_again_leaves_the_records_alone() {
    let fixture = Fixture::new().await;
    let request = request("key");
    acquire(&fixture.store, &request).await;
    fixture.store.migrate().await.unwrap();
    let found = fixture
        .store
        .lookup(&request.identity, &request.fingerprint);
    assert!(matches!(found.await, Ok(Some(Existing::InProgress { .. }))));
}

#[tokio::test]
async fn a_schema_of_a_newer_version_is_refused_by_name() {
    let fixture = Fixture::new().await;
    sql(
        &fixture.pool,
        r"insert into idempotency._migrations values (99, 'later', now(), true, '\x00', 0)",
    )
    .await;
    let refused = fixture.store.migrate().await.unwrap_err();
    assert!(refused.to_string().contains("migration 99"), "{refused}");
}

/// As `sqlx migrate run --source migrations/postgres` does it, with its own table.
#[tokio::test]
async fn files_that_were_applied_by_the_command_line_are_found_in_place() {
    let database = TestDatabase::create().await;
    let pool = database.pool(1).await;
    sql(
        &pool,
        r"create table _sqlx_migrations (
            version bigint primary key, description text not null,
            installed_on timestamptz not null default now(), success boolean not null,
            checksum bytea not null, execution_time bigint not null);
        insert into _sqlx_migrations values (1, 'record', now(), true, '\x00', 0)",
    )
    .await;
    for file in files() {
        sql(&pool, &file).await;
    }
    let store = PgStore::new(pool);
    let before = request("before");
    acquire(&store, &before).await;
    store.migrate().await.unwrap();
    store.migrate().await.unwrap();
    store
        .complete(&claim_of(&before), &completion())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_migrated_schema_takes_the_files_once_more() {
    let fixture = Fixture::new().await;
    for file in files() {
        sql(&fixture.pool, &file).await;
    }
    acquire(&fixture.store, &request("key")).await;
}

/// Or the handler would run, and its answer could not be recorded.
#[tokio::test]
async fn on_a_schema_of_an_older_version_nothing_is_claimed_and_nothing_begins() {
    let database = TestDatabase::create().await;
    let pool = database.pool(1).await;
    let files = files();
    for file in &files[..files.len() - 1] {
        sql(&pool, file).await;
    }
    let store = PgStore::new(pool.clone());
    let refused = store.claim(&request("key")).await.unwrap_err();
    let limit = Duration::from_secs(10);
    let begun = TransactionalStore::begin(&store, &request("key"), limit).await;
    for refused in [refused, begun.err().unwrap()] {
        assert_eq!(
            refused.kind(),
            tower_idempotency::StoreErrorKind::Unavailable
        );
    }
    let records = number(&pool, "select count(*) from idempotency.record").await;
    assert_eq!(records, 0);
    store.migrate().await.unwrap();
    acquire(&store, &request("key")).await;
}

#[tokio::test]
async fn a_store_without_its_schema_is_unavailable() {
    let database = TestDatabase::create().await;
    let store = PgStore::new(database.pool(1).await);
    let refused = store.claim(&request("key")).await.unwrap_err();
    assert_eq!(
        refused.kind(),
        tower_idempotency::StoreErrorKind::Unavailable
    );
}

/// As a hand that mends records may try.
#[tokio::test]
async fn the_server_refuses_what_no_record_and_no_message_can_be() {
    let fixture = Fixture::new().await;
    acquire(&fixture.store, &request("key")).await;
    for wrong in [
        "update idempotency.record set state = 'done'",
        "update idempotency.record set lost = 'forget'",
        "update idempotency.record set state = 'completed'",
        "insert into idempotency.outbox (id, partition_key, aggregatetype, aggregateid, type, payload, headers, state)
            values (gen_random_uuid(), 'p', 'order', '1', 't', '1', '{}', 'lost')",
        "insert into idempotency.outbox (id, partition_key, aggregatetype, aggregateid, type, payload, headers, state)
            values (gen_random_uuid(), 'p', 'order', '1', 't', '1', '{}', 'sent')",
    ] {
        let refused = sqlx::query(wrong).execute(&fixture.pool).await.unwrap_err();
        let refused = refused.into_database_error().unwrap();
        assert!(refused.is_check_violation(), "{wrong}: {refused}");
    }
}

#[tokio::test]
async fn the_primary_key_is_one_uuid() {
    let fixture = Fixture::new().await;
    let key = text(
        &fixture.pool,
        "select string_agg(a.attname || ' ' || format_type(a.atttypid, null), ', ')
        from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any (i.indkey)
        where i.indrelid = 'idempotency.record'::regclass and i.indisprimary",
    )
    .await;
    assert_eq!(key, "id uuid");
}

#[tokio::test]
async fn no_index_but_the_key_what_is_looked_up_and_the_time_of_the_sweep() {
    let fixture = Fixture::new().await;
    let indexes = text(
        &fixture.pool,
        "select string_agg(indexname, ', ' order by indexname)
        from pg_indexes where schemaname = 'idempotency' and tablename = 'record'",
    )
    .await;
    assert_eq!(
        indexes,
        "record_pkey, record_progress, record_reference, record_sweep_at"
    );
}

#[tokio::test]
async fn pages_are_filled_by_half_for_the_completing_update() {
    let fixture = Fixture::new().await;
    let options = text(
        &fixture.pool,
        "select array_to_string(reloptions, ' ') from pg_class
        where oid = 'idempotency.record'::regclass",
    )
    .await;
    assert!(options.contains("fillfactor=50"), "{options}");
}

#[tokio::test]
async fn answers_are_compressed_with_lz4_where_the_server_has_it() {
    let fixture = Fixture::new().await;
    let has_lz4 = text(
        &fixture.pool,
        "select ('lz4' = any (enumvals))::text from pg_settings
        where name = 'default_toast_compression'",
    )
    .await;
    let compression = text(
        &fixture.pool,
        "select attcompression::text from pg_attribute
        where attrelid = 'idempotency.record'::regclass and attname = 'answer'",
    )
    .await;
    assert_eq!(compression, if has_lz4 == "true" { "l" } else { "" });
}

#[tokio::test]
async fn completing_a_record_that_would_not_be_held_is_a_hot_update() {
    let mut fixture = Fixture::new().await;
    for n in 0..20 {
        let request = request(&n.to_string());
        let claim = acquire(&fixture.store, &request).await;
        fixture.store.complete(&claim, &completion()).await.unwrap();
    }
    let updates = |column| {
        format!(
            "select {column} from pg_stat_user_tables where schemaname = 'idempotency' and relname = 'record'"
        )
    };
    // A session reports what it did when it ends.
    fixture.end_sessions();
    until("the statistics show the updates", async || {
        number(&fixture.pool, &updates("n_tup_upd")).await == 20
    })
    .await;
    assert_eq!(number(&fixture.pool, &updates("n_tup_hot_upd")).await, 20);
}

/// 20,000 completed records far from their end.
async fn filled() -> Fixture {
    filled_with("null", "interval '1 day'").await
}

/// Half of the records made something, a tenth of those the same.
const CHARGES: &str = r#"case when n % 2 = 0
    then format('[["charge","ch_%s"],["batch","b_%s"]]', n, n % 20) end"#;

/// 20,000 completed records, what each noted, and the time that is left of it.
async fn filled_with(refs: &str, left: &str) -> Fixture {
    let fixture = Fixture::new().await;
    sql(
        &fixture.pool,
        &format!(
            r"insert into idempotency.record
            select gen_random_uuid(), '\x00', 's', 'o', n::text, 'completed', gen_random_uuid(), 1,
                'rerun', false, '\x00', now(), now(), now() + {left},
                now() + {left}, {refs}, '\x010000c9'
            from generate_series(1, 20000) as n;
            analyze idempotency.record"
        ),
    )
    .await;
    fixture
}

const SCANNED: &str = "select seq_tup_read from pg_stat_user_tables where relname = 'record'";

#[tokio::test]
async fn finding_by_a_reference_does_not_read_the_whole_table() {
    let mut fixture = filled_with(CHARGES, "interval '1 day'").await;
    sql(&fixture.pool, "select pg_stat_reset()").await;
    let scope = Within::Scope("s");
    for within in [scope, Within::AllScopes] {
        for (kind, id, found) in [("charge", "ch_4", 1), ("batch", "b_4", 10)] {
            let found_now = fixture
                .store
                .find_by_reference(within, kind, id, None, 10)
                .await;
            assert_eq!(found_now.unwrap().len(), found);
        }
    }
    fixture.end_sessions();
    let index = "select idx_scan from pg_stat_user_indexes where indexrelname = 'record_reference'";
    until("the statistics show the scans", async || {
        number(&fixture.pool, index).await >= 4
    })
    .await;
    assert_eq!(number(&fixture.pool, SCANNED).await, 0);
}

#[tokio::test]
async fn sweeping_records_with_references_does_not_read_the_whole_table() {
    let left = "case when n <= 100 then interval '-1 hour' else interval '1 day' end";
    let mut fixture = filled_with(CHARGES, left).await;
    sql(&fixture.pool, "select pg_stat_reset()").await;
    let swept = fixture.store.delete_expired(40).await.unwrap();
    assert_eq!(swept.deleted, 40);
    fixture.end_sessions();
    until("the statistics show the sweep", async || {
        let deleted = "select n_tup_del from pg_stat_user_tables where relname = 'record'";
        number(&fixture.pool, deleted).await == 40
    })
    .await;
    assert_eq!(number(&fixture.pool, SCANNED).await, 0);
}

#[tokio::test]
async fn records_without_references_have_no_entry_in_their_index() {
    let fixture = filled().await;
    let size = "select pg_relation_size('idempotency.record_reference')";
    let empty = number(&fixture.pool, size).await;
    sql(&fixture.pool, "reindex index idempotency.record_reference").await;
    assert_eq!(number(&fixture.pool, size).await, empty);
    // The page of its description, and one without an entry.
    assert_eq!(empty, 2 * 8192);
}

#[tokio::test]
async fn listing_and_sweeping_do_not_read_the_whole_table() {
    let mut fixture = filled().await;
    let held = request("held");
    let claim = acquire(&fixture.store, &held).await;
    let none = tower_idempotency::References::default();
    fixture.store.hold(&claim, &none).await.unwrap();

    let index = "select idx_scan from pg_stat_user_indexes where indexrelname = 'record_sweep_at'";
    sql(&fixture.pool, "select pg_stat_reset()").await;
    assert_eq!(fixture.store.list_held(None, 10).await.unwrap().len(), 1);
    fixture.store.delete_expired(100).await.unwrap();
    fixture.end_sessions();
    until("the statistics show the scans", async || {
        number(&fixture.pool, index).await >= 2
    })
    .await;
    assert_eq!(number(&fixture.pool, SCANNED).await, 0);
    let release = Resolution::Release;
    let resolved = fixture.store.resolve(&held.identity, claim.token, &release);
    resolved.await.unwrap();
}
