//! Clocks that are wrong: the application's, which decides nothing, and the database's.

use std::time::Duration;

use faults::client::{Answer, Pay};
use faults::cluster::Cluster;
use faults::database::Database;
use faults::process::Subject;
use faults::record::Record;
use faults::settings::Settings;
use faults::wait::{Gate, until};
use futures_util::future::join_all;

use crate::{SUBJECT, assert_code, assert_replays};

const HOUR: i64 = 3600;

fn settings(database: &Database, risk: &str) -> Settings {
    database.settings(risk).with(|s| {
        s.lease = Some(1500);
        s.sweep = Some(50);
        s.shows_expiry = true;
    })
}

/// Of a process that is an hour ahead, and one that is an hour behind.
async fn hours_apart(settings: &Settings) -> [Subject; 2] {
    [
        SUBJECT.start_at(HOUR, settings).await,
        SUBJECT.start_at(-HOUR, settings).await,
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e04_processes_whose_clocks_are_hours_apart_replay_each_others_answers() {
    for transactional in [false, true] {
        let database = Database::postgres().await;
        let settings = settings(&database, "high").with(|s| s.transactional = transactional);
        let subjects = hours_apart(&settings).await;
        for [one, two] in [[0, 1], [1, 0]] {
            let (one, two) = (&subjects[one], &subjects[two]);
            let pay = Pay::new("");
            let first = pay.send(one.port).await.unwrap();
            assert_eq!(first.status, 201, "{}", first.text());
            for subject in [two, one] {
                let replay = pay.send(subject.port).await.unwrap();
                assert_replays(&replay, &first);
                let shown = replay.header("idempotency-expires");
                assert_eq!(shown, first.header("idempotency-expires"));
            }
            let record = database.record(&pay.key).await.unwrap();
            assert!((database.clock().await - record.claimed_at).abs() < 30.0);
            let retention = record.expires_at - record.claimed_at;
            assert!((retention - 72.0 * 3600.0).abs() < 1.0, "{retention}");
            let shown = httpdate::parse_http_date(first.header("idempotency-expires").unwrap());
            let shown = shown
                .unwrap()
                .duration_since(std::time::SystemTime::UNIX_EPOCH);
            let off = record.expires_at - shown.unwrap().as_secs_f64();
            assert!((0.0..1.0).contains(&off), "{off}");
            assert_code(
                &pay.with_body("{}").send(two.port).await.unwrap(),
                "key-reused",
            );
            assert_eq!(database.runs(&pay.key).await.len(), 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e04_a_process_whose_clock_is_hours_off_takes_over_when_the_lease_is_over_and_not_before() {
    for ahead in [HOUR, -HOUR] {
        let database = Database::postgres().await;
        let settings = settings(&database, "medium");
        let holder = SUBJECT.start_at(ahead, &settings).await;
        let other = SUBJECT.start_at(-ahead, &settings).await;
        let gate = Gate::new();
        let pay = Pay::new(&gate.behave());
        let client = pay.begin_on(holder.port).await.unwrap();
        database.has_begun(&pay.key, 1).await;
        let first = database.record(&pay.key).await.unwrap();
        // Beyond its first lease, which the heartbeat of one keeps against the clock of the other.
        until("the first lease to be over", async || {
            let answer = pay.send(other.port).await.unwrap();
            assert_code(&answer, "request-in-progress");
            let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
            assert!(wait <= 2, "{wait} s");
            (database.clock().await > first.leased_until + 0.2).then_some(())
        })
        .await;
        holder.kill();
        drop(client);
        let last = database.record(&pay.key).await.unwrap();
        assert!(last.leased_until > first.leased_until);
        let successor = other_answer(&pay.behaving(""), &other).await;
        assert_eq!(successor.status, 201, "{}", successor.text());
        let taken = database.record(&pay.key).await.unwrap();
        let early = last.leased_until - taken.claimed_at;
        assert!((-5.0..=0.0).contains(&early), "taken over {early} s early");
        assert_eq!(taken.attempt, 2);
        assert_eq!(database.runs(&pay.key).await.len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e04_a_transaction_is_not_disturbed_by_a_process_whose_clock_is_hours_off() {
    let database = Database::postgres().await;
    let settings = settings(&database, "high").with(|s| s.transactional = true);
    let subjects = hours_apart(&settings).await;
    for [one, two] in [[0, 1], [1, 0]] {
        let (one, two) = (&subjects[one], &subjects[two]);
        let gate = Gate::new();
        let pay = Pay::new(&gate.behave());
        let mut client = pay.begin_on(one.port).await.unwrap();
        until("the transaction to be open", async || {
            (database.open_transactions().await == 1).then_some(())
        })
        .await;
        for _ in 0..5 {
            let answer = pay.send(two.port).await.unwrap();
            assert_code(&answer, "request-in-progress");
        }
        gate.open();
        let first = client.answer().await.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        assert_replays(&pay.send(two.port).await.unwrap(), &first);
        assert_eq!(database.effects(&pay.key).await, 1);
    }
}

/// Until there is something else to say than that the first one runs.
async fn other_answer(pay: &Pay, subject: &Subject) -> Answer {
    until("another answer", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.kind() != "request-in-progress").then_some(answer)
    })
    .await
}

/// A holder in the middle of its handler, on a server whose clock can be set.
struct Holding {
    pay: Pay,
    gate: Gate,
    client: tokio::task::JoinHandle<Answer>,
    holder: Subject,
    other: Subject,
    database: Database,
    // Declared last: it ends after all that uses it.
    cluster: Cluster,
}

impl Holding {
    async fn start(risk: &str) -> Self {
        let cluster = Cluster::start_with_clock().await;
        let database = Database::foreign(&cluster.url()).await;
        let settings = settings(&database, risk);
        let holder = SUBJECT.start(&settings).await;
        let other = SUBJECT.start(&settings).await;
        let gate = Gate::new();
        let pay = Pay::new(&gate.behave());
        let mut connection = pay.begin_on(holder.port).await.unwrap();
        let client = tokio::spawn(async move { connection.answer().await.unwrap() });
        database.has_begun(&pay.key, 1).await;
        Self {
            pay,
            gate,
            client,
            holder,
            other,
            database,
            cluster,
        }
    }

    async fn record(&self) -> Record {
        self.database.record(&self.pay.key).await.unwrap()
    }

    /// Waits for a heartbeat after the clock was set.
    async fn beats(&self) {
        until("a heartbeat by the new clock", async || {
            let left = self.record().await.leased_until - self.database.clock().await;
            (0.0..=1.5).contains(&left).then_some(())
        })
        .await;
    }

    /// For more than a lease, nobody takes over.
    async fn is_kept(&self) {
        let ends = self.record().await.leased_until;
        until("a lease to be over", async || {
            let answer = self.pay.send(self.other.port).await.unwrap();
            assert_code(&answer, "request-in-progress");
            (self.database.clock().await > ends + 0.2).then_some(())
        })
        .await;
    }

    /// One run, one answer.
    async fn completes(self) {
        self.gate.open();
        let first = self.client.await.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        for subject in [&self.holder, &self.other] {
            assert_replays(&self.pay.send(subject.port).await.unwrap(), &first);
        }
        assert_eq!(self.database.runs(&self.pay.key).await.len(), 1);
    }
}

/// Many duplicates at the moment of the jump, before the next heartbeat can be there.
async fn jump_ahead(holding: &Holding) -> Vec<Answer> {
    let others = (0..8).map(|_| {
        let (pay, port) = (holding.pay.behaving(""), holding.other.port);
        tokio::spawn(async move {
            let mut answers = Vec::new();
            for _ in 0..40 {
                answers.push(pay.send(port).await.unwrap());
            }
            answers
        })
    });
    let others: Vec<_> = others.collect();
    holding.cluster.set_clock(HOUR).await;
    let answers = join_all(others).await;
    answers.into_iter().flat_map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e05_when_the_databases_clock_is_set_ahead_critical_holds_and_never_runs_twice() {
    let holding = Holding::start("critical").await;
    for answer in jump_ahead(&holding).await {
        let kinds = ["request-in-progress", "outcome-unknown"];
        assert!(kinds.contains(&answer.kind().as_str()), "{answer:?}");
    }
    println!("{:?}", holding.record().await);
    // The completion of what was held in its absence, or of what it kept.
    holding.completes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e05_when_the_databases_clock_is_set_ahead_high_answers_and_never_runs_twice() {
    let holding = Holding::start("high").await;
    let answers = jump_ahead(&holding).await;
    let lost = answers
        .into_iter()
        .find(|a| a.kind() != "request-in-progress");
    println!("lost: {}", lost.is_some());
    let Some(lost) = lost else {
        return holding.completes().await;
    };
    assert_code(&lost, "attempt-lost");
    holding.gate.open();
    let first = holding.client.await.unwrap();
    assert_eq!((first.status, &first.body), (lost.status, &lost.body));
    assert_eq!(holding.database.runs(&holding.pay.key).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e05_after_its_next_heartbeat_a_clock_that_was_set_ahead_or_back_takes_no_claim_away() {
    // Under this class, a claim that is lost for a moment is a second execution.
    let holding = Holding::start("medium").await;
    for seconds in [HOUR, 0, -HOUR, 0] {
        holding.cluster.set_clock(seconds).await;
        holding.beats().await;
        holding.is_kept().await;
    }
    assert_eq!(holding.record().await.attempt, 1);
    holding.completes().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e05_a_clock_that_is_set_back_keeps_a_lost_attempt_until_it_has_caught_up() {
    let holding = Holding::start("medium").await;
    let Holding { holder, client, .. } = holding;
    client.abort();
    holder.kill();
    let (pay, other) = (&holding.pay, &holding.other);
    let record = holding.database.record(&pay.key).await.unwrap();
    holding.cluster.set_clock(-HOUR).await;
    let asked = tokio::time::Instant::now();
    while asked.elapsed() < Duration::from_millis(2000) {
        let answer = pay.send(other.port).await.unwrap();
        assert_code(&answer, "request-in-progress");
        assert_eq!(answer.header("retry-after"), Some("1"));
    }
    holding.cluster.set_clock(0).await;
    let successor = other_answer(&pay.behaving(""), other).await;
    assert_eq!(successor.status, 201, "{}", successor.text());
    let taken = holding.database.record(&pay.key).await.unwrap();
    assert!(taken.claimed_at >= record.leased_until);
    assert_eq!(taken.attempt, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e05_a_transaction_outlives_a_clock_that_is_set_ahead_or_back() {
    let cluster = Cluster::start_with_clock().await;
    let database = Database::foreign(&cluster.url()).await;
    let settings = settings(&database, "high").with(|s| s.transactional = true);
    let (subject, other) = (
        SUBJECT.start(&settings).await,
        SUBJECT.start(&settings).await,
    );
    for seconds in [HOUR, -HOUR, 0] {
        let gate = Gate::new();
        let pay = Pay::new(&gate.behave());
        let mut client = pay.begin_on(subject.port).await.unwrap();
        until("the transaction to be open", async || {
            (database.open_transactions().await == 1).then_some(())
        })
        .await;
        cluster.set_clock(seconds).await;
        for _ in 0..10 {
            let answer = pay.behaving("").send(other.port).await.unwrap();
            assert_code(&answer, "request-in-progress");
        }
        gate.open();
        let first = client.answer().await.unwrap();
        assert_eq!(first.status, 201, "{}", first.text());
        assert_replays(&pay.send(other.port).await.unwrap(), &first);
        assert_eq!(database.effects(&pay.key).await, 1);
    }
}

/// The server's own timers go on, and so does the execution limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e05_a_clock_that_is_set_back_keeps_no_key_of_a_silent_transaction() {
    let cluster = Cluster::start_with_clock().await;
    let database = Database::foreign(&cluster.url()).await;
    let settings = settings(&database, "high").with(|s| {
        s.transactional = true;
        s.execution_limit = Some(3000);
    });
    let silent = SUBJECT.start(&settings).await;
    let other = SUBJECT.start(&settings).await;
    silent.arm("handler_mid", "pause").await;
    let pay = Pay::new("");
    let _client = pay.begin_on(silent.port).await.unwrap();
    silent.has_reached("handler_mid", 1).await;
    silent.stop().await;
    cluster.set_clock(-HOUR).await;
    assert_eq!(database.open_transactions().await, 1);
    let first = other_answer(&pay, &other).await;
    assert_eq!(first.status, 201, "{}", first.text());
    silent.go_on();
    assert_replays(&pay.send(other.port).await.unwrap(), &first);
    assert_eq!(database.effects(&pay.key).await, 1);
}
