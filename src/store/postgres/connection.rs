use sqlx::postgres::PgPoolOptions;
use sqlx::{Error, Executor, PgPool, Postgres};

use super::{PgStore, PgStoreBuilder};
use crate::store::StoreError;
use crate::store::lent::{self, Lent};

/// What the guarantee asks of a session: commits that survive a crash unless the server asks for
/// more, one snapshot for each statement, and an end to waiting.
const SESSION: &str = "select
    set_config('synchronous_commit', case current_setting('synchronous_commit') when 'off' then 'on'
        else current_setting('synchronous_commit') end, false),
    set_config('default_transaction_isolation', 'read committed', false),
    set_config('statement_timeout', $1, false),
    set_config('idle_in_transaction_session_timeout', $1, false)";

pub(super) fn own_pool(settings: &PgStoreBuilder) -> PgPool {
    let options = PgPoolOptions::new()
        .max_connections(settings.max_connections)
        .acquire_timeout(settings.statement_timeout)
        // A connection that broke while idle is noticed by its next statement, which is sent again.
        .test_before_acquire(false);
    let options = if settings.pgbouncer {
        options
    } else {
        let timeout = format!("{}ms", settings.statement_timeout.as_millis());
        options.after_connect(move |connection, _| {
            let query = sqlx::query(SESSION).bind(timeout.clone()).persistent(false);
            Box::pin(async move { connection.execute(query).await.map(drop) })
        })
    };
    options.connect_lazy_with(settings.pool.connect_options().as_ref().clone())
}

impl PgStore {
    pub(super) async fn acquire(&self) -> Result<Lent<Postgres>, Error> {
        self.pool.acquire().await.map(Lent::new)
    }

    pub(super) async fn connection(&self) -> Result<Lent<Postgres>, StoreError> {
        self.acquire().await.map_err(lent::error)
    }
}
