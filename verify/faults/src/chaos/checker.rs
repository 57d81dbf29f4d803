//! The invariants, over what clients saw and what stands in the database.
//!
//! [`Live`] follows one operation while requests of it are sent, and leaves a [`Verdict`], which is
//! small. [`examine`] compares that with the record and the effects of the operation at the end.

use std::collections::HashSet;

use tower_idempotency::Envelope;

use super::history::{Event, Outcome, Seen, hash};
use super::plan::{Operation, Route, Variant};

/// One invariant that did not hold, in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// `I-1` to `I-12`.
    pub invariant: &'static str,
    /// All that was seen.
    pub text: String,
}

/// Of a refusal: whether it says when to come again, and whether it says that nothing was run.
const REFUSALS: [(&str, bool, bool); 8] = [
    ("store-unavailable", true, true),
    ("overloaded", true, true),
    ("shutting-down", true, true),
    ("request-in-progress", true, false),
    ("answer-not-recorded", true, false),
    ("transaction-conflict", true, false),
    ("key-reused", false, false),
    ("outcome-unknown", false, false),
];

/// The layer's own answers for a run that gave none.
const FAILURES: [&str; 4] = [
    "handler-panicked",
    "execution-limit",
    "attempt-lost",
    "transaction-aborted",
];

/// What is known of one request when all is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// A recorded answer had been seen before.
    pub is_late: bool,
    /// Its answer said that the handler was not run, or left nothing behind.
    pub ran_not: bool,
}

/// The first recorded answer that a client saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Recorded {
    hash: u64,
    variant: Variant,
}

/// An operation that is under way.
#[derive(Debug)]
pub struct Live {
    /// What it is.
    pub operation: Operation,
    recorded: Option<Recorded>,
    /// With which payload it is held.
    held: Option<Variant>,
    /// Answers that may have been given without a record.
    soft: Vec<u64>,
    has_rival: bool,
    /// Requests so far.
    pub sends: u32,
    events: Vec<Event>,
    violations: Vec<Violation>,
}

/// More are not remembered for the text of a violation.
const MOST_EVENTS: usize = 40;

impl Live {
    /// Nothing is sent yet.
    #[must_use]
    pub fn new(operation: Operation) -> Self {
        Self {
            operation,
            recorded: None,
            held: None,
            soft: Vec::new(),
            has_rival: false,
            sends: 0,
            events: Vec::new(),
            violations: Vec::new(),
        }
    }

    /// A request is sent. Whether a recorded answer was seen before.
    pub fn begin(&mut self, variant: Variant) -> bool {
        self.sends += 1;
        self.has_rival |= variant == Variant::Rival;
        self.recorded.is_some()
    }

