//! What has to be so when everything is over.

use std::collections::BTreeMap;

use sqlx::PgPool;

/// How often each key stands where it has to stand once.
const COUNTED: [(&str, &str); 4] = [
    ("ledger", "select key, count(*) from ledger group by key"),
    (
        "record",
        "select key, count(*) from idempotency.record where state = 'completed' group by key",
    ),
    (
        "outbox",
        "select payload ->> 'key', count(*) from idempotency.outbox group by 1",
    ),
    ("effect", "select key, count(*) from effect group by key"),
];

/// Each of what these find is a violation.
const WRONG: [(&str, &str); 7] = [
    (
        "the charge and its answer were written by two transactions",
        "select ledger.key from ledger join idempotency.record using (key)
         where ledger.xmin <> record.xmin",
    ),
    (
        "the message tells of another charge than the ledger",
        "select payload ->> 'key' from idempotency.outbox
         left join ledger on charge::text = payload ->> 'charge' and key = payload ->> 'key'
         where charge is null",
    ),
    (
        "the message is not of the operation that has the record",
        "select payload ->> 'key' from idempotency.outbox
         left join idempotency.record on record.id = operation_id and key = payload ->> 'key'
         where key is null",
    ),
    (
        "the effect is of no message",
        "select effect.key from effect left join idempotency.outbox on outbox.id::text = message
         where outbox.id is null",
    ),
    (
        "the message was not sent",
        "select payload ->> 'key' from idempotency.outbox where state <> 'sent'",
    ),
    (
        "the record is not completed",
        "select key from idempotency.record where state <> 'completed'",
    ),
    (
        "the message was taken in without an effect",
        "select message_id from idempotency.inbox left join effect on message = message_id
         where message is null",
    ),
];

const UNSENT: &str = "select count(*) from idempotency.outbox where state = 'pending'";

/// Sessions that hold what nobody will finish.
const LEFT_OPEN: &str = "
select (select count(*) from pg_stat_activity
        where datname = current_database() and state like 'idle in transaction%')
    + (select count(*) from pg_locks where locktype = 'advisory')";

/// What stands in the database.
pub(crate) struct Books {
    /// All rows of the ledger, of the outbox and of the effects.
    pub(crate) ledger: i64,
    pub(crate) outbox: i64,
    pub(crate) effects: i64,
    pub(crate) violations: Vec<String>,
}

/// Looks at everything.
pub(crate) async fn audit(
    pool: &PgPool,
    keys: impl Iterator<Item = String>,
) -> Result<Books, sqlx::Error> {
    let mut counts: BTreeMap<&str, BTreeMap<String, i64>> = BTreeMap::new();
    for (table, sql) in COUNTED {
        let rows: Vec<(Option<String>, i64)> = sqlx::query_as(sql).fetch_all(pool).await?;
        let rows = rows.into_iter();
        let rows = rows.map(|(key, count)| (key.unwrap_or_default(), count));
        counts.insert(table, rows.collect());
    }
    let total = |table| counts[table].values().sum();
    let mut books = Books {
        ledger: total("ledger"),
        outbox: total("outbox"),
        effects: total("effect"),
        violations: Vec::new(),
    };
    for key in keys {
        let found = |table| counts[table].get(&key).copied().unwrap_or(0);
        let found = COUNTED.map(|(table, _)| (table, found(table)));
        if found.iter().any(|(_, count)| *count != 1) {
            books.violations.push(format!("key {key}: {found:?}"));
        }
        for rows in counts.values_mut() {
            rows.remove(&key);
        }
    }
    for (table, rows) in counts {
        let strangers = rows.keys();
        let strangers = strangers.map(|key| format!("key {key}: nobody sent it: {table}"));
        books.violations.extend(strangers);
    }
    for (what, sql) in WRONG {
        let keys: Vec<Option<String>> = sqlx::query_scalar(sql).fetch_all(pool).await?;
        let keys = keys.into_iter().map(Option::unwrap_or_default);
        books
            .violations
            .extend(keys.map(|key| format!("key {key}: {what}")));
    }
    Ok(books)
}

/// Messages that wait.
pub(crate) async fn unsent(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(UNSENT).fetch_one(pool).await
}

/// Transactions and locks that nobody will end.
pub(crate) async fn left_open(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar(LEFT_OPEN).fetch_one(pool).await
}
