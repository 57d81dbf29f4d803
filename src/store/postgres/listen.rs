use std::sync::Arc;
use std::time::Duration;

use sqlx::Executor as _;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::time::timeout;
use uuid::Uuid;

use super::waiting::Waited;
use crate::backoff::Backoff;
use crate::identity::RecordId;

const CHANNEL: &str = "idempotency_changed";

/// A connection that has been silent for so long is asked for a sign of life: nothing else would tell
/// that its host is gone.
const SILENCE: Duration = Duration::from_secs(10);

/// The connection is closed when nobody has waited for so long.
const IDLE: Duration = Duration::from_secs(30);

/// The task that listens. Should it be dropped with its runtime, the next who waits starts another.
#[derive(Debug)]
pub(super) struct Ear {
    server: PgConnectOptions,
    patience: Duration,
    waited: Arc<Waited>,
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.waited.unheard();
    }
}

impl Ear {
    pub(super) fn new(server: PgConnectOptions, patience: Duration, waited: Arc<Waited>) -> Self {
        Self {
            server,
            patience,
            waited,
        }
    }

    /// Until nobody has waited for a while. Meanwhile those who wait poll, whether it hears or not.
    pub(super) async fn listen(self) {
        let new_backoff = || Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        let mut backoff = new_backoff();
        while let Err(error) = self.hear().await {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "cannot hear of changes; who waits polls"
            );
            if self.waited.is_heard.send_replace(false) {
                backoff = new_backoff();
            }
            backoff.pause().await;
            if self.waited.is_idle(IDLE) {
                break;
            }
        }
    }

    async fn hear(&self) -> Result<(), sqlx::Error> {
        let mut listener = self.in_time(self.connect()).await?;
        self.waited.is_heard.send_replace(true);
        while !self.waited.is_idle(IDLE) {
            match timeout(SILENCE, listener.try_recv()).await {
                Ok(Ok(Some(notification))) => self.changed(notification.payload()),
                Ok(lost) => return Err(lost.err().unwrap_or(sqlx::Error::WorkerCrashed)),
                Err(_silent) => {
                    self.in_time(listener.execute("select 1")).await?;
                }
            }
        }
        Ok(())
    }

    /// A pool of its own, since sqlx listens over no other connection.
    async fn connect(&self) -> Result<PgListener, sqlx::Error> {
        let pool = PgPoolOptions::new().max_connections(1);
        let pool = pool.connect_lazy_with(self.server.clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        listener.eager_reconnect(false);
        listener.listen(CHANNEL).await?;
        Ok(listener)
    }

    async fn in_time<T>(
        &self,
        step: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let silent = |silent: tokio::time::error::Elapsed| sqlx::Error::Io(silent.into());
        timeout(self.patience, step).await.map_err(silent)?
    }

    fn changed(&self, payload: &str) {
        if let Ok(id) = Uuid::try_parse(payload) {
            self.waited.changed(RecordId::from_bytes(*id.as_bytes()));
        }
    }
}
