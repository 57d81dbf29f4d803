//! Relays that die, stop, or lose their claim.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tower_idempotency::PgStore;
use tower_idempotency::outbox::{MessageId, Outgoing, PublishError, Publisher, RelayHandle};

use crate::common::fired::fired;

use super::{Fixture, Recorder, message, until};

const GRACE: Duration = Duration::from_secs(20);

/// Publishes, says so, and waits before it returns.
#[derive(Clone)]
struct Paused {
    recorder: Recorder,
    published: Arc<Notify>,
    go_on: Arc<Semaphore>,
}

impl Paused {
    fn new(recorder: &Recorder) -> Self {
        Self {
            recorder: recorder.clone(),
            published: Arc::default(),
            go_on: Arc::new(Semaphore::new(0)),
        }
    }
}

impl Publisher for Paused {
    async fn publish(&self, message: &Outgoing) -> Result<(), PublishError> {
        self.recorder.publish(message).await?;
        self.published.notify_one();
        fired("relay waits");
        drop(self.go_on.acquire().await);
        Ok(())
    }
}

/// What every lease and pause looks like once it is over.
const EXPIRE: &str =
    "update idempotency.outbox set available_at = now() - interval '1 s' where state = 'pending'";

#[tokio::test]
async fn g02_a_relay_that_dies_before_its_mark_leaves_the_same_id_to_the_next() {
    let fixture = Fixture::new().await;
    let id = fixture.commit(message("a", 1)).await;
    let recorder = Recorder::new();
    let paused = Paused::new(&recorder);
    let dying = tokio::spawn(fixture.relay(paused.clone()).run());
    paused.published.notified().await;
    dying.abort();
    assert!(dying.await.unwrap_err().is_cancelled());
    fired("relay ends");

    fixture.execute(EXPIRE).await;
    let next = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(next.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [id, id]);
    assert_eq!(recorder.published()[1].attempt(), 2);
}

#[tokio::test]
async fn g03_the_late_mark_of_a_relay_that_lost_its_claim_is_refused_and_counted() {
    let fixture = Fixture::new().await;
    fixture.commit(message("a", 1)).await;
    fixture.commit(message("a", 2)).await;
    let recorder = Recorder::new();
    let paused = Paused::new(&recorder);
    // Or it could itself claim again what it has lost.
    let late = fixture.relay(paused.clone());
    let late = late.with_poll_interval(Duration::from_secs(3600));
    let late = late.unwrap().spawn();
    paused.published.notified().await;

    // A second relay takes over, and is in the middle of publishing too.
    fixture.execute(EXPIRE).await;
    let second = Paused::new(&recorder);
    let other = fixture.relay(second.clone()).spawn();
    second.published.notified().await;
    let before = "select count(*) from idempotency.outbox where state = 'sent'";
    paused.go_on.add_permits(100);
    until("the late mark is refused", async || {
        late.stats().refused == 1
    })
    .await;
    assert_eq!(fixture.number(before).await, 0);
    assert_eq!(late.stats().sent, 0);
    assert!(late.shutdown(GRACE).await);

    second.go_on.add_permits(100);
    fixture.drained().await;
    until("both marks are counted", async || other.stats().sent == 2).await;
    assert!(other.shutdown(GRACE).await);
    assert_eq!(recorder.payloads(), ["1", "1", "2"]);
}

#[tokio::test]
async fn g09_a_message_whose_acknowledgement_was_lost_is_published_again_under_its_id() {
    let fixture = Fixture::new().await;
    let id = fixture.commit(message("a", 1)).await;
    let recorder = Recorder::answering(|message| match message.attempt() {
        1 => Err(PublishError::retryable("connection reset")),
        _ => Ok(()),
    });
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [id, id]);
}

#[tokio::test]
async fn a_publisher_that_never_answers_is_given_up_within_the_lease() {
    let fixture = Fixture::new().await;
    fixture.commit(message("a", 1)).await;
    let recorder = Recorder::new();
    let relay = fixture.relay(Paused::new(&recorder));
    let relay = relay.with_lease(Duration::from_millis(200));
    let relay = relay.unwrap().spawn();
    until("it is tried again", async || relay.stats().failed >= 1).await;
    assert_eq!(relay.stats().refused, 0);
    assert!(relay.shutdown(GRACE).await);
}

