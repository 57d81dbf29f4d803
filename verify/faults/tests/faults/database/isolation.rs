//! A database whose transactions are stricter than the store's, if nothing else is said.

use std::collections::BTreeMap;

use faults::client::Pay;
use faults::database::Database;
use faults::matrix::size;
use faults::proxy::Proxy;
use faults::strictness::make_stricter;
use futures_util::future::join_all;

use super::Route;
use crate::{SUBJECT, assert_replays, on_both_routes, warm};

on_both_routes! {
    d18_under_repeatable_read_duplicates_over_two_processes_execute_once,
    d18_under_serializable_duplicates_over_two_processes_execute_once,
    d18_under_serializable_on_the_applications_connections_duplicates_execute_once,
}

async fn d18_under_repeatable_read_duplicates_over_two_processes_execute_once(route: Route) {
    execute_once(route, "repeatable read", false).await;
}

async fn d18_under_serializable_duplicates_over_two_processes_execute_once(route: Route) {
    execute_once(route, "serializable", false).await;
}

/// Their settings are the application's, and are not changed.
async fn d18_under_serializable_on_the_applications_connections_duplicates_execute_once(
    route: Route,
) {
    execute_once(route, "serializable", true).await;
}

async fn execute_once(route: Route, isolation: &str, shared: bool) {
    let database = Database::postgres().await;
    make_stricter(&database.url, isolation).await;
    let ledger = route.ledger(&database.url).await;
    let proxy = Proxy::start(&database.url).await;
    let settings = route.settings(proxy.url(), &ledger).with(|s| {
        s.store_timeout = Some(10_000);
        s.settle_timeout = Some(20_000);
        s.lease = None;
        s.shared_pool = shared;
    });
    let subjects = warm::<4>(SUBJECT.start_all(2, &settings).await).await;
    let mut kinds = BTreeMap::new();
    for round in 0..size("D18") {
        // Several keys at once, so that their transactions meet.
        let pays = [(); 5].map(|()| Pay::new(if round % 2 == 0 { "delay=20" } else { "" }));
        let duplicates = pays.iter().flat_map(|pay| std::iter::repeat_n(pay, 10));
        let sending = duplicates
            .enumerate()
            .map(|(n, pay)| pay.send(subjects[n % 2].port));
        let answers: Vec<_> = join_all(sending).await;
        let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
        for (pay, answers) in pays.iter().zip(answers.chunks(10)) {
            let first = answers
                .iter()
                .filter(|a| a.status == 201 && !a.is_replayed());
            let first: Vec<_> = first.collect();
            assert_eq!(first.len(), 1, "{answers:?}");
            for answer in answers {
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
            let effects = match route {
                Route::Leased => ledger.runs(&pay.key).await.len(),
                Route::Transactional => ledger.effects(&pay.key).await,
            };
            assert_eq!(effects, 1);
        }
    }
    let failures = proxy.traffic().failures("40001");
    println!("{route:?}, {isolation}: {kinds:?}, {failures} serialization failures");
}
