//! The store stops, crashes, freezes, or never answers.

use std::time::{Duration, Instant};

use faults::client::{Answer, Pay};
use faults::cluster::Cluster;
use faults::database::Database;
use faults::matrix::size;
use faults::process::Subject;
use faults::random::Random;
use faults::settings::Settings;
use faults::wait::{Gate, until};
use futures_util::future::join_all;
use tokio::net::TcpListener;

use crate::{SUBJECT, assert_code, assert_replays, warm};

const STORE_TIMEOUT: Duration = Duration::from_millis(500);

/// Records on a server that is about to fail, ledger on one that is not.
pub(crate) fn settings(store: &str, ledger: &Database, risk: &str) -> Settings {
    Settings::new(store, risk).with(|s| {
        s.ledger = ledger.url.clone();
        s.store_timeout = Some(500);
    })
}

async fn timed(pay: &Pay, subject: &Subject) -> (Answer, Duration) {
    let sent = Instant::now();
    let answer = pay.send(subject.port).await.unwrap();
    (answer, sent.elapsed())
}

/// Closed while the store is down: refused in time, and not run; at once after five in a row.
pub(crate) async fn fails_closed(subject: &Subject) {
    let before = subject.runs().await;
    for _ in 0..5 {
        let (answer, took) = timed(&Pay::new(""), subject).await;
        assert_code(&answer, "store-unavailable");
        assert_eq!(answer.status, 503);
        assert!(answer.header("retry-after").is_some());
        assert!(
            took < STORE_TIMEOUT + Duration::from_millis(500),
            "{took:?}"
        );
    }
    let mut at_once = 0;
    for _ in 0..10 {
        let (answer, took) = timed(&Pay::new(""), subject).await;
        assert_code(&answer, "store-unavailable");
        at_once += u32::from(took < STORE_TIMEOUT / 2);
    }
    println!("answered at once: {at_once} of 10");
    assert!(at_once >= 8, "{at_once}");
    assert_eq!(subject.runs().await, before);
}

/// Open while the store is down: run, and marked.
async fn fails_open(subject: &Subject, ledger: &Database) {
    for _ in 0..7 {
        let pay = Pay::new("");
        let (answer, took) = timed(&pay, subject).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert!(answer.is_unprotected());
        assert!(
            took < STORE_TIMEOUT + Duration::from_millis(500),
            "{took:?}"
        );
        assert_eq!(ledger.runs(&pay.key).await.len(), 1);
    }
}

