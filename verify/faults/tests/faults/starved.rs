//! Holders that lose their claim while they run, and their process that goes on: heartbeats that a
//! blocked thread starves (C06), and a claim that its own process takes again (C08).

use faults::client::{Answer, Connection, Pay};
use faults::database::Database;
use faults::process::Subject;
use faults::settings::Settings;
use faults::wait::{Gate, until};
use tower_idempotency::store::{
    ClaimRequest, Claimed, Completion, Existing, LeaseRenewal, Renewed, Token,
};
use tower_idempotency::{
    Envelope, Fingerprint, Identity, Lost, PgStore, References, SqliteStore, Store, StoreErrorKind,
};

use crate::{SUBJECT, assert_code, assert_replays, on_every_store};

on_every_store! {
    c06_the_completion_of_a_holder_that_blocks_its_only_thread_is_refused,
    c06_a_holder_that_blocked_its_only_thread_knows_that_its_claim_is_lost,
    c06_under_critical_a_holder_that_blocked_its_only_thread_is_not_run_again,
    c08_a_process_that_takes_its_own_lost_claim_again_has_a_new_fence,
    c08_a_store_that_takes_its_own_claim_again_refuses_every_write_of_the_old_one,
}

fn settings(database: &Database, risk: &str) -> Settings {
    database.settings(risk).with(|s| s.lease = Some(1000))
}

/// A subject whose one thread does nothing but its handler.
async fn blocked(settings: &Settings, pay: &Pay) -> (Subject, Connection) {
    let settings = settings.clone().with(|s| s.workers = Some(1));
    let subject = SUBJECT.start(&settings).await;
    let client = pay.begin_on(subject.port).await.unwrap();
    (subject, client)
}

/// Retries until there is something else to say than that the first one runs.
async fn outlive_the_lease(pay: &Pay, subject: &Subject) -> Answer {
    until("the lease to run out", async || {
        let answer = pay.send(subject.port).await.unwrap();
        (answer.kind() != "request-in-progress").then_some(answer)
    })
    .await
}

