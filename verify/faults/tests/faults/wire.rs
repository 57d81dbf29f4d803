//! What is between a subject and its database fails: at one statement, or for all of them.

use std::cell::Cell;
use std::time::{Duration, Instant};

use faults::client::{Answer, Pay};
use faults::cluster::Cluster;
use faults::database::Database;
use faults::process::Subject;
use faults::proxy::{Action, Close, Exchange, Proxy, Traffic, reply, request};
use faults::settings::Settings;
use faults::wait::{Gate, until};
use sqlx::Connection as _;
use sqlx::postgres::{PgConnection, PgPool};
use tower_idempotency::PgStore;

use crate::outages::{fails_closed, recovers, settings};
use crate::{SUBJECT, assert_code, assert_replays};

const CLAIM: &str = "insert into idempotency.record";
const COMPLETION: &str = "update idempotency.record set state = 'completed'";
const LOOKUP: &str = "from idempotency.record where id = $1";
const HEARTBEAT: &str = "with due as";

/// Of a subject whose records are behind a proxy, and whose ledger is not.
fn settings_behind(proxy: &Proxy, database: &Database, risk: &str) -> Settings {
    Settings::new(proxy.url(), risk).with(|s| {
        s.ledger = database.url.clone();
        s.lease = Some(1500);
    })
}

async fn behind(proxy: &Proxy, database: &Database, risk: &str) -> Subject {
    SUBJECT.start(&settings_behind(proxy, database, risk)).await
}

/// The same, where the statements of replays are counted.
async fn asking(proxy: &Proxy, database: &Database, risk: &str) -> Subject {
    let settings = settings_behind(proxy, database, risk).with(|s| s.replay_cache = false);
    SUBJECT.start(&settings).await
}

