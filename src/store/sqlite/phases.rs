use std::time::Duration;

use sqlx::sqlite::SqliteRow;
use sqlx::{Executor, Row as _, Sqlite, Transaction};

use super::SqliteStore;
use super::records::uuid;
use super::settle::{fenced, identity};
use super::transaction::{ENTER, LEAVE, begin, refused, settled};
use crate::extract::References;
use crate::identity::RecordId;
use crate::store::lent;
use crate::store::phases::{Abandoned, PhasedStore, Step};
use crate::store::progress::Progress;
use crate::store::protocol::{self, MAX_PAGE};
use crate::store::sql::{AbandonedRow, shown};
use crate::store::{Claim, CommitError, StoreError};

/// The [phases](crate::store::Phases) of a leased route on a [`SqliteStore`]. All writers of the file
/// wait for one that is running.
///
/// ```
/// use axum::{Router, body::Body, http::{Request, StatusCode}, routing::post};
/// use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
/// use tower::ServiceExt;
/// use tower_idempotency::sqlite::{Phases, PhaseError, TxError};
/// use tower_idempotency::{IdempotencyLayer, Lost, Policy, Scope, SqliteStore};
///
/// async fn order(phases: Phases, item: String) -> Result<StatusCode, PhaseError<TxError>> {
///     let order: i64 = phases
///         .run("ordered", async |db| {
///             let insert = sqlx::query_scalar("insert into orders (item) values (?) returning id");
///             Ok(insert.bind(item).fetch_one(db).await?)
///         })
///         .await?;
///     // Here the gateway is called, with `phases.downstream_key("charge")`.
///     let charge = format!("ch_{order}");
///     phases
///         .run("charged", async |db| {
///             let update = sqlx::query("update orders set charge = ? where id = ?");
///             update.bind(charge).bind(order).execute(db).await?;
///             Ok(())
///         })
///         .await?;
///     Ok(StatusCode::CREATED)
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = std::env::temp_dir().join(format!("doc-phases-{}", std::process::id()));
/// # std::fs::create_dir_all(&directory)?;
/// # let path = directory.join("shop.db");
/// let file = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
/// let pool = SqlitePool::connect_with(file).await?;
/// let store = SqliteStore::new(pool.clone());
/// store.migrate().await?;
/// sqlx::raw_sql("create table orders (id integer primary key, item text, charge text)")
///     .execute(&pool)
///     .await?;
/// // A lost attempt is run again, which means: resumed.
/// let layer = IdempotencyLayer::new(store, Scope::global())
///     .with_policy(Policy::critical().with_lost(Lost::Rerun))?;
/// let app = Router::new().route("/orders", post(order).layer(layer));
///
/// let request = Request::post("/orders").header("idempotency-key", "order-1");
/// let answer = app.oneshot(request.body(Body::from("tea"))?).await?;
/// assert_eq!(answer.status(), StatusCode::CREATED);
/// let charge: String = sqlx::query_scalar("select charge from orders").fetch_one(&pool).await?;
/// assert_eq!(charge, "ch_1");
/// # std::fs::remove_dir_all(&directory)?;
/// # Ok(())
/// # }
/// ```
pub type Phases = crate::store::Phases<SqliteStore>;

/// Progress only grows, so its length says whether it is what the phase began with.
const SAVE: &str = "
update idempotency_record set progress = ?4, refs = coalesce(?5, refs)
where id = ?1 and token = ?2 and state = 'running' and coalesce(length(progress), 0) = ?3";

const PROGRESS: &str = "
select progress, refs from idempotency_record
where id = ?1 and token = ?2 and state = 'running'";

/// By the index of what has progress, which answered records have not. The names are a JSON array.
const LIST_ABANDONED: &str = "
select id, scope, operation, key, fingerprint, expires_at - claimed_at as retention
from idempotency_record
where progress is not null and state = 'running' and lost = 'rerun'
    and leased_until <= unixepoch('subsec') and expires_at > unixepoch('subsec')
    and operation in (select value from json_each(?1)) and (?2 is null or id > ?2)
order by id limit ?3";

impl PhasedStore for SqliteStore {
    async fn begin_phase(
        &self,
        _claim: &Claim,
        _limit: Duration,
    ) -> Result<Transaction<'static, Sqlite>, StoreError> {
        let mut transaction = begin(self).await?;
        let entered = (&mut *transaction).execute(ENTER).await;
        entered.map_err(lent::error)?;
        Ok(transaction)
    }

    async fn save_phase(
        &self,
        mut transaction: Transaction<'static, Sqlite>,
        claim: &Claim,
        step: &Step,
    ) -> Result<(), CommitError> {
        let connection = &mut *transaction;
        connection.execute(LEAVE).await.map_err(refused)?;
        let query = fenced(SAVE, &claim.identity, claim.token)
            .bind(step.before.version())
            .bind(step.after.to_json())
            .bind(step.references.to_json());
        let saved = query.execute(connection).await.map_err(refused)?;
        if saved.rows_affected() == 0 {
            return Err(CommitError::Recorded);
        }
        settled(transaction.commit().await)
    }

    /// Where a commit is under way this may read too early: the next phase then waits for it to begin,
    /// and is refused for the version it was made from.
    async fn progress(&self, claim: &Claim) -> Result<Option<(Progress, References)>, StoreError> {
        let query = fenced(PROGRESS, &claim.identity, claim.token);
        let mut connection = self.connection().await?;
        let result = query.fetch_optional(&mut *connection).await;
        let Some(row) = connection.finish(result)? else {
            return Ok(None);
        };
        let progress = row.try_get("progress").map_err(lent::error)?;
        let references: Option<String> = row.try_get("refs").map_err(lent::error)?;
        let references = protocol::references(references.as_deref())?;
        Ok(Some((protocol::progress(progress)?, references)))
    }

    async fn list_abandoned(
        &self,
        operations: &[String],
        after: Option<RecordId>,
        limit: u32,
    ) -> Result<Vec<Abandoned>, StoreError> {
        let read = |after: Option<RecordId>| async move {
            let query = sqlx::query(LIST_ABANDONED)
                .bind(serde_json::json!(operations).to_string())
                .bind(after.map(|id| id.as_bytes().to_vec()))
                .bind(limit.min(MAX_PAGE));
            let mut connection = self.connection().await?;
            let result = query.fetch_all(&mut *connection).await;
            let rows = connection.finish(result)?;
            rows.iter()
                .map(|row| Ok(read_abandoned(row)?.show()))
                .collect()
        };
        shown(after, read).await
    }
}

fn read_abandoned(row: &SqliteRow) -> Result<AbandonedRow, StoreError> {
    Ok(AbandonedRow {
        id: RecordId::from_bytes(uuid(row, "id")?),
        identity: identity(row).map_err(lent::error),
        fingerprint: row.try_get("fingerprint").map_err(lent::error),
        retention: row.try_get("retention").map_err(lent::error),
    })
}
