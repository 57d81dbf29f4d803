//! Both claim protocols of the crate as models, every state of which is visited: [`lease`] and
//! [`transaction`]. Their documentation says what each step stands for in the crate, and what is left out.
//!
//! A bound of `3x1x3 late 2` is 3 workers, 1 key, 3 attempts: a worker has one attempt under way at a time,
//! and any worker may make any of them, one after the other or at once. Two statements may be under way
//! at once whose senders have given up on them. Attempts, workers and keys that differ in nothing but
//! their names are one.

pub mod lease;
pub mod transaction;

use std::collections::HashSet;
use std::fmt;
use std::hash::Hash;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model, Path};

/// How much of a model is visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Attempts that are under way at once.
    pub workers: usize,
    /// Keys.
    pub keys: usize,
    /// Attempts of each key, one after the other or at once.
    pub attempts: usize,
    /// Statements that are under way at once, and whose senders wait no more: of leased attempts. Each
    /// transaction may have one.
    pub late: usize,
}

impl Bounds {
    /// Workers, keys, attempts of each, late statements.
    #[must_use]
    pub const fn new(workers: usize, keys: usize, attempts: usize, late: usize) -> Self {
        Self {
            workers,
            keys,
            attempts,
            late,
        }
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            workers,
            keys,
            attempts,
            late,
        } = self;
        write!(f, "{workers}x{keys}x{attempts} late {late}")
    }
}

/// What a check found.
#[derive(Debug)]
pub struct Report {
    /// States that differ.
    pub states: usize,
    /// Steps of the longest way that was gone; there may be shorter ones to the same state.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
    /// How many properties hold.
    pub held: usize,
    /// Those that do not.
    pub failures: Vec<Failure>,
}

/// A property that does not hold.
#[derive(Debug)]
pub struct Failure {
    /// Its name.
    pub property: &'static str,
    /// The steps to a state where it fails, each with what is there after it; `None` for what was never
    /// reached. Attempts and keys are renamed after each step, so that a number is good for one line.
    pub steps: Option<Vec<String>>,
}

/// What a model has to be, to be checked by several threads.
pub trait Checkable:
    Model<
        State: Clone + fmt::Debug + Hash + Eq + Send + Sync + 'static,
        Action: Clone + fmt::Debug + PartialEq + Send + Sync + 'static,
    > + Send
    + Sync
    + 'static
{
}

impl<M> Checkable for M
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + fmt::Debug + Hash + Eq + Send + Sync + 'static,
    M::Action: Clone + fmt::Debug + PartialEq + Send + Sync + 'static,
{
}

/// Visits every state of a model, or ends with the first failure. States are told apart by 64 bits of
/// a digest.
pub fn check(model: impl Checkable, threads: usize) -> Report {
    let began = Instant::now();
    let checker = model.checker().threads(threads);
    let checker = checker.finish_when(HasDiscoveries::AnyFailures);
    let checker = checker.spawn_bfs().join();
    let properties = checker.model().properties();
    let mut discoveries = checker.discoveries();
    let (never, sometimes): (Vec<_>, Vec<_>) = properties
        .iter()
        .partition(|property| property.expectation.discovery_is_failure());
    let failed = never.iter().filter_map(|property| {
        let path = discoveries.remove(property.name)?;
        Some(Failure {
            property: property.name,
            steps: Some(steps(checker.model(), path)),
        })
    });
    let mut failures: Vec<Failure> = failed.collect();
    // Before every state is visited, nothing is never reached.
    if failures.is_empty() {
        let unreached = sometimes
            .iter()
            .filter(|p| !discoveries.contains_key(p.name));
        failures.extend(unreached.map(|p| Failure {
            property: p.name,
            steps: None,
        }));
    }
    Report {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        took: began.elapsed(),
        held: properties.len() - failures.len(),
        failures,
    }
}

/// The steps of a shortest way to where a property does not hold, or that it does.
pub fn counterexample(model: impl Checkable, property: &'static str) -> Option<Vec<String>> {
    let is_found = HasDiscoveries::AnyOf([property].into());
    let checker = model.checker().finish_when(is_found).spawn_bfs().join();
    checker.discovery(property)?;
    Some(shortest(checker.model(), property))
}

/// The checker goes by blocks, so that what it finds first is not always the nearest.
fn shortest<M: Checkable>(model: &M, property: &'static str) -> Vec<String> {
    let holds = model.property(property).condition;
    let mut ways: Vec<(M::State, usize, String)> = Vec::new();
    ways.extend(
        model
            .init_states()
            .into_iter()
            .map(|state| (state, 0, String::new())),
    );
    let mut seen: HashSet<M::State> = ways.iter().map(|way| way.0.clone()).collect();
    let mut at = 0;
    while holds(model, &ways[at].0) {
        let state = ways[at].0.clone();
        for (action, next) in model.next_steps(&state) {
            if seen.insert(next.clone()) {
                let step = model.format_step(&state, action).unwrap_or_default();
                ways.push((next, at, step));
            }
        }
        at += 1;
    }
    let mut steps = Vec::new();
    while !ways[at].2.is_empty() {
        steps.push(ways[at].2.clone());
        at = ways[at].1;
    }
    steps.reverse();
    steps
}

fn steps<M: Checkable>(model: &M, path: Path<M::State, M::Action>) -> Vec<String> {
    let steps = path.into_vec().into_iter();
    let steps = steps.filter_map(|(state, action)| model.format_step(&state, action?));
    steps.collect()
}
