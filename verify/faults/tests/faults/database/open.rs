//! A route that runs without its store: what says so.

use faults::client::{Answer, Pay};
use faults::process::Subject;
use faults::wait::Gate;

use super::{Route, Service, recovers, settled};
use crate::{SUBJECT, assert_code, assert_replays};

/// One count of the layer.
async fn counted(subject: &Subject, name: &str) -> usize {
    let stats = subject.get("/stats").await.text();
    let (_, rest) = stats.split_once(&format!("{name}: ")).unwrap();
    let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
    number.parse().unwrap()
}

/// All counts together.
async fn counted_in_all(subject: &Subject) -> usize {
    let stats = subject.get("/stats").await.text();
    let numbers = stats.split(|c: char| !c.is_ascii_digit());
    numbers.filter_map(|n| n.parse::<usize>().ok()).sum()
}

async fn low(route: Route) -> (Service, Subject) {
    let service = Service::start(route).await;
    let settings = service.settings.clone().with(|s| s.risk = "low".into());
    let open = SUBJECT.start(&settings).await;
    (service, open)
}

fn assert_protected(answer: &Answer) {
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert!(!answer.is_unprotected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d07_an_open_route_runs_without_its_store_and_header_counter_and_log_say_so() {
    let (service, open) = low(Route::Leased).await;
    let stored = Pay::new("");
    let first = stored.send(open.port).await.unwrap();
    assert_protected(&first);

    service.cluster.shut("fast");
    let mut sent = 1;
    for _ in 0..7 {
        let pay = Pay::new("");
        let answer = pay.send(open.port).await.unwrap();
        sent += 1;
        assert_eq!(answer.status, 201, "{}", answer.text());
        assert_eq!(answer.header("idempotency-unprotected"), Some("true"));
        assert!(!answer.is_replayed());
        assert_eq!(service.ledger.runs(&pay.key).await.len(), 1);
    }
    assert_eq!(counted(&open, "unprotected").await, 7);
    let said = open.said();
    assert_eq!(said.matches("runs unprotected").count(), 7, "{said}");
    assert!(!said.contains(&stored.key), "a key is logged");

    // What this process knows, it still keeps.
    let gate = Gate::new();
    let pay = Pay::new(&gate.behave());
    let mut running = pay.begin_on(open.port).await.unwrap();
    service.ledger.has_begun(&pay.key, 1).await;
    let duplicate = pay.send(open.port).await.unwrap();
    assert_code(&duplicate, "request-in-progress");
    gate.open();
    assert!(running.answer().await.unwrap().is_unprotected());
    sent += 2;
    assert_eq!(counted(&open, "unprotected").await, 8);
    assert_eq!(counted_in_all(&open).await, sent);

    service.cluster.boot();
    recovers(&open).await;
    let before = counted(&open, "unprotected").await;
    assert_protected(&Pay::new("").send(open.port).await.unwrap());
    assert_replays(&stored.send(open.port).await.unwrap(), &first);
    assert_eq!(counted(&open, "unprotected").await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d07_a_transactional_route_is_never_open() {
    let (service, open) = low(Route::Transactional).await;
    assert_protected(&settled(&Pay::new(""), open.port).await);
    service.cluster.shut("fast");
    for _ in 0..7 {
        let answer = Pay::new("").send(open.port).await.unwrap();
        assert_code(&answer, "store-unavailable");
        assert!(answer.header("retry-after").is_some());
    }
    assert_eq!(open.runs().await, 1);
    assert_eq!(counted(&open, "unprotected").await, 0);
    assert_eq!(counted(&open, "unavailable").await, 7);
    service.cluster.boot();
    recovers(&open).await;
}
