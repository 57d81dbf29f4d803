//! The rules of a record, once for every store of this crate: a store brings the statements
//! ([`Records`]), and the steps and decisions are made here.

use std::future::Future;
use std::time::{Duration, SystemTime};

use super::{
    Claim, ClaimRequest, Claimed, Completed, Completion, Existing, RecordState, RecordSummary,
    StoreError,
};
use crate::envelope::Envelope;
use crate::extract::References;
use crate::fingerprint::Fingerprint;
use crate::identity::Identity;
use crate::policy::Lost;
use crate::store::Token;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
use crate::store::progress::Progress;

/// Rounds of a claim before it gives up: each means that the record changed between two statements.
const CLAIM_ROUNDS: u32 = 16;

/// Most records that are listed at once.
pub(crate) const MAX_PAGE: u32 = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    Completed,
    Held,
}

/// A record as one statement read it; times are already compared with the store's clock.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) digest: Vec<u8>,
    pub(crate) state: State,
    pub(crate) token: Token,
    pub(crate) attempt: u32,
    pub(crate) lost: Lost,
    pub(crate) abandoned: bool,
    pub(crate) fingerprint: Vec<u8>,
    pub(crate) lease_left: Option<Duration>,
    pub(crate) expired: bool,
    pub(crate) expires_at: SystemTime,
    pub(crate) retention_left: Duration,
    pub(crate) answer: Option<Vec<u8>>,
    pub(crate) references: Option<String>,
}

/// What became of an insert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// The record is there, and its retention ends then.
    Until(SystemTime),
    /// The id is taken.
    Taken,
    /// The id is in the hands of a transaction that goes on: whether it is taken is not decided.
    Undecided,
}

/// One statement each, atomic, by the store's clock. Those that return a `bool` say whether they
/// changed a row.
pub(crate) trait Records: Sync {
    /// Whether a claim will most likely meet a record, and had better look first.
    fn expects_a_record(&self) -> bool {
        false
    }

    /// Inserts a running record unless the id is taken. Does not wait for long where it may be.
    fn insert(
        &self,
        request: &ClaimRequest,
    ) -> impl Future<Output = Result<Inserted, StoreError>> + Send;

    /// Reads a record with a snapshot of its own.
    fn select(
        &self,
        identity: &Identity,
    ) -> impl Future<Output = Result<Option<Row>, StoreError>> + Send;

    /// Makes the record `request`'s if it still carries `old` and, being running, its lease, being
    /// completed, its retention is over. Does not wait for a record that somebody has locked.
    fn take_over(
        &self,
        request: &ClaimRequest,
        old: Token,
        takeover: Takeover,
    ) -> impl Future<Output = Result<Option<SystemTime>, StoreError>> + Send;

