//! What was measured, in lines for people and in lines for programs.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::limits::{Verdict, limit};
use crate::sample::Sample;

#[derive(Debug)]
pub(crate) struct Report {
    file: File,
    verdicts: Vec<Verdict>,
    failed: u64,
}

/// The one in the middle, the least and the greatest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// # Panics
    ///
    /// Of nothing.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Self {
            median: f64::midpoint(low, high),
            min: values[0],
            max: values[values.len() - 1],
        }
    }
}

impl Report {
    pub(crate) fn to(path: &Path) -> Self {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).expect("it is writable");
        }
        Self {
            file: File::create(path).expect("it is writable"),
            verdicts: Vec::new(),
            failed: 0,
        }
    }

    /// A figure that is judged, of one value a repetition.
    pub(crate) fn ratio(&mut self, name: &str, values: impl IntoIterator<Item = f64>) {
        let (limit, spread) = (limit(name), Spread::of(values));
        let verdict = limit.judge(spread.median);
        println!(
            "ratio {name} {} [{}..{}] floor {} target {} {}",
            short(spread.median),
            short(spread.min),
            short(spread.max),
            limit.floor,
            limit.target,
            verdict.name(),
        );
        self.verdicts.push(verdict);
        self.keep(&json!({
            "kind": "ratio", "name": name, "median": spread.median, "min": spread.min,
            "max": spread.max, "floor": limit.floor, "target": limit.target,
            "verdict": verdict.name(),
        }));
    }

    /// A variant at a point, of one sample a repetition.
    pub(crate) fn figure(&mut self, variant: &str, point: &str, samples: &[Sample]) {
        let median = |of: fn(&Sample) -> f64| Spread::of(samples.iter().map(of)).median;
        let rate = Spread::of(samples.iter().map(|sample| sample.rate));
        let (p50, p99) = (median(|s| s.p50), median(|s| s.p99));
        let (database, application) = (median(|s| s.database), median(|s| s.application));
        let log = median(|s| s.log);
        println!(
            "figure {variant}@{point} {:.0} ops/s [{:.0}..{:.0}] p50 {p50:.2} ms p99 {p99:.2} ms \
             cpu {:.1} us ({database:.1} + {application:.1}) wal {log:.0} B",
            rate.median,
            rate.min,
            rate.max,
            database + application,
        );
        let failed: u64 = samples.iter().map(|sample| sample.failed).sum();
        if failed > 0 {
            println!("failed {variant}@{point} {failed} requests");
            self.failed += failed;
        }
        self.keep(&json!({
            "kind": "figure", "variant": variant, "point": point, "rate": rate.median,
            "min": rate.min, "max": rate.max, "p50_ms": p50, "p99_ms": p99,
            "database_us": database, "application_us": application, "wal_bytes": log,
            "failed": failed,
        }));
    }

    /// What is told and not judged.
    pub(crate) fn note(&mut self, name: &str, value: f64, unit: &str) {
        println!("note {name} {} {unit}", short(value));
        self.keep(&json!({ "kind": "note", "name": name, "value": value, "unit": unit }));
    }

    fn keep(&mut self, line: &Value) {
        writeln!(self.file, "{line}").expect("it is writable");
    }

    /// Whether everything is as it must be.
    pub(crate) fn end(&self) -> bool {
        let count = |verdict| self.verdicts.iter().filter(|v| **v == verdict).count();
        let below = count(Verdict::Below);
        println!(
            "ok {} short {} below {below} failed requests {}",
            count(Verdict::Ok),
            count(Verdict::Short),
            self.failed,
        );
        below == 0 && self.failed == 0
    }
}

/// Three digits, or what there is before the point.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 || size == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
