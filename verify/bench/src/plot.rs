//! Charts of results, for the README.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::svg::{Bar, Line, bars, lines};

/// In the order in which they are drawn.
const SHOWN: [&str; 10] = [
    "naive",
    "naive-64",
    "insert-first",
    "transactional",
    "transactional-cache",
    "leased-single",
    "leased",
    "leased-cache",
    "axum-idempotent",
    "bare",
];

const COMPARED: [&str; 4] = ["naive", "insert-first", "leased-single", "leased"];

const COST: &str = "CPU microseconds of an operation (PostgreSQL + application)";

/// Variants at points, as they were measured.
struct Figures(Vec<Value>);

/// Whether there was anything to draw.
pub(crate) fn run(results: &[PathBuf], directory: &Path) -> bool {
    std::fs::create_dir_all(directory).expect("it is writable");
    let figures = Figures::read(results);
    let drawn = [
        (
            "fresh.svg",
            figures.rates("base", "Fresh operations a second, as multiples of naive"),
        ),
        (
            "replay.svg",
            figures.rates("replay", "Replays a second, as multiples of naive"),
        ),
        ("cpu.svg", figures.cpu()),
        (
            "connections.svg",
            figures.over("connections", &CONNECTIONS, &COMPARED),
        ),
        (
            "bodies.svg",
            figures.over("size of the answer", &BODIES, &COMPARED),
        ),
        (
            "rows.svg",
            figures.over("records in the table, UUIDv7 keys", &ROWS, &["leased"]),
        ),
        (
            "processes.svg",
            figures.over(
                "processes on one database",
                &PROCESSES,
                &["naive", "leased"],
            ),
        ),
    ];
    let mut count = 0;
    for (name, svg) in drawn {
        let Some(svg) = svg else { continue };
        std::fs::write(directory.join(name), svg).expect("it is writable");
        println!("{}", directory.join(name).display());
        count += 1;
    }
    count > 0
}

/// The points of an axis, with what they are called.
type Axis = [(&'static str, &'static str)];

const CONNECTIONS: [(&str, &str); 4] = [
    ("connections-1", "1"),
    ("connections-8", "8"),
    ("base", "64"),
    ("connections-256", "256"),
];
const BODIES: [(&str, &str); 3] = [
    ("base", "1 KB"),
    ("body-16", "16 KB"),
    ("body-256", "256 KB"),
];
const ROWS: [(&str, &str); 3] = [
    ("rows-0-v7", "none"),
    ("rows-5m-v7", "5 million"),
    ("rows-10m-v7", "10 million"),
];
const PROCESSES: [(&str, &str); 3] = [
    ("processes-1", "1"),
    ("processes-2", "2"),
    ("processes-4", "4"),
];

impl Figures {
    fn read(results: &[PathBuf]) -> Self {
        let texts = results.iter().map(std::fs::read_to_string);
        let lines: String = texts.map(|text| text.expect("it can be read")).collect();
        let lines = lines
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        Self(
            lines
                .filter(|line: &Value| line["kind"] == "figure")
                .collect(),
        )
    }

    fn value(&self, variant: &str, point: &str, of: &str) -> Option<f64> {
        let mut figures = self.0.iter();
        let found = figures.find(|f| f["variant"] == variant && f["point"] == point);
        found?[of].as_f64()
    }

    fn cost(&self, variant: &str, point: &str) -> Option<f64> {
        let database = self.value(variant, point, "database_us")?;
        Some(database + self.value(variant, point, "application_us")?)
    }

    /// The handler alone would dwarf the others.
    fn rates(&self, point: &str, title: &str) -> Option<String> {
        let naive = self.value("naive", point, "rate")?;
        let shown = SHOWN
            .iter()
            .filter(|variant| **variant != "bare" || point == "replay");
        let drawn = shown.filter_map(|variant| {
            let times = self.value(variant, point, "rate")? / naive;
            Some(Bar {
                name: (*variant).into(),
                parts: vec![times],
                text: format!("{times:.2} ×"),
            })
        });
        Some(bars(title, &["rate"], &drawn.collect::<Vec<_>>()))
    }

    fn cpu(&self) -> Option<String> {
        let drawn = SHOWN.iter().filter_map(|variant| {
            let database = self.value(variant, "base", "database_us")?;
            let application = self.value(variant, "base", "application_us")?;
            Some(Bar {
                name: (*variant).into(),
                parts: vec![database, application],
                text: format!("{:.0} µs", database + application),
            })
        });
        let drawn: Vec<_> = drawn.collect();
        let title = "CPU microseconds of a fresh operation";
        (!drawn.is_empty()).then(|| bars(title, &["PostgreSQL", "application"], &drawn))
    }

    /// What an operation costs along an axis; nothing where less than two points were measured.
    fn over(&self, unit: &str, axis: &Axis, variants: &[&str]) -> Option<String> {
        let is_measured = |point: &str| {
            variants
                .iter()
                .any(|variant| self.cost(variant, point).is_some())
        };
        let axis: Vec<_> = axis
            .iter()
            .filter(|(point, _)| is_measured(point))
            .collect();
        if axis.len() < 2 {
            return None;
        }
        let drawn = variants.iter().map(|variant| Line {
            name: (*variant).into(),
            values: axis
                .iter()
                .map(|(point, _)| self.cost(variant, point))
                .collect(),
        });
        let names: Vec<String> = axis.iter().map(|(_, name)| (*name).to_owned()).collect();
        Some(lines(COST, unit, &names, &drawn.collect::<Vec<_>>()))
    }
}