    /// Whether there is nothing more to wait for.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.recorded.is_some() || self.held.is_some()
    }

    /// Whether it waits for a person, as far as a client knows.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.recorded.is_none() && self.held.is_some()
    }

    /// Which payload its key stands for.
    #[must_use]
    pub fn variant(&self) -> Option<Variant> {
        let recorded = self.recorded.map(|recorded| recorded.variant);
        recorded.or(self.held)
    }

    /// A request has ended.
    pub fn end(&mut self, event: Event) -> Sent {
        let mut sent = Sent {
            is_late: event.is_late,
            ran_not: event.outcome == Outcome::NotSent,
        };
        if self.events.len() < MOST_EVENTS {
            self.events.push(event.clone());
        }
        if let Outcome::Answered(seen) = &event.outcome {
            sent.ran_not = self.answered(&event, seen);
        }
        sent
    }

    /// Whether the answer says that nothing was run.
    fn answered(&mut self, event: &Event, seen: &Seen) -> bool {
        let code = seen.code();
        if let Some((_, comes_again, ran_not)) = REFUSALS.iter().find(|(name, ..)| *name == code) {
            if *comes_again && !seen.has_retry_after {
                self.violate("I-8", format!("{code} does not say when to come again"));
            }
            self.refused(event, code);
            // Nothing of a transaction is left where its client is told to come again.
            let undone =
                self.operation.route == Route::Transactional && code != "answer-not-recorded";
            return *ran_not || undone;
        }
        if !code.is_empty() && !FAILURES.contains(&code) {
            self.violate("I-12", format!("answered {} {code}", seen.status));
            return false;
        }
        self.check_echo(event, seen);
        self.check_class(code);
        if is_recorded(self.operation.route, seen) {
            self.compare(event, seen);
        } else {
            if event.is_late {
                let text = format!("run again after its answer was seen: send {}", event.send);
                self.violate("I-4", text);
            }
            if is_soft(self.operation.route, seen) {
                self.soft.push(seen.hash);
            }
        }
        false
    }

    /// Who gets an answer of a handler gets that of the own payload.
    fn check_echo(&mut self, event: &Event, seen: &Seen) {
        let (said, operation) = (&seen.said, &self.operation);
        let asked = (operation.number, operation.amount_of(event.variant));
        if said.execution.is_some() && (said.operation, said.amount) != asked {
            let text = format!(
                "send {} asked for {asked:?} and was answered {:?}",
                event.send,
                (said.operation, said.amount)
            );
            self.violate("I-7", text);
        }
    }

    /// What the route never says.
    fn check_class(&mut self, code: &str) {
        let route = self.operation.route;
        let is_foreign = match code {
            "attempt-lost" => route != Route::High,
            "transaction-aborted" => route != Route::Transactional,
            _ => false,
        };
        if is_foreign {
            self.violate("I-5", format!("{code} on {}", route.path()));
        }
    }

    fn refused(&mut self, event: &Event, code: &str) {
        let route = self.operation.route;
        match code {
            "key-reused" => {
                let is_own = self.recorded.is_some_and(|r| r.variant == event.variant);
                if event.is_late && is_own || event.variant == Variant::Own && !self.has_rival {
                    let text = format!("send {} is refused as another payload", event.send);
                    self.violate("I-7", text);
                }
            }
            "outcome-unknown" => {
                if route != Route::Critical {
                    self.violate("I-5", format!("held on {}", route.path()));
                } else if event.is_late {
                    let text = format!("send {} is told that its outcome is unknown", event.send);
                    self.violate("I-4", text);
                }
                self.held = Some(event.variant);
            }
            "transaction-conflict" => {
                if route != Route::Transactional {
                    self.violate("I-12", format!("{code} on {}", route.path()));
                } else if event.is_late {
                    let text = format!("send {} began to run again", event.send);
                    self.violate("I-4", text);
                }
            }
            _ => {}
        }
    }

    /// All recorded answers are one.
    fn compare(&mut self, event: &Event, seen: &Seen) {
        let Some(first) = self.recorded else {
            self.recorded = Some(Recorded {
                hash: seen.hash,
                variant: event.variant,
            });
            return;
        };
        if event.is_late && !seen.is_replayed {
            let text = format!("run again after its answer was seen: send {}", event.send);
            self.violate("I-4", text);
        } else if first.variant != event.variant {
            let text = format!("send {} got the answer of another payload", event.send);
            self.violate("I-7", text);
        } else if first.hash != seen.hash {
            let text = format!(
                "send {} got {:016x}, the first answer is {:016x}",
                event.send, seen.hash, first.hash
            );
            self.violate("I-3", text);
        }
    }

    /// It did not come to an end.
    pub fn stuck(&mut self, after: &str) {
        self.violate("I-5", format!("no answer {after}"));
    }

    /// It was to be replayed, and was not.
    pub fn not_replayed(&mut self, what: &str) {
        self.violate("I-4", format!("not replayed when all is well: {what}"));
    }

    fn violate(&mut self, invariant: &'static str, text: String) {
        self.violations.push(Violation { invariant, text });
    }

    /// The violations so far, each with all that was seen, and what is left to compare.
    #[must_use]
    pub fn finish(self) -> (Vec<String>, Verdict) {
        let name = name(&self.operation);
        let violations = self.violations.iter().map(|violation| {
            let events: Vec<_> = self.events.iter().map(ToString::to_string).collect();
            let Violation { invariant, text } = violation;
            format!("{invariant} {name}: {text}; {}", events.join("; "))
        });
        let violations = violations.collect();
        let lost_soft = self
            .soft
            .iter()
            .any(|soft| self.recorded.is_some_and(|recorded| recorded.hash != *soft));
        let verdict = Verdict {
            recorded: self.recorded.map(|recorded| recorded.hash),
            is_held: self.is_held(),
            lost_soft,
        };
        (violations, verdict)
    }
}

