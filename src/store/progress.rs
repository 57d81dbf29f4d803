use std::fmt;

use serde::Serialize;
use serde_json::value::RawValue;

/// Phases one operation may have, bytes of all they save, and bytes of a name.
const MAX_PHASES: usize = 16;
const MAX_PROGRESS_LEN: usize = 64 * 1024;
const MAX_NAME_LEN: usize = 255;

/// The phases an operation has finished, in order, each with what it saved.
#[derive(Clone, Default)]
pub struct Progress {
    /// As it is stored: its length says which of several it is, since it only grows.
    json: Option<String>,
    phases: Vec<Phase>,
}

type Phase = (String, Box<RawValue>);

impl Progress {
    /// The JSON a store keeps, an array of `[name, data]`, or `None` when there is none.
    #[must_use]
    pub fn to_json(&self) -> Option<&str> {
        self.json.as_deref()
    }

    /// Reads what [`to_json`](Self::to_json) wrote.
    #[must_use]
    pub fn from_json(json: Option<String>) -> Option<Self> {
        let phases = match &json {
            None => Vec::new(),
            Some(json) => serde_json::from_str(json).ok()?,
        };
        Some(Self { json, phases })
    }

    /// The length of the JSON in characters, 0 when there is none. A store saves new progress only over
    /// progress of the length it was made from.
    #[must_use]
    pub fn version(&self) -> i64 {
        let length = self.json.as_deref().map_or(0, |json| json.chars().count());
        i64::try_from(length).unwrap_or(i64::MAX)
    }

    /// The names of the finished phases, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.phases.iter().map(|(name, _)| name.as_str())
    }

    /// What the phase at this place saved.
    pub(crate) fn get(&self, place: usize) -> Option<(&str, &str)> {
        let (name, data) = self.phases.get(place)?;
        Some((name, data.get()))
    }

    /// The same with one more phase.
    pub(crate) fn with(&self, name: &str, data: &impl Serialize) -> Result<Self, Unsaved> {
        if self.phases.len() == MAX_PHASES {
            return Err(Unsaved::Misuse(PhaseMisuse::TooMany));
        }
        let data = serde_json::value::to_raw_value(data).map_err(Unsaved::Data)?;
        let mut phases = self.phases.clone();
        phases.push((name.to_owned(), data));
        let json = serde_json::to_string(&phases).map_err(Unsaved::Data)?;
        if json.len() > MAX_PROGRESS_LEN {
            let size = json.len();
            return Err(Unsaved::Misuse(PhaseMisuse::TooLarge { size }));
        }
        let json = Some(json);
        Ok(Self { json, phases })
    }
}

/// Names only: what was saved is the application's.
impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

/// Why a phase cannot be added.
#[derive(Debug)]
pub(crate) enum Unsaved {
    Misuse(PhaseMisuse),
    Data(serde_json::Error),
}

/// A phase that cannot be, whoever tries. Nothing of it is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PhaseMisuse {
    /// A name that is empty, or longer than 255 bytes.
    Name {
        /// Its length in bytes.
        len: usize,
    },
    /// This attempt has been through a phase of that name already.
    Reused {
        /// Its name.
        name: String,
    },
    /// An earlier attempt has finished another phase at this point: the code has changed since, or
    /// does not take the same way each time.
    Diverged {
        /// The phase that was asked for.
        asked: String,
        /// The phase that was finished.
        finished: String,
    },
    /// The operation has 16 phases already.
    TooMany,
    /// All that the phases save would be longer than 64 KiB.
    TooLarge {
        /// Its length in bytes.
        size: usize,
    },
    /// Another phase of the operation is running. Phases follow each other.
    Busy,
}

impl fmt::Display for PhaseMisuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name { len } => {
                write!(f, "`name` must be 1 to {MAX_NAME_LEN} bytes, not {len}")
            }
            Self::Reused { name } => write!(f, "`name` must be of one phase only: `{name}` is not"),
            Self::Diverged { asked, finished } => write!(
                f,
                "phase `{asked}` was asked for where `{finished}` was finished before"
            ),
            Self::TooMany => write!(
                f,
                "`phases` must be at most {MAX_PHASES}: one more was begun"
            ),
            Self::TooLarge { size } => write!(
                f,
                "`progress` must be at most {MAX_PROGRESS_LEN} bytes, not {size}"
            ),
            Self::Busy => f.write_str("another phase of the operation is running"),
        }
    }
}

impl std::error::Error for PhaseMisuse {}

pub(crate) fn check_name(name: &str) -> Result<(), PhaseMisuse> {
    match name.len() {
        1..=MAX_NAME_LEN => Ok(()),
        len => Err(PhaseMisuse::Name { len }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_as_it_was_written() {
        let written = Progress::default().with("a", &"ü").unwrap();
        let written = written.with("b", &u128::MAX).unwrap();
        let json = written.to_json().unwrap().to_owned();
        assert_eq!(
            json,
            r#"[["a","ü"],["b",340282366920938463463374607431768211455]]"#
        );
        let read = Progress::from_json(Some(json)).unwrap();
        assert_eq!(read.get(1), written.get(1));
        assert_eq!(read.version(), written.version());
    }

    #[test]
    fn a_phase_too_many_is_refused() {
        let mut progress = Progress::default();
        for number in 0..MAX_PHASES {
            progress = progress.with(&number.to_string(), &()).unwrap();
        }
        let refused = progress.with("more", &()).unwrap_err();
        assert!(matches!(refused, Unsaved::Misuse(PhaseMisuse::TooMany)));
    }

    #[test]
    fn the_size_limit_counts_all_phases_together() {
        let half = "x".repeat(MAX_PROGRESS_LEN / 2);
        let progress = Progress::default().with("a", &half).unwrap();
        let Unsaved::Misuse(refused) = progress.with("b", &half).unwrap_err() else {
            panic!("too large");
        };
        let shown = refused.to_string();
        assert_eq!(shown, "`progress` must be at most 65536 bytes, not 65555");
    }

    #[test]
    fn debug_shows_nothing_that_was_saved() {
        let progress = Progress::default().with("card", &"4242").unwrap();
        assert_eq!(format!("{progress:?}"), r#"["card"]"#);
    }
}
