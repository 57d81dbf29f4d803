use std::error::Error;
use std::time::Duration;

use crate::error::ConfigError;
use crate::{PgStore, StoreError};

/// In the order of the index, by physical place, and around rows that somebody has locked.
const SWEEP: &str = "
delete from idempotency.inbox where ctid = any (array(
    select ctid from idempotency.inbox
    where received_at <= statement_timestamp() - make_interval(secs => $1)
    order by received_at limit $2
    for update skip locked
))";

/// Forgets messages that nobody delivers any more, in bounded batches: a task that the application
/// spawns. One process of a service is enough; several do no harm.
///
/// ```no_run
/// use tower_idempotency::PgStore;
/// use tower_idempotency::inbox::InboxSweeper;
///
/// # async fn example(store: PgStore) {
/// tokio::spawn(InboxSweeper::new(store).run());
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct InboxSweeper {
    store: PgStore,
    retention: Duration,
    interval: Duration,
    batch: u32,
}

impl InboxSweeper {
    /// A sweeper of the inbox in the database of `store`: what is older than 14 days, in batches of
    /// 1,000, every minute.
    pub fn new(store: PgStore) -> Self {
        Self {
            store,
            retention: Duration::from_secs(14 * 24 * 3600),
            interval: Duration::from_secs(60),
            batch: 1000,
        }
    }

    /// How long a message is remembered. Default: 14 days. A message that comes again after that
    /// takes effect again, so it has to be longer than any sender repeats itself: the schedule that
    /// the [Standard Webhooks](https://www.standardwebhooks.com) specification recommends goes on
    /// for more than 75 hours, and people send again by hand what has failed over a weekend.
    ///
    /// # Errors
    ///
    /// `retention` of zero, or of more than 100 years.
    pub fn with_retention(mut self, retention: Duration) -> Result<Self, ConfigError> {
        if retention.is_zero() || retention > Duration::from_secs(100 * 366 * 24 * 3600) {
            let reason = "must be longer than zero, and at most 100 years";
            return Err(ConfigError::new("retention", reason));
        }
        self.retention = retention;
        Ok(self)
    }

    /// How long to wait when nothing is left to sweep. Default: 60 s.
    ///
    /// # Errors
    ///
    /// `interval` of zero.
    pub fn with_interval(mut self, interval: Duration) -> Result<Self, ConfigError> {
        if interval.is_zero() {
            return Err(ConfigError::new("interval", "must be longer than zero"));
        }
        self.interval = interval;
        Ok(self)
    }

    /// The most rows one statement deletes. Default: 1,000.
    ///
    /// # Errors
    ///
    /// `batch` of zero or more than 100,000.
    pub fn with_batch(mut self, batch: u32) -> Result<Self, ConfigError> {
        if !(1..=100_000).contains(&batch) {
            let reason = format!("must be 1 to 100000, not {batch}");
            return Err(ConfigError::new("batch", reason));
        }
        self.batch = batch;
        Ok(self)
    }

    /// Sweeps until dropped. Errors are logged, and the next round tries again.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: each batch is one statement.
    pub async fn run(self) {
        loop {
            match self.sweep().await {
                Ok(0) => {}
                Ok(deleted) => tracing::debug!(deleted, "swept the inbox"),
                Err(error) => {
                    let cause: &dyn Error = &error;
                    tracing::warn!(
                        error = cause,
                        source = error.source(),
                        "cannot sweep the inbox"
                    );
                }
            }
            tokio::time::sleep(self.interval).await;
        }
    }

    /// Sweeps batch by batch until nothing is left, and says how many messages were forgotten.
    ///
    /// # Errors
    ///
    /// The store's; what was swept before stays swept.
    pub async fn sweep(&self) -> Result<u64, StoreError> {
        let mut total = 0;
        loop {
            let query = sqlx::query(SWEEP)
                .bind(self.retention.as_secs_f64())
                .bind(i64::from(self.batch));
            let deleted = self.store.run(query).await?.affected;
            total += deleted;
            if deleted < u64::from(self.batch) {
                return Ok(total);
            }
            tokio::task::yield_now().await;
        }
    }
}
