//! Histories made by hand: each invariant has one that breaks it, and one that does not.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bytes::Bytes;
use http::Response;

use super::*;
use crate::chaos::history::Said;

fn operation(route: Route) -> Operation {
    let mut operations = (0..).map(|number| Operation::new(1, number));
    operations.find(|found| found.route == route).unwrap()
}

fn body(operation: &Operation, execution: &str) -> String {
    let (number, amount) = (operation.number, operation.amount);
    format!(r#"{{"execution":"{execution}","attempt":1,"operation":{number},"amount":{amount}}}"#)
}

fn envelope(operation: &Operation, status: u16, execution: &str) -> Vec<u8> {
    let response = Response::builder().status(status);
    let response = response.body(Bytes::from(body(operation, execution)));
    Envelope::new(response.unwrap()).encode()
}

fn answer(operation: &Operation, status: u16, execution: &str) -> Seen {
    let body = body(operation, execution);
    Seen {
        status,
        hash: hash(status, std::iter::empty(), body.as_bytes()),
        said: serde_json::from_str(&body).unwrap(),
        ..Seen::default()
    }
}

fn replay(operation: &Operation, execution: &str) -> Seen {
    Seen {
        is_replayed: true,
        ..answer(operation, 201, execution)
    }
}

fn refusal(code: &str) -> Seen {
    Seen {
        status: 503,
        has_retry_after: true,
        said: Said {
            code: Some(code.into()),
            ..Said::default()
        },
        ..Seen::default()
    }
}

/// A history in which one request follows the other.
struct Told(Live);

impl Told {
    fn new(route: Route) -> Self {
        Self(Live::new(operation(route)))
    }

    fn sends(mut self, variant: Variant, outcome: Outcome) -> Self {
        let is_late = self.0.begin(variant);
        self.0.end(Event {
            send: 0,
            variant,
            is_late,
            subject: 0,
            behave: String::new(),
            sent: 0,
            ended: 1,
            outcome,
        });
        self
    }

    fn gets(self, make: impl FnOnce(&Operation) -> Seen) -> Self {
        let seen = make(&self.0.operation);
        self.sends(Variant::Own, Outcome::Answered(seen))
    }

    fn gets_refusal(self, code: &str) -> Self {
        self.gets(|_| refusal(code))
    }

    fn gets_nothing(self) -> Self {
        self.sends(Variant::Own, Outcome::Unknown("broken"))
    }

    fn finds(self) -> Vec<String> {
        invariants(self.0.finish().0)
    }

    fn verdict(self) -> Verdict {
        self.0.finish().1
    }
}

fn invariants(violations: Vec<String>) -> Vec<String> {
    let first = |text: String| text.split(' ').next().map(str::to_owned);
    violations.into_iter().filter_map(first).collect()
}

fn effect(operation: &Operation, execution: &str) -> Effect {
    Effect {
        execution: execution.into(),
        send: 0,
        operation: i64::try_from(operation.number).unwrap(),
        amount: i64::try_from(operation.amount).unwrap(),
        attempt: 1,
        is_paired: true,
    }
}

fn record(operation: &Operation) -> Record {
    Record {
        state: "completed".into(),
        attempt: 1,
        is_visible: false,
        answer: Some(envelope(operation, 201, "e1")),
    }
}

/// What stands in the database at the end.
struct Stands {
    operation: Operation,
    verdict: Verdict,
    record: Option<Record>,
    effects: Vec<Effect>,
    sent: Sent,
    logged: Logged,
}

impl Stands {
    /// As it should after one answer.
    fn well(route: Route) -> Self {
        let told = Told::new(route).gets(|o| replay(o, "e1"));
        let operation = told.0.operation.clone();
        Self {
            verdict: told.verdict(),
            record: Some(record(&operation)),
            effects: vec![effect(&operation, "e1")],
            sent: Sent::default(),
            logged: Logged::default(),
            operation,
        }
    }

    fn but(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn finds(self) -> Vec<String> {
        let (verdict, record) = (Some(&self.verdict), self.record.as_ref());
        let sent = |_| self.sent;
        let found = examine(
            &self.operation,
            verdict,
            record,
            &self.effects,
            sent,
            &self.logged,
        );
        invariants(found)
    }
}

const NONE: [&str; 0] = [];

#[test]
fn retries_until_a_replay_are_fine_on_every_route() {
    for route in Route::ALL {
        let told = Told::new(route)
            .gets_nothing()
            .gets_refusal("store-unavailable");
        let told = told.gets(|o| answer(o, 201, "e1"));
        let told = told.gets(|o| replay(o, "e1"));
        assert_eq!(told.gets_refusal("request-in-progress").finds(), NONE);
        assert_eq!(Stands::well(route).finds(), NONE, "{route:?}");
    }
}

#[test]
fn two_effects_are_found_where_one_is_promised_and_none_elsewhere() {
    let again = |stands: &mut Stands| {
        let mut second = effect(&stands.operation, "e0");
        second.attempt = 2;
        second.send = 1;
        stands.effects.push(second);
    };
    for route in [Route::Critical, Route::High, Route::Transactional] {
        let found = Stands::well(route).but(again).finds();
        assert!(found.contains(&"I-1".to_owned()), "{route:?} {found:?}");
    }
    assert_eq!(Stands::well(Route::Medium).but(again).finds(), NONE);
    let by_one = Stands::well(Route::Medium).but(again);
    assert_eq!(by_one.but(|s| s.effects[1].send = 0).finds(), ["I-1"]);
}

#[test]
fn an_effect_past_the_transaction_and_one_without_a_record_are_found() {
    let stands = || Stands::well(Route::Transactional);
    let apart = stands().but(|stands| stands.effects[0].is_paired = false);
    assert_eq!(apart.finds(), ["I-2"]);
    assert_eq!(
        stands().but(|stands| stands.effects.clear()).finds(),
        ["I-2", "I-2"]
    );
    let refused = |stands: &mut Stands| {
        let answer = envelope(&stands.operation, 404, "e1");
        stands.verdict.recorded = Some(hash_of(&answer).unwrap());
        stands.record.as_mut().unwrap().answer = Some(answer);
    };
    assert_eq!(stands().but(refused).finds(), ["I-2"]);
    let undone = stands().but(refused).but(|stands| stands.effects.clear());
    assert_eq!(undone.finds(), NONE);
}

#[test]
fn an_answer_that_differs_is_found() {
    for route in Route::ALL {
        let told = Told::new(route).gets(|o| replay(o, "e1"));
        let told = told.gets(|o| replay(o, "e2"));
        assert_eq!(told.finds(), ["I-3"]);
        let changed = |stands: &mut Stands| {
            let answer = envelope(&stands.operation, 202, "e1");
            stands.record.as_mut().unwrap().answer = Some(answer);
        };
        assert_eq!(Stands::well(route).but(changed).finds(), ["I-3"]);
    }
}

#[test]
fn two_fresh_answers_are_two_records_unless_the_route_may_lose_one() {
    for (route, found) in [
        (Route::Critical, &["I-3"][..]),
        (Route::High, &["I-3"]),
        (Route::Transactional, &["I-3"]),
        (Route::Medium, &[]),
    ] {
        let mut live = Live::new(operation(route));
        // Both were under way at once.
        let late = [live.begin(Variant::Own), live.begin(Variant::Own)];
        assert_eq!(late, [false, false]);
        for execution in ["e1", "e2"] {
            let seen = answer(&live.operation, 201, execution);
            live.end(Event {
                send: 0,
                variant: Variant::Own,
                is_late: false,
                subject: 0,
                behave: String::new(),
                sent: 0,
                ended: 1,
                outcome: Outcome::Answered(seen),
            });
        }
        assert_eq!(invariants(live.finish().0), found);
    }
}

#[test]
fn a_lost_answer_is_found_by_what_comes_in_its_place() {
    for route in Route::ALL {
        let told = || Told::new(route).gets(|o| replay(o, "e1"));
        assert_eq!(told().gets(|o| answer(o, 201, "e2")).finds(), ["I-4"]);
        assert_eq!(told().gets(|o| answer(o, 429, "e2")).finds(), ["I-4"]);
        let gone = Stands::well(route).but(|stands| stands.record = None);
        assert!(gone.finds().contains(&"I-4".to_owned()));
        let late = Stands::well(route).but(|stands| stands.sent.is_late = true);
        assert_eq!(late.finds(), ["I-4"]);
    }
    let told = Told::new(Route::Critical).gets(|o| replay(o, "e1"));
    assert_eq!(told.gets_refusal("outcome-unknown").finds(), ["I-4"]);
}

#[test]
fn an_answer_that_was_given_without_a_record_may_be_lost_if_the_log_says_so() {
    let told = Told::new(Route::Medium).gets(|o| answer(o, 201, "e0"));
    let told = told.gets(|o| replay(o, "e1"));
    let verdict = told.verdict();
    assert!(verdict.lost_soft);
    let lost = || Stands::well(Route::Medium).but(|stands| stands.verdict = verdict);
    assert_eq!(lost().finds(), ["I-4"]);
    let logged = lost().but(|stands| {
        let id = stands.operation.identity().id().to_string();
        stands.logged.unrecorded.insert(id);
    });
    assert_eq!(logged.finds(), NONE);
}

#[test]
fn a_key_that_is_stuck_is_found_and_one_that_is_held_in_sight_is_not() {
    let mut live = Live::new(operation(Route::High));
    live.stuck("in time");
    assert_eq!(invariants(live.finish().0), ["I-5"]);
    let open = Told::new(Route::High)
        .gets_refusal("request-in-progress")
        .verdict();
    let stuck = Stands::well(Route::High).but(|stands| stands.verdict = open);
    assert_eq!(stuck.finds(), ["I-5"]);
    let running = Stands::well(Route::High).but(|stands| {
        stands.record.as_mut().unwrap().state = "running".into();
    });
    assert_eq!(running.finds(), ["I-5"]);

    let told = Told::new(Route::Critical).gets_refusal("outcome-unknown");
    let verdict = told.verdict();
    let held = |is_visible| {
        Stands::well(Route::Critical).but(|stands| {
            stands.verdict = verdict;
            let record = stands.record.as_mut().unwrap();
            (record.state, record.answer) = ("held".into(), None);
            record.is_visible = is_visible;
        })
    };
    assert_eq!(held(true).finds(), NONE);
    let gone = || held(true).but(|stands| stands.record = None);
    assert_eq!(gone().finds(), ["I-5"]);
    // Nobody ran under the claim that was held.
    assert_eq!(gone().but(|stands| stands.effects.clear()).finds(), NONE);
    assert_eq!(held(false).finds(), ["I-5"]);
    assert_eq!(
        Told::new(Route::High)
            .gets_refusal("outcome-unknown")
            .finds(),
        ["I-5"]
    );
}

#[test]
fn a_record_that_another_attempt_has_written_is_found() {
    let stands = |route| Stands::well(route);
    let late = stands(Route::Medium).but(|s| s.record.as_mut().unwrap().attempt = 2);
    assert_eq!(late.finds(), ["I-6"]);
    let again = stands(Route::High).but(|s| s.effects[0].attempt = 2);
    assert_eq!(again.finds(), ["I-6"]);
}

#[test]
fn what_is_of_another_payload_is_found() {
    let told = || Told::new(Route::High).gets(|o| replay(o, "e1"));
    let replayed = |told: Told| {
        let seen = replay(&told.0.operation, "e1");
        told.sends(Variant::Rival, Outcome::Answered(seen))
    };
    let found = replayed(told()).finds();
    assert!(found.iter().all(|found| found == "I-7"), "{found:?}");
    assert!(!found.is_empty());
    let refused = |variant| told().sends(variant, Outcome::Answered(refusal("key-reused")));
    assert_eq!(refused(Variant::Rival).finds(), NONE);
    assert_eq!(refused(Variant::Own).finds(), ["I-7"]);
    // Nobody else has the key: scopes never meet.
    assert_eq!(
        Told::new(Route::High).gets_refusal("key-reused").finds(),
        ["I-7"]
    );
    let foreign = Stands::well(Route::High).but(|stands| stands.effects[0].operation += 1);
    assert_eq!(foreign.finds(), ["I-7"]);
}

#[test]
fn a_refusal_that_ran_or_does_not_say_when_to_come_again_is_found() {
    let mute = Seen {
        has_retry_after: false,
        ..refusal("store-unavailable")
    };
    assert_eq!(Told::new(Route::High).gets(|_| mute).finds(), ["I-8"]);
    let ran = Stands::well(Route::High).but(|stands| stands.sent.ran_not = true);
    assert_eq!(ran.finds(), ["I-8"]);
    for code in ["store-unavailable", "overloaded", "shutting-down"] {
        let mut live = Live::new(operation(Route::High));
        assert!(live.answered(&event(refusal(code)), &refusal(code)));
    }
}

fn event(seen: Seen) -> Event {
    Event {
        send: 0,
        variant: Variant::Own,
        is_late: false,
        subject: 0,
        behave: String::new(),
        sent: 0,
        ended: 1,
        outcome: Outcome::Answered(seen),
    }
}

#[test]
fn answers_that_no_route_gives_and_counts_that_do_not_add_up_are_found() {
    assert_eq!(
        Told::new(Route::High).gets_refusal("nested-layers").finds(),
        ["I-12"]
    );
    assert_eq!(accounts("accounts 10 8 9"), None);
    assert_eq!(accounts("accounts 10 10 10"), None);
    assert!(accounts("accounts 10 10 9").is_some());
    assert!(accounts("accounts 10 9 11").is_some());
}
