//! One process of the server is killed, or stopped, while a request is in flight on it.

use std::time::{Duration, Instant};

use faults::client::Pay;
use faults::cluster::Cluster;
use faults::matrix::size;
use faults::random::fresh_key;
use faults::settings::Settings;
use faults::signal;
use faults::wait::{Gate, until};
use futures_util::future::join_all;
use sqlx::Connection as _;

use super::{Load, Route, Sent, Service, recovers, sent};
use crate::{assert_code, on_both_routes};

on_both_routes! {
    d02_a_backend_that_is_killed_ends_all_sessions_and_every_request_is_settled,
}

/// What is written for keys that begin with `slow-` takes a while.
const SLOW: [&str; 2] = [
    "create function public.slow() returns trigger language plpgsql as
     $$ begin perform pg_sleep(0.2); return new; end $$",
    "create trigger slow before insert or update on idempotency.record for each row
     when (new.key like 'slow-%') execute function public.slow()",
];

const FAST: [&str; 1] = ["drop trigger slow on idempotency.record"];

/// So does what their handlers write.
const SLOW_HANDLER: [&str; 2] = [
    SLOW[0],
    "create trigger slow before insert on ledger for each row
     when (new.key like 'slow-%') execute function public.slow()",
];

/// Backends that are in the middle of such a write.
const WRITING: &str = "
select pid from pg_stat_activity where wait_event = 'PgSleep'
    and application_name like 'tower-idempotency%' and query ~ 'idempotency.record|into ledger'";

/// Backends of transactions whose handlers have written, and do something else.
const IN_HANDLER: &str = "
select pid from pg_stat_activity where state = 'idle in transaction'
    and backend_xid is not null and application_name like 'tower-idempotency transactions %'";

fn slow() -> Pay {
    Pay {
        key: format!("slow-{}", fresh_key()),
        ..Pay::new("")
    }
}

impl Service {
    /// The process of the server that a request is in flight on.
    async fn backend(&self, which: &'static str) -> u32 {
        until("a request to be in flight", async || {
            let mut admin = self.cluster.connect().await;
            let pid = sqlx::query_scalar(which).fetch_optional(&mut admin).await;
            let pid: Option<i32> = pid.unwrap();
            pid.map(|pid| u32::try_from(pid).unwrap())
        })
        .await
    }
}

async fn d02_a_backend_that_is_killed_ends_all_sessions_and_every_request_is_settled(route: Route) {
    let service = Service::start(route).await;
    let before = service.paid_times(3).await;
    service.cluster.execute(&SLOW).await;
    let mut all = before;
    for _ in 0..size("D02") {
        let mut bystander = service.cluster.connect().await;
        bystander.ping().await.unwrap();
        let port = service.subject.port;
        // One after the other, so that there is always one to be found.
        let running = (0..12).map(|n| {
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(100) * n).await;
                sent(&slow(), port).await
            })
        });
        let running: Vec<_> = running.collect();
        let victim = service.backend(WRITING).await;
        let killed = Instant::now();
        service.cluster.kill_backend(victim).await;
        // The server first says that the process died, and then ends the others.
        let ended = async {
            while bystander.ping().await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let ended = tokio::time::timeout(Duration::from_secs(10), ended).await;
        ended.expect("the sessions of others end");
        let round = join_all(running).await.into_iter().map(Result::unwrap);
        let round: Vec<_> = round.collect();
        let hit = round.iter().filter(|sent| sent.at + sent.took > killed);
        println!("{} requests met the kill", hit.count());
        all.extend(round);
        recovers(&service.subject).await;
    }
    service.cluster.execute(&FAST).await;
    service.holds(&all).await;
}