async fn executed_once(database: &Database, subject: &Subject, pay: &Pay, first: &Answer) {
    assert_eq!(first.status, 201, "{}", first.text());
    assert!(!first.is_replayed());
    assert_replays(&pay.send(subject.port).await.unwrap(), first);
    let runs = database.runs(&pay.key).await;
    assert_eq!((runs.len(), runs[0].attempt), (1, 1));
    assert!(database.held().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c11_a_claim_whose_acknowledgement_is_lost_runs_the_handler_once() {
    for risk in ["critical", "high", "medium"] {
        let database = Database::postgres().await;
        let proxy = Proxy::start(&database.url).await;
        let subject = asking(&proxy, &database, risk).await;
        let lost = proxy.on(reply(CLAIM)).does(Action::Cut(Close::Reset));
        let pay = Pay::new("");
        let first = pay.send(subject.port).await.unwrap();
        assert_eq!(lost.fired(), 1);
        executed_once(&database, &subject, &pay, &first).await;
        assert_eq!(proxy.traffic().executions(CLAIM), 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c12_a_completion_whose_acknowledgement_is_lost_is_the_answer() {
    for risk in ["critical", "high", "medium"] {
        let database = Database::postgres().await;
        let proxy = Proxy::start(&database.url).await;
        let subject = behind(&proxy, &database, risk).await;
        let lost = proxy.on(reply(COMPLETION)).does(Action::Cut(Close::Reset));
        let pay = Pay::new("");
        let first = pay.send(subject.port).await.unwrap();
        assert_eq!(lost.fired(), 1);
        executed_once(&database, &subject, &pay, &first).await;
        assert_eq!(proxy.traffic().executions(COMPLETION), 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c12_a_completion_that_never_arrives_is_sent_again() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = behind(&proxy, &database, "critical").await;
    let lost = proxy.on(request(COMPLETION)).times(2);
    let lost = lost.does(Action::Cut(Close::Reset));
    let pay = Pay::new("");
    let first = pay.send(subject.port).await.unwrap();
    assert_eq!(lost.fired(), 2);
    executed_once(&database, &subject, &pay, &first).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c07_a_holder_whose_heartbeats_are_late_stops_acting_and_is_fenced() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let holder = behind(&proxy, &database, "medium").await;
    let late = proxy.on(request(HEARTBEAT)).times(usize::MAX);
    let late = late.does(Action::Hold);
    let gate = Gate::new();
    let pay = Pay::new(&format!("careful {}", gate.behave()));
    let mut client = pay.begin_on(holder.port).await.unwrap();
    database.has_begun(&pay.key, 1).await;
    late.has_fired(1).await;

    let settings = database.settings("medium").with(|s| s.lease = Some(1500));
    let other = SUBJECT.start(&settings).await;
    let successor = until("the lease to run out", async || {
        let answer = pay.behaving("").send(other.port).await.unwrap();
        (answer.kind() != "request-in-progress").then_some(answer)
    })
    .await;
    assert_eq!(successor.status, 201, "{}", successor.text());
    assert!(successor.text().contains(r#""attempt":2"#));
    // The holder has heard of nothing, and must know by its own clock.
    gate.open();
    assert_replays(&client.answer().await.unwrap(), &successor);
    let finished = database.runs(&pay.key).await;
    let finished = finished.iter().filter(|run| run.finished);
    assert_eq!(finished.count(), 1);

    // The heartbeats arrive at last, and change nothing.
    let before = proxy.traffic();
    late.release();
    until("a late heartbeat to be answered", async || {
        let passed = proxy.traffic().since(&before);
        let mut beats = passed.exchanges.iter();
        let answered = beats.find(|beat| beat.executes(HEARTBEAT) && beat.status.is_some());
        answered.cloned()
    })
    .await;
    for subject in [&holder, &other] {
        assert_replays(&pay.send(subject.port).await.unwrap(), &successor);
    }
    assert_eq!(database.runs(&pay.key).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c07_heartbeats_that_are_slow_within_the_lease_keep_the_claim() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let holder = behind(&proxy, &database, "medium").await;
    let slow = proxy.on(reply(HEARTBEAT)).times(usize::MAX);
    let slow = slow.does(Action::Delay(Duration::from_millis(250)));
    let gate = Gate::new();
    let pay = Pay::new(&format!("careful {}", gate.behave()));
    let mut client = pay.begin_on(holder.port).await.unwrap();
    // Five beats are more than one lease.
    slow.has_fired(5).await;
    gate.open();
    let first = client.answer().await.unwrap();
    executed_once(&database, &holder, &pay, &first).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x8_d17_while_nothing_is_heard_of_the_server_requests_are_refused_and_then_recover() {
    let (database, ledger) = (Database::postgres().await, Database::sqlite().await);
    let proxy = Proxy::start(&database.url).await;
    let subject = SUBJECT.start(&settings(proxy.url(), &ledger, "high")).await;
    let stored = Pay::new("");
    let first = stored.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    let before = proxy.traffic();
    proxy.blackhole();
    fails_closed(&subject).await;
    let passed = proxy.traffic().since(&before);
    assert_eq!((passed.request_bytes, passed.reply_bytes), (0, 0));
    proxy.heal();
    recovers(&subject).await;
    assert_replays(&stored.send(subject.port).await.unwrap(), &first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn x7_while_the_server_refuses_requests_are_refused_and_then_recover() {
    let (database, ledger) = (Database::postgres().await, Database::sqlite().await);
    let proxy = Proxy::start(&database.url).await;
    let subject = SUBJECT.start(&settings(proxy.url(), &ledger, "high")).await;
    proxy.refuse();
    proxy.cut();
    fails_closed(&subject).await;
    proxy.heal();
    recovers(&subject).await;
}

/// A host that vanished, and another in its place: nobody closes the connections to the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d17_connections_that_are_half_open_are_given_up_in_time() {
    let (database, ledger) = (Database::postgres().await, Database::sqlite().await);
    let proxy = Proxy::start(&database.url).await;
    let subject = SUBJECT.start(&settings(proxy.url(), &ledger, "high")).await;
    let subject = crate::warm::<16>(vec![subject]).await.remove(0);
    let before = proxy.traffic();
    println!("{} connections are stranded", before.connections);
    assert!(before.connections > 1);
    proxy.strand();
    let stranded = Instant::now();
    let pay = Pay::new("");
    let refused = Cell::new(0);
    let first = until("a good connection to be used", async || {
        let sent = Instant::now();
        let answer = pay.send(subject.port).await.unwrap();
        assert!(
            sent.elapsed() < Duration::from_secs(1),
            "it is not given up"
        );
        if answer.status == 201 {
            return Some(answer);
        }
        assert_code(&answer, "store-unavailable");
        refused.set(refused.get() + 1);
        None
    })
    .await;
    println!(
        "refused {} times in {:?}",
        refused.get(),
        stranded.elapsed()
    );
    assert!(refused.get() > 0, "no connection was half-open");
    assert!(proxy.traffic().since(&before).connections > 0);
    assert_replays(&pay.send(subject.port).await.unwrap(), &first);
    assert_eq!(ledger.runs(&pay.key).await.len(), 1);
    recovers(&subject).await;
}

/// Opening a connection takes longer than a request waits for the store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d17_connections_that_are_slow_to_open_are_used_when_they_are_open() {
    let (database, ledger) = (Database::postgres().await, Database::sqlite().await);
    let proxy = Proxy::start(&database.url).await;
    let timeout = Duration::from_millis(400);
    let settings = settings(proxy.url(), &ledger, "high").with(|s| {
        s.store_timeout = Some(400);
        s.migrate = false;
    });
    PgStore::new(PgPool::connect(&database.url).await.unwrap())
        .migrate()
        .await
        .unwrap();
    let slow = proxy
        .on(request("startup"))
        .times(1000)
        .does(Action::Delay(timeout * 2));
    let subject = SUBJECT.start(&settings).await;
    let pay = Pay::new("");
    until("a connection to be used", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.status == 201).then_some(())
    })
    .await;
    assert!(slow.fired() > 0);
}

async fn superuser(cluster: &Cluster) -> PgConnection {
    PgConnection::connect(&cluster.url()).await.unwrap()
}

async fn run(connection: &mut PgConnection, statements: &[&'static str]) {
    for statement in statements {
        sqlx::raw_sql(*statement)
            .execute(&mut *connection)
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d10_while_the_server_has_no_connection_to_give_requests_are_refused() {
    let (cluster, ledger) = (Cluster::start().await, Database::sqlite().await);
    let mut admin = superuser(&cluster).await;
    run(
        &mut admin,
        &[
            "create role app login password 'app' connection limit 10",
            "grant all on database postgres to app",
        ],
    )
    .await;
    let (_, place) = cluster
        .url()
        .rsplit_once('@')
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .unwrap();
    let url = format!("postgres://app:app@{place}");
    let proxy = Proxy::start(&url).await;
    let subject = SUBJECT.start(&settings(proxy.url(), &ledger, "high")).await;
    let stored = Pay::new("");
    let first = stored.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());

    proxy.cut();
    let slots = until("all slots to be taken", async || {
        let mut slots = Vec::new();
        while let Ok(slot) = PgConnection::connect(&url).await {
            slots.push(slot);
        }
        (slots.len() == 10).then_some(slots)
    })
    .await;
    fails_closed(&subject).await;
    let refused = proxy.traffic().failures("53300");
    println!("refused by the server: {refused}");
    assert!(refused > 0);
    for slot in slots {
        slot.close().await.unwrap();
    }
    recovers(&subject).await;
    assert_replays(&stored.send(subject.port).await.unwrap(), &first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d13_while_the_server_is_read_only_requests_are_refused() {
    let (cluster, ledger) = (Cluster::start().await, Database::sqlite().await);
    let mut admin = superuser(&cluster).await;
    let proxy = Proxy::start(&cluster.url()).await;
    let subject = SUBJECT.start(&settings(proxy.url(), &ledger, "high")).await;
    let stored = Pay::new("");
    let first = stored.send(subject.port).await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());

    let on = "alter system set default_transaction_read_only = on";
    run(&mut admin, &[on, "select pg_reload_conf()"]).await;
    until("the server to be read-only", async || {
        let now: String = sqlx::query_scalar("show default_transaction_read_only")
            .fetch_one(&mut superuser(&cluster).await)
            .await
            .unwrap();
        (now == "on").then_some(())
    })
    .await;
    let before = proxy.traffic();
    fails_closed(&subject).await;
    let traffic = proxy.traffic().since(&before);
    let refused = traffic.failures("25006");
    println!(
        "{refused} statements were refused, {} connections opened",
        traffic.connections
    );
    assert!(refused > 0);
    // A connection that is refused is not used again: after a failover, another may lead elsewhere.
    let refusing = traffic.exchanges.iter().filter(|one| one.error.is_some());
    let mut refusing: Vec<_> = refusing.map(|one| one.connection).collect();
    refusing.sort_unstable();
    let times = refusing.len();
    refusing.dedup();
    assert_eq!(refusing.len(), times);

    let off = "alter system reset default_transaction_read_only";
    run(&mut admin, &[off, "select pg_reload_conf()"]).await;
    recovers(&subject).await;
    assert_replays(&stored.send(subject.port).await.unwrap(), &first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_execution_and_a_replay_cost_two_statements_each_and_no_transaction() {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let subject = asking(&proxy, &database, "high").await;
    // Each connection prepares a statement once.
    let cost = async |pay: &Pay| {
        let before = proxy.traffic();
        let answer = pay.send(subject.port).await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
        proxy.traffic().since(&before)
    };
    let [first, replay] = until("every statement to be prepared", async || {
        let pay = Pay::new("");
        let costs = [cost(&pay).await, cost(&pay).await];
        let new = |exchange: &Exchange| !exchange.prepared.is_empty();
        let is_warm = costs.iter().all(|cost| !cost.exchanges.iter().any(new));
        is_warm.then_some(costs)
    })
    .await;
    // The pool itself pings every connection that it gets back, which nobody waits for.
    let statements = |cost: &Traffic| {
        let executed = cost.exchanges.iter().map(|one| one.executed.len());
        executed.sum::<usize>()
    };
    assert_eq!(statements(&first), 2);
    assert_eq!(
        (first.executions(CLAIM), first.executions(COMPLETION)),
        (1, 1)
    );
    assert_eq!(statements(&replay), 2);
    assert_eq!(
        (replay.executions(CLAIM), replay.executions(LOOKUP)),
        (1, 1)
    );
    for cost in [first, replay] {
        assert_eq!((cost.connections, cost.executions("begin")), (0, 0));
    }
}