    /// Holds a running record that carries `token` and whose lease is over. Does not wait either.
    fn hold_lost(
        &self,
        identity: &Identity,
        token: Token,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;

    fn update_completed(
        &self,
        claim: &Claim,
        completion: &Completion,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Deletes a record that is held, or that is running and not abandoned, unless it has progress.
    fn delete_claimed(
        &self,
        claim: &Claim,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Ends the lease of a running record that is abandoned; one with progress, which may be held,
    /// is running from then on, and to be run again.
    fn give_up(&self, claim: &Claim) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Holds a running record, and notes the references in one that is held already.
    fn update_held(
        &self,
        claim: &Claim,
        references: &References,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// Whether no claim of this identity is under way that nobody sees yet.
    fn is_settled(
        &self,
        _identity: &Identity,
    ) -> impl Future<Output = Result<bool, StoreError>> + Send {
        std::future::ready(Ok(true))
    }
}

/// How a claim takes over the record it met.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Takeover {
    pub(crate) attempt: u32,
    /// Only to answer that the earlier attempt was lost.
    pub(crate) abandoned: bool,
}

impl Takeover {
    /// What becomes of the operation when the new attempt is lost. One that never runs leaves
    /// everything as it was decided before.
    pub(crate) fn lost(self, request: &ClaimRequest) -> Lost {
        if self.abandoned {
            Lost::Answer
        } else {
            request.lost
        }
    }

    fn claimed(self, claim: Claim) -> Claimed {
        if self.abandoned {
            Claimed::Abandoned(claim)
        } else {
            Claimed::Acquired(claim)
        }
    }
}

/// What a claim does about the record it met.
#[derive(Debug)]
enum Step {
    Return(Claimed),
    TakeOver(Takeover),
    HoldLost,
}

/// Insert, or look first where a record is expected; on a conflict read with a new snapshot; if the record is gone, insert again. Reading back
/// in the inserting statement would see neither row when two overlap.
pub(crate) async fn claim(
    records: &impl Records,
    request: &ClaimRequest,
) -> Result<Claimed, StoreError> {
    let mut contested = None;
    let mut found = match records.expects_a_record() {
        true => records.select(&request.identity).await?,
        false => None,
    };
    for _ in 0..CLAIM_ROUNDS {
        if found.is_none() {
            let inserted = records.insert(request).await?;
            if let Inserted::Until(expires_at) = inserted {
                return Ok(Claimed::Acquired(request.claim(1, expires_at)));
            }
            found = records.select(&request.identity).await?;
            if found.is_none() && inserted == Inserted::Undecided {
                return Ok(in_progress());
            }
        }
        let Some(row) = found.take() else { continue };
        let old = row.token;
        match row.step_for(request)? {
            Step::Return(claimed) => return Ok(claimed),
            // It could not be taken, and is as it was: somebody is at it, or has it locked.
            _ if contested == Some(old) => return Ok(in_progress()),
            Step::HoldLost => {
                records.hold_lost(&request.identity, old).await?;
            }
            Step::TakeOver(takeover) => {
                if let Some(expires_at) = records.take_over(request, old, takeover).await? {
                    let claim = request.claim(takeover.attempt, expires_at);
                    return Ok(takeover.claimed(claim));
                }
            }
        }
        contested = Some(old);
    }
    Err(StoreError::unavailable(
        "record changed in every round of the claim",
    ))
}

/// Somebody is at it, and nobody can say for how long.
fn in_progress() -> Claimed {
    let lease_left = Duration::from_secs(1);
    Claimed::Existing(Existing::InProgress { lease_left })
}

pub(crate) async fn complete(
    records: &impl Records,
    claim: &Claim,
    completion: &Completion,
) -> Result<(), StoreError> {
    if records.update_completed(claim, completion).await? {
        return Ok(());
    }
    match records.select(&claim.identity).await? {
        Some(row) if row.token == claim.token && row.state == State::Completed => Ok(()),
        _ => Err(StoreError::claim_lost()),
    }
}

/// A claim whose commit takes long appears after a release that found nothing: there is to be none when the
/// record is looked for.
pub(crate) async fn release(records: &impl Records, claim: &Claim) -> Result<(), StoreError> {
    if records.delete_claimed(claim).await? || records.give_up(claim).await? {
        return Ok(());
    }
    if !records.is_settled(&claim.identity).await? {
        return Err(StoreError::unavailable("a claim is under way"));
    }
    match records.select(&claim.identity).await? {
        None => Ok(()),
        Some(row) if row.token == claim.token && row.state != State::Completed => {
            Err(StoreError::unavailable("the claim has only just come"))
        }
        Some(_) => Err(StoreError::claim_lost()),
    }
}

pub(crate) async fn hold(
    records: &impl Records,
    claim: &Claim,
    references: &References,
) -> Result<(), StoreError> {
    if records.update_held(claim, references).await? {
        return Ok(());
    }
    Err(StoreError::claim_lost())
}

pub(crate) async fn lookup(
    records: &impl Records,
    identity: &Identity,
    fingerprint: &Fingerprint,
) -> Result<Option<Existing>, StoreError> {
    match records.select(identity).await? {
        None => Ok(None),
        Some(row) => row.seen_by(identity, fingerprint),
    }
}

impl Row {
    fn step_for(self, request: &ClaimRequest) -> Result<Step, StoreError> {
        self.check_identity(&request.identity)?;
        if self.token == request.token && self.state == State::Running {
            let claim = request.claim(self.attempt, self.expires_at);
            let takeover = Takeover {
                attempt: self.attempt,
                abandoned: self.abandoned,
            };
            return Ok(Step::Return(takeover.claimed(claim)));
        }
        if self.is_over() {
            return Ok(Step::TakeOver(Takeover {
                attempt: 1,
                abandoned: false,
            }));
        }
        if !self.is_lost() || !self.is_of(&request.fingerprint)? {
            let existing = self.existing_for(&request.fingerprint)?;
            return Ok(Step::Return(Claimed::Existing(existing)));
        }
        Ok(match self.lost {
            Lost::Hold => Step::HoldLost,
            Lost::Rerun | Lost::Answer => Step::TakeOver(Takeover {
                attempt: self.attempt.saturating_add(1),
                abandoned: self.lost == Lost::Answer,
            }),
        })
    }

    fn is_lost(&self) -> bool {
        self.state == State::Running && self.lease_left.is_none()
    }

    /// What the sweep would delete is as good as absent, whether it came by or not.
    fn is_over(&self) -> bool {
        let ended = self.state == State::Completed || self.is_lost() && self.lost != Lost::Hold;
        self.expired && ended
    }

    fn seen_by(
        self,
        identity: &Identity,
        fingerprint: &Fingerprint,
    ) -> Result<Option<Existing>, StoreError> {
        self.check_identity(identity)?;
        if self.is_over() {
            return Ok(None);
        }
        self.existing_for(fingerprint).map(Some)
    }

    fn existing_for(self, fingerprint: &Fingerprint) -> Result<Existing, StoreError> {
        if !self.is_of(fingerprint)? {
            return Ok(Existing::Mismatch);
        }
        match self.state {
            State::Held => Ok(Existing::Held),
            State::Completed => self.completed().map(Box::new).map(Existing::Completed),
            State::Running => Ok(Existing::InProgress {
                lease_left: self.lease_left.unwrap_or_default(),
            }),
        }
    }

    fn completed(self) -> Result<Completed, StoreError> {
        let answer = self
            .answer
            .ok_or_else(|| StoreError::corrupt("no answer"))?;
        Ok(Completed {
            answer: Envelope::decode(&answer).map_err(StoreError::corrupt)?,
            references: references(self.references.as_deref())?,
            expires_at: self.expires_at,
            retention_left: self.retention_left,
        })
    }

    /// Ids are 16 bytes: a collision is improbable, and would replay one client's answer to another.
    fn check_identity(&self, identity: &Identity) -> Result<(), StoreError> {
        if self.digest == identity.digest() {
            Ok(())
        } else {
            Err(collision())
        }
    }

    fn is_of(&self, fingerprint: &Fingerprint) -> Result<bool, StoreError> {
        let stored = Fingerprint::from_bytes(&self.fingerprint)
            .ok_or_else(|| StoreError::corrupt("fingerprint cannot be read"))?;
        Ok(fingerprint.matches(&stored))
    }
}

fn collision() -> StoreError {
    StoreError::corrupt("two identities share one record id")
}

/// Of a record that a person asks for; `answer` is its answer, or the beginning of it.
pub(crate) fn state(state: State, answer: Option<&[u8]>) -> Result<RecordState, StoreError> {
    match (state, answer) {
        (State::Running, _) => Ok(RecordState::Running),
        (State::Held, _) => Ok(RecordState::Held),
        (State::Completed, None) => Err(StoreError::corrupt("no answer")),
        (State::Completed, Some(answer)) => Ok(RecordState::Completed {
            status: Envelope::status_in(answer).map_err(StoreError::corrupt)?,
        }),
    }
}

/// The record that was found under the id of `identity`, if it is the one that is meant.
pub(crate) fn inspected(
    found: Option<RecordSummary>,
    identity: &Identity,
) -> Result<Option<RecordSummary>, StoreError> {
    match found {
        Some(record) if record.identity.digest() != identity.digest() => Err(collision()),
        found => Ok(found),
    }
}

/// Only stores with transactions of their own have any.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(crate) fn progress(json: Option<String>) -> Result<Progress, StoreError> {
    Progress::from_json(json).ok_or_else(|| StoreError::corrupt("progress cannot be read"))
}

pub(crate) fn references(json: Option<&str>) -> Result<References, StoreError> {
    References::from_json(json).ok_or_else(|| StoreError::corrupt("references cannot be read"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::sync::Mutex;

    use bytes::Bytes;

    use super::*;

    /// What the statements of one claim meet, one after the other.
    #[derive(Default)]
    struct Script {
        inserts: Mutex<Vec<Inserted>>,
        rows: Mutex<Vec<Option<Row>>>,
        take_overs: Mutex<Vec<bool>>,
        held: Mutex<u32>,
    }

    fn next<T>(script: &Mutex<Vec<T>>) -> T {
        script.lock().unwrap().remove(0)
    }

    impl Records for Script {
        async fn insert(&self, _: &ClaimRequest) -> Result<Inserted, StoreError> {
            Ok(next(&self.inserts))
        }

        async fn select(&self, _: &Identity) -> Result<Option<Row>, StoreError> {
            Ok(next(&self.rows))
        }

        async fn take_over(
            &self,
            _: &ClaimRequest,
            _: Token,
            _: Takeover,
        ) -> Result<Option<SystemTime>, StoreError> {
            Ok(next(&self.take_overs).then_some(SystemTime::UNIX_EPOCH))
        }

        async fn hold_lost(&self, _: &Identity, _: Token) -> Result<bool, StoreError> {
            *self.held.lock().unwrap() += 1;
            Ok(true)
        }

        async fn update_completed(&self, _: &Claim, _: &Completion) -> Result<bool, StoreError> {
            Ok(false)
        }

        async fn delete_claimed(&self, _: &Claim) -> Result<bool, StoreError> {
            Ok(false)
        }

        async fn give_up(&self, _: &Claim) -> Result<bool, StoreError> {
            Ok(false)
        }

        async fn update_held(&self, _: &Claim, _: &References) -> Result<bool, StoreError> {
            Ok(false)
        }
    }

    fn request() -> ClaimRequest {
        ClaimRequest {
            identity: Identity::new("s", "o", "k"),
            fingerprint: Fingerprint::of_bytes(b"request"),
            token: Token::from_bytes([1; 16]),
            lost: Lost::Rerun,
            lease: Duration::from_secs(30),
            ttl: Duration::from_secs(3600),
        }
    }

    fn row(state: State) -> Row {
        let answer = Envelope::new(http::Response::new(Bytes::from_static(b"first")));
        Row {
            digest: request().identity.digest().to_vec(),
            state,
            token: Token::from_bytes([2; 16]),
            attempt: 1,
            lost: Lost::Rerun,
            abandoned: false,
            fingerprint: request().fingerprint.to_bytes(),
            lease_left: Some(Duration::from_secs(9)),
            expired: false,
            expires_at: SystemTime::UNIX_EPOCH,
            retention_left: Duration::ZERO,
            answer: (state == State::Completed).then(|| answer.encode()),
            references: None,
        }
    }

    async fn lost_race(rows: Vec<Option<Row>>, inserts: Vec<Inserted>) -> Claimed {
        let script = Script {
            inserts: Mutex::new(inserts),
            rows: Mutex::new(rows),
            ..Script::default()
        };
        claim(&script, &request()).await.unwrap()
    }

    #[tokio::test]
    async fn c5_a_lost_insert_race_replays_what_the_winner_completed() {
        let claimed = lost_race(vec![Some(row(State::Completed))], vec![Inserted::Taken]).await;
        assert!(matches!(claimed, Claimed::Existing(Existing::Completed(_))));
    }

    #[tokio::test]
    async fn c5_a_lost_insert_race_is_in_progress_while_the_winner_runs() {
        let claimed = lost_race(vec![Some(row(State::Running))], vec![Inserted::Taken]).await;
        assert!(matches!(
            claimed,
            Claimed::Existing(Existing::InProgress { .. })
        ));
    }

    #[tokio::test]
    async fn c5_a_lost_insert_race_is_run_again_where_the_winner_vanished() {
        let claimed = lost_race(
            vec![None],
            vec![Inserted::Taken, Inserted::Until(SystemTime::UNIX_EPOCH)],
        )
        .await;
        assert!(matches!(claimed, Claimed::Acquired(_)));
    }

    #[tokio::test]
    async fn a_key_that_is_not_decided_is_in_progress_or_what_is_known_of_it() {
        let claimed = lost_race(vec![None], vec![Inserted::Undecided]).await;
        let in_progress = matches!(claimed, Claimed::Existing(Existing::InProgress { .. }));
        assert!(in_progress, "{claimed:?}");
        let answered = vec![Some(row(State::Completed))];
        let claimed = lost_race(answered, vec![Inserted::Undecided]).await;
        assert!(matches!(claimed, Claimed::Existing(Existing::Completed(_))));
    }

    #[tokio::test]
    async fn a_lost_takeover_race_looks_again() {
        let lost = Row {
            lease_left: None,
            ..row(State::Running)
        };
        let script = Script {
            inserts: Mutex::new(vec![Inserted::Taken; 2]),
            rows: Mutex::new(vec![Some(lost), Some(row(State::Running))]),
            take_overs: Mutex::new(vec![false]),
            ..Script::default()
        };
        let claimed = claim(&script, &request()).await.unwrap();
        assert!(matches!(
            claimed,
            Claimed::Existing(Existing::InProgress { .. })
        ));
    }

    #[tokio::test]
    async fn a_lost_record_that_cannot_be_taken_is_in_progress() {
        let lost = Row {
            lease_left: None,
            ..row(State::Running)
        };
        let script = Script {
            inserts: Mutex::new(vec![Inserted::Taken; 2]),
            rows: Mutex::new(vec![Some(lost.clone()), Some(lost)]),
            take_overs: Mutex::new(vec![false]),
            ..Script::default()
        };
        let claimed = claim(&script, &request()).await.unwrap();
        assert!(matches!(
            claimed,
            Claimed::Existing(Existing::InProgress { .. })
        ));
    }

    #[tokio::test]
    async fn a_claim_whose_record_changes_in_every_round_gives_up() {
        let rounds = CLAIM_ROUNDS as usize;
        let script = Script {
            inserts: Mutex::new(vec![Inserted::Taken; rounds]),
            rows: Mutex::new(vec![None; rounds]),
            ..Script::default()
        };
        let error = claim(&script, &request()).await.unwrap_err();
        assert_eq!(error.kind(), super::super::StoreErrorKind::Unavailable);
    }

    #[tokio::test]
    async fn a_lost_attempt_of_another_request_is_a_mismatch_and_stays_as_it_is() {
        let other = Row {
            lease_left: None,
            fingerprint: Fingerprint::of_bytes(b"other").to_bytes(),
            ..row(State::Running)
        };
        let claimed = lost_race(vec![Some(other)], vec![Inserted::Taken]).await;
        assert!(matches!(claimed, Claimed::Existing(Existing::Mismatch)));
    }
}