/// As before the fault, within five seconds of its end.
pub(crate) async fn recovers(subject: &Subject) -> Pay {
    let back = Instant::now();
    let pay = Pay::new("");
    let first = until("the store to be used again", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.status == 201 && !answer.is_unprotected()).then_some(answer)
    })
    .await;
    println!("recovered after {:?}", back.elapsed());
    assert!(
        back.elapsed() < Duration::from_secs(5),
        "{:?}",
        back.elapsed()
    );
    assert_replays(&pay.send(subject.port).await.unwrap(), &first);
    // Not one good connection among broken ones: all of them are good.
    let pays = [(); 20].map(|()| Pay::new(""));
    let answers = join_all(pays.iter().map(|pay| pay.send(subject.port))).await;
    for answer in answers {
        assert_eq!(answer.unwrap().status, 201);
    }
    pay
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d06_x7_while_the_server_is_stopped_each_class_does_what_it_says_and_recovers() {
    let (cluster, ledger) = (Cluster::start().await, Database::sqlite().await);
    // What is remembered is answered all the same.
    let settings = |risk| settings(&cluster.url(), &ledger, risk).with(|s| s.replay_cache = false);
    let closed = SUBJECT.start(&settings("high")).await;
    let open = SUBJECT.start(&settings("low")).await;
    let stored = Pay::new("");
    let first = stored.send(closed.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());

    cluster.shut("fast");
    fails_closed(&closed).await;
    fails_open(&open, &ledger).await;
    assert_code(
        &stored.send(closed.port).await.unwrap(),
        "store-unavailable",
    );

    cluster.boot();
    recovers(&closed).await;
    recovers(&open).await;
    assert_replays(&stored.send(closed.port).await.unwrap(), &first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x8_while_the_server_is_frozen_each_class_does_what_it_says_and_recovers() {
    let (cluster, ledger) = (Cluster::start().await, Database::sqlite().await);
    let closed = SUBJECT
        .start(&settings(&cluster.url(), &ledger, "high"))
        .await;
    let open = SUBJECT
        .start(&settings(&cluster.url(), &ledger, "low"))
        .await;
    // Open connections, which will neither answer nor close.
    let pays = [(); 8].map(|()| Pay::new("delay=20"));
    join_all(pays.iter().map(|pay| pay.send(closed.port))).await;

    cluster.freeze().await;
    let given_up = Pay::new("");
    assert_code(
        &given_up.send(closed.port).await.unwrap(),
        "store-unavailable",
    );
    fails_closed(&closed).await;
    fails_open(&open, &ledger).await;

    cluster.thaw();
    recovers(&closed).await;
    recovers(&open).await;
    // Its claim was sent to the frozen server, and made when that went on: it must not be stuck.
    let thawed = Instant::now();
    until("a claim given up to be withdrawn", async || {
        let answer = given_up.send(closed.port).await.unwrap();
        (answer.status == 201).then_some(())
    })
    .await;
    assert!(
        thawed.elapsed() < Duration::from_secs(5),
        "{:?}",
        thawed.elapsed()
    );
    assert_eq!(ledger.runs(&given_up.key).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x8_a_store_that_accepts_and_never_answers_is_given_up_in_time() {
    let ledger = Database::sqlite().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("postgres://nobody@{}/none", listener.local_addr().unwrap());
    let (accepted, mut count) = tokio::sync::mpsc::unbounded_channel();
    let accepting = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // Kept open.
            accepted.send(stream).unwrap();
        }
    });
    let settings = settings(&url, &ledger, "high").with(|s| s.migrate = false);
    let subject = SUBJECT.start(&settings).await;
    fails_closed(&subject).await;
    assert!(count.try_recv().is_ok(), "nobody connected");
    assert_eq!(ledger.ledger.count().await.unwrap(), 0);
    accepting.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x6_an_answer_that_cannot_be_recorded_is_held_back_and_replayed_later() {
    let (cluster, ledger) = (Cluster::start().await, Database::sqlite().await);
    let settings = settings(&cluster.url(), &ledger, "high").with(|s| s.settle_timeout = Some(400));
    let subject = warm::<1>(vec![SUBJECT.start(&settings).await]).await;
    x6(&cluster, &ledger, &subject[0], Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x6_an_answer_that_waits_for_longer_than_its_lease_is_still_the_answer() {
    let (cluster, ledger) = (Cluster::start().await, Database::sqlite().await);
    let settings = settings(&cluster.url(), &ledger, "high").with(|s| {
        s.settle_timeout = Some(400);
        s.lease = Some(1000);
    });
    let subject = warm::<1>(vec![SUBJECT.start(&settings).await]).await;
    for _ in 0..2 {
        x6(&cluster, &ledger, &subject[0], Duration::from_millis(1500)).await;
    }
}

/// The database stops between claim and completion.
async fn x6(cluster: &Cluster, ledger: &Database, subject: &Subject, longer: Duration) {
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    let mut connection = pay.begin_on(subject.port).await.unwrap();
    ledger.has_begun(&pay.key, 1).await;
    cluster.shut("immediate");
    gate.open();
    let answer = connection.answer().await.unwrap();
    assert_code(&answer, "answer-not-recorded");
    assert_eq!(answer.status, 503);
    assert!(answer.header("retry-after").is_some());
    assert!(ledger.runs(&pay.key).await[0].finished);

    tokio::time::sleep(longer).await;
    cluster.boot();
    let replay = until("the answer to be recorded", async || {
        let answer = pay.send(subject.port).await.unwrap();
        let waits = ["request-in-progress", "store-unavailable"];
        (!waits.contains(&&*answer.kind())).then_some(answer)
    })
    .await;
    assert_eq!(replay.status, 201, "{}", replay.text());
    assert!(replay.is_replayed());
    let runs = ledger.runs(&pay.key).await;
    assert_eq!(runs.len(), 1);
    assert!(replay.text().contains(&runs[0].execution));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d01_answers_given_before_and_while_the_server_crashes_are_replayed_after() {
    let (cluster, ledger) = (Cluster::start().await, Database::sqlite().await);
    let settings = settings(&cluster.url(), &ledger, "high").with(|s| s.lease = Some(1000));
    let subject = SUBJECT.start(&settings).await;
    let mut random = Random::seeded("crashes");
    let (mut sent, crashes) = (Vec::new(), size("D01"));
    let mut met = 0;
    for _ in 0..crashes {
        let running = send_for(&subject, Duration::from_millis(600));
        tokio::time::sleep(Duration::from_millis(random.below(150))).await;
        cluster.shut("immediate");
        let crashed = Instant::now();
        cluster.boot();
        let round = running.await.unwrap();
        let meets = |request: &&Request| request.sent < crashed && crashed < request.answered;
        met += round.iter().filter(meets).count();
        sent.extend(round);
    }
    recovers(&subject).await;
    let answered = sent.iter().filter(|request| request.answer.status == 201);
    let answered = answered.count();
    println!(
        "{crashes} crashes met {met} requests; {answered} of {} answered",
        sent.len()
    );
    assert!(met > 0, "no request met a crash");
    assert!(answered > 0);
    for Request { pay, answer, .. } in &sent {
        let settled = until("every key to be settled", async || {
            let answer = pay.send(subject.port).await.unwrap();
            (answer.kind() != "request-in-progress").then_some(answer)
        })
        .await;
        if answer.status == 201 {
            assert_replays(&settled, answer);
        }
        assert!([201, 500].contains(&settled.status), "{}", settled.text());
        assert!(ledger.runs(&pay.key).await.len() <= 1);
    }
}

struct Request {
    pay: Pay,
    sent: Instant,
    answered: Instant,
    answer: Answer,
}

/// Four clients that send one request after the other.
fn send_for(subject: &Subject, time: Duration) -> tokio::task::JoinHandle<Vec<Request>> {
    let port = subject.port;
    tokio::spawn(async move {
        let end = Instant::now() + time;
        let clients = (0..4).map(|_| async {
            let mut requests = Vec::new();
            while Instant::now() < end {
                let (pay, sent) = (Pay::new("delay=5"), Instant::now());
                let answer = pay.send(port).await.unwrap();
                requests.push(Request {
                    pay,
                    sent,
                    answered: Instant::now(),
                    answer,
                });
            }
            requests
        });
        join_all(clients).await.into_iter().flatten().collect()
    })
}
