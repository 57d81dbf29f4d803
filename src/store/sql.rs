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
    pub(crate) fn show(self) -> (RecordId, Option<HeldRecord>) {
        (self.id, self.read())
    }

    fn read(self) -> Option<HeldRecord> {
        let references = self.references;
        let references = references.and_then(|json| protocol::references(json.as_deref()));
        let claimed_at = self.claimed_at.and_then(time);
        let id = self.id;
        Some(HeldRecord {
            identity: readable(id, named(id, self.identity))?,
            token: readable(id, self.token)?,
            attempt: readable(id, self.attempt).unwrap_or_default(),
            references: readable::<References>(id, references).unwrap_or_default(),
            claimed_at: readable(id, claimed_at).unwrap_or(SystemTime::UNIX_EPOCH),
        })
    }
}

/// The columns of a record that can be resumed.
pub(crate) struct AbandonedRow {
    pub(crate) id: RecordId,
    pub(crate) identity: Result<Identity, StoreError>,
    pub(crate) fingerprint: Result<Vec<u8>, StoreError>,
    /// In seconds.
    pub(crate) retention: Result<f64, StoreError>,
}

impl AbandonedRow {
    /// Of a damaged one, nothing can be resumed.
    pub(crate) fn show(self) -> (RecordId, Option<Abandoned>) {
        (self.id, self.read())
    }

    fn read(self) -> Option<Abandoned> {
        let id = self.id;
        let fingerprint = self.fingerprint.and_then(|bytes| {
            Fingerprint::from_bytes(&bytes)
                .ok_or_else(|| StoreError::corrupt("fingerprint cannot be read"))
        });
        let retention = self
            .retention
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).map_err(StoreError::corrupt));
        Some(Abandoned {
            identity: readable(id, named(id, self.identity))?,
            fingerprint: readable(id, fingerprint)?,
            retention: readable(id, retention)?,
        })
    }
}

/// What can be shown of a page of records behind an id, or of the next one where nothing of it can: an empty page
/// says that there is nothing more.
pub(crate) async fn shown<T, F>(
    mut after: Option<RecordId>,
    read: impl Fn(Option<RecordId>) -> F,
) -> Result<Vec<T>, StoreError>
where
    F: Future<Output = Result<Vec<(RecordId, Option<T>)>, StoreError>>,
{
    loop {
        let page = read(after).await?;
        let last = page.last().map(|(id, _)| *id);
        let shown: Vec<_> = page.into_iter().filter_map(|(_, shown)| shown).collect();
        if last.is_none() || !shown.is_empty() {
            return Ok(shown);
        }
        after = last;
    }
}

/// Whoever walks over the pages goes on after the id of these names.
fn named(id: RecordId, identity: Result<Identity, StoreError>) -> Result<Identity, StoreError> {
    let identity = identity?;
    if identity.id() == id {
        return Ok(identity);
    }
    Err(StoreError::corrupt("the id is not that of the names"))
}

fn readable<T>(id: RecordId, column: Result<T, StoreError>) -> Option<T> {
    let log = |error: &StoreError| {
        let cause: &dyn Error = error;
        tracing::error!(%id, error = cause, source = error.source(), "record is damaged");
    };
    column.inspect_err(log).ok()
}
