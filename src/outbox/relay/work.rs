use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::handle::Signals;
use super::report;
use super::settings::{Relay, Settings};
use super::turn::Turn;
use crate::backoff::Backoff;
use crate::outbox::admin::Outbox;
use crate::outbox::publisher::Publisher;
use crate::outbox::queue::Queue;

const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// A relay at work.
#[derive(Debug)]
pub(super) struct Worker<P> {
    pub(super) queue: Queue,
    pub(super) publisher: Arc<P>,
    pub(super) settings: Settings,
    pub(super) signals: Signals,
}

/// When to claim next, and from where.
struct Pace {
    next: Instant,
    /// The last partition that was claimed. Only fairness depends on it: those with small keys
    /// would else always come first.
    after: String,
    failures: Backoff,
    outage: Option<Backoff>,
}

impl<P: Publisher> Worker<P> {
    pub(super) fn new(relay: Relay<P>, signals: Signals) -> Self {
        let settings = relay.settings;
        Self {
            queue: Queue::new(relay.store, settings.lease, settings.poison),
            publisher: relay.publisher,
            settings,
            signals,
        }
    }

    pub(super) async fn run(self) {
        let worker = Arc::new(self);
        let stop = worker.signals.stop.clone();
        let chores = async {
            tokio::join!(worker.sweep(), worker.listen());
        };
        tokio::join!(worker.publish_all(), stop.run_until_cancelled(chores));
    }

    async fn publish_all(self: &Arc<Self>) {
        let mut turns = JoinSet::new();
        let mut pace = Pace {
            next: Instant::now(),
            after: String::new(),
            failures: backoff(),
            outage: None,
        };
        while !self.signals.stop.is_cancelled() {
            // One that is sent to see whether the receiver is back.
            let most = match pace.outage {
                None => self.settings.concurrency,
                Some(_) => 1,
            };
            let free = most.saturating_sub(turns.len());
            if free > 0 && pace.next <= Instant::now() {
                self.claim(&mut pace, free, &mut turns).await;
                continue;
            }
            tokio::select! {
                () = self.signals.stop.cancelled() => break,
                () = tokio::time::sleep_until(pace.next), if free > 0 => {}
                () = self.signals.wake.notified(), if pace.outage.is_none() => pace.next = Instant::now(),
                Some(turn) = turns.join_next() => self.ended(&mut pace, turn),
            }
        }
        while let Some(turn) = turns.join_next().await {
            self.ended(&mut pace, turn);
        }
    }

    /// An outage is counted when it holds up what comes next.
    fn ended(&self, pace: &mut Pace, turn: Result<Turn, JoinError>) {
        let given_back = matches!(
            turn,
            Ok(Turn::Unavailable {
                given_back: true,
                ..
            })
        );
        pace.ended(turn);
        let counter = &self.signals.counters.unavailable;
        counter.add(u64::from(given_back));
    }

    async fn claim(self: &Arc<Self>, pace: &mut Pace, free: usize, turns: &mut JoinSet<Turn>) {
        let since = Instant::now();
        let claimed = match self.queue.claim(&pace.after, free).await {
            Ok(claimed) => claimed,
            Err(error) => {
                report(&error, "cannot claim messages");
                pace.next = Instant::now() + pace.failures.next_pause();
                return;
            }
        };
        pace.failures = backoff();
        let is_round = pace.after.is_empty();
        let keys = claimed
            .iter()
            .map(|claimed| claimed.message.partition_key());
        let last = keys.max().map(ToOwned::to_owned);
        if claimed.len() < free {
            pace.after.clear();
            if is_round {
                // Whoever waits has been seen.
                pace.next = since + spread(self.settings.poll_interval);
            }
        } else if let Some(last) = last {
            pace.after = last;
        }
        for claimed in claimed {
            let worker = Arc::clone(self);
            turns.spawn(async move { worker.turn(claimed, since).await });
        }
    }

    async fn sweep(&self) {
        let outbox = Outbox::new(self.queue.store().clone());
        let batch = self.settings.batch.max(1000);
        loop {
            match outbox.sweep(self.settings.retention, batch).await {
                Ok(swept) => {
                    self.signals.counters.swept.add(swept);
                    if swept == u64::from(batch) {
                        tokio::task::yield_now().await;
                        continue;
                    }
                }
                Err(error) => report(&error, "cannot sweep the outbox"),
            }
            tokio::time::sleep(SWEEP_INTERVAL).await;
        }
    }

    async fn listen(&self) {
        if !self.settings.listen {
            return;
        }
        let mut backoff = backoff();
        loop {
            if let Err(error) = self.notifications().await {
                report(&error.into(), "cannot listen, polling alone");
            }
            backoff.pause().await;
        }
    }

    async fn notifications(&self) -> Result<(), sqlx::Error> {
        let options = self.queue.store().connect_options();
        let pool = sqlx::postgres::PgPoolOptions::new()
            .max_connections(1)
            .connect_lazy_with(options);
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.listen("idempotency_outbox").await?;
        loop {
            listener.recv().await?;
            self.signals.wake.notify_one();
        }
    }
}

impl Pace {
    fn ended(&mut self, turn: Result<Turn, JoinError>) {
        match turn {
            Ok(Turn::Over) => self.outage = None,
            Ok(Turn::More) => {
                self.outage = None;
                self.next = Instant::now();
            }
            Ok(Turn::Unavailable { asked_for, .. }) => {
                // Those that were under way together are one reason to pause, not many.
                let is_news = self.outage.is_none() || self.next <= Instant::now();
                let outage = self.outage.get_or_insert_with(backoff);
                if is_news {
                    self.next = Instant::now() + outage.next_pause();
                }
                self.next = self.next.max(Instant::now() + asked_for);
            }
            Err(error) => {
                let cause: &dyn Error = &error;
                tracing::error!(error = cause, "publisher panicked, its lease will run out");
            }
        }
    }
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(100), Duration::from_secs(30))
}

/// So that relays that were started together do not poll together.
fn spread(interval: Duration) -> Duration {
    Backoff::new(interval, interval).next_pause()
}
