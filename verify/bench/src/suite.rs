//! What is measured, in its order.

use std::time::Duration;

use crate::arena::{Arena, Entrant, Pace, Place};
use crate::keys::Version;
use crate::load::Ask;
use crate::options::{Extent, Options};
use crate::report::Report;
use crate::sample::Sample;
use crate::serve::Work;
use crate::variants::Variant;

/// Connections of the base point.
pub(crate) const CONNECTIONS: usize = 64;

/// Bytes of its answers.
pub(crate) const ANSWER: usize = 1024;

#[derive(Debug)]
pub(crate) struct Suite {
    pub(crate) arena: Arena,
    pub(crate) report: Report,
    pub(crate) options: Options,
}

/// Whether everything is as it must be.
pub(crate) async fn run(options: Options) -> bool {
    let mut suite = Suite {
        arena: Arena::open(pace(options.extent)).await,
        report: Report::to(&options.out),
        options,
    };
    if suite.options.extent == Extent::Large {
        suite.growth().await;
    } else {
        suite.usual().await;
    }
    suite.report.end()
}

pub(crate) fn pace(extent: Extent) -> Pace {
    let (repetitions, warm_up, measured) = match extent {
        Extent::Short => (3, 300, 1000),
        Extent::Full => (7, 500, 2000),
        Extent::Large => (5, 500, 2000),
    };
    Pace {
        repetitions,
        warm_up: Duration::from_millis(warm_up),
        measured: Duration::from_millis(measured),
    }
}

impl Suite {
    /// Whether one of these limits is to be looked at.
    pub(crate) fn wants(&self, names: &[&str]) -> bool {
        let only = &self.options.only;
        only.is_empty() || only.iter().any(|only| names.contains(&only.as_str()))
    }

    async fn usual(&mut self) {
        self.fresh().await;
        self.business().await;
        self.replays().await;
        self.connections().await;
        self.bodies().await;
        self.slow_flush().await;
        self.uncovered().await;
        self.memory().await;
    }

    pub(crate) fn is_short(&self) -> bool {
        self.options.extent == Extent::Short
    }

    /// Lets them take turns, and tells what each did.
    pub(crate) async fn compete(&mut self, point: &str, entrants: &[Entrant]) -> Table {
        let samples = self.arena.rounds(entrants).await;
        let variants = entrants.iter().map(|entrant| entrant.variant);
        let table = Table(variants.zip(samples).collect());
        for (variant, samples) in &table.0 {
            self.report.figure(variant.name(), point, samples);
        }
        table
    }
}

/// One at the base point.
pub(crate) fn at_base(variant: Variant) -> Entrant {
    Entrant {
        variant,
        work: Work::Nothing,
        ask: Ask::Fresh(Version::V4),
        connections: CONNECTIONS,
        answer: ANSWER,
        processes: 1,
        place: Place::Small,
    }
}

/// What each of them did, round by round.
#[derive(Debug)]
pub(crate) struct Table(Vec<(Variant, Vec<Sample>)>);

impl Table {
    /// # Panics
    ///
    /// Where it took no part.
    pub(crate) fn of(&self, variant: Variant) -> &[Sample] {
        let row = self.0.iter().find(|(of, _)| *of == variant);
        &row.unwrap_or_else(|| panic!("{variant} took no part")).1
    }

    /// One divided by the other, of the same round.
    pub(crate) fn ratios(
        &self,
        one: Variant,
        other: Variant,
        figure: fn(&Sample) -> f64,
    ) -> Vec<f64> {
        let pairs = self.of(one).iter().zip(self.of(other));
        pairs
            .map(|(one, other)| figure(one) / figure(other))
            .collect()
    }
}