async fn c06_the_completion_of_a_holder_that_blocks_its_only_thread_is_refused(database: Database) {
    let settings = settings(&database, "medium");
    let gate = Gate::new();
    let pay = Pay::new(&format!("block {}", gate.behave()));
    let other = SUBJECT.start(&settings).await;
    let (holder, mut client) = blocked(&settings, &pay).await;
    database.has_begun(&pay.key, 1).await;
    let successor = outlive_the_lease(&pay.behaving(""), &other).await;
    assert_eq!(successor.status, 201, "{}", successor.text());
    assert!(successor.text().contains(r#""attempt":2"#));
    gate.open();
    assert_replays(&client.answer().await.unwrap(), &successor);
    assert!(holder.said().contains("refused by the record"));
    for subject in [&holder, &other] {
        assert_replays(&pay.send(subject.port).await.unwrap(), &successor);
    }
    assert_eq!(database.runs(&pay.key).await.len(), 2);
}

async fn c06_a_holder_that_blocked_its_only_thread_knows_that_its_claim_is_lost(
    database: Database,
) {
    let settings = settings(&database, "medium");
    let gate = Gate::new();
    let pay = Pay::new(&format!("block careful {}", gate.behave()));
    let other = SUBJECT.start(&settings).await;
    let (_holder, mut client) = blocked(&settings, &pay).await;
    database.has_begun(&pay.key, 1).await;
    let successor = outlive_the_lease(&pay.behaving(""), &other).await;
    gate.open();
    // It asked, and did not finish. Its 503 frees a key that is not its own any more.
    client.answer().await.unwrap();
    let runs = database.runs(&pay.key).await;
    let finished: Vec<_> = runs.iter().filter(|run| run.finished).collect();
    assert_eq!((runs.len(), finished.len()), (2, 1));
    assert!(successor.text().contains(&finished[0].execution));
    assert_replays(&pay.send(other.port).await.unwrap(), &successor);
}

async fn c06_under_critical_a_holder_that_blocked_its_only_thread_is_not_run_again(
    database: Database,
) {
    let settings = settings(&database, "critical");
    let gate = Gate::new();
    let pay = Pay::new(&format!("block {}", gate.behave()));
    let other = SUBJECT.start(&settings).await;
    let (_holder, mut client) = blocked(&settings, &pay).await;
    database.has_begun(&pay.key, 1).await;
    assert_code(&outlive_the_lease(&pay, &other).await, "outcome-unknown");
    gate.open();
    let first = client.answer().await.unwrap();
    assert_eq!(first.status, 201, "{}", first.text());
    assert_replays(&pay.send(other.port).await.unwrap(), &first);
    assert_eq!(database.runs(&pay.key).await.len(), 1);
}

/// A transaction needs no heartbeat: the server ends it at its limit, and the key is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c06_a_transaction_that_blocks_its_only_thread_for_too_long_commits_nothing() {
    let database = Database::postgres().await;
    let settings = database.settings("high").with(|s| {
        s.transactional = true;
        s.execution_limit = Some(1000);
        s.store_timeout = Some(10_000);
        s.settle_timeout = Some(20_000);
    });
    let gate = Gate::new();
    let pay = Pay::new(&format!("block {}", gate.behave()));
    let other = SUBJECT.start(&settings).await;
    let (holder, mut client) = blocked(&settings, &pay).await;
    until("the transaction to be open", async || {
        (database.open_transactions().await == 1).then_some(())
    })
    .await;
    let successor = outlive_the_lease(&pay.behaving(""), &other).await;
    assert_eq!(successor.status, 201, "{}", successor.text());
    assert_eq!(database.effects(&pay.key).await, 1);
    gate.open();
    assert_code(&client.answer().await.unwrap(), "transaction-conflict");
    assert_eq!(database.effects(&pay.key).await, 1);
    for subject in [&holder, &other] {
        assert_replays(&pay.send(subject.port).await.unwrap(), &successor);
    }
    database.is_clean().await;
}

/// Until there is something else to say than that it runs; `None` when its process is gone.
fn retry(pay: Pay, port: u16) -> tokio::task::JoinHandle<Option<Answer>> {
    tokio::spawn(async move {
        loop {
            let answer = pay.send(port).await.ok()?;
            if answer.kind() != "request-in-progress" {
                return Some(answer);
            }
        }
    })
}

/// Attempt 1 is stopped, attempt 2 takes over elsewhere and dies, attempt 3 runs beside attempt 1.
async fn c08_a_process_that_takes_its_own_lost_claim_again_has_a_new_fence(database: Database) {
    let settings = settings(&database, "medium");
    let subject = SUBJECT.start(&settings).await;
    let other = SUBJECT.start(&settings).await;
    let (one, two, three) = (Gate::new(), Gate::new(), Gate::new());
    let pay = Pay::new(&one.behave());
    let mut first = pay.begin_on(subject.port).await.unwrap();
    database.has_begun(&pay.key, 1).await;
    let old = database.record(&pay.key).await.unwrap();
    subject.stop().await;

    let taken = retry(pay.behaving(&two.behave()), other.port);
    database.has_begun(&pay.key, 2).await;
    other.kill();
    assert!(taken.await.unwrap().is_none(), "it was answered");
    subject.go_on();
    let again = retry(pay.behaving(&three.behave()), subject.port);
    database.has_begun(&pay.key, 3).await;
    let new = database.record(&pay.key).await.unwrap();
    assert_eq!((old.attempt, new.attempt), (1, 3));
    assert_ne!(old.token, new.token);

    one.open();
    assert_code(&first.answer().await.unwrap(), "request-in-progress");
    assert!(subject.said().contains("refused by the record"));
    assert_eq!(database.record(&pay.key).await.unwrap().token, new.token);
    three.open();
    let answer = again.await.unwrap().unwrap();
    assert_eq!(answer.status, 201, "{}", answer.text());
    assert!(answer.text().contains(r#""attempt":3"#));
    assert_replays(&pay.send(subject.port).await.unwrap(), &answer);
}

async fn c08_a_store_that_takes_its_own_claim_again_refuses_every_write_of_the_old_one(
    database: Database,
) {
    match database.url.strip_prefix("sqlite:") {
        Some(path) => {
            let options = faults::ledger::sqlite_options(path);
            let pool = sqlx::SqlitePool::connect_with(options).await.unwrap();
            let store = SqliteStore::new(pool);
            store.migrate().await.unwrap();
            takes_its_own_claim_again(&database, store).await;
        }
        None => {
            let pool = sqlx::PgPool::connect(&database.url).await.unwrap();
            let store = PgStore::new(pool);
            store.migrate().await.unwrap();
            takes_its_own_claim_again(&database, store).await;
        }
    }
}

async fn takes_its_own_claim_again(database: &Database, store: impl Store) {
    let request = |token| ClaimRequest {
        identity: Identity::new("acme", "POST /pay", "key"),
        fingerprint: Fingerprint::of_bytes(b"request"),
        token,
        lost: Lost::Rerun,
        lease: std::time::Duration::from_millis(300),
        ttl: std::time::Duration::from_secs(3600),
    };
    let claim = async |request: &ClaimRequest| match store.claim(request).await.unwrap() {
        Claimed::Acquired(claim) => Some(claim),
        Claimed::Existing(Existing::InProgress { .. }) => None,
        other => panic!("{other:?}"),
    };
    let old = claim(&request(Token::random().unwrap())).await.unwrap();
    let next = request(Token::random().unwrap());
    let new = until("the lease to run out", async || claim(&next).await).await;
    faults::fired::fired("lease over");
    assert_eq!((old.attempt, new.attempt), (1, 2));
    let completion = Completion {
        answer: Envelope::new(http::Response::new("paid".into())),
        references: References::default(),
    };
    let none = References::default();
    for refused in [
        store.complete(&old, &completion).await,
        store.release(&old).await,
        store.hold(&old, &none).await,
    ] {
        assert_eq!(refused.unwrap_err().kind(), StoreErrorKind::ClaimLost);
    }
    let renewal = LeaseRenewal {
        claim: old,
        lease: std::time::Duration::from_secs(30),
    };
    assert_eq!(store.extend(&[renewal]).await.unwrap(), [Renewed::Lost]);
    let record = database.record("key").await.unwrap();
    assert_eq!((record.state.as_str(), record.attempt), ("running", 2));
    store.complete(&new, &completion).await.unwrap();
}
