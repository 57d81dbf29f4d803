//! A store and its model, side by side.

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use tower_idempotency::store::conformance::Subject;
use tower_idempotency::store::{
    Claim, ClaimRequest, Claimed, Completion, Existing, LeaseRenewal, RecordState, Renewed,
    Resolution, Token, Within,
};
use tower_idempotency::{
    Envelope, Fingerprint, Identity, References, Store, StoreError, StoreErrorKind,
};

use super::Step;
use super::reference::{Call, KEYS, LEASE, RENEWED, Reference, Shown, State, TTL, Told, View};

pub struct World<'a, S> {
    pub subject: &'a S,
    pub reference: Reference,
    keys: Vec<Identity>,
    calls: Vec<Call>,
    promises: Promises,
}

/// What holds whatever the model says, for each key.
#[derive(Default)]
struct Promises {
    /// I-6: whose claim was acquired last, and when. No write of anybody else is accepted.
    owner: [Option<(Call, u64)>; KEYS],
    /// I-4: to which body which answer was recorded, and until when it is replayed at least.
    answer: [Option<(usize, u8, u64)>; KEYS],
}

impl<'a, S: Subject> World<'a, S> {
    /// Empties the store of what another sequence left.
    pub async fn new(subject: &'a S) -> Self {
        let store = subject.store();
        for held in store.list_held(None, 1000).await.unwrap() {
            let freed = store.resolve(&held.identity, held.token, &Resolution::Release);
            freed.await.unwrap();
        }
        subject.age(minutes(100 * TTL)).await;
        store.delete_expired(1000).await.unwrap();
        for held in store.list_held(None, 1000).await.unwrap() {
            let freed = store.resolve(&held.identity, held.token, &Resolution::Release);
            freed.await.unwrap();
        }
        let key = |n: usize| Identity::new("acme", "POST /charges", n.to_string());
        let mut keys: Vec<_> = (0..KEYS).map(key).collect();
        // As lists are.
        keys.sort_by_key(Identity::id);
        Self {
            subject,
            reference: Reference::default(),
            keys,
            calls: Vec::new(),
            promises: Promises::default(),
        }
    }

    /// A call that was not made before.
    pub fn call(&mut self, key: usize, body: usize, lost: tower_idempotency::Lost) -> Call {
        let token = self.calls.len() as u64 + 1;
        let call = Call {
            key,
            body,
            lost,
            token,
        };
        self.calls.push(call);
        call
    }

    /// The latest but so many; where there is none, one that never claimed.
    pub fn past(&self, of: usize) -> Call {
        let stranger = Call {
            key: 0,
            body: 0,
            lost: tower_idempotency::Lost::Rerun,
            token: 0,
        };
        match self.calls.len() {
            0 => stranger,
            len => self.calls[len - 1 - of % len],
        }
    }

