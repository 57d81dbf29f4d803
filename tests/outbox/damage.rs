//! Rows that somebody else has written, and that the relay cannot read.

use std::time::Duration;

use tower_idempotency::outbox::Poison;

use super::{Fixture, Recorder, message};

const GRACE: Duration = Duration::from_secs(20);

/// As an import by hand may leave it: valid JSON, and no headers.
const DAMAGE: &str = "update idempotency.outbox set headers = '[1]' where aggregateid = 'damaged'";

#[tokio::test]
async fn a_message_that_cannot_be_read_is_dead_and_holds_up_no_other_partition() {
    let fixture = Fixture::new().await;
    let damaged = fixture.commit(message("damaged", 1)).await;
    fixture.execute(DAMAGE).await;
    let healthy = fixture.commit(message("healthy", 2)).await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).spawn();
    fixture.drained().await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [healthy]);
    // At once: no attempt of the other was lost with it.
    assert_eq!(recorder.published()[0].attempt(), 1);
    let dead = fixture.outbox().list_dead(None, 10).await.unwrap();
    assert_eq!((dead.len(), dead[0].id), (1, damaged));
}

#[tokio::test]
async fn a_message_that_cannot_be_read_does_not_end_the_turn_of_the_one_before_it() {
    let fixture = Fixture::new().await;
    let first = fixture.commit(message("damaged", 1)).await;
    fixture.commit(message("damaged", 2)).await;
    let second = "update idempotency.outbox set headers = '[1]' where payload::text = '2'";
    fixture.execute(second).await;
    let last = fixture.commit(message("damaged", 3)).await;
    let recorder = Recorder::new();
    let relay = fixture.relay(recorder.clone()).with_poison(Poison::Skip);
    let relay = relay.spawn();
    fixture.drained().await;
    super::until("all are counted", async || {
        (relay.stats().sent, relay.stats().dead) == (2, 1)
    })
    .await;
    assert!(relay.shutdown(GRACE).await);
    assert_eq!(recorder.ids(), [first, last]);
}
