//! Any sequence of steps has the same results on every store as on a small model of it.

mod reference;
mod transactions;
mod world;

use std::fmt::Debug;
use std::future::Future;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use tokio::runtime::{Builder, Runtime};
use tower_idempotency::Lost;
use tower_idempotency::store::conformance::Subject;

use super::broken::{Fault, with};
use super::memory::Memory;
use super::postgres::Postgres;
use super::sqlite::Sqlite;
use reference::KEYS;
use world::World;

/// A claim is named by how many came after it: 0 is the latest.
#[derive(Debug, Clone)]
pub enum Step {
    Claim {
        key: usize,
        body: usize,
        lost: Lost,
    },
    ClaimAgain {
        of: usize,
    },
    Complete {
        of: usize,
        answer: u8,
        reference: Option<u8>,
    },
    Release {
        of: usize,
    },
    Hold {
        of: usize,
        reference: Option<u8>,
    },
    Extend {
        of: Vec<usize>,
    },
    Resolve {
        of: usize,
        answer: Option<u8>,
    },
    Sweep,
    MinutesPass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let of = || 0..4_usize;
    let reference = || proptest::option::of(0..2_u8);
    prop_oneof![
        6 => (0..KEYS, 0..5_usize, lost()).prop_map(|(key, body, lost)| {
            Step::Claim { key, body: usize::from(body == 4), lost }
        }),
        2 => of().prop_map(|of| Step::ClaimAgain { of }),
        4 => (of(), 0..3_u8, reference())
            .prop_map(|(of, answer, reference)| Step::Complete { of, answer, reference }),
        2 => of().prop_map(|of| Step::Release { of }),
        3 => (of(), reference()).prop_map(|(of, reference)| Step::Hold { of, reference }),
        2 => vec(of(), 0..4).prop_map(|of| Step::Extend { of }),
        2 => (of(), proptest::option::of(0..3_u8))
            .prop_map(|(of, answer)| Step::Resolve { of, answer }),
        2 => Just(Step::Sweep),
        4 => passed().prop_map(Step::MinutesPass),
    ]
}

fn lost() -> impl Strategy<Value = Lost> {
    prop_oneof![Just(Lost::Rerun), Just(Lost::Answer), Just(Lost::Hold)]
}

/// Within a lease, past it, past the retention.
fn passed() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(70), 3 => Just(140), 1 => Just(1010)]
}

fn runtime() -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

/// As many cases as are asked for, and otherwise as many as take a few seconds. A counterexample
/// becomes a rule of the conformance suite, not a file.
fn config(cases: u32) -> Config {
    let asked = std::env::var_os("PROPTEST_CASES").map(|_| Config::default().cases);
    Config {
        cases: asked.unwrap_or(cases),
        failure_persistence: None,
        max_shrink_iters: 1000,
        ..Config::default()
    }
}

/// The shortest sequence that fails, and why.
fn failing<T: Debug + Clone, F: Future<Output = Result<(), TestCaseError>>>(
    runtime: &Runtime,
    mut runner: TestRunner,
    step: impl Strategy<Value = T>,
    case: impl Fn(Vec<T>) -> F,
) -> Option<(String, Vec<T>)> {
    match runner.run(&vec(step, 1..41), |steps| runtime.block_on(case(steps))) {
        Ok(()) => None,
        Err(TestError::Fail(why, steps)) => Some((why.to_string(), steps)),
        Err(aborted) => panic!("{aborted}"),
    }
}

fn must_hold<T: Debug>(failing: Option<(String, Vec<T>)>) {
    if let Some((why, steps)) = failing {
        let steps: Vec<_> = steps.iter().map(|step| format!("  {step:?}")).collect();
        panic!("{why}\nafter\n{}", steps.join("\n"));
    }
}

async fn run(subject: &impl Subject, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut world = World::new(subject).await;
    for step in &steps {
        world.step(step).await?;
    }
    Ok(())
}

#[test]
fn any_sequence_of_steps_on_memory_is_as_on_the_model() {
    let (runtime, runner) = (runtime(), TestRunner::new(config(500)));
    must_hold(failing(&runtime, runner, step(), async |steps| {
        run(&Memory::new(), steps).await
    }));
}

#[test]
fn any_sequence_of_steps_on_sqlite_is_as_on_the_model() {
    let runtime = runtime();
    let sqlite = runtime.block_on(Sqlite::new());
    let runner = TestRunner::new(config(16));
    must_hold(failing(&runtime, runner, step(), async |steps| {
        run(&sqlite, steps).await
    }));
}

#[test]
fn any_sequence_of_steps_on_postgres_is_as_on_the_model() {
    let runtime = runtime();
    let postgres = runtime.block_on(Postgres::new());
    let runner = TestRunner::new(config(16));
    must_hold(failing(&runtime, runner, step(), async |steps| {
        run(&postgres, steps).await
    }));
}

/// A fault is found, always by the same sequence, which is short enough to be read.
fn is_found(fault: Fault) {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let (runtime, runner) = (runtime(), TestRunner::new_with_rng(config(500), rng));
    let found = failing(&runtime, runner, step(), async |steps| {
        run(&with(fault), steps).await
    });
    let (why, steps) = found.expect("the fault is found");
    assert!(steps.len() <= 6, "{why}: {steps:?}");
}

#[test]
fn a_completion_under_any_token_differs_from_the_model() {
    is_found(Fault::CompletesUnderAnyToken);
}

#[test]
fn a_release_of_foreign_claims_differs_from_the_model() {
    is_found(Fault::ReleasesForeignClaims);
}

#[test]
fn a_claim_that_does_not_recognise_its_token_differs_from_the_model() {
    is_found(Fault::ForgetsItsOwnToken);
}

#[test]
fn a_takeover_of_a_live_lease_differs_from_the_model() {
    is_found(Fault::TakesLiveLeases);
}

#[test]
fn fingerprints_that_are_not_compared_differ_from_the_model() {
    is_found(Fault::ComparesNoFingerprints);
}

#[test]
fn an_abandoned_operation_that_is_rerun_differs_from_the_model() {
    is_found(Fault::RerunsAbandonedOperations);
}

#[test]
fn a_sweep_of_held_records_differs_from_the_model() {
    is_found(Fault::SweepsHeldRecords);
}

#[test]
fn leases_that_are_always_kept_differ_from_the_model() {
    is_found(Fault::KeepsEveryLease);
}

#[test]
fn a_hold_that_does_nothing_differs_from_the_model() {
    is_found(Fault::HoldsNothing);
}

#[test]
fn forgotten_references_differ_from_the_model() {
    is_found(Fault::ForgetsReferences);
}
