//! A07: the process is killed at any moment, and started again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use faults::client::{Answer, Pay};
use faults::database::Database;
use faults::matrix::size;
use faults::process::Subject;
use faults::random::Random;
use futures_util::future::join_all;
use http::Response;
use tower_idempotency::Envelope;
use tower_idempotency::store::{HeldRecord, Resolution};

use crate::{SUBJECT, assert_code, assert_replays, on_every_store, warm};

/// Requests under way at once when the process is killed.
pub(crate) const AT_ONCE: usize = 5;

on_every_store! {
    a07_under_critical_a_kill_at_any_moment_never_runs_twice_and_leaves_no_key_stuck,
    a07_under_high_a_kill_at_any_moment_never_runs_twice_and_leaves_no_key_stuck,
    a07_under_medium_a_kill_at_any_moment_leaves_no_key_stuck,
}

async fn a07_under_critical_a_kill_at_any_moment_never_runs_twice_and_leaves_no_key_stuck(
    database: Database,
) {
    let (subject, sent) = kill_and_restart(&database, "critical").await;
    let mut held = Vec::new();
    for Sent { pay, answer } in sent {
        let settled = retry_until_settled(&subject, &pay).await;
        let runs = database.runs(&pay.key).await.len();
        if let Some(first) = answer {
            assert_replays(&settled, &first);
        }
        if settled.kind() == "outcome-unknown" {
            assert!(runs <= 1, "{runs} runs");
            held.push(pay);
        } else {
            assert_eq!(settled.status, 201, "{}", settled.text());
            assert_eq!(runs, 1, "{}", settled.text());
            replays(&subject, &pay, &settled).await;
        }
    }
    println!("held: {}", held.len());
    assert!(!held.is_empty(), "no kill left an unknown outcome");
    resolve_all(&database, &subject, &held).await;
}

/// By turns with an answer, and by freeing the key. A process that warms up on a machine that stalls
/// refuses some, and may be killed before it has taken back their claims: those are held, too.
async fn resolve_all(database: &Database, subject: &Subject, held: &[Pay]) {
    let listed = database.held().await;
    let is_ours = |record: &HeldRecord| held.iter().any(|pay| pay.key == record.identity.key());
    let (ours, others): (Vec<_>, Vec<_>) = listed.into_iter().partition(is_ours);
    assert_eq!(ours.len(), held.len());
    println!("of other requests: {}", others.len());
    for record in &others {
        assert!(database.runs(record.identity.key()).await.len() <= 1);
        let resolved = database.resolve(record, &Resolution::Release).await;
        resolved.unwrap();
    }
    for (n, pay) in held.iter().enumerate() {
        let record = ours.iter().find(|record| record.identity.key() == pay.key);
        let record = record.expect("a held record is listed");
        let runs = database.runs(&pay.key).await.len();
        if n % 2 == 0 {
            let answer = Response::builder().status(202).body(Bytes::from("by hand"));
            let answer = Resolution::Answer(Envelope::new(answer.unwrap()));
            database.resolve(record, &answer).await.unwrap();
            let replay = pay.send(subject.port).await.unwrap();
            assert!(replay.is_replayed());
            assert_eq!((replay.status, replay.text()), (202, "by hand".into()));
            assert_eq!(database.runs(&pay.key).await.len(), runs);
            assert!(database.resolve(record, &answer).await.is_err());
        } else {
            database
                .resolve(record, &Resolution::Release)
                .await
                .unwrap();
            let fresh = pay.send(subject.port).await.unwrap();
            assert_eq!(fresh.status, 201, "{}", fresh.text());
            assert!(!fresh.is_replayed());
            assert_eq!(database.runs(&pay.key).await.len(), runs + 1);
            replays(subject, pay, &fresh).await;
        }
    }
    assert!(database.held().await.is_empty());
}

async fn a07_under_high_a_kill_at_any_moment_never_runs_twice_and_leaves_no_key_stuck(
    database: Database,
) {
    let (subject, sent) = kill_and_restart(&database, "high").await;
    let mut lost = 0;
    for Sent { pay, answer } in sent {
        let settled = retry_until_settled(&subject, &pay).await;
        let runs = database.runs(&pay.key).await.len();
        if let Some(first) = answer {
            assert_replays(&settled, &first);
        }
        if settled.kind() == "attempt-lost" {
            lost += 1;
            assert!(runs <= 1, "{runs} runs");
        } else {
            assert_eq!(settled.status, 201, "{}", settled.text());
            assert_eq!(runs, 1, "{}", settled.text());
        }
        replays(&subject, &pay, &settled).await;
        assert_eq!(database.runs(&pay.key).await.len(), runs);
    }
    println!("lost: {lost}");
    assert!(lost > 0, "no kill left an unknown outcome");
}

