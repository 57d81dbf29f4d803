//! How records are spelled in SQL, whatever the dialect.

use std::time::{Duration, SystemTime};

use super::StoreError;
use super::protocol::State;
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
