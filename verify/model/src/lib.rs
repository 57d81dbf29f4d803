//! Both claim protocols of the crate as models, every state of which is visited.

pub mod lease;

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
    /// Statements that are under way at once, and whose senders wait no more.
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
        write!(f, "{}x{}x{}", self.workers, self.keys, self.attempts)
    }
}

/// What a check found.
#[derive(Debug)]
pub struct Report {
    /// States that differ.
    pub states: usize,
    /// Steps of the longest way that was needed to reach one.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
    /// Properties that hold, in every state.
    pub held: usize,
    /// Those that do not, with the steps of a shortest way there; `None` for what was never reached.
    pub failed: Vec<(&'static str, Option<String>)>,
}

/// Visits every state of a model.
pub fn check<M>(model: M, threads: usize) -> Report
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + fmt::Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + fmt::Debug + PartialEq + Send + Sync + 'static,
{
    let began = Instant::now();
    let checker = model.checker().threads(threads);
    let checker = checker
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let mut discoveries = checker.discoveries();
    let properties = checker.model().properties();
    let mut failed = Vec::new();
    for property in &properties {
        let found = discoveries.remove(property.name);
        match property.expectation.discovery_is_failure() {
            true => failed.extend(found.map(|path| (property.name, Some(steps(path))))),
            false if found.is_none() => failed.push((property.name, None)),
            false => {}
        }
    }
    Report {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        took: began.elapsed(),
        held: properties.len() - failed.len(),
        failed,
    }
}

fn steps<S: Clone + PartialEq, A: Clone + PartialEq + fmt::Debug>(path: Path<S, A>) -> String {
    let actions = path.into_actions();
    let lines: Vec<String> = actions.iter().map(|action| format!("{action:?}")).collect();
    lines.join("\n")
}
