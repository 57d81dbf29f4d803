use std::error::Error;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::ConfigError;
use crate::store::{Store, Swept};

/// Shorter pauses are added up: a sleep ends with a tick of the timer.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// Deletes records whose retention is over, and holds lost attempts that nobody retries, in bounded
/// batches: a task that the application spawns.
///
/// One process of a service is enough; several do no harm.
///
/// ```no_run
/// use tower_idempotency::{MemoryStore, Sweeper};
///
/// # async fn example(store: MemoryStore) {
/// tokio::spawn(Sweeper::new(store).run());
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Sweeper<S> {
    store: S,
    interval: Duration,
    batch: u32,
}

impl<S: Store> Sweeper<S> {
    /// A sweeper of `store`: batches of 500, every minute.
    #[must_use]
    pub fn new(store: S) -> Self {
        Self {
            store,
            interval: Duration::from_secs(60),
            batch: 500,
        }
    }

    /// How long to wait when nothing is left to sweep. Default: 60 s.
    ///
    /// # Errors
    ///
    /// `interval` of zero.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::{MemoryStore, Sweeper};
    /// let sweeper = Sweeper::new(MemoryStore::new()).with_interval(Duration::from_secs(5))?;
    /// assert!(sweeper.with_interval(Duration::ZERO).is_err());
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
    pub fn with_interval(mut self, interval: Duration) -> Result<Self, ConfigError> {
        if interval.is_zero() {
            return Err(ConfigError::new("interval", "must be longer than zero"));
        }
        self.interval = interval;
        Ok(self)
    }

    /// The most records one statement deletes. Default: 500: more hold up other work for longer.
    ///
    /// # Errors
    ///
    /// `batch` of zero or more than 100,000.
    ///
    /// ```
    /// # use tower_idempotency::{MemoryStore, Sweeper};
    /// let sweeper = Sweeper::new(MemoryStore::new()).with_batch(10_000)?;
    /// assert!(sweeper.with_batch(0).is_err());
    /// # Ok::<(), tower_idempotency::ConfigError>(())
    /// ```
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
    /// May be dropped at any time: what is swept stays swept, and the next sweep finds the rest.
    pub async fn run(self) {
        loop {
            match self.sweep().await {
                Ok(swept) if swept != Swept::default() => {
                    tracing::debug!(deleted = swept.deleted, held = swept.held, "swept");
                    if swept.held > 0 {
                        tracing::warn!(
                            held = swept.held,
                            "lost attempts are held for a person: see list_held"
                        );
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    let cause: &dyn Error = &error;
                    tracing::warn!(error = cause, source = error.source(), "cannot sweep");
                }
            }
            tokio::time::sleep(self.interval).await;
        }
    }

    /// Sweeps batch by batch until one is not full, with pauses in between that are as long as the
    /// store [asks for](Store::pause_after_sweep). What somebody had locked is left to the next sweep.
    ///
    /// # Errors
    ///
    /// The store's; what was swept before stays swept.
    ///
    /// ```
    /// use std::time::Duration;
    /// use axum::{Router, body::Body, http::Request, routing::post};
    /// use tower::ServiceExt;
    /// use tower_idempotency::{IdempotencyLayer, MemoryStore, Scope, Sweeper};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = MemoryStore::new();
    /// let layer = IdempotencyLayer::new(store.clone(), Scope::global());
    /// let app = Router::new().route("/orders", post(|| async {}).layer(layer));
    /// let order = Request::post("/orders").header("idempotency-key", "order-1");
    /// app.oneshot(order.body(Body::empty())?).await?;
    ///
    /// let sweeper = Sweeper::new(store.clone());
    /// assert_eq!(sweeper.sweep().await?.deleted, 0);
    /// store.advance(Duration::from_secs(73 * 3600));
    /// assert_eq!(sweeper.sweep().await?.deleted, 1);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn sweep(&self) -> Result<Swept, crate::StoreError> {
        let mut total = Swept::default();
        let mut pauses = Pauses::default();
        loop {
            let began = Instant::now();
            let swept = self.store.delete_expired(self.batch).await?;
            total.deleted += swept.deleted;
            total.held += swept.held;
            if swept.deleted + swept.held < u64::from(self.batch) {
                return Ok(total);
            }
            let Some(pause) = pauses.due(self.store.pause_after_sweep(began.elapsed())) else {
                tokio::task::yield_now().await;
                continue;
            };
            let began = Instant::now();
            tokio::time::sleep(pause).await;
            pauses.took(pause, began.elapsed());
        }
    }
}

/// What pauses of a sweep are owed, and were taken.
#[derive(Debug, Default)]
struct Pauses {
    owed: Duration,
    taken: Duration,
}

impl Pauses {
    /// How long to pause after one more batch, if it is worth it.
    fn due(&mut self, pause: Duration) -> Option<Duration> {
        self.owed += pause;
        let due = self.owed.saturating_sub(self.taken);
        (due >= SHORTEST_PAUSE).then_some(due)
    }

    /// What a tick of the timer adds to a pause counts; what a stall adds is no leave to go without pauses.
    fn took(&mut self, pause: Duration, took: Duration) {
        self.taken += took.min(pause * 2);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Pauses;

    const fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn short_pauses_add_up() {
        let mut pauses = Pauses::default();
        assert_eq!(pauses.due(micros(400)), None);
        assert_eq!(pauses.due(micros(400)), None);
        assert_eq!(pauses.due(micros(400)), Some(micros(1200)));
    }

    #[test]
    fn a_pause_that_was_too_long_is_made_up_for_but_a_stall_is_not() {
        let mut pauses = Pauses::default();
        assert_eq!(pauses.due(micros(1500)), Some(micros(1500)));
        pauses.took(micros(1500), micros(2000));
        assert_eq!(pauses.due(micros(1400)), None);
        assert_eq!(pauses.due(micros(200)), Some(micros(1100)));
        pauses.took(micros(1100), Duration::from_secs(30));
        assert_eq!(pauses.due(micros(2000)), None);
        assert_eq!(pauses.due(micros(200)), Some(micros(1100)));
    }
}
