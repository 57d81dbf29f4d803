use futures_util::future::join_all;
use sqlx::{Error, Row as _};

use super::PgStore;
use super::connection::is_locked;
use super::types::PgUuid;
use crate::store::lent::error;
use crate::store::{LeaseRenewal, Renewed, StoreError};

/// Locks in the order of ids, and passes over what somebody else has locked: one stuck record must
/// not let the leases of all others run out. Finds each by its id, as the batches do that
/// [`group`](super::group) sends.
const EXTEND: &str = "
with due as (
    select record.id, renewal.lease
    from unnest($1::uuid[], $2::uuid[], $3::float8[]) as renewal (id, token, lease)
    join idempotency.record on record.id = any (array[renewal.id])
        and record.token = renewal.token and record.state = 'running'
    order by renewal.id
    for no key update of record skip locked
)
update idempotency.record set leased_until = clock_timestamp() + make_interval(secs => due.lease)
from due where record.id = any (array[due.id])
returning record.id, record.token";

const EXTEND_ONE: &str = "
update idempotency.record set leased_until = clock_timestamp() + make_interval(secs => $3)
where id = $1 and token = $2 and state = 'running'";

/// How long a passed-over record is waited for.
const LOCK_TIMEOUT: &str = "set local lock_timeout = '50ms'";

impl PgStore {
    pub(super) async fn extend_leases(
        &self,
        leases: &[LeaseRenewal],
    ) -> Result<Vec<Renewed>, StoreError> {
        if leases.is_empty() {
            return Ok(Vec::new());
        }
        let kept = self.extend_batch(leases).await?;
        let renewals = leases.iter().map(|renewal| async {
            let claim = &renewal.claim;
            if kept.contains(&(claim.identity.id().into(), claim.token.into())) {
                return Renewed::Kept;
            }
            // One that fails alone must not hide that the others are kept.
            Box::pin(self.extend_one(renewal))
                .await
                .unwrap_or(Renewed::Busy)
        });
        Ok(join_all(renewals).await)
    }

    async fn extend_batch(
        &self,
        leases: &[LeaseRenewal],
    ) -> Result<Vec<(PgUuid, PgUuid)>, StoreError> {
        let claims = || leases.iter().map(|renewal| &renewal.claim);
        let ids: Vec<PgUuid> = claims().map(|claim| claim.identity.id().into()).collect();
        let tokens: Vec<PgUuid> = claims().map(|claim| claim.token.into()).collect();
        let lengths: Vec<f64> = leases.iter().map(|r| r.lease.as_secs_f64()).collect();
        let query = sqlx::query(EXTEND).bind(ids).bind(tokens).bind(lengths);
        let rows = self.run(query).await?.rows;
        let kept = rows.iter().map(|row| {
            Ok((
                row.try_get(0).map_err(error)?,
                row.try_get(1).map_err(error)?,
            ))
        });
        kept.collect()
    }

    async fn extend_one(&self, renewal: &LeaseRenewal) -> Result<Renewed, StoreError> {
        let mut connection = self.connection().await?;
        let result = self.extend_waiting(&mut connection, renewal).await;
        match result {
            Err(locked) if is_locked(&locked) => Ok(Renewed::Busy),
            Err(other) => Err(error(other)),
            Ok(renewed) => connection.finish(Ok(renewed)),
        }
    }

    async fn extend_waiting(
        &self,
        connection: &mut sqlx::PgConnection,
        renewal: &LeaseRenewal,
    ) -> Result<Renewed, Error> {
        let mut transaction = self.begin(connection).await?;
        sqlx::query(LOCK_TIMEOUT)
            .persistent(false)
            .execute(&mut *transaction)
            .await?;
        let done = sqlx::query(EXTEND_ONE)
            .bind(PgUuid::from(renewal.claim.identity.id()))
            .bind(PgUuid::from(renewal.claim.token))
            .bind(renewal.lease.as_secs_f64())
            .persistent(self.pooled_begin.is_none())
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(match done.rows_affected() {
            0 => Renewed::Lost,
            _ => Renewed::Kept,
        })
    }
}
