//! A07: the process is killed at any moment between and inside the phases of an operation.

use std::collections::BTreeMap;
use std::time::Duration;

use faults::database::Database;
use faults::ledger::Ledger;
use faults::matrix::size;
use faults::random::Random;
use faults::shop::{PHASES, SCHEMA, Settings};
use faults::wait::until;
use sqlx::PgPool;

use crate::kills::{AT_ONCE, Sent, kill_within, replays, retry_until_settled};
use crate::{SHOP, assert_replays, warm};

/// That of a [`Completer`](tower_idempotency::Completer).
const COMPLETER_LEASE: Duration = Duration::from_secs(30);

/// A database with the tables of a shop.
pub(crate) async fn shop() -> (Database, PgPool, Settings) {
    let database = Database::postgres().await;
    let Ledger::Postgres(pool) = &database.ledger else {
        unreachable!("it is PostgreSQL");
    };
    let pool = pool.clone();
    sqlx::raw_sql(SCHEMA).execute(&pool).await.unwrap();
    let settings = Settings {
        store: database.url.clone(),
        lease: 1000,
        completes: None,
        relays: None,
    };
    (database, pool, settings)
}

/// Sends orders and kills the shop, over and over, and until a kill has hit an order after each phase.
async fn kill_and_restart(kills: u64, settings: &Settings, pool: &PgPool) -> Vec<Sent> {
    let mut random = Random::seeded("phases");
    let (mut all, mut hits) = (Vec::new(), BTreeMap::new());
    let (mut left, mut refused) = (kills, 0);
    while left > 0 || !(0..PHASES.len()).all(|phases| hits.contains_key(&phases)) {
        left = left.saturating_sub(1);
        let shop = warm::<AT_ONCE>(vec![SHOP.start(settings).await]).await;
        let shop = shop.into_iter().next().unwrap();
        let mut sent = kill_within(250, shop, &mut random).await;
        for Sent { pay, answer } in &mut sent {
            // A disk that stalls makes a phase wait for its record for too long; a retry finishes it.
            if let Some(refusal) = answer.take_if(|answer| answer.status == 503) {
                assert!(refusal.header("retry-after").is_some());
                refused += 1;
            } else if let Some(answer) = answer {
                assert_eq!(answer.status, 201, "{}", answer.text());
            } else {
                *hits.entry(steps(pool, &pay.key).await.len()).or_insert(0) += 1;
            }
        }
        all.extend(sent);
        let most = 100 * kills;
        assert!(
            all.len() as u64 <= most,
            "{most} orders, hit after {hits:?}"
        );
    }
    println!(
        "kills hit orders by their finished phases {hits:?}; {refused} of {} refused",
        all.len()
    );
    assert!(refused * 20 <= all.len());
    all
}

/// The phases of an order whose writes are committed.
async fn steps(pool: &PgPool, key: &str) -> Vec<String> {
    let steps = sqlx::query_scalar("select name from step where key = $1 order by n");
    steps.bind(key).fetch_all(pool).await.unwrap()
}

async fn number(pool: &PgPool, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(pool).await.unwrap()
}

async fn assert_whole(pool: &PgPool, orders: &[Sent]) {
    for Sent { pay, .. } in orders {
        assert_eq!(steps(pool, &pay.key).await, PHASES);
    }
    let orders = number(pool, "select count(distinct key) from step").await;
    assert_eq!(number(pool, "select count(*) from step").await, 3 * orders);
    assert_eq!(number(pool, "select count(*) from charge").await, orders);
    let again = number(pool, "select count(*) from charge where calls > 1").await;
    println!("{orders} orders, {again} of them charged again under the same key");
    let left = "select count(*) from idempotency.record where progress is not null";
    assert_eq!(number(pool, left).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a07_after_a_kill_in_or_between_phases_a_retry_finishes_each_order_exactly_once() {
    let (database, pool, settings) = shop().await;
    let orders = kill_and_restart(size("A07").max(32), &settings, &pool).await;
    let shop = SHOP.start(&settings).await;
    for Sent { pay, answer } in &orders {
        let settled = retry_until_settled(&shop, pay).await;
        assert_eq!(settled.status, 201, "{}", settled.text());
        if let Some(first) = answer {
            assert_replays(&settled, first);
        }
        replays(&shop, pay, &settled).await;
    }
    assert_whole(&pool, &orders).await;
    database.is_clean().await;
}

/// While clients retry, and two completers beside each other are killed as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a07_after_a_kill_in_or_between_phases_completers_finish_each_order_exactly_once() {
    let (database, pool, settings) = shop().await;
    let settings = Settings {
        completes: Some(50),
        ..settings
    };
    let orders = kill_and_restart(size("A07"), &settings, &pool).await;
    let shops = SHOP.start_all(2, &settings).await;
    let unfinished = "select count(*) from idempotency.record where progress is not null";
    // What a completer was at when it was killed is claimed for its lease, which is as long as `until` waits.
    let is_done = async || (number(&pool, unfinished).await == 0).then_some(());
    let lease = tokio::time::timeout(COMPLETER_LEASE, async {
        while is_done().await.is_none() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    println!(
        "the completers were done within a lease: {}",
        lease.await.is_ok()
    );
    until("the completers to be done", is_done).await;
    // What had begun is finished, though nobody has asked for it again.
    for Sent { pay, .. } in &orders {
        let steps = steps(&pool, &pay.key).await;
        assert!(steps.is_empty() || steps == PHASES, "{steps:?}");
    }
    for Sent { pay, answer } in &orders {
        let settled = retry_until_settled(&shops[0], pay).await;
        assert_eq!(settled.status, 201, "{}", settled.text());
        if let Some(first) = answer {
            assert_replays(&settled, first);
        }
        replays(&shops[1], pay, &settled).await;
    }
    assert_whole(&pool, &orders).await;
    database.is_clean().await;
}
