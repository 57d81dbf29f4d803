use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Postgres, Row as _, Transaction};

use super::PgStore;
use super::entrance::{Entrance, mark};
use super::held::identity;
use super::transaction::refused;
use super::types::PgUuid;
use crate::extract::References;
use crate::identity::RecordId;
use crate::store::lent;
use crate::store::phases::{Abandoned, PhasedStore, Step};
use crate::store::progress::Progress;
use crate::store::protocol::{self, MAX_PAGE};
use crate::store::sql::{AbandonedRow, shown};
use crate::store::{Claim, CommitError, StoreError};

/// The [phases](crate::store::Phases) of a leased route on a [`PgStore`].
///
/// ```
/// use axum::http::StatusCode;
/// use tower_idempotency::postgres::{Phases, PhaseError, TxError};
/// # struct Gateway;
/// # impl Gateway {
/// #     async fn charge(&self, _key: &str, _order: i64) -> Result<String, TxError> { Ok("ch_1".into()) }
/// # }
///
/// async fn order(phases: Phases, item: String) -> Result<StatusCode, PhaseError<TxError>> {
///     let order: i64 = phases
///         .run("ordered", async |db| {
///             let insert = sqlx::query_scalar("insert into orders (item) values ($1) returning id");
///             Ok(insert.bind(item).fetch_one(db).await?)
///         })
///         .await?;
///     // Not again once "charged" is finished; until then the same key each time: it charges once.
///     let charge = match phases.saved::<String>("charged").await? {
///         Some(charge) => charge,
///         None => {
///             let key = phases.downstream_key("charge");
///             Gateway.charge(&key, order).await.map_err(PhaseError::Work)?
///         }
///     };
///     phases
///         .run("charged", async |db| {
///             let update = sqlx::query("update orders set charge = $2 where id = $1");
///             update.bind(order).bind(&charge).execute(db).await?;
///             Ok(charge)
///         })
///         .await?;
///     Ok(StatusCode::CREATED)
/// }
/// ```
pub type Phases = crate::store::Phases<PgStore>;

/// Last in its transaction: the row is not locked before, since the heartbeat needs it. Progress only
/// grows, so its length says whether it is what the phase began with. Planned each time: in this session a
/// plan made while the table was empty would read all of it for as long as it is kept.
const SAVE: &str = "
with attempt as (
    select current_setting('idempotency.attempt', true) = $6 as is_open
), record as (
    update idempotency.record set progress = $4, refs = coalesce($5, refs)
    from attempt
    where id = $1 and token = $2 and state = 'running' and is_open
        and coalesce(length(progress), 0) = $3
    returning 1
)
select is_open, exists (select from record) as is_saved,
    case when is_open then set_config('idempotency.committed', '', false) end
from attempt";

/// Waits for a phase whose commit is under way: it has the row locked.
const PROGRESS: &str = "
select progress, refs from idempotency.record
where id = $1 and token = $2 and state = 'running' for share";

/// By the index of what has progress, which answered records have not.
const LIST_ABANDONED: &str = "
select id, scope, operation, key, fingerprint,
    date_part('epoch', expires_at - claimed_at) as retention
from idempotency.record
where progress is not null and state = 'running' and lost = 'rerun'
    and leased_until <= clock_timestamp() and expires_at > clock_timestamp()
    and operation = any ($1) and ($2::uuid is null or id > $2)
order by id limit $3";

impl PhasedStore for PgStore {
    async fn begin_phase(
        &self,
        claim: &Claim,
        limit: Duration,
    ) -> Result<Transaction<'static, Postgres>, StoreError> {
        let entrance = Entrance::phase(&claim.identity, claim.token, limit);
        let begun = self.transactions.begin(entrance);
        begun.await.map_err(lent::error)
    }

    async fn save_phase(
        &self,
        mut transaction: Transaction<'static, Postgres>,
        claim: &Claim,
        step: &Step,
    ) -> Result<(), CommitError> {
        match save(&mut transaction, claim, step).await {
            Ok(()) => self.transactions.commit(transaction).await,
            Err(error) => {
                let refused = self
                    .transactions
                    .refused(&mut transaction, claim.token, error);
                Err(refused.await)
            }
        }
    }

    async fn progress(&self, claim: &Claim) -> Result<Option<(Progress, References)>, StoreError> {
        let query = sqlx::query(PROGRESS)
            .bind(PgUuid::from(claim.identity.id()))
            .bind(PgUuid::from(claim.token));
        let done = self.run(query).await?;
        let Some(row) = done.rows.first() else {
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
                .bind(operations)
                .bind(after.map(PgUuid::from))
                .bind(i64::from(limit.min(MAX_PAGE)));
            let rows = self.run(query).await?.rows;
            rows.iter()
                .map(|row| Ok(read_abandoned(row)?.show()))
                .collect()
        };
        shown(after, read).await
    }
}

fn read_abandoned(row: &PgRow) -> Result<AbandonedRow, StoreError> {
    let id: PgUuid = row.try_get("id").map_err(lent::error)?;
    Ok(AbandonedRow {
        id: RecordId::from_bytes(id.0),
        identity: identity(row).map_err(lent::error),
        fingerprint: row.try_get("fingerprint").map_err(lent::error),
        retention: row.try_get("retention").map_err(lent::error),
    })
}

async fn save(
    connection: &mut PgConnection,
    claim: &Claim,
    step: &Step,
) -> Result<(), CommitError> {
    let row = sqlx::query(SAVE)
        .persistent(false)
        .bind(PgUuid::from(claim.identity.id()))
        .bind(PgUuid::from(claim.token))
        .bind(step.before.version())
        .bind(step.after.to_json())
        .bind(step.references.to_json())
        .bind(mark(claim.token))
        .fetch_one(connection)
        .await
        .map_err(refused)?;
    // As of a record: a transaction of nobody's has no mark, and that of an ended one reads as empty.
    let is_open: Option<bool> = row.try_get("is_open").map_err(refused)?;
    if is_open != Some(true) {
        return Err(CommitError::Ended);
    }
    let is_saved: bool = row.try_get("is_saved").map_err(refused)?;
    is_saved.then_some(()).ok_or(CommitError::Recorded)
}
