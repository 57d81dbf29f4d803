//! The primary vanishes, and a standby takes its place.

use std::time::{Duration, Instant};

use faults::client::Pay;
use faults::cluster::Cluster;
use faults::fired::fired;
use faults::settings::Settings;
use faults::wait::{Gate, until};

use super::{Route, Sent, Service, recovers, sent};
use crate::on_both_routes;

/// Sessions whose commits wait for a standby, of the kind that most of them are of.
const WAITING: &str = "
select coalesce(max(number), 0) from (
    select count(*) as number from pg_stat_activity
    where wait_event = 'SyncRep' and application_name like 'tower-idempotency%'
    group by application_name
) as kinds";

on_both_routes! {
    d14_an_asynchronous_standby_loses_the_last_answers_and_nothing_else,
    d14_a_synchronous_standby_loses_no_answer,
    d14_what_was_given_up_while_no_standby_answers_is_bounded,
}

struct Pair {
    service: Service,
    standby: Cluster,
}

impl Pair {
    async fn start(route: Route) -> Self {
        // What the standby has lost is not hidden by what the service remembers.
        let asks = |settings: &mut Settings| settings.replay_cache = false;
        let service = Service::with(route, Cluster::start().await, asks).await;
        let standby = service.cluster.standby().await;
        Self { service, standby }
    }

    /// The end of the primary, with what it had not sent.
    async fn fail_over(mut self) -> (Service, Cluster) {
        let primary = &self.service.cluster;
        let written = primary.written().await;
        primary.vanish().await;
        self.standby.take_over(&written).await;
        self.service.proxy.lead_to(&self.standby.url());
        self.service.proxy.cut();
        // Asked from now on.
        if self.service.route == Route::Transactional {
            self.service.ledger = self.service.route.ledger(&self.standby.url()).await;
        }
        recovers(&self.service.subject).await;
        (self.service, self.standby)
    }
}

/// What README says of it: a transactional route has lost the effect with the answer, and a retry has
/// both again; elsewhere the effect is there, and a retry runs again.
async fn d14_an_asynchronous_standby_loses_the_last_answers_and_nothing_else(route: Route) {
    let pair = Pair::start(route).await;
    let kept = pair.service.paid_times(5).await;
    pair.service.cluster.is_followed_by(&pair.standby).await;
    pair.standby.stop_receiving().await;
    let tail = pair.service.paid_times(5).await;
    let (service, _standby) = pair.fail_over().await;

    service.holds(&kept).await;
    for Sent { pay, answer, .. } in &tail {
        let before = service.effects(pay).await;
        let again = service.settled(pay).await;
        assert_eq!(again.status, 201, "{}", again.text());
        assert!(!again.is_replayed(), "it is not lost");
        assert_ne!(again.body, answer.body);
        let effects = match route {
            Route::Leased => (1, 2),
            Route::Transactional => (0, 1),
        };
        assert_eq!((before, service.effects(pay).await), effects);
        crate::assert_replays(&service.send(pay).await, &again);
    }
    println!(
        "{} of {} answers were lost",
        tail.len(),
        tail.len() + kept.len()
    );
}

async fn d14_a_synchronous_standby_loses_no_answer(route: Route) {
    let pair = Pair::start(route).await;
    let primary = &pair.service.cluster;
    let names = "alter system set synchronous_standby_names = '*'";
    // Plain commits wait for nothing: those of the layer do.
    let off = "alter system set synchronous_commit = off";
    primary
        .execute(&[names, off, "select pg_reload_conf()"])
        .await;
    until("the standby to be synchronous", async || {
        let state = "select count(*) from pg_stat_replication where sync_state = 'sync'";
        let mut admin = primary.connect().await;
        let state = sqlx::query_scalar(state).fetch_one(&mut admin).await;
        let state: i64 = state.unwrap();
        (state == 1).then_some(())
    })
    .await;
    let mut all = pair.service.paid_times(5).await;
    // One that is about to be answered.
    let gate = Gate::new();
    let running = Pay::new(&gate.behave());
    let mut client = running.begin_on(pair.service.subject.port).await.unwrap();
    pair.service.subject.has_run(6).await;

    pair.standby.stop_receiving().await;
    gate.open();
    let answer = client.answer().await.unwrap();
    assert_eq!(answer.status, 503, "{answer:?}");
    for _ in 0..4 {
        let sent = sent(&Pay::new(""), pair.service.subject.port).await;
        assert_eq!(sent.answer.status, 503, "it is answered: {sent:?}");
        all.push(sent);
    }
    let (service, _standby) = pair.fail_over().await;
    service.holds(&all).await;
    let settled = service.settled(&running).await;
    assert_eq!(settled.status, 201, "{}", settled.text());
    assert_eq!(service.effects(&running).await, 1);
}

/// The server does not notice that whoever waits for such a commit is gone.
async fn d14_what_was_given_up_while_no_standby_answers_is_bounded(route: Route) {
    let asks = |settings: &mut Settings| {
        settings.max_transactions = Some(2);
        settings.group_commit = false;
    };
    let service = Service::with(route, Cluster::start().await, asks).await;
    let kept = service.paid_times(3).await;
    let standby = |names: &str| {
        let set = format!("alter system set synchronous_standby_names = '{names}'");
        async {
            service
                .cluster
                .execute(&[&{ set }, "select pg_reload_conf()"])
                .await
        }
    };
    standby("nobody").await;

    let port = service.subject.port;
    let (begun, mut most, mut asked) = (Instant::now(), 0_i64, Vec::new());
    let mut admin = service.cluster.connect().await;
    while begun.elapsed() < Duration::from_secs(32) {
        asked.extend((0..8).map(|_| tokio::spawn(async move { Pay::new("").send(port).await })));
        tokio::time::sleep(Duration::from_millis(500)).await;
        let waiting = sqlx::query_scalar(WAITING).fetch_one(&mut admin).await;
        most = most.max(waiting.unwrap());
    }
    let max = match route {
        Route::Leased => 8,
        Route::Transactional => 2,
    };
    println!("{most} sessions waited at once");
    fired("no standby");
    assert!((max..3 * max).contains(&most), "{most} sessions");
    for asked in asked {
        let answer = asked.await.unwrap().unwrap();
        assert_eq!(answer.status, 503, "{}", answer.text());
    }

    standby("").await;
    recovers(&service.subject).await;
    service.holds(&kept).await;
}
