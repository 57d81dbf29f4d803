//! The end of a retention, and the sweeper, at the worst moment.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use faults::client::{Answer, Connection, Pay};
use faults::database::Database;
use faults::matrix::size;
use faults::process::Subject;
use faults::proxy::{Action, Proxy, reply, request};
use faults::record::Record;
use faults::settings::Settings;
use faults::wait::{Gate, until};
use futures_util::future::join_all;

use crate::{SUBJECT, assert_code, assert_replays, on_every_store, warm};

const CLAIM: &str = "insert into idempotency.record";
const LOOKUP: &str = "from idempotency.record where id = $1";
const BEGIN: &str = "select idempotency.enter(";
const RELEASE: &str = "delete from idempotency.record";

on_every_store! {
    e01_a_replay_that_is_half_sent_at_its_expiry_ends_as_it_began,
    e01_a_transactional_replay_that_is_half_sent_at_its_expiry_ends_as_it_began,
    e01_retries_across_expiries_get_one_answer_or_the_next_and_no_mixture,
    e01_transactional_retries_across_expiries_get_one_answer_or_the_next_and_no_mixture,
    e03_ten_sweepers_delete_what_is_over_and_no_live_lost_or_held_record,
    e07_a_retry_around_the_expiry_is_replayed_before_it_and_executed_after_it,
    e07_a_transactional_retry_around_the_expiry_is_replayed_before_it_and_executed_after_it,
}

/// A retention as short as a busy machine lets handlers be slow.
fn short(settings: &mut Settings) {
    settings.ttl = Some(1500);
    settings.lease = Some(300);
    settings.execution_limit = Some(1200);
    settings.store_timeout = Some(10_000);
    settings.settle_timeout = Some(10_000);
    settings.shows_expiry = true;
}

fn settings(database: &Database, transactional: bool) -> Settings {
    let settings = database.settings("high").with(short);
    settings.with(|s| s.transactional = transactional)
}

/// With its connections open: to open them takes a good part of so short a limit.
async fn start(settings: &Settings) -> Subject {
    let started = vec![SUBJECT.start(settings).await];
    warm::<8>(started).await.remove(0)
}

async fn e01_a_replay_that_is_half_sent_at_its_expiry_ends_as_it_began(database: Database) {
    half_sent(&database, false).await;
}

async fn e01_a_transactional_replay_that_is_half_sent_at_its_expiry_ends_as_it_began(
    database: Database,
) {
    half_sent(&database, true).await;
}

async fn half_sent(database: &Database, transactional: bool) {
    let settings = settings(database, transactional);
    let (subject, other) = (start(&settings).await, start(&settings).await);
    let pay = Pay::new("size=100000");
    let first = pay.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    subject.arm("body_chunk", "pause").await;
    let mut replay = pay.begin_on(subject.port).await.unwrap();
    replay.read_at_least(40_000).await.unwrap();
    subject.has_reached("body_chunk", 1).await;

    database.has_expired(&pay.key).await;
    let second = pay.send(other.port).await.unwrap();
    assert_eq!(second.status, 201, "{}", second.text());
    assert!(!second.is_replayed());
    assert_ne!(second.body, first.body);
    subject.arm("body_chunk", "pass").await;
    assert_replays(&replay.answer().await.unwrap(), &first);
    assert_eq!(database.runs(&pay.key).await.len(), 2);
}

async fn e01_retries_across_expiries_get_one_answer_or_the_next_and_no_mixture(database: Database) {
    across_expiries(&database, false).await;
}

async fn e01_transactional_retries_across_expiries_get_one_answer_or_the_next_and_no_mixture(
    database: Database,
) {
    across_expiries(&database, true).await;
}

