//! Failures: how often, for how long, and what a person can do.

use std::time::Duration;

use tower_idempotency::outbox::{OutboxErrorKind, Outgoing, Poison, PublishError};

use super::{Fixture, Recorder, message, until};

const GRACE: Duration = Duration::from_secs(20);

/// Takes every message but `"poison"`.
fn picky(error: impl Fn() -> PublishError + Send + Sync + 'static) -> Recorder {
    Recorder::answering(move |message| match message.payload() {
        "666" => Err(error()),
        _ => Ok(()),
    })
}

async fn poisoned(fixture: &Fixture) {
    for n in [1, 666, 2] {
        fixture.commit(message("poisoned", n)).await;
    }
    for n in 1..=3 {
        fixture.commit(message("healthy", n)).await;
    }
}

fn of(published: &[Outgoing], partition: &str) -> Vec<String> {
    let of = published.iter().filter(|m| m.aggregate_id() == partition);
    of.map(|message| message.payload().to_owned()).collect()
}

#[tokio::test]
async fn g06_a_poison_message_stops_its_partition_alone() {
    let fixture = Fixture::new().await;
    poisoned(&fixture).await;
    let recorder = picky(|| PublishError::retryable("no"));
    let relay = fixture.relay(recorder.clone()).with_max_attempts(3);
    let relay = relay.unwrap().spawn();
    until("the message is dead", async || {
        fixture.outbox().backlog().await.unwrap().dead == 1
    })
    .await;
    // A later message of another partition still gets through; what is behind the dead one does not.
    fixture.commit(message("later", 1)).await;
    until("only what is blocked is left", async || {
        fixture.outbox().backlog().await.unwrap().pending == 1
    })
    .await;
    assert_eq!(relay.stats().dead, 1);
    assert_eq!(relay.stats().failed, 2);
    assert!(relay.shutdown(GRACE).await);
    let published = recorder.published();
    assert_eq!(of(&published, "poisoned"), ["1", "666", "666", "666"]);
    assert_eq!(of(&published, "healthy"), ["1", "2", "3"]);
    assert_eq!(of(&published, "later"), ["1"]);
}

#[tokio::test]
async fn g06_a_poison_message_is_skipped_by_choice() {
    let fixture = Fixture::new().await;
    poisoned(&fixture).await;
    let recorder = picky(|| PublishError::retryable("no"));
    let relay = fixture.relay(recorder.clone()).with_poison(Poison::Skip);
    let relay = relay.with_max_attempts(2).unwrap().spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(
        of(&recorder.published(), "poisoned"),
        ["1", "666", "666", "2"]
    );
}

#[tokio::test]
async fn a_permanent_failure_is_dead_at_once() {
    let fixture = Fixture::new().await;
    poisoned(&fixture).await;
    let recorder = picky(|| PublishError::permanent("malformed"));
    let relay = fixture.relay(recorder.clone()).spawn();
    until("the message is dead", async || {
        fixture.outbox().backlog().await.unwrap().dead == 1
    })
    .await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(of(&recorder.published(), "poisoned"), ["1", "666"]);
}

#[tokio::test]
async fn dead_messages_are_listed_with_what_the_publisher_said() {
    let fixture = Fixture::new().await;
    let first = fixture.commit(message("a", 666)).await;
    let second = fixture.commit(message("b", 666)).await;
    let relay = picky(|| PublishError::permanent(std::io::Error::other("too large")));
    let relay = fixture.relay(relay).spawn();
    until("both are dead", async || {
        fixture.outbox().backlog().await.unwrap().dead == 2
    })
    .await;
    assert!(relay.shutdown(GRACE).await);
    let outbox = fixture.outbox();
    let dead = outbox.list_dead(None, 10).await.unwrap();
    assert_eq!(
        dead.iter().map(|d| d.id).collect::<Vec<_>>(),
        [first, second]
    );
    assert_eq!(dead[0].last_error.as_deref(), Some("too large"));
    assert_eq!(
        (dead[0].attempts, dead[0].topic.as_str()),
        (1, "thing.changed")
    );
    assert!(dead[0].died_at >= dead[0].created_at);
    let page = outbox.list_dead(Some(first), 10).await.unwrap();
    assert_eq!(page.iter().map(|d| d.id).collect::<Vec<_>>(), [second]);
}

#[tokio::test]
async fn a_dead_message_that_is_retried_comes_before_those_it_blocked() {
    let fixture = Fixture::new().await;
    let healed = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_healed = healed.clone();
    let recorder = Recorder::answering(move |message| {
        let heals = is_healed.load(std::sync::atomic::Ordering::SeqCst);
        match message.payload() {
            "666" if !heals => Err(PublishError::permanent("no")),
            _ => Ok(()),
        }
    });
    let id = fixture.commit(message("a", 666)).await;
    fixture.commit(message("a", 2)).await;
    let relay = fixture.relay(recorder.clone()).spawn();
    until("the message is dead", async || {
        fixture.outbox().backlog().await.unwrap().dead == 1
    })
    .await;
    healed.store(true, std::sync::atomic::Ordering::SeqCst);
    fixture.outbox().retry_dead(id).await.unwrap();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.payloads(), ["666", "666", "2"]);
    assert_eq!(recorder.published()[1].attempt(), 1);
    assert_eq!(recorder.ids()[0], recorder.ids()[1]);
}