#[tokio::test]
async fn a_publisher_that_panics_costs_an_attempt_and_no_more() {
    let fixture = Fixture::new().await;
    let fatal = fixture.commit(message("a", 666)).await;
    fixture.commit(message("b", 1)).await;
    let recorder = Recorder::answering(|message| match message.payload() {
        "666" => panic!("a bug of the publisher"),
        _ => Ok(()),
    });
    let relay = fixture.relay(recorder.clone()).with_max_attempts(2);
    let relay = relay.and_then(|relay| relay.with_lease(Duration::from_millis(500)));
    let relay = relay.unwrap().spawn();
    until("the message is dead", async || {
        fixture.outbox().backlog().await.unwrap().dead == 1
    })
    .await;
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let tries = recorder.ids().iter().filter(|id| **id == fatal).count();
    assert_eq!(tries, 2);
}

#[tokio::test]
async fn a_shutdown_waits_for_what_is_being_published_and_claims_nothing_more() {
    let fixture = Fixture::new().await;
    let first = fixture.commit(message("a", 1)).await;
    fixture.commit(message("a", 2)).await;
    let recorder = Recorder::new();
    let paused = Paused::new(&recorder);
    let relay = fixture.relay(paused.clone());
    // Or a claim could be under way.
    let relay = relay.with_poll_interval(Duration::from_secs(3600));
    let relay = relay.unwrap().spawn();
    paused.published.notified().await;
    let mut shutdown = std::pin::pin!(relay.shutdown(GRACE));
    tokio::select! {
        biased;
        _ = &mut shutdown => panic!("did not wait"),
        () = std::future::ready(()) => {}
    }
    paused.go_on.add_permits(100);
    assert!(shutdown.await);
    assert_eq!(recorder.ids(), [first]);
    assert_eq!(fixture.outbox().backlog().await.unwrap().pending, 1);
}

#[tokio::test]
async fn a_shutdown_ends_after_its_grace() {
    let fixture = Fixture::new().await;
    fixture.commit(message("a", 1)).await;
    let paused = Paused::new(&Recorder::new());
    let relay = fixture.relay(paused.clone()).spawn();
    paused.published.notified().await;
    assert!(!relay.shutdown(Duration::from_millis(10)).await);
}

#[tokio::test]
async fn a_relay_that_is_woken_does_not_wait_for_its_next_poll() {
    let fixture = Fixture::new().await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone());
    let hour = Duration::from_secs(3600);
    let relay = relay.with_poll_interval(hour).unwrap().spawn();
    let first = published_at_once(&fixture, &recorder, &relay).await;
    let id = fixture.commit(message("a", 1)).await;
    relay.wake();
    until("it is published", async || recorder.ids() == [first, id]).await;
    assert!(relay.shutdown(GRACE).await);
}

/// It has claimed for the first time, whether before this message or woken by it, and waits for its next poll.
async fn published_at_once(
    fixture: &Fixture,
    recorder: &Recorder,
    relay: &RelayHandle,
) -> MessageId {
    let id = fixture.commit(message("a", 0)).await;
    relay.wake();
    until("the first is published", async || recorder.ids() == [id]).await;
    until("it is done with it", async || {
        fixture.outbox().backlog().await.unwrap().pending == 0
    })
    .await;
    // It looks once more for what follows: the next message must not be found by that.
    tokio::time::sleep(Duration::from_millis(300)).await;
    id
}

#[tokio::test]
async fn a_listening_relay_is_woken_by_a_message_that_notifies() {
    let fixture = Fixture::new().await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).with_listen(true);
    let hour = Duration::from_secs(3600);
    let relay = relay.with_poll_interval(hour).unwrap().spawn();
    let listening = "select count(*) from pg_stat_activity
        where datname = current_database() and state = 'idle' and query ilike 'listen %'";
    until("it listens", async || fixture.number(listening).await > 0).await;
    let first = published_at_once(&fixture, &recorder, &relay).await;
    let id = fixture.commit(message("a", 1).with_notify(true)).await;
    until("it is published", async || recorder.ids() == [first, id]).await;
    assert!(relay.shutdown(GRACE).await);
}

#[tokio::test]
async fn g07_a_relay_whose_listening_connection_was_cut_still_polls() {
    let fixture = Fixture::new().await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).with_listen(true).spawn();
    let cut = "select count(pg_terminate_backend(pid)) from pg_stat_activity
        where datname = current_database() and query ilike 'listen %'";
    until("the connection is cut", async || {
        fixture.number(cut).await > 0
    })
    .await;
    fired("listener cut");
    let id = fixture.commit(message("a", 1)).await;
    until("it is published", async || recorder.ids() == [id]).await;
    assert!(relay.shutdown(GRACE).await);
}

