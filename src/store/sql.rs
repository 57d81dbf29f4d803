//! How records are spelled in SQL, whatever the dialect.

use std::error::Error;
use std::time::{Duration, SystemTime};

use super::protocol::{self, State};
use super::{Abandoned, HeldRecord, StoreError, Token};
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::{Identity, RecordId};
use crate::policy::Lost;

impl State {
    pub(crate) fn from_sql(text: &str) -> Result<Self, StoreError> {
        match text {
            "running" => Ok(Self::Running),
            "completed" => Ok(Self::Completed),
            "held" => Ok(Self::Held),
            _ => Err(StoreError::corrupt("state is unknown")),
        }
    }
}

impl Lost {
    pub(crate) fn as_sql(self) -> &'static str {
        match self {
            Self::Rerun => "rerun",
            Self::Answer => "answer",
            Self::Hold => "hold",
        }
    }

    pub(crate) fn from_sql(text: &str) -> Result<Self, StoreError> {
        match text {
            "rerun" => Ok(Self::Rerun),
            "answer" => Ok(Self::Answer),
            "hold" => Ok(Self::Hold),
            _ => Err(StoreError::corrupt("policy for a lost attempt is unknown")),
        }
    }
}

/// Seconds since the epoch, as the database tells time.
pub(crate) fn time(epoch: f64) -> Result<SystemTime, StoreError> {
    Duration::try_from_secs_f64(epoch)
        .ok()
        .and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since))
        .ok_or_else(|| StoreError::corrupt("time is out of range"))
}

/// Seconds left, or `None` when there are none.
pub(crate) fn left(seconds: f64) -> Result<Option<Duration>, StoreError> {
    if !seconds.is_finite() {
        return Err(StoreError::corrupt("lease has no end"));
    }
    let left = Duration::try_from_secs_f64(seconds.max(0.0)).map_err(StoreError::corrupt)?;
    Ok(Some(left).filter(|left| !left.is_zero()))
}

/// A record that can be resumed.
pub(crate) fn abandoned(
    identity: Identity,
    fingerprint: &[u8],
    retention: f64,
) -> Result<Abandoned, StoreError> {
    Ok(Abandoned {
        identity,
        fingerprint: Fingerprint::from_bytes(fingerprint)
            .ok_or_else(|| StoreError::corrupt("fingerprint cannot be read"))?,
        retention: Duration::try_from_secs_f64(retention).map_err(StoreError::corrupt)?,
    })
}

/// A damaged record must not hide the others.
pub(crate) fn undamaged(record: Result<Abandoned, StoreError>) -> Option<Abandoned> {
    let log = |error: &StoreError| {
        let cause: &dyn Error = error;
        tracing::error!(
            error = cause,
            source = error.source(),
            "abandoned record is damaged"
        );
    };
    record.inspect_err(log).ok()
}

/// The columns of a held record, each as far as it could be read.
pub(crate) struct HeldRow {
    pub(crate) id: RecordId,
    pub(crate) identity: Result<Identity, StoreError>,
    pub(crate) token: Result<Token, StoreError>,
    pub(crate) attempt: Result<u32, StoreError>,
    pub(crate) references: Result<Option<String>, StoreError>,
    /// Seconds since the epoch.
    pub(crate) claimed_at: Result<f64, StoreError>,
}

impl HeldRow {
    /// A damaged record must not hide the others, and is shown, with what cannot be read left out,
    /// while it can be resolved: as long as it can be named and carries a token.
    fn show(self) -> Option<HeldRecord> {
        let references = self.references;
        let references = references.and_then(|json| protocol::references(json.as_deref()));
        let claimed_at = self.claimed_at.and_then(time);
        let id = self.id;
        Some(HeldRecord {
            identity: readable(id, self.identity)?,
            token: readable(id, self.token)?,
            attempt: readable(id, self.attempt).unwrap_or_default(),
            references: readable::<References>(id, references).unwrap_or_default(),
            claimed_at: readable(id, claimed_at).unwrap_or(SystemTime::UNIX_EPOCH),
        })
    }
}

/// Those of a page that can be shown. Where none can, what follows it is to be read, after this id: an empty
/// page says that there is nothing more.
pub(crate) fn shown(page: Vec<HeldRow>) -> Result<Vec<HeldRecord>, RecordId> {
    let last = page.last().map(|row| row.id);
    let shown: Vec<_> = page.into_iter().filter_map(HeldRow::show).collect();
    match last {
        Some(last) if shown.is_empty() => Err(last),
        _ => Ok(shown),
    }
}

fn readable<T>(id: RecordId, column: Result<T, StoreError>) -> Option<T> {
    let log = |error: &StoreError| {
        let cause: &dyn Error = error;
        tracing::error!(%id, error = cause, source = error.source(), "held record is damaged");
    };
    column.inspect_err(log).ok()
}