/// Whether a client that sees this knows that it is recorded.
fn is_recorded(route: Route, seen: &Seen) -> bool {
    if seen.is_replayed {
        return true;
    }
    let is_failure = !seen.code().is_empty();
    match route {
        Route::Medium => false,
        Route::Critical => !is_failure && !matches!(seen.status, 401 | 403 | 408 | 425 | 429),
        Route::High => !matches!(seen.status, 401 | 403 | 408 | 425 | 429),
        Route::Transactional => {
            let is_kept = matches!(seen.status, 200..400 | 402 | 404 | 409);
            !is_failure && is_kept
        }
    }
}

/// Whether it would be recorded where there is no time limit to that.
fn is_soft(route: Route, seen: &Seen) -> bool {
    let is_kept = seen.status < 500 && !matches!(seen.status, 401 | 403 | 408 | 425 | 429);
    route == Route::Medium && seen.code().is_empty() && is_kept
}

/// What is left of an operation when its requests are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verdict {
    /// The answer that clients saw.
    pub recorded: Option<u64>,
    /// All that clients know is that it is held.
    pub is_held: bool,
    /// An answer was seen that was another one than the recorded.
    pub lost_soft: bool,
}

/// The record of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// `running`, `completed` or `held`.
    pub state: String,
    /// The attempt that holds it.
    pub attempt: i32,
    /// Whether those who look for held records find it.
    pub is_visible: bool,
    /// Its answer.
    pub answer: Option<Vec<u8>>,
}

/// A run of the handler, as it noted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effect {
    /// Its name.
    pub execution: String,
    /// By which request.
    pub send: i64,
    /// Of which operation, by the payload.
    pub operation: i64,
    /// Of which payload.
    pub amount: i64,
    /// Which attempt it was told to be.
    pub attempt: i32,
    /// Whether it was written by the transaction that wrote the record.
    pub is_paired: bool,
}

/// What the logs of all processes tell of records, by their ids.
#[derive(Debug, Default)]
pub struct Logged {
    /// Answers that were given without a record.
    pub unrecorded: HashSet<String>,
}

/// Compares an operation with what stands in the database.
pub fn examine(
    operation: &Operation,
    verdict: Option<&Verdict>,
    record: Option<&Record>,
    effects: &[Effect],
    sent: impl Fn(i64) -> Sent,
    logged: &Logged,
) -> Vec<String> {
    let mut examined = Examined {
        operation,
        violations: Vec::new(),
    };
    examined.effects(effects, &sent);
    if operation.route == Route::Transactional {
        examined.transaction(record, effects);
    }
    if let Some(verdict) = verdict {
        examined.verdict(verdict, record, effects, logged);
    }
    if let Some(record) = record {
        examined.record(record, effects);
    }
    examined.violations
}

struct Examined<'a> {
    operation: &'a Operation,
    violations: Vec<String>,
}