#[tokio::test]
async fn a_relay_outlives_the_end_of_its_connections() {
    let fixture = Fixture::new().await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    for n in 0..5 {
        fixture.commit(message("a", n)).await;
        fixture
            .execute(
                "select pg_terminate_backend(pid) from pg_stat_activity
                where datname = current_database() and pid <> pg_backend_pid()
                    and application_name ~ '^tower-idempotency [0-9a-f]{8}$'",
            )
            .await;
    }
    // What a cut connection had claimed waits for its lease.
    until("nothing is left", async || {
        fixture.execute(EXPIRE).await;
        matches!(fixture.outbox().backlog().await, Ok(backlog) if backlog.pending == 0)
    })
    .await;
    assert!(relay.shutdown(GRACE).await);
    let mut first_seen: Vec<String> = Vec::new();
    for payload in recorder.payloads() {
        if !first_seen.contains(&payload) {
            first_seen.push(payload);
        }
    }
    assert_eq!(first_seen, ["0", "1", "2", "3", "4"]);
}

#[tokio::test]
async fn g10_a_transaction_left_open_elsewhere_holds_nothing_up() {
    let fixture = Fixture::new().await;
    let mut open = fixture.pool.begin().await.unwrap();
    sqlx::query("select pg_current_xact_id()")
        .execute(&mut *open)
        .await
        .unwrap();
    let recorder = Recorder::new();
    fired("transaction open");
    let relay = fixture.relay(recorder.clone()).spawn();
    let id = fixture.commit(message("a", 1)).await;
    until("it is published", async || recorder.ids() == [id]).await;
    assert!(relay.shutdown(GRACE).await);
    open.rollback().await.unwrap();
}

/// The relay's table is the same through PgBouncer's way of running statements.
#[tokio::test]
async fn a_relay_works_with_the_statements_for_pgbouncer() {
    let fixture = Fixture::new().await;
    let store = PgStore::builder(fixture.pool.clone())
        .with_pgbouncer(true)
        .build();
    let recorder = Recorder::new();
    let relay = super::hurry(tower_idempotency::outbox::Relay::new(
        store,
        recorder.clone(),
    ));
    let relay = relay.spawn();
    let first = fixture.commit(message("a", 1)).await;
    let second = fixture.commit(message("a", 2)).await;
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [first, second]);
}

/// A database that takes longer for a claim than a publisher is given.
const SLOW: &str = "
    create function slow() returns trigger language plpgsql as
        $$ begin perform pg_sleep(0.3); return new; end $$;
    create trigger slow before update on idempotency.outbox
        for each row when (old.attempt < new.attempt) execute function slow()";

#[tokio::test]
async fn a_claim_that_took_half_of_its_lease_costs_no_attempt() {
    let fixture = Fixture::new().await;
    fixture.execute(SLOW).await;
    let id = fixture.commit(message("a", 1)).await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone());
    let relay = relay.with_lease(Duration::from_millis(500));
    let relay = relay.unwrap().spawn();
    until("it was claimed and given back", async || {
        relay.stats().unavailable >= 2
    })
    .await;
    // Nothing was begun that could not be finished.
    assert!(recorder.ids().is_empty());
    assert_eq!(relay.stats().failed, 0);
    fixture
        .execute("drop trigger slow on idempotency.outbox")
        .await;
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [id]);
}

/// Added to the time, it would end the relay with a panic.
#[tokio::test]
async fn an_interval_that_never_ends_is_refused() {
    let fixture = Fixture::new().await;
    let relay = fixture.relay(Recorder::new());
    let error = relay.with_poll_interval(Duration::MAX).unwrap_err();
    assert_eq!(error.field(), "poll_interval");
}

#[tokio::test]
async fn a_service_needs_the_rights_that_the_readme_says_and_no_more() {
    let mut fixture = Fixture::new().await;
    fixture.pool = fixture.database.service_pool(4).await;
    fixture.store = PgStore::new(fixture.pool.clone());
    let id = fixture.commit(message("a", 1)).await;
    let recorder = Recorder::new();
    let handle = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(handle.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [id]);
    let swept = fixture.outbox().sweep(Duration::ZERO, 10).await;
    assert_eq!(swept.unwrap(), 1);
}
