//! A refusal rolls back what its handler wrote, and with it its lock: another node may be there before it
//! is recorded.

use faults::client::Pay;
use faults::database::Database;
use faults::process::Subject;
use faults::proxy::{Action, Fault, Proxy, request};
use faults::wait::until;

use super::{behind, runs_afresh, settings, took_effect_once};
use crate::{SUBJECT, assert_code, assert_replays};

/// How an operation is entered on a connection that is at hand.
const AGAIN: &str = "select idempotency.enter($1";

/// Two nodes, and a request to the first of them, whose refusal is rolled back, and not entered again yet.
struct Refused {
    database: Database,
    first: Subject,
    second: Subject,
    pay: Pay,
    client: faults::client::Connection,
    held: Fault,
    _proxy: Proxy,
}

impl Refused {
    async fn new() -> Self {
        let database = Database::postgres().await;
        let proxy = Proxy::start(&database.url).await;
        let first = behind(&proxy, &database, |_| {}).await;
        let second = SUBJECT.start(&settings(&database)).await;
        let held = proxy.on(request(AGAIN)).does(Action::Hold);
        let pay = Pay::new("status=404");
        let client = pay.begin_on(first.port).await.unwrap();
        held.has_fired(1).await;
        assert_eq!(database.effects(&pay.key).await, 0);
        Self {
            database,
            first,
            second,
            pay,
            client,
            held,
            _proxy: proxy,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_answered_as_another_node_has_answered_meanwhile() {
    let mut refused = Refused::new().await;
    let paying = refused.pay.behaving("");
    let other = paying.send(refused.second.port).await.unwrap();
    assert_eq!(other.status, 201, "{}", other.text());
    refused.held.release();
    let answer = refused.client.answer().await.unwrap();
    assert_replays(&answer, &other);
    let (runs, others) = (refused.first.runs().await, refused.second.runs().await);
    assert_eq!((runs, others), (1, 1));
    took_effect_once(&refused.database, &refused.first, &paying, &other).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_that_another_node_runs_meanwhile_is_not_recorded() {
    let mut refused = Refused::new().await;
    let paying = refused.pay.behaving("delay=2000");
    let mut other = paying.begin_on(refused.second.port).await.unwrap();
    until("the other to run", async || {
        (refused.second.runs().await == 1).then_some(())
    })
    .await;
    refused.held.release();
    let answer = refused.client.answer().await.unwrap();
    assert_code(&answer, "transaction-conflict");
    let other = other.answer().await.unwrap();
    assert_eq!(other.status, 201, "{}", other.text());
    assert_eq!(refused.first.runs().await, 1);
    took_effect_once(&refused.database, &refused.first, &paying, &other).await;
}

/// Its process dies, or its connection breaks, where nothing of it is there any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_whose_process_dies_before_it_is_recorded_runs_again() {
    let mut refused = Refused::new().await;
    refused.first.kill();
    assert!(refused.client.answer().await.is_err());
    refused.held.release();
    let paying = refused.pay.behaving("");
    runs_afresh(&refused.database, &refused.second, &paying).await;
    assert_eq!(refused.second.runs().await, 1);
}
