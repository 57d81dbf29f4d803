//! A connection that goes from one transaction to the next, and fails on its way.

use faults::client::Pay;
use faults::database::Database;
use faults::proxy::{Action, Close, Proxy, request};
use faults::wait::until;
use futures_util::future::join_all;

use crate::{SUBJECT, assert_replays};

/// How a transaction begins on a connection that another has ended its own on.
const HANDED: &str = "rollback; set transaction";

const TIMES: usize = 4;

async fn fails_on_its_way(action: Action) {
    let database = Database::postgres().await;
    let proxy = Proxy::start(&database.url).await;
    let settings = database.settings("high").with(|s| {
        s.transactional = true;
        s.max_transactions = Some(2);
        s.store = proxy.url().to_owned();
    });
    let subject = SUBJECT.start(&settings).await;
    let fault = proxy.on(request(HANDED)).times(TIMES).does(action);
    let pays: Vec<_> = (0..40).map(|_| Pay::new("delay=20")).collect();
    let answers = join_all(pays.iter().map(|pay| async {
        let first = pay.send(subject.port).await.unwrap();
        if first.status == 201 {
            return first;
        }
        assert_eq!(first.kind(), "store-unavailable", "{}", first.text());
        until("a retry to be answered", async || {
            let retry = pay.send(subject.port).await.unwrap();
            (retry.status == 201).then_some(retry)
        })
        .await
    }))
    .await;
    fault.has_fired(TIMES).await;
    for (pay, answer) in pays.iter().zip(&answers) {
        assert_replays(&pay.send(subject.port).await.unwrap(), answer);
        assert_eq!(database.runs(&pay.key).await.len(), 1);
    }
    until("all transactions to be over", async || {
        (database.open_transactions().await == 0).then_some(())
    })
    .await;
    database.is_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_whose_connection_breaks_as_it_is_handed_over_is_begun_on_another() {
    fails_on_its_way(Action::Cut(Close::Reset)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_not_begun_where_it_was_handed_over_is_begun_again() {
    fails_on_its_way(Action::Fail("57014")).await;
}