/// What the backend of a request does when it is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// It stores the answer of a leased request.
    Completion,
    /// It executes a statement of the handler of a transactional one.
    Statement,
    /// It waits for the handler, and will not hear of the commit.
    Commit,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d03_a_backend_that_is_stopped_in_a_completion_delays_its_own_request_alone() {
    d03_a_backend_that_is_stopped_delays_its_own_request_alone(At::Completion).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d03_a_backend_that_is_stopped_in_a_handlers_statement_delays_its_own_request_alone() {
    d03_a_backend_that_is_stopped_delays_its_own_request_alone(At::Statement).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d03_a_backend_that_is_stopped_before_a_commit_delays_its_own_request_alone() {
    d03_a_backend_that_is_stopped_delays_its_own_request_alone(At::Commit).await;
}

/// Twice as long as the store waits for the server.
fn is_affected(sent: &Sent) -> bool {
    sent.took >= Duration::from_secs(1) || sent.answer.kind() != "201"
}

fn overlap(one: &Sent, other: &Sent) -> bool {
    one.at < other.at + other.took && other.at < one.at + one.took
}

/// The server is told nothing, and cannot end what it does not run.
async fn d03_a_backend_that_is_stopped_delays_its_own_request_alone(at: At) {
    let route = match at {
        At::Completion => Route::Leased,
        At::Statement | At::Commit => Route::Transactional,
    };
    // Nothing else bounds what a handler waits for.
    let limit = |s: &mut Settings| s.execution_limit = Some(1500);
    let service = Service::with(route, Cluster::start().await, limit).await;
    recovers(&service.subject).await;
    let subject = crate::warm::<4>(vec![crate::SUBJECT.start(&service.settings).await]);
    let others = subject.await.remove(0);
    let (gate, mut pay) = (Gate::new(), slow());
    match at {
        At::Completion => service.cluster.execute(&SLOW).await,
        At::Statement => service.cluster.execute(&SLOW_HANDLER).await,
        At::Commit => pay.behave = gate.behave(),
    }
    let mut client = pay.begin_on(service.subject.port).await.unwrap();
    if at == At::Completion {
        // Its claim is over, which writes a record, too.
        service.ledger.has_begun(&pay.key, 1).await;
    }
    let which = match at {
        At::Completion | At::Statement => WRITING,
        At::Commit => IN_HANDLER,
    };
    let victim = service.backend(which).await;
    signal::stop(victim).await;
    let (stopped, time) = (Instant::now(), Duration::from_secs(size("D03")));
    gate.open();
    let (here, there) = (service.subject.port, others.port);
    let load = [here, there].map(|port| Load::of(1, "delay=20", port));

    // All time limits of a request together, and what a busy machine adds.
    let answer = client.answer().await.unwrap();
    let took = stopped.elapsed();
    assert!(took < Duration::from_millis(3500), "{took:?}");
    println!("{:?} after {took:?}", answer.kind());
    let expected = match at {
        At::Completion => "answer-not-recorded",
        At::Statement => "execution-limit",
        At::Commit => "transaction-conflict",
    };
    assert_code(&answer, expected);
    for port in [here, there] {
        let refused = sent(&pay, port).await;
        let documented = [
            "request-in-progress",
            "store-unavailable",
            "answer-not-recorded",
        ];
        assert!(documented.contains(&&*refused.answer.kind()), "{refused:?}");
        assert!(refused.took < Duration::from_secs(2), "{refused:?}");
    }
    tokio::time::sleep(time.saturating_sub(stopped.elapsed())).await;
    let [same, another] = load.map(Load::end);
    let (same, another) = (same.await, another.await);
    for (sent, whose) in [(&same, "the same process"), (&another, "another process")] {
        let longest = sent.iter().max_by_key(|sent| sent.took).unwrap();
        let (took, after) = (longest.took, longest.at - stopped);
        println!(
            "the slowest of {} of {whose} took {took:?}, {after:?} after the stop",
            sent.len()
        );
    }
    // The other process has nothing to do with the backend: what affects both at once is the machine.
    let stalls: Vec<_> = another.iter().filter(|sent| is_affected(sent)).collect();
    assert!(stalls.len() * 20 <= another.len(), "{stalls:?}");
    for sent in same.iter().filter(|sent| is_affected(sent)) {
        let stalled = stalls.iter().any(|stall| overlap(stall, sent));
        assert!(stalled, "{sent:?} {:?} after the stop", sent.at - stopped);
    }
    let unaffected: Vec<_> = same.into_iter().chain(another).collect();
    assert_eq!(signal::state(victim), Some('T'), "it went on by itself");

    signal::go_on(victim);
    let going_on = Instant::now();
    let settled = service.settled(&pay).await;
    assert!(
        going_on.elapsed() < Duration::from_secs(7),
        "{:?}",
        going_on.elapsed()
    );
    assert_eq!(settled.status, 201, "{}", settled.text());
    crate::assert_replays(&service.send(&pay).await, &settled);
    assert_eq!(service.effects(&pay).await, 1);
    let other = crate::database::settled(&pay, others.port).await;
    crate::assert_replays(&other, &settled);
    service.holds(&unaffected).await;
}
