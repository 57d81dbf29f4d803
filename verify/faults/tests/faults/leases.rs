//! Handlers that are slower than their lease.

use std::time::{Duration, Instant};

use faults::client::Pay;
use faults::database::Database;
use faults::wait::Gate;
use futures_util::future::join_all;

use crate::{SUBJECT, assert_replays, on_every_store, warm};

on_every_store! {
    l3_a_handler_slower_than_its_lease_keeps_its_claim,
}

async fn l3_a_handler_slower_than_its_lease_keeps_its_claim(database: Database) {
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