    pub async fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let (now, store) = (self.reference.now, self.subject.store());
        let (expected, told) = match *step {
            Step::Claim { .. } | Step::ClaimAgain { .. } => {
                let call = match *step {
                    Step::Claim { key, body, lost } => self.call(key, body, lost),
                    Step::ClaimAgain { of } => self.past(of),
                    _ => unreachable!("matched above"),
                };
                let told = claimed(store.claim(&self.request(call)).await);
                self.promises.claimed(call, &told, now);
                (self.reference.claim(call), told)
            }
            Step::Complete {
                of,
                answer,
                reference,
            } => {
                let call = self.past(of);
                let completion = completion(answer, reference);
                let told = done(store.complete(&self.claim(call), &completion).await);
                self.promises.written(call, &told)?;
                let claimed_at = self.promises.owner[call.key].map_or(0, |(_, at)| at);
                let until = claimed_at + TTL;
                self.promises.answered(call, answer, &told, now, until);
                (self.reference.complete(call, answer, reference), told)
            }
            Step::Release { of } => {
                let call = self.past(of);
                let told = done(store.release(&self.claim(call)).await);
                (self.reference.release(call), told)
            }
            Step::Hold { of, reference } => {
                let call = self.past(of);
                let told = done(store.hold(&self.claim(call), &references(reference)).await);
                self.promises.written(call, &told)?;
                (self.reference.hold(call, reference), told)
            }
            Step::Extend { ref of } => {
                let calls: Vec<_> = of.iter().map(|of| self.past(*of)).collect();
                let told = self.extend(&calls).await?;
                (self.reference.extend(&calls), told)
            }
            Step::Resolve { of, answer } => {
                let call = self.past(of);
                let resolution = answer.map_or(Resolution::Release, |answer| {
                    Resolution::Answer(envelope(answer))
                });
                let resolved = store.resolve(&self.keys[call.key], token(call.token), &resolution);
                let told = done(resolved.await);
                if let Some(answer) = answer {
                    let owner = self.promises.owner[call.key].map_or(call, |(owner, _)| owner);
                    let until = now + TTL;
                    self.promises.answered(owner, answer, &told, now, until);
                }
                (self.reference.resolve(call, answer), told)
            }
            Step::Sweep => {
                let told = match store.delete_expired(100).await {
                    Ok(swept) => Told::Swept {
                        deleted: swept.deleted,
                        held: swept.held,
                    },
                    Err(error) => failed(&error),
                };
                (self.reference.sweep(), told)
            }
            Step::MinutesPass(by) => {
                self.subject.age(minutes(by)).await;
                self.reference.now += by;
                return self.look(step).await;
            }
        };
        prop_assert_eq!(told, expected, "{:?}", step);
        self.look(step).await
    }

    async fn extend(&mut self, calls: &[Call]) -> Result<Told, TestCaseError> {
        let renewals: Vec<_> = calls
            .iter()
            .map(|call| LeaseRenewal {
                claim: self.claim(*call),
                lease: minutes(RENEWED),
            })
            .collect();
        let renewed = match self.subject.store().extend(&renewals).await {
            Ok(renewed) => renewed,
            Err(error) => return Ok(failed(&error)),
        };
        for (call, renewed) in calls.iter().zip(&renewed) {
            if *renewed != Renewed::Lost {
                self.promises.written(*call, &Told::Done)?;
            }
        }
        let kept = renewed.iter().map(|renewed| *renewed == Renewed::Kept);
        Ok(Told::Renewed(kept.collect()))
    }

    /// Compares all that can be seen, and what was promised.
    pub async fn look(&self, step: &impl std::fmt::Debug) -> Result<(), TestCaseError> {
        let view = self.view().await;
        for key in 0..KEYS {
            self.promises
                .kept(key, &view.lookups[key], self.reference.now)?;
        }
        prop_assert_eq!(view, self.reference.view(), "after {:?}", step);
        Ok(())
    }

    async fn view(&self) -> View {
        let store = self.subject.store();
        let mut view = View {
            lookups: Vec::new(),
            inspections: Vec::new(),
            held: Vec::new(),
            found: [Vec::new(), Vec::new()],
        };
        for identity in &self.keys {
            let one = looked_up(store.lookup(identity, &fingerprint(0)).await);
            let two = looked_up(store.lookup(identity, &fingerprint(1)).await);
            view.lookups.push([one, two]);
            let shown = store.inspect(identity).await.unwrap();
            view.inspections.push(shown.map(|record| Shown {
                state: match record.state {
                    RecordState::Running => State::Running,
                    RecordState::Completed { .. } => State::Completed,
                    RecordState::Held => State::Held,
                },
                attempt: record.attempt,
                reference: reference_of(&record.references),
                kept: tens(record.expires_at.duration_since(record.claimed_at).unwrap()),
            }));
        }
        let key = |identity: &Identity| self.keys.iter().position(|i| i == identity).unwrap();
        for held in store.list_held(None, 100).await.unwrap() {
            let reference = reference_of(&held.references);
            let token = u128::from_be_bytes(*held.token.as_bytes())
                .try_into()
                .unwrap();
            view.held
                .push((key(&held.identity), token, held.attempt, reference));
        }
        for (reference, found) in view.found.iter_mut().enumerate() {
            let id = format!("ch_{reference}");
            let records = store.find_by_reference(Within::AllScopes, "charge", &id, None, 100);
            found.extend(
                records
                    .await
                    .unwrap()
                    .iter()
                    .map(|record| key(&record.identity)),
            );
        }
        view
    }

    pub fn request(&self, call: Call) -> ClaimRequest {
        ClaimRequest {
            identity: self.keys[call.key].clone(),
            fingerprint: fingerprint(call.body),
            token: token(call.token),
            lost: call.lost,
            lease: minutes(LEASE),
            ttl: minutes(TTL),
        }
    }

    fn claim(&self, call: Call) -> Claim {
        self.request(call).claim(1, SystemTime::UNIX_EPOCH)
    }

    /// A transaction was committed: its token is the owner's, and its answer stays.
    pub fn committed(&mut self, call: Call, answer: Option<u8>) {
        let now = self.reference.now;
        self.promises.owner[call.key] = Some((call, now));
        if let Some(answer) = answer {
            self.promises
                .answered(call, answer, &Told::Done, now, now + TTL);
        }
    }
}

