//! What is committed, stored and freed, by how the handler ends.

use std::time::Duration;

use axum::http::StatusCode;
use tower_idempotency::{Policy, Store, store::Resolution};

use crate::bank::{Banking, paid};
use crate::site::{Runs, Sent, policy};

on_both_stores!(
    t1_a_handlers_write_and_its_answer_commit_together,
    t1_a_handler_that_fails_leaves_nothing_and_the_retry_runs,
    t2_a_constraint_that_fails_at_commit_is_a_500_and_the_key_is_free,
    t8_a_replay_writes_nothing,
    t11_a_handler_that_commits_by_itself_is_told_apart_and_held,
    t11_a_handler_that_rolls_back_by_itself_has_done_nothing,
    t12_a_handler_that_takes_no_transaction_has_its_answer_stored,
    x1_a_5xx_rolls_back_and_frees_the_key,
    x1_a_panic_rolls_back_and_frees_the_key,
    x2_a_refusal_is_stored_without_the_handlers_writes,
    x2b_a_rejected_payload_frees_the_key,
    x3_an_answer_that_says_nothing_happened_frees_the_key,
    x5_the_handlers_word_overrides_the_status,
    x5_what_a_handler_holds_waits_for_a_person,
    x11_a_handler_that_never_returns_is_ended_and_the_key_is_free,
    r10_a_stream_commits_its_tombstone_at_the_head,
    r11_a_body_that_breaks_off_rolls_back,
    l1_a_record_past_its_ttl_runs_again,
    s1_every_risk_class_is_refused_while_the_store_is_down,
);

async fn assert_ran_twice(bank: &impl Banking, then: &str, status: u16) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    let first = paid(&site, "a", then).await;
    assert_eq!(first.status, status, "{first:?}");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    paid(&site, "a", "201").await.assert_run(2);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

async fn t1_a_handlers_write_and_its_answer_commit_together(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    let first = paid(&site, "a", "201").await;
    first.assert_run(1);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
    paid(&site, "a", "201").await.assert_replay_of(&first);
    assert_eq!(runs.count(), 1);
}

async fn t1_a_handler_that_fails_leaves_nothing_and_the_retry_runs(bank: impl Banking) {
    assert_ran_twice(&bank, "give-up", 500).await;
}

async fn t2_a_constraint_that_fails_at_commit_is_a_500_and_the_key_is_free(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    let first = paid(&site, "a", "deferred").await;
    first.assert_problem(500, "transaction-aborted");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    paid(&site, "a", "201").await.assert_run(2);
}

async fn t8_a_replay_writes_nothing(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    let first = paid(&site, "a", "201").await;
    for _ in 0..5 {
        paid(&site, "a", "201").await.assert_replay_of(&first);
    }
    assert_eq!((bank.ledger().await, runs.count()), (1, 1));
}

/// What the handlers committed stays, and is not done again.
async fn t11_a_handler_that_commits_by_itself_is_told_apart_and_held(bank: impl Banking) {
    let runs = Runs::free();
    for (key, then) in [("a", "commit"), ("b", "commit; begin")] {
        let site = bank.open(&runs, policy().with_reruns(1)).await;
        let first = paid(&site, key, then).await;
        first.assert_problem(500, "transaction-ended");
        let second = paid(&site, key, "201").await;
        second.assert_problem(409, "outcome-unknown");
    }
    assert_eq!((bank.ledger().await, bank.records().await), (2, 2));
    assert_eq!(runs.count(), 2);
}

async fn t11_a_handler_that_rolls_back_by_itself_has_done_nothing<B: Banking>(bank: B) {
    let site = bank.open(&Runs::free(), policy()).await;
    let first = paid(&site, "a", "rollback").await;
    let second = paid(&site, "a", "201").await;
    if B::TELLS_COMMITS {
        first.assert_problem(500, "transaction-aborted");
        second.assert_run(2);
        assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
    } else {
        first.assert_problem(500, "transaction-ended");
        second.assert_problem(409, "outcome-unknown");
        assert_eq!((bank.ledger().await, bank.records().await), (0, 1));
    }
}

async fn t12_a_handler_that_takes_no_transaction_has_its_answer_stored(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    let first = site.send(Sent::post("/plain").key("a")).await;
    first.assert_run(1);
    let again = site.send(Sent::post("/plain").key("a")).await;
    again.assert_replay_of(&first);
    assert_eq!(bank.records().await, 1);
}

async fn x1_a_5xx_rolls_back_and_frees_the_key(bank: impl Banking) {
    assert_ran_twice(&bank, "503", 503).await;
}

async fn x1_a_panic_rolls_back_and_frees_the_key(bank: impl Banking) {
    assert_ran_twice(&bank, "panic", 500).await;
}

