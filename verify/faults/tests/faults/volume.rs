//! E06: very many records that are over, and a reader that keeps them from being cleaned up.

use std::time::{Duration, Instant};

use faults::client::Pay;
use faults::database::Database;
use faults::fired::fired;
use faults::ledger::Ledger;
use faults::matrix::size;

use crate::{SUBJECT, assert_replays, on_every_store};

on_every_store! {
    e06_claims_go_on_while_very_many_records_are_swept_beside_a_long_reader,
}

const BATCH: u32 = 500;

/// No request may take longer: an order of magnitude more than the slowest seen on a busy machine.
const DEADLINE: Duration = Duration::from_secs(5);

/// Ten records that are over, and then one that is not.
const FILL: &str = "
insert into idempotency.record (id, digest, scope, operation, key, state, token, attempt, lost,
    fingerprint, claimed_at, leased_until, expires_at, sweep_at, answer)
select gen_random_uuid(), decode(md5(n::text) || md5(n::text), 'hex'), 'acme', 'POST /old', n::text,
    'completed', gen_random_uuid(), 1, 'answer', '', now - interval '4 days', now - interval '4 days',
    ends, ends, decode(repeat('00', 200), 'hex')
from (select n, now, now + make_interval(hours => case n % 11 when 0 then 24 else -24 end) as ends
    from generate_series(1, $1) as n, clock_timestamp() as now) as old";

const FILL_SQLITE: &str = "
with recursive numbers (n) as (select 1 union all select n + 1 from numbers where n < ?1)
insert into idempotency_record (id, digest, scope, operation, key, state, token, attempt, lost,
    fingerprint, claimed_at, leased_until, expires_at, sweep_at, answer)
select randomblob(16), randomblob(32), 'acme', 'POST /old', n, 'completed', randomblob(16), 1,
    'answer', '', now - 345600, now - 345600, ends, ends, zeroblob(200)
from (select n, unixepoch() as now, unixepoch() + case n % 11 when 0 then 86400 else -86400 end as ends
    from numbers)";

const COUNT: &str = "select count(*) from idempotency.record";
const COUNT_SQLITE: &str = "select count(*) from idempotency_record";

async fn fill(database: &Database, rows: i64) {
    let filled = match &database.ledger {
        Ledger::Postgres(pool) => {
            let filled = sqlx::query(FILL).bind(rows).execute(pool).await;
            filled.unwrap().rows_affected()
        }
        Ledger::Sqlite(pool) => {
            let filled = sqlx::query(FILL_SQLITE).bind(rows).execute(pool).await;
            filled.unwrap().rows_affected()
        }
    };
    assert_eq!(i64::try_from(filled), Ok(rows));
    fired("bulk load");
}

async fn count(database: &Database) -> i64 {
    let count = match &database.ledger {
        Ledger::Postgres(pool) => sqlx::query_scalar(COUNT).fetch_one(pool).await,
        Ledger::Sqlite(pool) => sqlx::query_scalar(COUNT_SQLITE).fetch_one(pool).await,
    };
    count.unwrap()
}

/// A snapshot of everything, until it is ended.
enum Reader {
    Postgres(sqlx::Transaction<'static, sqlx::Postgres>),
    Sqlite(sqlx::Transaction<'static, sqlx::Sqlite>),
}

impl Reader {
    async fn begin(database: &Database) -> Self {
        let mut reader = match &database.ledger {
            Ledger::Postgres(pool) => {
                const BEGIN: &str = "begin isolation level repeatable read";
                Self::Postgres(pool.begin_with(BEGIN).await.unwrap())
            }
            Ledger::Sqlite(pool) => Self::Sqlite(pool.begin().await.unwrap()),
        };
        reader.count().await;
        fired("long reader");
        reader
    }

    async fn count(&mut self) -> i64 {
        let count = match self {
            Self::Postgres(reader) => sqlx::query_scalar(COUNT).fetch_one(&mut **reader).await,
            Self::Sqlite(reader) => {
                let count = sqlx::query_scalar(COUNT_SQLITE);
                count.fetch_one(&mut **reader).await
            }
        };
        count.unwrap()
    }
}

async fn e06_claims_go_on_while_very_many_records_are_swept_beside_a_long_reader(
    database: Database,
) {
    // SQLite waits for its disk with each batch.
    let share = match &database.ledger {
        Ledger::Postgres(_) => 1,
        Ledger::Sqlite(_) => 10,
    };
    let rows = i64::try_from(size("E06") / share).unwrap();
    let settings = database
        .settings("critical")
        .with(|s| s.store_timeout = Some(10_000));
    let subject = SUBJECT.start(&settings).await;
    let transactional = settings.with(|s| s.transactional = true);
    let transactional = SUBJECT.start(&transactional).await;
    let began = Instant::now();
    fill(&database, rows).await;
    let (live, over) = (rows / 11, rows - rows / 11);
    println!("{rows} records after {:?}", began.elapsed());

    let mut reader = Some(Reader::begin(&database).await);
    let sweeping = database.sweeper(BATCH);
    let (mut sent, mut slowest) = (0, Duration::ZERO);
    while !sweeping.is_finished() {
        for subject in [&subject, &transactional] {
            let pay = Pay::new("");
            let asked = Instant::now();
            let first = pay.send(subject.port).await.unwrap();
            assert_eq!(first.status, 201, "{}", first.text());
            assert_replays(&pay.send(subject.port).await.unwrap(), &first);
            slowest = slowest.max(asked.elapsed());
            sent += 1;
        }
        // What is deleted beside a reader stays where it is, and on SQLite each batch passes over it anew: so
        // much of that as there is in a day of many requests.
        let Some(reading) = &mut reader else { continue };
        let swept = rows + sent - count(&database).await;
        if swept >= over.min(20_000) / 2 {
            assert_eq!(reading.count().await, rows);
            reader = None;
            println!("{swept} beside the reader, after {:?}", began.elapsed());
        }
    }
    let swept = sweeping.await.unwrap();
    println!(
        "{} swept after {:?}; the slowest of {sent} requests and their replays: {slowest:?}",
        swept.deleted,
        began.elapsed()
    );
    assert!(reader.is_none(), "nothing was swept beside the reader");
    assert!(slowest < DEADLINE, "{slowest:?}");
    assert_eq!(i64::try_from(swept.deleted), Ok(over));
    assert_eq!(count(&database).await, live + sent);
    database.is_clean().await;
}