async fn across_expiries(database: &Database, transactional: bool) {
    // No attempt is to be lost here, however busy the machine is.
    let settings = settings(database, transactional).with(|s| {
        s.ttl = Some(2400);
        s.lease = Some(1200);
    });
    let subjects = [start(&settings).await, start(&settings).await];
    let pay = Pay::new("size=20000");
    let sweepers = database.sweepers(1, 100);
    let is_over = Arc::new(AtomicBool::new(false));
    let clients = [0, 1, 0, 1].map(|n: usize| {
        let (pay, port, is_over) = (pay.clone(), subjects[n].port, is_over.clone());
        tokio::spawn(async move {
            let mut answers = Vec::new();
            while !is_over.load(Ordering::SeqCst) {
                answers.push(pay.send(port).await.unwrap());
            }
            answers
        })
    });
    let recorded = async |after: f64| {
        until("the next answer to be recorded", async || {
            let record = database.record(&pay.key).await;
            record.filter(|r| r.state == "completed" && r.claimed_at > after)
        })
        .await
    };
    let mut record: Record = recorded(0.0).await;
    for _ in 0..size("E01") {
        database.has_expired(&pay.key).await;
        let next = recorded(record.claimed_at).await;
        assert!(next.claimed_at >= record.expires_at, "{record:?}, {next:?}");
        assert_eq!(next.attempt, 1);
        record = next;
    }
    is_over.store(true, Ordering::SeqCst);
    let mut answers = BTreeMap::<_, Vec<Answer>>::new();
    let mut refused = 0;
    for client in clients {
        for answer in client.await.unwrap() {
            if answer.status == 201 {
                answers.entry(execution(&answer)).or_default().push(answer);
            } else {
                // Whoever clears away what is over may be in the way of a transaction's record.
                if !(transactional && answer.kind() == "transaction-conflict") {
                    assert_code(&answer, "request-in-progress");
                }
                refused += 1;
            }
        }
    }
    let runs = database.runs(&pay.key).await;
    println!(
        "{} runs, {:?} answers, {refused} refused, {} swept",
        runs.len(),
        answers.values().map(Vec::len).collect::<Vec<_>>(),
        sweepers.deleted()
    );
    assert_eq!(answers.len(), runs.len(), "an answer of no run, or of none");
    for (execution, answers) in answers {
        assert!(runs.iter().any(|run| run.execution == execution));
        let fresh = answers.iter().filter(|answer| !answer.is_replayed());
        assert_eq!(fresh.count(), 1, "executed once");
        for answer in &answers {
            assert_eq!(answer.body, answers[0].body);
            let ends = answer.header("idempotency-expires");
            assert_eq!(ends, answers[0].header("idempotency-expires"));
        }
    }
}

fn execution(answer: &Answer) -> String {
    let document: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    document["execution"].as_str().unwrap().to_owned()
}

