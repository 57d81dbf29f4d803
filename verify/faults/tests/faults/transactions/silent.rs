//! The host of the server vanishes, and another is in its place: nobody closes the connections to the
//! first, on which transactions are open, or about to begin.

use std::time::{Duration, Instant};

use faults::client::Pay;
use faults::database::Database;
use faults::process::Subject;
use faults::proxy::Proxy;
use faults::wait::{Gate, until};
use futures_util::future::join_all;

use super::{behind, settled, took_effect_once};
use crate::warm;

const TRANSACTIONS: u32 = 2;

struct Place {
    database: Database,
    proxy: Proxy,
    subject: Subject,
}

/// All its connections for transactions are open.
async fn place() -> Place {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = behind(&proxy, &database, |s| {
        s.max_transactions = Some(TRANSACTIONS);
        s.store_timeout = Some(500);
        s.settle_timeout = Some(500);
        s.execution_limit = Some(3000);
    });
    let subject = warm::<4>(vec![subject.await]).await.remove(0);
    let place = Place {
        database,
        proxy,
        subject,
    };
    place.runs_all_at_once().await;
    place
}

impl Place {
    /// As many transactions as there may be are open at once, which takes that many connections.
    async fn runs_all_at_once(&self) {
        let gate = Gate::new();
        let pays = [(); TRANSACTIONS as usize].map(|()| Pay::new(&gate.behave()));
        let before = self.subject.runs().await;
        // A handler that was cut off within a statement keeps its place until its time is over.
        let running = join_all(pays.iter().map(|pay| {
            until("it to be executed", async || {
                let answer = pay.send(self.subject.port).await.unwrap();
                (answer.status == 201).then_some(answer)
            })
        }));
        let opened = async {
            self.subject.has_run(before + u64::from(TRANSACTIONS)).await;
            gate.open();
        };
        for (pay, answer) in pays.iter().zip(tokio::join!(running, opened).0) {
            took_effect_once(&self.database, &self.subject, pay, &answer).await;
        }
    }

    /// Serves again in time, on all its connections.
    async fn recovers(&self) {
        let stranded = Instant::now();
        let pay = Pay::new("");
        let mut refused = 0;
        let first = loop {
            let sent = Instant::now();
            let answer = pay.send(self.subject.port).await.unwrap();
            assert!(sent.elapsed() < Duration::from_millis(2500), "it hangs");
            if answer.status == 201 {
                break answer;
            }
            // What began too late for its request is still to be rolled back.
            let expected = ["store-unavailable", "request-in-progress"];
            assert!(expected.contains(&&*answer.kind()), "{}", answer.text());
            refused += 1;
            assert!(
                stranded.elapsed() < Duration::from_secs(25),
                "nothing is given up"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        println!("refused {refused} times in {:?}", stranded.elapsed());
        took_effect_once(&self.database, &self.subject, &pay, &first).await;
        until("the breaker to be closed", async || {
            let answer = Pay::new("").send(self.subject.port).await.unwrap();
            (answer.status == 201).then_some(())
        })
        .await;
        self.runs_all_at_once().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d17_transactions_that_would_begin_on_silent_connections_begin_on_new_ones() {
    let place = place().await;
    let before = place.proxy.traffic();
    place.proxy.strand();
    place.recovers().await;
    assert!(place.proxy.traffic().since(&before).connections > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d17_transactions_whose_connections_fall_silent_take_no_place_for_good() {
    let place = place().await;
    // Both connections are lost in the hands of handlers, and so more than once.
    for _ in 0..2 {
        let gate = Gate::new();
        let pays = [(); TRANSACTIONS as usize].map(|()| Pay::new(&gate.behave()));
        let before = place.subject.runs().await;
        let running = join_all(pays.iter().map(|pay| pay.send(place.subject.port)));
        let stranded = async {
            let runs = before + u64::from(TRANSACTIONS);
            place.subject.has_run(runs).await;
            place.proxy.strand();
            gate.open();
        };
        for (pay, answer) in pays.iter().zip(tokio::join!(running, stranded).0) {
            println!("{}", answer.unwrap().kind());
            assert_eq!(place.database.effects(&pay.key).await, 0);
        }
        place.recovers().await;
        for pay in &pays {
            let settled = settled(pay, &place.subject).await;
            took_effect_once(&place.database, &place.subject, pay, &settled).await;
        }
    }
}
