//! Transactional routes: effect and answer in one transaction, whatever happens to it.

mod cost;
mod crashes;
mod kills;
mod pools;
mod refused;
mod silent;
mod vanished;
mod wire;

use std::collections::HashMap;

use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::process::Subject;
use faults::proxy::{Exchange, Proxy, Traffic};
use faults::settings::Settings;
use faults::wait::until;

use crate::{SUBJECT, assert_code, assert_replays};

const LOOKUP: &str = "from idempotency.record where id = $1";
const BEGIN: &str = "select idempotency.enter(";
const WRITE: &str = "insert into ledger";
const RECORD: &str = "current_setting('idempotency.attempt'";
const COMMIT: &str = "commit and chain";
/// The row by which it is told whether an old transaction has ended.
const PROBE: &str = "'running', $6";

fn settings(database: &Database) -> Settings {
    database.settings("high").with(transactional)
}

/// A busy machine may be slow: where a timeout is the fault, the test says so.
fn transactional(settings: &mut Settings) {
    settings.transactional = true;
    settings.store_timeout = Some(10_000);
    settings.settle_timeout = Some(20_000);
}

/// Of a subject whose store is behind a proxy.
fn settings_behind(proxy: &Proxy, database: &Database) -> Settings {
    Settings::new(proxy.url(), "high").with(|s| {
        s.ledger = database.url.clone();
        transactional(s);
    })
}

async fn behind(proxy: &Proxy, database: &Database, change: impl FnOnce(&mut Settings)) -> Subject {
    let settings = settings_behind(proxy, database).with(change);
    SUBJECT.start(&settings).await
}

/// Retries until there is something else to say than that the first one runs.
async fn settled(pay: &Pay, subject: &Subject) -> Answer {
    until("the first transaction to end", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.kind() != "request-in-progress").then_some(answer)
    })
    .await
}

/// Nothing is left of an attempt, and the next one is executed, once.
async fn runs_afresh(database: &Database, subject: &Subject, pay: &Pay) -> Answer {
    assert_eq!(database.effects(&pay.key).await, 0);
    let first = settled(pay, subject).await;
    assert_eq!(first.status, 201, "{}", first.text());
    assert!(!first.is_replayed());
    took_effect_once(database, subject, pay, &first).await;
    first
}

/// The answer is there for good, with one effect in its transaction, and no transaction is left.
async fn took_effect_once(database: &Database, subject: &Subject, pay: &Pay, first: &Answer) {
    assert_eq!(first.status, 201, "{}", first.text());
    let replay = settled(pay, subject).await;
    assert_replays(&replay, first);
    let runs = database.runs(&pay.key).await;
    assert!(first.text().contains(&runs[0].execution));
    assert_eq!(database.effects(&pay.key).await, 1);
    let other = pay.with_body("{}").send(subject.port).await.unwrap();
    assert_code(&other, "key-reused");
    database.is_clean().await;
}

/// No transaction was begun within another one: how many there were.
fn begins_are_clean(traffic: &Traffic) -> usize {
    let mut last: HashMap<_, &Exchange> = HashMap::new();
    let mut begun = 0;
    let executing = |exchange: &&Exchange| !exchange.executed.is_empty();
    for exchange in traffic.exchanges.iter().filter(executing) {
        let before = last.insert(exchange.connection, exchange);
        if exchange.executes(BEGIN) {
            begun += 1;
            let is_idle = before.is_none_or(|before| before.status.unwrap_or('I') == 'I');
            // It leaves the empty transaction that the end of the last one has begun.
            let has_chained = |before: &Exchange| {
                before.executes("and chain") || before.executes("start transaction")
            };
            let is_handed_over =
                before.is_some_and(has_chained) && exchange.executes("select idempotency.enter($1");
            assert!(is_idle || is_handed_over, "{before:?}, {exchange:?}");
        }
    }
    begun
}