impl Examined<'_> {
    fn violate(&mut self, invariant: &str, text: &str) {
        let name = name(self.operation);
        self.violations.push(format!("{invariant} {name}: {text}"));
    }

    fn effects(&mut self, effects: &[Effect], sent: impl Fn(i64) -> Sent) {
        let route = self.operation.route;
        if route.runs_once() && effects.len() > 1 {
            self.violate("I-1", &format!("{} effects: {effects:?}", effects.len()));
        }
        for effect in effects {
            let Sent { is_late, ran_not } = sent(effect.send);
            let number = i64::try_from(self.operation.number).unwrap_or(i64::MAX);
            let amount = u64::try_from(effect.amount).unwrap_or(u64::MAX);
            if effect.operation != number || self.operation.variant_of(amount).is_none() {
                self.violate(
                    "I-7",
                    &format!("an effect of another operation: {effect:?}"),
                );
            }
            if is_late {
                self.violate("I-4", &format!("run after its answer was seen: {effect:?}"));
            }
            if ran_not {
                self.violate("I-8", &format!("refused, and run nevertheless: {effect:?}"));
            }
            if route.runs_once() && effect.attempt > 1 {
                self.violate("I-6", &format!("a lost attempt was run again: {effect:?}"));
            }
        }
        let mut sends = HashSet::new();
        if !effects.iter().all(|effect| sends.insert(effect.send)) {
            self.violate("I-1", &format!("one request was run twice: {effects:?}"));
        }
    }

    /// Effect if and only if record, but for answers that say that there is none.
    fn transaction(&mut self, record: Option<&Record>, effects: &[Effect]) {
        for effect in effects.iter().filter(|effect| !effect.is_paired) {
            let text = format!("an effect of another transaction than its record: {effect:?}");
            self.violate("I-2", &text);
        }
        let answer = record.and_then(|record| record.answer.as_deref());
        let answer = answer.and_then(|answer| Envelope::decode(answer).ok());
        let status = answer.map(|answer| answer.status().as_u16());
        if status.is_some_and(|status| status < 400) && effects.is_empty() {
            self.violate("I-2", &format!("{status:?} is recorded, and has no effect"));
        }
        if status.is_some_and(|status| status >= 400) && !effects.is_empty() {
            self.violate("I-2", &format!("{status:?} is recorded with {effects:?}"));
        }
    }

    fn verdict(
        &mut self,
        verdict: &Verdict,
        record: Option<&Record>,
        effects: &[Effect],
        logged: &Logged,
    ) {
        let state = record.map(|record| record.state.as_str());
        if let Some(seen) = verdict.recorded {
            match record.map(|record| record.answer.as_deref().map(hash_of)) {
                Some(Some(Ok(kept))) if kept == seen => {}
                Some(Some(Ok(kept))) => {
                    let text = format!("seen was {seen:016x}, and recorded is {kept:016x}");
                    self.violate("I-3", &text);
                }
                _ => self.violate(
                    "I-4",
                    &format!("an answer was seen, and is gone: {state:?}"),
                ),
            }
        }
        // A paused attempt may have completed it in the end; and what nobody ran under may be given up,
        // by the process that did not hear of its claim.
        let may_be_free = state.is_none() && effects.is_empty();
        if verdict.is_held && !matches!(state, Some("held" | "completed")) && !may_be_free {
            self.violate("I-5", &format!("it was held, and now is {state:?}"));
        }
        if verdict.recorded.is_none() && !verdict.is_held {
            self.violate("I-5", &format!("no answer and not held: {state:?}"));
        }
        let id = self.operation.identity().id().to_string();
        if verdict.lost_soft && !logged.unrecorded.contains(&id) {
            let text = "an answer was lost, and the log does not say that it was not recorded";
            self.violate("I-4", text);
        }
    }

    fn record(&mut self, record: &Record, effects: &[Effect]) {
        let route = self.operation.route;
        if record.state == "held" && !(route == Route::Critical && record.is_visible) {
            let text = format!("held on {}, visible: {}", route.path(), record.is_visible);
            self.violate("I-5", &text);
        }
        if record.state == "running" {
            self.violate("I-5", "it is still running");
        }
        let Some(answer) = &record.answer else { return };
        let Ok(envelope) = Envelope::decode(answer) else {
            return self.violate("I-3", "its record cannot be read");
        };
        let body = envelope.body().map(|body| &body[..]).unwrap_or_default();
        let said: super::history::Said = serde_json::from_slice(body).unwrap_or_default();
        let Some(execution) = said.execution else {
            return;
        };
        if route != Route::Transactional && said.attempt != record.attempt {
            let text = format!("attempt {} has recorded {execution}", record.attempt);
            self.violate("I-6", &text);
        }
        let is_undone = route == Route::Transactional && envelope.status().as_u16() >= 400;
        let is_there = effects.iter().any(|effect| effect.execution == execution);
        if !is_undone && !is_there {
            self.violate(
                "I-2",
                &format!("{execution} is recorded, and has no effect"),
            );
        }
    }
}

fn hash_of(answer: &[u8]) -> Result<u64, tower_idempotency::EnvelopeError> {
    let envelope = Envelope::decode(answer)?;
    let headers = envelope.headers().iter();
    let headers = headers.map(|(name, value)| (name.as_str(), value.as_bytes()));
    let body = envelope.body().map(|body| &body[..]).unwrap_or_default();
    Ok(hash(envelope.status().as_u16(), headers, body))
}

/// Invariant I-12 of one process: every keyed request that came is counted once, but for those whose
/// client was gone before they were read.
#[must_use]
pub fn accounts(line: &str) -> Option<String> {
    let mut numbers = line.strip_prefix("accounts ")?.split(' ').map(str::parse);
    let mut next = || numbers.next()?.ok();
    let (arrived, answered, counted): (u64, u64, u64) = (next()?, next()?, next()?);
    let is_right = (answered..=arrived).contains(&counted);
    (!is_right).then(|| {
        format!("I-12: {arrived} keyed requests came, {answered} were answered, {counted} counted")
    })
}

fn name(operation: &Operation) -> String {
    let (scope, route, key) = (operation.scope, operation.route.path(), &operation.key);
    format!("{scope} {route} {key}")
}

#[cfg(test)]
mod tests;
