//! The leased protocol keeps its promises, and each fault that is planted breaks one.

#![allow(missing_docs, reason = "a test has no users")]

use model::lease::property::{C11, CLAIM, I1, I4, I6, ONCE};
use model::lease::{Class, Fault, Handler, Lease};
use model::{Bounds, check, counterexample};

use Class::{Critical, High, Medium};
use Handler::{Acts, Asks, Phase};

const BOUNDS: Bounds = Bounds::new(2, 1, 2, 2);

/// One acts, one breaks its claim, one acts again.
const THREE: Bounds = Bounds::new(3, 1, 3, 1);

#[track_caller]
fn assert_holds(class: Class, handler: Handler) {
    let fault = None;
    let report = check(
        Lease {
            bounds: BOUNDS,
            class,
            handler,
            fault,
        },
        2,
    );
    println!(
        "{class:?} {handler:?}: {} states, depth {}",
        report.states, report.depth
    );
    assert!(report.failures.is_empty(), "{:#?}", report.failures);
    assert!(report.states > 1_000, "{}", report.states);
}

fn find(model: Lease, property: &'static str) -> Option<Vec<String>> {
    let steps = counterexample(model, property)?;
    let (class, fault, count) = (model.class, model.fault, steps.len());
    println!(
        "{class:?} {fault:?}: {count} steps to break: {property}\n  {}",
        steps.join("\n  ")
    );
    Some(steps)
}

fn broken(class: Class, handler: Handler, fault: Option<Fault>) -> Lease {
    Lease {
        bounds: BOUNDS,
        class,
        handler,
        fault,
    }
}

#[track_caller]
fn assert_found(class: Class, handler: Handler, fault: Fault, property: &'static str) {
    let model = broken(class, handler, Some(fault));
    assert!(find(model, property).is_some(), "{fault:?} is not noticed");
}

#[track_caller]
fn assert_found_by_three(class: Class, handler: Handler, fault: Fault, property: &'static str) {
    let model = Lease {
        bounds: THREE,
        ..broken(class, handler, Some(fault))
    };
    assert!(find(model, property).is_some(), "{fault:?} is not noticed");
}

#[test]
fn critical_keeps_every_promise() {
    assert_holds(Critical, Asks);
}

#[test]
fn critical_in_phases_keeps_every_promise() {
    assert_holds(Critical, Phase);
}

#[test]
fn high_keeps_every_promise() {
    assert_holds(High, Asks);
}

#[test]
fn high_in_phases_keeps_every_promise() {
    assert_holds(High, Phase);
}

#[test]
fn high_has_one_effect_also_where_the_handler_does_not_ask() {
    assert_eq!(find(broken(High, Acts, None), I1), None);
}

/// A person frees the key of a paused attempt, which then acts after all.
#[test]
fn critical_has_two_effects_where_a_handler_does_not_ask_and_a_person_frees_its_key() {
    assert!(find(broken(Critical, Acts, None), I1).is_some());
}

#[test]
fn medium_keeps_every_promise() {
    assert_holds(Medium, Asks);
}

#[test]
fn medium_in_phases_has_one_effect() {
    assert_holds(Medium, Phase);
}

#[test]
fn a_completion_without_a_fence_is_noticed() {
    assert_found(Medium, Asks, Fault::CompleteUnfenced, I6);
    assert_found(Medium, Asks, Fault::CompleteUnfenced, I4);
}

#[test]
fn a_release_without_looking_for_the_owner_is_noticed() {
    assert_found(Medium, Asks, Fault::ReleaseUnfenced, I6);
    assert_found_by_three(High, Asks, Fault::ReleaseUnfenced, I1);
    assert_found(High, Asks, Fault::ReleaseUnfenced, I4);
}

#[test]
fn a_release_of_what_is_abandoned_is_noticed() {
    assert_found_by_three(High, Asks, Fault::ReleaseAbandoned, I1);
}

#[test]
fn a_phase_without_a_fence_is_noticed() {
    assert_found(Medium, Phase, Fault::PhaseUnfenced, I6);
    assert_found(Medium, Phase, Fault::PhaseUnfenced, I1);
}

#[test]
fn a_claim_that_reads_back_in_its_insert_is_noticed() {
    assert_found(High, Asks, Fault::ReadBack, CLAIM);
    assert_found(High, Asks, Fault::ReadBack, I1);
}

#[test]
fn c11_a_claim_that_does_not_know_its_own_record_is_noticed() {
    assert_found(Critical, Asks, Fault::ForgetsToken, C11);
}

#[test]
fn a_takeover_of_a_lease_that_was_renewed_meanwhile_is_noticed() {
    assert_found(Medium, Asks, Fault::TakesOverRenewed, CLAIM);
}

#[test]
fn a_heartbeat_that_takes_a_lost_record_back_is_noticed() {
    assert_found(Medium, Asks, Fault::BeatRevives, I6);
}

#[test]
fn trust_that_counts_from_the_reply_is_noticed() {
    assert_found(Medium, Asks, Fault::TrustsReply, CLAIM);
}

#[test]
fn trust_that_counts_from_the_last_of_several_claims_is_noticed() {
    assert_found(Medium, Asks, Fault::TrustsLastClaim, CLAIM);
}

#[test]
fn a_handler_that_starts_on_a_lease_that_is_over_is_noticed() {
    assert_found(Medium, Asks, Fault::StartsLate, ONCE);
}
