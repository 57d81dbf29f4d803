use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::{Connection as _, PgConnection, SqlSafeStr};

use super::{PgStore, SchemaError};

/// Any two nodes that start at once have to agree on it.
const LOCK: &str = "select pg_advisory_xact_lock(7163904716390471)";

/// Under a stricter default, the node that waited would go on with what it saw before.
const BEGIN: &str = "begin isolation level read committed";

/// Waiting for another node, or for a long upgrade, is not a fault.
const NO_TIMEOUT: &str = "set local statement_timeout = 0";
const NO_LOCK_TIMEOUT: &str = "set local lock_timeout = 0";

/// That everything is in place already is no news.
const NO_NOTICES: &str = "set local client_min_messages = warning";

fn migrator() -> Migrator {
    let record = Migration::new(
        1,
        "record".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/postgres/0001_record.sql").into_sql_str(),
        false,
    );
    let outbox_inbox = Migration::new(
        2,
        "outbox inbox".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/postgres/0002_outbox_inbox.sql").into_sql_str(),
        false,
    );
    let enter = Migration::new(
        3,
        "enter".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/postgres/0003_enter.sql").into_sql_str(),
        false,
    );
    let reference = Migration::new(
        4,
        "reference".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/postgres/0004_reference.sql").into_sql_str(),
        false,
    );
    let progress = Migration::new(
        5,
        "progress".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/postgres/0005_progress.sql").into_sql_str(),
        false,
    );
    let waited = Migration::new(
        6,
        "waited".into(),
        MigrationType::Simple,
        include_str!("../../../migrations/postgres/0006_waited.sql").into_sql_str(),
        false,
    );
    let migrations = vec![record, outbox_inbox, enter, reference, progress, waited];
    let mut migrator = Migrator::with_migrations(migrations);
    migrator.create_schema("idempotency");
    migrator.dangerous_set_table_name("idempotency._migrations");
    // The transaction below holds a lock of its own, which also works behind a transaction pooler.
    migrator.set_locking(false);
    migrator
}

impl PgStore {
    /// Creates or upgrades the schema `idempotency`, all of it or nothing. Safe to run on every
    /// start, and from several nodes at once.
    ///
    /// The files in `migrations/postgres` are the same ones, for those who run migrations with the
    /// `sqlx` command line; this method then finds everything in place.
    ///
    /// # Errors
    ///
    /// When the database cannot be reached, refuses, or was migrated by a newer version.
    pub async fn migrate(&self) -> Result<(), SchemaError> {
        let mut connection = self.acquire().await?;
        let migrated = run(&mut connection).await;
        if migrated.is_ok() {
            connection.keep();
        }
        migrated.map_err(SchemaError)
    }
}

async fn run(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let mut transaction = connection.begin_with(BEGIN).await?;
    for statement in [NO_TIMEOUT, NO_LOCK_TIMEOUT, NO_NOTICES, LOCK] {
        let query = sqlx::query(statement).persistent(false);
        query.execute(&mut *transaction).await?;
    }
    migrator()
        .run_direct(None, &mut *transaction, false)
        .await?;
    transaction.commit().await?;
    Ok(())
}