impl Promises {
    fn claimed(&mut self, call: Call, told: &Told, now: u64) {
        let known = self.owner[call.key].filter(|(owner, _)| owner.token == call.token);
        if matches!(told, Told::Acquired { .. } | Told::Abandoned { .. }) {
            // Perhaps it is the claim that is known.
            self.owner[call.key] = known.or(Some((call, now)));
        }
    }

    fn written(&self, call: Call, told: &Told) -> Result<(), TestCaseError> {
        let owner = self.owner[call.key].map(|(owner, _)| owner);
        let is_owner = owner.is_some_and(|owner| owner.token == call.token);
        prop_assert!(
            *told != Told::Done || is_owner,
            "I-6: {call:?} writes past {owner:?}"
        );
        Ok(())
    }

    fn answered(&mut self, call: Call, answer: u8, told: &Told, now: u64, until: u64) {
        let known = &mut self.answer[call.key];
        if *told == Told::Done && known.is_none_or(|(_, _, until)| until <= now) {
            *known = Some((call.body, answer, until));
        }
    }

    fn kept(&self, key: usize, lookups: &[Told; 2], now: u64) -> Result<(), TestCaseError> {
        if let Some((body, answer, until)) = self.answer[key]
            && now < until
        {
            let told = &lookups[body];
            let is_kept = matches!(told, Told::Completed { answer: a, .. } if *a == answer);
            prop_assert!(is_kept, "I-4: answer {answer} became {told:?}");
        }
        Ok(())
    }
}

fn minutes(minutes: u64) -> Duration {
    Duration::from_secs(60 * minutes)
}

/// Rounded to tens of minutes: what a test takes does not matter.
fn tens(left: Duration) -> u64 {
    (left.as_secs() + 299) / 600 * 10
}

fn token(token: u64) -> Token {
    Token::from_bytes(u128::from(token).to_be_bytes())
}

fn fingerprint(body: usize) -> Fingerprint {
    Fingerprint::of_bytes(body.to_string().as_bytes())
}

fn envelope(answer: u8) -> Envelope {
    Envelope::new(http::Response::new(answer.to_string().into()))
}

fn references(reference: Option<u8>) -> References {
    let mut references = References::default();
    if let Some(reference) = reference {
        references
            .push("charge", &format!("ch_{reference}"))
            .unwrap();
    }
    references
}

fn reference_of(references: &References) -> Option<u8> {
    let (_, id) = references.as_slice().first()?;
    Some(id.trim_start_matches("ch_").parse().unwrap())
}

pub fn completion(answer: u8, reference: Option<u8>) -> Completion {
    Completion {
        answer: envelope(answer),
        references: references(reference),
    }
}

pub fn failed(error: &StoreError) -> Told {
    match error.kind() {
        StoreErrorKind::ClaimLost => Told::ClaimLost,
        _ => Told::Failed(format!("{error:?}")),
    }
}

fn done(result: Result<(), StoreError>) -> Told {
    result.map_or_else(|error| failed(&error), |()| Told::Done)
}

fn claimed(result: Result<Claimed, StoreError>) -> Told {
    match result {
        Ok(Claimed::Acquired(claim)) => Told::Acquired {
            attempt: claim.attempt,
        },
        Ok(Claimed::Abandoned(claim)) => Told::Abandoned {
            attempt: claim.attempt,
        },
        Ok(Claimed::Existing(existing)) => seen(existing),
        Err(error) => failed(&error),
    }
}

fn looked_up(result: Result<Option<Existing>, StoreError>) -> Told {
    match result {
        Ok(found) => found.map_or(Told::Absent, seen),
        Err(error) => failed(&error),
    }
}

fn seen(existing: Existing) -> Told {
    match existing {
        Existing::InProgress { lease_left } => Told::InProgress {
            left: tens(lease_left),
        },
        Existing::Completed(completed) => Told::Completed {
            answer: completed.answer.body().unwrap()[0] - b'0',
            reference: reference_of(&completed.references),
        },
        Existing::Mismatch => Told::Mismatch,
        Existing::Held => Told::Held,
    }
}
