//! A07: the process is killed at any moment of a transaction, and started again.

use std::collections::BTreeMap;

use faults::database::Database;
use faults::ledger::Ledger;
use faults::matrix::size;
use faults::random::Random;

use super::settings;
use crate::kills::{AT_ONCE, Sent, kill_while_at_work, replays, retry_until_settled};
use crate::{SUBJECT, assert_replays, on_every_store, warm};

on_every_store! {
    a07_a_kill_at_any_moment_leaves_effect_and_answer_or_neither_and_a_retry_finds_the_one,
}

async fn a07_a_kill_at_any_moment_leaves_effect_and_answer_or_neither_and_a_retry_finds_the_one(
    database: Database,
) {
    let settings = settings(&database).with(|s| s.sweep = Some(300));
    let mut random = Random::seeded("transactional");
    let (mut all, mut hits) = (Vec::new(), BTreeMap::new());
    let start = async || warm::<AT_ONCE>(vec![SUBJECT.start(&settings).await]).await;
    let mut subject = start().await.remove(0);
    for _ in 0..size("A07") {
        let sent = kill_while_at_work(subject, &mut random).await;
        for Sent { pay, answer } in &sent {
            let effects = database.effects(&pay.key).await;
            assert!(effects <= 1, "{effects} effects");
            let moment = match (answer, effects) {
                (Some(answer), _) if answer.status != 201 => panic!("{answer:?}"),
                (Some(_), 0) => panic!("it was answered and is gone"),
                (Some(_), _) => "after the answer",
                (None, 0) => "before the commit",
                (None, _) => "between commit and answer",
            };
            *hits.entry(moment).or_insert(0) += 1;
        }
        all.extend(sent);
        subject = start().await.remove(0);
    }
    println!("kills hit requests {hits:?}");
    assert!(
        hits.contains_key("before the commit"),
        "no kill hit a transaction"
    );
    for Sent { pay, answer } in &all {
        let settled = retry_until_settled(&subject, pay).await;
        assert_eq!(settled.status, 201, "{}", settled.text());
        if let Some(first) = answer {
            assert_replays(&settled, first);
        }
        replays(&subject, pay, &settled).await;
        assert_eq!(database.effects(&pay.key).await, 1);
        let runs = database.runs(&pay.key).await;
        assert!(settled.text().contains(&runs[0].execution));
    }
    let (effects, keys) = effects_and_keys(&database).await;
    println!(
        "{effects} effects of {keys} keys, {} of them at a kill",
        all.len()
    );
    assert_eq!(effects, keys);
    database.is_clean().await;
}

async fn effects_and_keys(database: &Database) -> (i64, i64) {
    const KEYS: &str = "select count(distinct key) from ledger";
    let keys = match &database.ledger {
        Ledger::Postgres(pool) => sqlx::query_scalar(KEYS).fetch_one(pool).await,
        Ledger::Sqlite(pool) => sqlx::query_scalar(KEYS).fetch_one(pool).await,
    };
    (database.ledger.count().await.unwrap(), keys.unwrap())
}