async fn x2_a_refusal_is_stored_without_the_handlers_writes(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    for (number, status) in [402, 404, 409, 410, 423].into_iter().enumerate() {
        let key = status.to_string();
        let first = paid(&site, &key, &key).await;
        assert_eq!(first.status, status);
        paid(&site, &key, "201").await.assert_replay_of(&first);
        assert_eq!(runs.count(), number + 1);
    }
    assert_eq!((bank.ledger().await, bank.records().await), (0, 5));
}

async fn x2b_a_rejected_payload_frees_the_key(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    for status in ["400", "415", "422"] {
        let first = site
            .send(crate::bank::pay(status, status).body("wrong"))
            .await;
        assert_eq!(first.status.as_str(), status);
        // With another payload, which is no reuse of the key.
        let mended = paid(&site, status, "201").await;
        assert_eq!(mended.status, StatusCode::CREATED);
    }
    assert_eq!((bank.ledger().await, bank.records().await), (3, 3));
}

async fn x3_an_answer_that_says_nothing_happened_frees_the_key(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    for status in ["401", "403", "408", "425", "429"] {
        assert_eq!(paid(&site, status, status).await.status.as_str(), status);
    }
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
}

async fn x5_the_handlers_word_overrides_the_status(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    let stored = paid(&site, "a", "500 store").await;
    assert!(!stored.headers.contains_key("outcome"));
    paid(&site, "a", "201").await.assert_replay_of(&stored);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));

    let released = paid(&site, "b", "201 release").await;
    assert_eq!(released.status, StatusCode::CREATED);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

async fn x5_what_a_handler_holds_waits_for_a_person(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    let first = paid(&site, "a", "201 hold").await;
    assert_eq!(first.status, StatusCode::CREATED);
    let second = paid(&site, "a", "201").await;
    second.assert_problem(409, "outcome-unknown");
    assert_eq!(bank.ledger().await, 0);

    let store = bank.store();
    let held = store.list_held(None, 10).await.unwrap();
    assert_eq!(held.len(), 1);
    let release = store.resolve(&held[0].identity, held[0].token, &Resolution::Release);
    release.await.unwrap();
    paid(&site, "a", "201").await.assert_run(2);
}

async fn x11_a_handler_that_never_returns_is_ended_and_the_key_is_free(bank: impl Banking) {
    let runs = Runs::free();
    let policy = policy().with_execution_limit(Duration::from_millis(300));
    let site = bank.open(&runs, policy).await;
    let first = paid(&site, "a", "hang").await;
    first.assert_problem(500, "execution-limit");
    assert_eq!(first.headers["retry-after"], "1");
    paid(&site, "a", "201").await.assert_run(2);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

async fn r10_a_stream_commits_its_tombstone_at_the_head(bank: impl Banking) {
    let runs = Runs::free();
    let site = bank.open(&runs, policy()).await;
    let mut stream = site.connect().await;
    let request = "POST /pay HTTP/1.1\r\nhost: bank\r\nx-tenant: acme\r\nidempotency-key: a\r\n\
         x-then: endless\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n{\"item\":\"tea\"}";
    tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes())
        .await
        .unwrap();
    crate::site::eventually("the tombstone is committed", async || {
        bank.records().await == 1
    })
    .await;
    assert_eq!(bank.ledger().await, 1);
    let retry = paid(&site, "a", "201").await;
    retry.assert_problem(410, "response-not-retained");
    assert_eq!(runs.count(), 1);
}

async fn r11_a_body_that_breaks_off_rolls_back(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    let first = paid(&site, "a", "break-off").await;
    first.assert_problem(500, "response-failed");
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    paid(&site, "a", "201").await.assert_run(2);
}

async fn l1_a_record_past_its_ttl_runs_again(bank: impl Banking) {
    let site = bank.open(&Runs::free(), policy()).await;
    paid(&site, "a", "201").await.assert_run(1);
    bank.age(Duration::from_secs(73 * 3600)).await;
    let second = paid(&site, "a", "201").await;
    second.assert_run(2);
    paid(&site, "a", "201").await.assert_replay_of(&second);
    assert_eq!((bank.ledger().await, bank.records().await), (2, 1));
}

async fn s1_every_risk_class_is_refused_while_the_store_is_down(bank: impl Banking) {
    bank.close_store().await;
    for policy in [
        Policy::critical(),
        Policy::high(),
        Policy::medium(),
        Policy::low(),
    ] {
        let runs = Runs::free();
        let site = bank.open(&runs, policy).await;
        let answer = paid(&site, "a", "201").await;
        answer.assert_problem(503, "store-unavailable");
        assert_eq!(answer.headers["retry-after"], "1");
        assert_eq!(runs.count(), 0);
    }
}
