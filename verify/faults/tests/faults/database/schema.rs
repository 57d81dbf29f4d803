//! A schema that is not there, or of another version than the process expects.

use faults::client::Pay;
use faults::database::Database;
use faults::process::Subject;
use faults::schema::{Version, put};
use faults::settings::Settings;

use super::{Load, Route, count, settled};
use crate::{SUBJECT, assert_code, assert_replays, on_both_routes};

on_both_routes! {
    d19_without_a_schema_requests_are_refused_until_somebody_makes_it,
    d19_on_an_older_schema_a_request_is_served_or_does_not_run,
    d19_a_newer_schema_is_never_migrated_and_serves_as_before,
    d19_an_upgrade_under_load_loses_no_answer_and_runs_nothing_twice,
    d19_a_later_upgrade_under_load_is_not_noticed_by_what_runs,
}

struct Place {
    route: Route,
    settings: Settings,
    ledger: Database,
    database: Database,
}

impl Place {
    async fn with(route: Route, version: Version) -> Self {
        let database = Database::postgres().await;
        put(&database.url, version).await;
        let ledger = route.ledger(&database.url).await;
        let settings = route.settings(&database.url, &ledger).with(|s| {
            s.store_timeout = Some(800);
            s.migrate = false;
        });
        Self {
            route,
            settings,
            ledger,
            database,
        }
    }

    /// A process that migrates when it starts.
    async fn upgrade(&self) -> Subject {
        let settings = self.settings.clone().with(|s| s.migrate = true);
        SUBJECT.start(&settings).await
    }

    async fn effects(&self, pay: &Pay) -> usize {
        match self.route {
            Route::Leased => self.ledger.runs(&pay.key).await.len(),
            Route::Transactional => self.ledger.effects(&pay.key).await,
        }
    }
}

async fn refuses(subject: &Subject) {
    for _ in 0..3 {
        let refused = Pay::new("").send(subject.port).await.unwrap();
        assert_code(&refused, "store-unavailable");
        assert!(refused.header("retry-after").is_some());
    }
    assert_eq!(subject.runs().await, 0);
}

async fn d19_without_a_schema_requests_are_refused_until_somebody_makes_it(route: Route) {
    let place = Place::with(route, Version::None).await;
    let early = SUBJECT.start(&place.settings).await;
    refuses(&early).await;
    let upgraded = place.upgrade().await;
    let pay = Pay::new("");
    let first = settled(&pay, early.port).await;
    assert_eq!(first.status, 201, "{}", first.text());
    assert_replays(&pay.send(upgraded.port).await.unwrap(), &first);
    assert_eq!(place.effects(&pay).await, 1);
}

/// It is never run and then not recorded.
async fn d19_on_an_older_schema_a_request_is_served_or_does_not_run(route: Route) {
    let place = Place::with(route, Version::Older).await;
    let early = SUBJECT.start(&place.settings).await;
    let pay = Pay::new("");
    let before = pay.send(early.port).await.unwrap();
    println!("{route:?}: {}", before.kind());
    if before.status != 201 {
        refuses(&early).await;
    }
    let upgraded = place.upgrade().await;
    let after = settled(&pay, early.port).await;
    assert_eq!(after.status, 201, "{}", after.text());
    if before.status == 201 {
        assert_replays(&after, &before);
    }
    assert_replays(&pay.send(upgraded.port).await.unwrap(), &after);
    assert_eq!(place.effects(&pay).await, 1);
}

async fn d19_a_newer_schema_is_never_migrated_and_serves_as_before(route: Route) {
    let place = Place::with(route, Version::Newer).await;
    let migrating = place.settings.clone().with(|s| s.migrate = true);
    let said = SUBJECT.refuses(&migrating).await;
    assert!(said.contains("VersionMissing(7)"), "{said}");
    let subject = SUBJECT.start(&place.settings).await;
    let pay = Pay::new("");
    let first = pay.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    assert_replays(&pay.send(subject.port).await.unwrap(), &first);
    assert_eq!(place.effects(&pay).await, 1);
}

async fn d19_an_upgrade_under_load_loses_no_answer_and_runs_nothing_twice(route: Route) {
    let place = Place::with(route, Version::Older).await;
    let old = SUBJECT.start(&place.settings).await;
    let load = Load::of(4, "delay=5", old.port);
    let _ = Pay::new("").send(old.port).await.unwrap();
    let upgraded = place.upgrade().await;
    let pay = Pay::new("");
    let after = settled(&pay, old.port).await;
    assert_eq!(after.status, 201, "{}", after.text());
    let ran = old.runs().await;
    old.has_run(ran + 20).await;
    let all = load.end().await;
    println!("{route:?}: {} of {} ran", count(&all, "201"), all.len());
    assert!(count(&all, "201") > 0);
    hold(&place, &all, &upgraded).await;
}

async fn d19_a_later_upgrade_under_load_is_not_noticed_by_what_runs(route: Route) {
    let place = Place::with(route, Version::Current).await;
    let old = crate::warm::<4>(vec![SUBJECT.start(&place.settings).await]);
    let old = old.await.remove(0);
    let load = Load::of(4, "delay=5", old.port);
    old.has_run(20).await;
    put(&place.database.url, Version::Newer).await;
    let ran = old.runs().await;
    old.has_run(ran + 20).await;
    let all = load.end().await;
    assert_eq!(count(&all, "201"), all.len());
    hold(&place, &all, &old).await;
}

async fn hold(place: &Place, all: &[super::Sent], subject: &Subject) {
    for super::Sent { pay, answer, .. } in all {
        assert!(place.route.documents(&answer.kind()), "{answer:?}");
        let settled = settled(pay, subject.port).await;
        assert_eq!(settled.status, 201, "{}", settled.text());
        if answer.status == 201 {
            assert_replays(&settled, answer);
        }
        assert_eq!(place.effects(pay).await, 1);
    }
}
