//! What clients saw.

use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::Deserialize;

use super::plan::Variant;
use crate::client::Answer;

/// Of an answer, what the invariants are about.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// Its status.
    pub status: u16,
    /// Of status, replayable headers and body.
    pub hash: u64,
    /// Whether it says that it was given before.
    pub is_replayed: bool,
    /// Whether it says when to come again.
    pub has_retry_after: bool,
    /// What its body says.
    pub said: Said,
}

/// The body of an answer of the handler, or of the layer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Said {
    /// Of the layer's own answers.
    pub code: Option<String>,
    /// The run of the handler.
    pub execution: Option<String>,
    /// Which attempt it was.
    #[serde(default)]
    pub attempt: i32,
    /// Of which operation.
    #[serde(default)]
    pub operation: u64,
    /// With which payload.
    #[serde(default)]
    pub amount: u64,
}

/// What the layer documents not to replay, its word for a replay, and what the body says already.
const NOT_COMPARED: [&str; 5] = [
    "date",
    "idempotent-replayed",
    "connection",
    "content-length",
    "transfer-encoding",
];

/// Of all that a replay has to repeat.
#[must_use]
pub fn hash<'a>(
    status: u16,
    headers: impl Iterator<Item = (&'a str, &'a [u8])>,
    body: &[u8],
) -> u64 {
    let headers = headers.filter(|(name, _)| !NOT_COMPARED.contains(name));
    let mut headers: Vec<_> = headers.collect();
    headers.sort_unstable();
    let mut hasher = DefaultHasher::new();
    (status, headers, body).hash(&mut hasher);
    hasher.finish()
}

impl Seen {
    /// Of an answer as it came.
    #[must_use]
    pub fn new(answer: &Answer) -> Self {
        let headers = answer.headers.iter();
        let headers = headers.map(|(name, value)| (name.as_str(), value.as_bytes()));
        Self {
            status: answer.status,
            hash: hash(answer.status, headers, &answer.body),
            is_replayed: answer.is_replayed(),
            has_retry_after: answer.header("retry-after").is_some(),
            said: serde_json::from_slice(&answer.body).unwrap_or_default(),
        }
    }

    /// The code of the layer's own answers, or nothing.
    #[must_use]
    pub fn code(&self) -> &str {
        self.said.code.as_deref().unwrap_or_default()
    }
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// With an answer.
    Answered(Seen),
    /// The connection could not be made: nothing was sent.
    NotSent,
    /// Nobody knows: the connection broke, or was broken, or nothing came.
    Unknown(&'static str),
}

/// One request from its beginning to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its number, unique in a run.
    pub send: usize,
    /// With which payload.
    pub variant: Variant,
    /// Whether a recorded answer was seen before it was sent.
    pub is_late: bool,
    /// To which subject.
    pub subject: usize,
    /// How the handler was to behave.
    pub behave: String,
    /// When it was sent, in milliseconds of the run.
    pub sent: u64,
    /// When it ended.
    pub ended: u64,
    /// How.
    pub outcome: Outcome,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            send,
            subject,
            sent,
            ended,
            ..
        } = self;
        let (variant, behave) = (self.variant, self.behave.trim());
        write!(f, "send {send} {sent}-{ended} ms to {subject} {variant:?}")?;
        if !behave.is_empty() {
            write!(f, " [{behave}]")?;
        }
        match &self.outcome {
            Outcome::NotSent => write!(f, ": not sent"),
            Outcome::Unknown(why) => write!(f, ": unknown ({why})"),
            Outcome::Answered(seen) => {
                let replayed = if seen.is_replayed { " replayed" } else { "" };
                let execution = seen.said.execution.as_deref().unwrap_or_default();
                let (status, code, hash) = (seen.status, seen.code(), seen.hash);
                write!(f, ": {status}{replayed} {code}{execution} {hash:016x}")
            }
        }
    }
}
