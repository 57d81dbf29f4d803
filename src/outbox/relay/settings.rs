use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::handle::{RelayHandle, Signals};
use super::work::Worker;
use crate::PgStore;
use crate::error::ConfigError;
use crate::outbox::Publisher;

/// What a dead message does to those behind it in its partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Poison {
    /// They wait until a person has [retried](crate::outbox::Outbox::retry_dead) or
    /// [discarded](crate::outbox::Outbox::discard_dead) it: order is kept whatever happens.
    #[default]
    Block,
    /// They go on without it: for receivers that can do without one message, or without order.
    Skip,
}

/// Publishes what was enqueued: a task that the application spawns, in as many processes as it
/// likes.
///
/// It polls always. The relays of one database should agree on [`Poison`].
///
/// ```no_run
/// use std::time::Duration;
/// use tower_idempotency::PgStore;
/// use tower_idempotency::outbox::{Publisher, Relay};
///
/// # async fn example(store: PgStore, publisher: impl Publisher) -> Result<(), Box<dyn std::error::Error>> {
/// let relay = Relay::new(store, publisher).with_concurrency(32)?.spawn();
/// // When the process is told to stop:
/// let all_done = relay.shutdown(Duration::from_secs(20)).await;
/// # Ok(())
/// # }
/// ```
#[must_use]
pub struct Relay<P> {
    pub(super) store: PgStore,
    pub(super) publisher: Arc<P>,
    pub(super) settings: Settings,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) concurrency: usize,
    pub(super) batch: u32,
    pub(super) lease: Duration,
    pub(super) poll_interval: Duration,
    pub(super) max_attempts: u32,
    pub(super) backoff: (Duration, Duration),
    pub(super) poison: Poison,
    pub(super) retention: Duration,
    pub(super) listen: bool,
}

impl<P: Publisher> Relay<P> {
    /// A relay from the database of `store` to `publisher`, with the default settings. It shares
    /// the store's connections; [`PgStore::migrate`] makes its table.
    pub fn new(store: PgStore, publisher: P) -> Self {
        Self {
            store,
            publisher: Arc::new(publisher),
            settings: Settings {
                concurrency: 16,
                batch: 100,
                lease: Duration::from_secs(30),
                poll_interval: Duration::from_millis(500),
                max_attempts: 12,
                backoff: (Duration::from_secs(1), Duration::from_secs(300)),
                poison: Poison::Block,
                retention: Duration::from_secs(7 * 24 * 3600),
                listen: false,
            },
        }
    }

    /// The most messages that are published at once, each of another partition. Default: 16.
    ///
    /// # Errors
    ///
    /// `concurrency` of zero or more than 1,000.
    pub fn with_concurrency(mut self, concurrency: usize) -> Result<Self, ConfigError> {
        if !(1..=1000).contains(&concurrency) {
            let reason = format!("must be 1 to 1000, not {concurrency}");
            return Err(ConfigError::new("concurrency", reason));
        }
        self.settings.concurrency = concurrency;
        Ok(self)
    }

    /// The most messages of one partition that are published in a row before another partition
    /// gets its place, and the most rows that one statement of the sweep deletes (at least 1,000).
    /// Default: 100.
    ///
    /// # Errors
    ///
    /// `batch` of zero or more than 100,000.
    pub fn with_batch(mut self, batch: u32) -> Result<Self, ConfigError> {
        if !(1..=100_000).contains(&batch) {
            let reason = format!("must be 1 to 100000, not {batch}");
            return Err(ConfigError::new("batch", reason));
        }
        self.settings.batch = batch;
        Ok(self)
    }

    /// How long a claim lasts: what was claimed by a relay that died is published by another after
    /// that. A publisher is given half of it for one message. Default: 30 s. With less than 20 s, a
    /// receiver that nobody can connect to may count as a failure of the message: the publishers of this
    /// crate try for 5 s.
    ///
    /// # Errors
    ///
    /// `lease` of less than 100 ms or more than a day.
    pub fn with_lease(mut self, lease: Duration) -> Result<Self, ConfigError> {
        if !(Duration::from_millis(100)..=Duration::from_secs(24 * 3600)).contains(&lease) {
            let reason = format!("must be 100 ms to 24 h, not {lease:?}");
            return Err(ConfigError::new("lease", reason));
        }
        self.settings.lease = lease;
        Ok(self)
    }