#[tokio::test]
async fn all_that_is_dead_is_retried_oldest_first() {
    let fixture = Fixture::new().await;
    let mut ids = Vec::new();
    for partition in ["a", "b", "c"] {
        ids.push(fixture.commit(message(partition, 666)).await);
    }
    let refusing = fixture
        .relay(picky(|| PublishError::permanent("no")))
        .spawn();
    until("all are dead", async || {
        fixture.outbox().backlog().await.unwrap().dead == 3
    })
    .await;
    assert!(refusing.shutdown(GRACE).await);
    let outbox = fixture.outbox();
    assert_eq!(outbox.retry_all_dead(2).await.unwrap(), 2);
    let left = outbox.list_dead(None, 10).await.unwrap();
    assert_eq!(
        left.iter().map(|dead| dead.id).collect::<Vec<_>>(),
        ids[2..]
    );
    assert_eq!(outbox.retry_all_dead(2).await.unwrap(), 1);
    assert_eq!(outbox.retry_all_dead(2).await.unwrap(), 0);
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    let published: std::collections::BTreeSet<_> = recorder.ids().into_iter().collect();
    assert_eq!(published, ids.into_iter().collect());
}

#[tokio::test]
async fn a_dead_message_that_is_discarded_lets_its_partition_go_on() {
    let fixture = Fixture::new().await;
    let id = fixture.commit(message("a", 666)).await;
    fixture.commit(message("a", 2)).await;
    let recorder = picky(|| PublishError::permanent("no"));
    let relay = fixture.relay(recorder.clone()).spawn();
    until("the message is dead", async || {
        fixture.outbox().backlog().await.unwrap().dead == 1
    })
    .await;
    fixture.outbox().discard_dead(id).await.unwrap();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.payloads(), ["666", "2"]);
    let again = fixture.outbox().discard_dead(id).await.unwrap_err();
    assert_eq!(again.kind(), OutboxErrorKind::NotDead);
}

#[tokio::test]
async fn only_a_dead_message_can_be_retried() {
    let fixture = Fixture::new().await;
    let id = fixture.commit(message("a", 1)).await;
    let refused = fixture.outbox().retry_dead(id).await.unwrap_err();
    assert_eq!(refused.kind(), OutboxErrorKind::NotDead);
}

/// The end of the pause, in seconds from the failure on.
const PAUSE: &str = "select extract(epoch from max(available_at) - clock_timestamp())::bigint
    from idempotency.outbox";

#[tokio::test]
async fn the_pause_after_a_failure_grows_with_the_attempts() {
    let fixture = Fixture::new().await;
    // Of sixty-four pauses, the longest is near its bound.
    for n in 0..64 {
        fixture.commit(message(&format!("p{n}"), 666)).await;
    }
    let mut longest = Vec::new();
    for attempt in 0..3 {
        fixture
            .execute(&format!(
                "update idempotency.outbox set available_at = now(), attempt = {}",
                attempt * 2
            ))
            .await;
        let recorder = picky(|| PublishError::retryable("no"));
        let relay = fixture.relay(recorder.clone());
        let hour = Duration::from_secs(3600);
        let relay = relay.with_backoff(hour, 1000 * hour);
        assert!(relay.is_err(), "a pause of more than a day");
        let relay = fixture.relay(recorder.clone());
        let relay = relay.with_backoff(Duration::from_secs(600), 24 * hour);
        let relay = relay.unwrap().spawn();
        until("all have failed", async || recorder.ids().len() >= 64).await;
        assert!(relay.shutdown(GRACE).await);
        longest.push(fixture.number(PAUSE).await);
    }
    // 10 min, 40 min, 160 min; no pause is longer, and the longest of 64 is above two thirds but
    // once in 10^11.
    assert!(
        longest[0] <= 600 && (1600..=2400).contains(&longest[1]),
        "{longest:?}"
    );
    assert!((6400..=9600).contains(&longest[2]), "{longest:?}");
}

#[tokio::test]
async fn g08_an_outage_costs_no_attempts_and_no_hot_loop() {
    let fixture = Fixture::new().await;
    for n in 0..40 {
        fixture.commit(message(&format!("p{n}"), 1)).await;
    }
    let back = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_back = back.clone();
    let recorder =
        Recorder::answering(
            move |_| match is_back.load(std::sync::atomic::Ordering::SeqCst) {
                true => Ok(()),
                false => Err(PublishError::unavailable("connection refused")),
            },
        );
    let relay = fixture.relay(recorder.clone()).with_max_attempts(1);
    let relay = relay.unwrap().spawn();
    // The first wave, and probes after about 100, 200 and 400 ms.
    until("the relay has probed", async || recorder.ids().len() >= 19).await;
    assert!(recorder.ids().len() < 25, "{}", recorder.ids().len());
    back.store(true, std::sync::atomic::Ordering::SeqCst);
    fixture.drained().await;
    // A mark is counted when the database has confirmed it.
    until("all are counted", async || relay.stats().sent == 40).await;
    assert_eq!(relay.stats().dead, 0);
    assert!(relay.shutdown(GRACE).await);
}
