//! The store behind a PgBouncer in transaction mode: no session is anybody's own.

use std::collections::BTreeMap;

use faults::bouncer::Bouncer;
use faults::client::Pay;
use faults::database::Database;
use faults::matrix::size;
use faults::process::Subject;
use faults::random::Random;
use faults::settings::Settings;
use futures_util::future::join_all;
use sqlx::PgPool;
use tower_idempotency::PgStore;

use super::Route;
use crate::kills::{AT_ONCE, Sent, kill_while_at_work, replays, retry_until_settled};
use crate::{SUBJECT, assert_replays, on_both_routes, warm};

on_both_routes! {
    d16_behind_pgbouncer_duplicates_over_three_processes_execute_once,
    d16_behind_pgbouncer_a_kill_at_any_moment_never_runs_twice_and_answers_are_replayed,
}

struct Pooled {
    settings: Settings,
    database: Database,
    bouncer: Bouncer,
}

impl Pooled {
    async fn start(route: Route) -> Self {
        let database = Database::postgres().await;
        let direct = PgPool::connect(&database.url).await.unwrap();
        PgStore::new(direct).migrate().await.unwrap();
        let bouncer = Bouncer::start(&database.url).await;
        let settings = Settings::new(&bouncer.url, "high").with(|s| {
            s.ledger = database.url.clone();
            s.pgbouncer = true;
            s.migrate = false;
            s.transactional = route == Route::Transactional;
            s.store_timeout = Some(10_000);
            s.settle_timeout = Some(20_000);
            s.lease = Some(1000);
        });
        Self {
            settings,
            database,
            bouncer,
        }
    }

    async fn subjects(&self, count: usize) -> Vec<Subject> {
        warm::<AT_ONCE>(SUBJECT.start_all(count, &self.settings).await).await
    }

    async fn effects(&self, pay: &Pay) -> usize {
        match self.settings.transactional {
            true => self.database.effects(&pay.key).await,
            false => self.database.runs(&pay.key).await.len(),
        }
    }
}

async fn d16_behind_pgbouncer_duplicates_over_three_processes_execute_once(route: Route) {
    let pooled = Pooled::start(route).await;
    let subjects = pooled.subjects(3).await;
    let mut kinds = BTreeMap::new();
    for _ in 0..size("D16") {
        let pay = Pay::new("delay=40");
        let sending = (0..40).map(|n| pay.send(subjects[n % 3].port));
        let answers: Vec<_> = join_all(sending).await;
        let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
        let first = answers
            .iter()
            .filter(|a| a.status == 201 && !a.is_replayed());
        let first: Vec<_> = first.collect();
        assert_eq!(first.len(), 1, "{answers:?}");
        for answer in &answers {
            *kinds.entry(answer.kind()).or_insert(0) += 1;
            if answer.is_replayed() {
                assert_replays(answer, first[0]);
            } else if answer != first[0] {
                crate::assert_code(answer, "request-in-progress");
            }
        }
        for subject in &subjects {
            assert_replays(&pay.send(subject.port).await.unwrap(), first[0]);
        }
        assert_eq!(pooled.effects(&pay).await, 1);
    }
    println!("{route:?}: {kinds:?}");
    pooled.bouncer.is_shared();
    pooled.database.is_clean().await;
}

async fn d16_behind_pgbouncer_a_kill_at_any_moment_never_runs_twice_and_answers_are_replayed(
    route: Route,
) {
    let pooled = Pooled::start(route).await;
    let mut random = Random::seeded("pgbouncer");
    let mut all = Vec::new();
    let mut subject = pooled.subjects(1).await.remove(0);
    for _ in 0..size("D16") {
        all.extend(kill_while_at_work(subject, &mut random).await);
        subject = pooled.subjects(1).await.remove(0);
    }
    let mut kinds = BTreeMap::new();
    for Sent { pay, answer } in &all {
        let settled = retry_until_settled(&subject, pay).await;
        *kinds.entry(settled.kind()).or_insert(0) += 1;
        if let Some(first) = answer {
            assert_replays(&settled, first);
        }
        let effects = pooled.effects(pay).await;
        if settled.status == 201 {
            assert_eq!(effects, 1, "{}", settled.text());
        } else {
            assert_eq!(settled.kind(), "attempt-lost");
            assert!(route == Route::Leased && effects <= 1, "{effects}");
        }
        replays(&subject, pay, &settled).await;
    }
    println!("{route:?}: {kinds:?}");
    pooled.bouncer.is_shared();
    pooled.database.is_clean().await;
}
