//! Handlers that are slower than their lease.

use std::time::{Duration, Instant};

use faults::client::Pay;
use faults::cluster::Cluster;
use faults::database::Database;
use faults::proxy::{Action, Exchange, Proxy, request};
use faults::wait::Gate;
use futures_util::future::join_all;

use crate::{SUBJECT, assert_replays, warm};

/// On a server of its own, which does not wait for the disk: where others create databases beside it, a
/// flush was seen to take two seconds and more, and no heartbeat keeps a lease that is shorter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l3_a_handler_slower_than_its_lease_keeps_its_claim_on_postgres() {
    let cluster = Cluster::start().await;
    let database = Database::foreign(&cluster.url()).await;
    a_handler_slower_than_its_lease_keeps_its_claim(database).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l3_a_handler_slower_than_its_lease_keeps_its_claim_on_sqlite() {
    a_handler_slower_than_its_lease_keeps_its_claim(Database::sqlite().await).await;
}

async fn a_handler_slower_than_its_lease_keeps_its_claim(database: Database) {
    const LEASE: Duration = Duration::from_secs(1);
    // Under this class, a claim that is lost for a moment is a second execution.
    let settings = database.settings("medium").with(|s| s.lease = Some(1000));
    let subjects = warm::<10>(SUBJECT.start_all(2, &settings).await).await;
    let (port, other) = (subjects[0].port, subjects[1].port);
    let gate = Gate::new();
    let pays: Vec<_> = (0..10).map(|_| Pay::new(&gate.behave())).collect();
    let running = pays.iter().cloned().map(|pay| {
        tokio::spawn(async move { (Instant::now(), pay.send(port).await.unwrap(), pay) })
    });
    let running: Vec<_> = running.collect();
    for pay in &pays {
        database.has_begun(&pay.key, 1).await;
    }
    let (began, mut refused_late) = (Instant::now(), 0);
    while began.elapsed() < 3 * LEASE {
        for pay in &pays {
            let answer = pay.send(other).await.unwrap();
            crate::assert_code(&answer, "request-in-progress");
        }
        refused_late += u32::from(began.elapsed() > LEASE);
    }
    println!("in progress {refused_late} times after the first lease");
    assert!(refused_late > 0);
    gate.open();
    for ended in join_all(running).await {
        let (began, first, pay) = ended.unwrap();
        assert!(began.elapsed() > 3 * LEASE);
        assert_eq!(first.status, 201, "{}", first.text());
        assert_replays(&pay.send(other).await.unwrap(), &first);
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
}

/// A lease may be over before a connection is open that could renew it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_lease_of_a_process_waits_for_the_connection_that_will_renew_it() {
    /// What a session begins with, whether it is a writer's or not.
    const OPENED: &str = "set_config('default_transaction_isolation'";
    let database = Database::postgres().await;
    // Either of the two may come second.
    for _ in 0..5 {
        let proxy = Proxy::start(&database.url).await;
        let settings = database
            .settings("medium")
            .with(|s| (s.store, s.group_commit) = (proxy.url().to_owned(), true));
        let slow = proxy.on(request(OPENED)).nth(2);
        let slow = slow.does(Action::Delay(Duration::from_millis(200)));
        let subject = SUBJECT.start(&settings).await;
        let answer = Pay::new("").send(subject.port).await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_eq!(slow.fired(), 1);
        let exchanges = proxy.traffic().exchanges;
        let is_claim = |e: &Exchange| e.executes("insert into idempotency.record");
        let claim = exchanges.iter().position(is_claim).unwrap();
        let opened = exchanges[..claim].iter().filter(|e| e.executes(OPENED));
        assert_eq!(opened.count(), 2);
    }
}