async fn a07_under_medium_a_kill_at_any_moment_leaves_no_key_stuck(database: Database) {
    let (subject, sent) = kill_and_restart(&database, "medium").await;
    let mut again = 0;
    for Sent { pay, answer } in sent {
        let settled = retry_until_settled(&subject, &pay).await;
        assert_eq!(settled.status, 201, "{}", settled.text());
        if let Some(first) = answer {
            assert_replays(&settled, &first);
        }
        let runs = database.runs(&pay.key).await;
        again += usize::from(runs.len() > 1);
        replays(&subject, &pay, &settled).await;
        assert_eq!(database.runs(&pay.key).await.len(), runs.len());
    }
    println!("run again: {again}");
    assert!(again > 0, "no kill hit a running handler");
}

/// A request, and its answer if there was one before the kill.
pub(crate) struct Sent {
    pub(crate) pay: Pay,
    pub(crate) answer: Option<Answer>,
}

/// Kills a subject over and over while it is at work.
async fn kill_and_restart(database: &Database, risk: &str) -> (Subject, Vec<Sent>) {
    let settings = database.settings(risk).with(|s| {
        s.lease = Some(1000);
        s.sweep = Some(300);
    });
    let mut random = Random::seeded(risk);
    let (mut all, mut hits) = (Vec::new(), BTreeMap::new());
    let mut subject = warm::<AT_ONCE>(vec![SUBJECT.start(&settings).await])
        .await
        .remove(0);
    for _ in 0..size("A07") {
        let sent = kill_while_at_work(subject, &mut random).await;
        for Sent { pay, answer } in &sent {
            let hit = moment(database, pay, answer.as_ref()).await;
            *hits.entry(hit).or_insert(0) += 1;
        }
        all.extend(sent);
        subject = warm::<AT_ONCE>(vec![SUBJECT.start(&settings).await])
            .await
            .remove(0);
    }
    println!("kills hit requests {hits:?}");
    let hit = |moment| hits.get(moment).copied().unwrap_or(0);
    assert!(hit(IN_THE_HANDLER) > 0, "no kill hit a handler");
    (subject, all)
}

/// Sends a few requests, and kills the process before they can all be through.
pub(crate) async fn kill_while_at_work(subject: Subject, random: &mut Random) -> Vec<Sent> {
    kill_within(90, subject, random).await
}

/// The same, at some moment of so many milliseconds.
pub(crate) async fn kill_within(window: u64, subject: Subject, random: &mut Random) -> Vec<Sent> {
    let port = subject.port;
    let pays = (0..AT_ONCE).map(|_| Pay::new(&format!("delay={}", random.below(60))));
    let running = pays.map(|pay| {
        tokio::spawn(async move {
            let answer = pay.send(port).await.ok();
            Sent { pay, answer }
        })
    });
    let running: Vec<_> = running.collect();
    let moment = Duration::from_millis(random.below(window));
    tokio::time::sleep(moment).await;
    tokio::task::spawn_blocking(move || subject.kill())
        .await
        .unwrap();
    let sent = join_all(running).await;
    sent.into_iter().map(Result::unwrap).collect()
}

const IN_THE_HANDLER: &str = "in the handler";

/// Where a request was when its process died.
async fn moment(database: &Database, pay: &Pay, answer: Option<&Answer>) -> &'static str {
    let runs = database.runs(&pay.key).await;
    let state = database.state(&pay.key).await;
    match (answer, state.as_deref(), runs.first()) {
        (Some(_), _, _) => "after the answer",
        (None, None, _) => "before the claim",
        (None, Some("completed"), _) => "between record and answer",
        (None, Some(_), None) => "between claim and handler",
        (None, Some(_), Some(run)) if run.finished => "between handler and record",
        (None, Some(_), Some(_)) => IN_THE_HANDLER,
    }
}

/// No key may be stuck: one lease later, there is something else to say than that it runs.
pub(crate) async fn retry_until_settled(subject: &Subject, pay: &Pay) -> Answer {
    let deadline = Instant::now() + Duration::from_secs(6);
    loop {
        let answer = pay.send(subject.port).await.unwrap();
        if answer.kind() != "request-in-progress" {
            return answer;
        }
        assert!(Instant::now() < deadline, "stuck: {answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub(crate) async fn replays(subject: &Subject, pay: &Pay, settled: &Answer) {
    let replay = pay.send(subject.port).await.unwrap();
    assert_replays(&replay, settled);
    let other = pay.with_body("{}").send(subject.port).await.unwrap();
    assert_code(&other, "key-reused");
}