/// A retry that met a record, which is then over, and swept.
async fn swept_while_held(transactional: bool, matching: faults::proxy::Match, is_over: bool) {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    // A retry has to ask.
    let settings = settings(&database, transactional).with(|s| s.replay_cache = false);
    let behind = settings.clone().with(|s| s.store = proxy.url().to_owned());
    let (subject, other) = (start(&behind).await, start(&settings).await);
    for replaced in [false, true] {
        let pay = Pay::new("");
        let first = pay.send(subject.port).await.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        if is_over {
            database.has_expired(&pay.key).await;
        }
        let held = proxy.on(matching.clone()).does(Action::Hold);
        let retry = tokio::spawn({
            let (pay, port) = (pay.clone(), subject.port);
            async move { pay.send(port).await.unwrap() }
        });
        held.has_fired(1).await;
        database.has_expired(&pay.key).await;
        assert!(database.sweep(100).await.deleted > 0);
        assert_eq!(database.state(&pay.key).await, None);
        let second = if replaced {
            Some(pay.send(other.port).await.unwrap())
        } else {
            None
        };
        held.release();
        let answer = retry.await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_ne!(answer.body, first.body, "it was swept");
        match second {
            Some(second) => assert_replays(&answer, &second),
            None => assert!(!answer.is_replayed()),
        }
        assert_eq!(database.runs(&pay.key).await.len(), 2);
        assert_replays(&pay.send(other.port).await.unwrap(), &answer);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e02_a_record_swept_between_insert_and_select_of_a_claim_is_executed_anew() {
    swept_while_held(false, request(LOOKUP), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e02_a_record_swept_between_select_and_takeover_of_a_claim_is_executed_anew() {
    swept_while_held(false, reply(LOOKUP), true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e02_a_record_swept_before_the_lookup_of_a_transaction_is_executed_anew() {
    swept_while_held(true, request(LOOKUP), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e02_a_record_swept_when_a_transaction_has_met_it_is_executed_anew() {
    swept_while_held(true, reply(BEGIN), true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e02_a_record_swept_before_the_claim_that_clears_it_is_executed_anew() {
    swept_while_held(true, request(CLAIM), true).await;
}

/// What clears an answer away that is over is slower than its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e02_an_answer_that_others_clear_away_meanwhile_is_theirs_to_replace() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let settings = settings(&database, true);
    let behind = settings.clone().with(|s| s.store = proxy.url().to_owned());
    let kept = settings.with(|s| s.ttl = Some(30_000));
    let (subject, other) = (start(&behind).await, start(&kept).await);
    let pay = Pay::new("");
    assert_eq!(pay.send(subject.port).await.unwrap().status, 201);
    database.has_expired(&pay.key).await;
    let held = proxy.on(request(RELEASE)).does(Action::Hold);
    let slow = tokio::spawn({
        let (pay, port) = (pay.clone(), subject.port);
        async move { pay.send(port).await.unwrap() }
    });
    held.has_fired(1).await;
    let second = until("the lease of what clears to end", async || {
        let answer = pay.send(other.port).await.unwrap();
        (answer.status == 201).then_some(answer)
    })
    .await;
    held.release();
    assert_replays(&slow.await.unwrap(), &second);
    assert_eq!(database.runs(&pay.key).await.len(), 2);
}

async fn e03_ten_sweepers_delete_what_is_over_and_no_live_lost_or_held_record(database: Database) {
    let critical = database.settings("critical").with(|s| s.lease = Some(1000));
    let subject = SUBJECT.start(&critical).await;
    let doomed = SUBJECT.start(&critical).await;
    let load = start(&settings(&database, false)).await;
    let load_in_transactions = start(&settings(&database, true)).await;

    let gate = Gate::new();
    let live: Vec<_> = (0..4).map(|_| Pay::new(&gate.behave())).collect();
    let running: Vec<_> = live.iter().map(|pay| begun(pay, &subject)).collect();
    let running = join_all(running).await;
    let lost: Vec<_> = (0..3).map(|_| Pay::new("hang")).collect();
    let clients = join_all(lost.iter().map(|pay| begun(pay, &doomed))).await;
    let held = Pay::new("panic");
    held.send(subject.port).await.unwrap();
    for pay in live.iter().chain(&lost) {
        database.has_begun(&pay.key, 1).await;
    }

    let sweepers = database.sweepers(10, 7);
    doomed.kill();
    drop(clients);
    let paid = async |subject: &Subject| {
        let pay = Pay::new("");
        let answer = pay.send(subject.port).await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_replays(&pay.send(subject.port).await.unwrap(), &answer);
    };
    // Longer than leases and retentions: all that is sent before is swept meanwhile.
    let mut sent = 0;
    while sweepers.deleted() < 100 || sweepers.held() < 3 {
        tokio::join!(paid(&load), paid(&load_in_transactions));
        sent += 2;
        let nth = sent / 2 % live.len();
        assert_code(
            &live[nth].send(subject.port).await.unwrap(),
            "request-in-progress",
        );
        assert_code(&held.send(load.port).await.unwrap(), "outcome-unknown");
        assert!(sent < 10_000, "swept {}", sweepers.deleted());
    }
    println!(
        "{} rounds, {} deleted, {} held, of {sent} sent",
        sweepers.rounds(),
        sweepers.deleted(),
        sweepers.held()
    );
    assert!(sweepers.largest() <= 7);
    gate.open();
    for (pay, mut client) in live.iter().zip(running) {
        let first = client.answer().await.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        assert_replays(&pay.send(load.port).await.unwrap(), &first);
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
    for pay in lost.iter().chain([&held]) {
        let retry = pay.behaving("").send(subject.port).await.unwrap();
        assert_code(&retry, "outcome-unknown");
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
    assert_eq!(database.held().await.len(), 4);
}

async fn begun(pay: &Pay, subject: &Subject) -> Connection {
    pay.begin_on(subject.port).await.unwrap()
}

async fn e07_a_retry_around_the_expiry_is_replayed_before_it_and_executed_after_it(
    database: Database,
) {
    around_the_expiry(&database, false).await;
}

async fn e07_a_transactional_retry_around_the_expiry_is_replayed_before_it_and_executed_after_it(
    database: Database,
) {
    around_the_expiry(&database, true).await;
}

/// How far from the expiry retries are sent, in milliseconds.
const OFFSETS: [f64; 6] = [-200.0, -20.0, -3.0, -1.0, 0.0, 1.0];

async fn around_the_expiry(database: &Database, transactional: bool) {
    let subject = start(&settings(database, transactional)).await;
    let mut counts = [0; 3];
    for _ in 0..size("E07") / 8 {
        let keys = (0..8).map(|_| around_one_expiry(database, &subject));
        for sides in join_all(keys).await {
            for (count, side) in counts.iter_mut().zip(sides) {
                *count += side;
            }
        }
    }
    let [replayed, refused, executed] = counts;
    println!("{replayed} replayed, {refused} refused, {executed} executed around the expiry");
    assert!(replayed > 0 && executed > 0);
}

/// How many retries were replayed, refused, and executed or replayed from the execution.
async fn around_one_expiry(database: &Database, subject: &Subject) -> [usize; 3] {
    let pay = Pay::new("");
    let first = pay.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    let record = database.record(&pay.key).await.unwrap();
    assert_shows_expiry(&first, &record);
    let retries = OFFSETS.map(|offset| {
        let (pay, port) = (pay.clone(), subject.port);
        let at = record.expires_at + offset / 1000.0;
        tokio::spawn(async move {
            let mut connection = Connection::open(port).await.unwrap();
            let left = at - now() - 0.002;
            tokio::time::sleep(Duration::from_secs_f64(left.max(0.0))).await;
            while now() < at {
                tokio::task::yield_now().await;
            }
            let sent = now();
            connection.write(&pay.bytes()).await.unwrap();
            let answer = connection.answer().await.unwrap();
            (sent, answer, now())
        })
    });
    database.has_expired(&pay.key).await;
    let mut sides = [0; 3];
    for retry in retries {
        let (sent, answer, answered) = retry.await.unwrap();
        let ago = sent - record.expires_at;
        if answer.body == first.body {
            assert!(ago < 0.0, "replayed {ago} s after its expiry");
            assert_replays(&answer, &first);
            assert_shows_expiry(&answer, &record);
            sides[0] += 1;
        } else if answer.status != 201 {
            if answer.kind() != "transaction-conflict" {
                assert_code(&answer, "request-in-progress");
            }
            assert!(answered >= record.expires_at, "refused before its expiry");
            sides[1] += 1;
        } else {
            assert!(answered >= record.expires_at, "executed before its expiry");
            sides[2] += 1;
        }
    }
    let second = pay.send(subject.port).await.unwrap();
    assert_eq!(second.status, 201, "{}", second.text());
    assert_ne!(second.body, first.body);
    // By the database's clock: not a microsecond before.
    let next = database.record(&pay.key).await.unwrap();
    assert!(next.claimed_at >= record.expires_at, "{record:?}, {next:?}");
    assert_eq!(database.runs(&pay.key).await.len(), 2);
    sides
}

fn assert_shows_expiry(answer: &Answer, record: &Record) {
    let shown = answer.header("idempotency-expires").unwrap();
    let shown = httpdate::parse_http_date(shown).unwrap();
    let shown = shown.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a time of this century")]
    let shown = shown.as_secs() as f64;
    let ends = record.expires_at;
    assert!((0.0..1.0).contains(&(ends - shown)), "{shown}, not {ends}");
}

/// By this machine's clock, which is the database's.
fn now() -> f64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs_f64()
}