    /// How often to look for messages when there were none. Default: 500 ms, each time shortened at
    /// random by up to a half. [`RelayHandle::wake`] looks at once.
    ///
    /// # Errors
    ///
    /// `interval` of less than a millisecond or more than a day.
    pub fn with_poll_interval(mut self, interval: Duration) -> Result<Self, ConfigError> {
        if !(Duration::from_millis(1)..=Duration::from_secs(24 * 3600)).contains(&interval) {
            let reason = format!("must be 1 ms to 24 h, not {interval:?}");
            return Err(ConfigError::new("poll_interval", reason));
        }
        self.settings.poll_interval = interval;
        Ok(self)
    }

    /// How often a message is tried before it is dead. Default: 12, which with the default backoff
    /// takes nine minutes on average, and never more than 19. Tries while the receiver is
    /// [unavailable](crate::outbox::PublishErrorKind::Unavailable) do not count.
    ///
    /// # Errors
    ///
    /// `attempts` of zero or more than 1,000,000.
    pub fn with_max_attempts(mut self, attempts: u32) -> Result<Self, ConfigError> {
        if !(1..=1_000_000).contains(&attempts) {
            let reason = format!("must be 1 to 1000000, not {attempts}");
            return Err(ConfigError::new("max_attempts", reason));
        }
        self.settings.max_attempts = attempts;
        Ok(self)
    }

    /// The pause after a failure: a random time up to `first`, after each further failure up to
    /// twice as long, never longer than `max`. Default: 1 s and 5 min.
    ///
    /// # Errors
    ///
    /// `first` of zero, `max` shorter than `first` or longer than a day.
    pub fn with_backoff(mut self, first: Duration, max: Duration) -> Result<Self, ConfigError> {
        if first.is_zero() || max < first || max > Duration::from_secs(24 * 3600) {
            let reason = "must be longer than zero, at most 24 h, and not the longer one first";
            return Err(ConfigError::new("backoff", reason));
        }
        self.settings.backoff = (first, max);
        Ok(self)
    }

    /// What a dead message does to those behind it. Default: [`Poison::Block`].
    pub fn with_poison(mut self, poison: Poison) -> Self {
        self.settings.poison = poison;
        self
    }

    /// How long what was sent or discarded is kept. Default: 7 days.
    ///
    /// # Errors
    ///
    /// `retention` of more than 100 years.
    pub fn with_retention(mut self, retention: Duration) -> Result<Self, ConfigError> {
        if retention > Duration::from_secs(100 * 366 * 24 * 3600) {
            let reason = "must be at most 100 years";
            return Err(ConfigError::new("retention", reason));
        }
        self.settings.retention = retention;
        Ok(self)
    }

    /// Whether messages that [notify](crate::outbox::Message::with_notify) are looked for at once.
    /// Takes a connection of its own, which cannot lead to PgBouncer in transaction mode. Polling
    /// goes on: a notification can be lost. Default: `false`.
    pub fn with_listen(mut self, listen: bool) -> Self {
        self.settings.listen = listen;
        self
    }

    /// Publishes until dropped. Errors are logged, and tried again.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: what was being published is published again when its lease is over.
    pub async fn run(self) {
        let signals = Signals::default();
        Worker::new(self, signals).run().await;
    }

    /// Publishes in a task of its own, until the [handle](RelayHandle) ends it. It goes on when the
    /// handle is dropped.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    #[must_use]
    pub fn spawn(self) -> RelayHandle {
        let signals = Signals::default();
        let task = tokio::spawn(Worker::new(self, signals.clone()).run());
        RelayHandle::new(signals, task)
    }
}

impl<P> fmt::Debug for Relay<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
