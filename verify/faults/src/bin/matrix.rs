//! Runs the table of faults; `scripts/faults` says how.

#![allow(
    clippy::expect_used,
    reason = "an operator's tool, which fails by panicking"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use faults::matrix::runner::{Outcome, Runner};
use faults::matrix::{GATE, OTHERS, ROWS, Row, docs};

const RESULTS: &str = "verify/faults/results.txt";
const PAGE: &str = "docs/faults.md";

fn main() -> ExitCode {
    let (mut is_full, mut is_fresh, mut asked) = (false, false, Vec::new());
    let mut at_once = std::thread::available_parallelism().map_or(1, usize::from);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--full" => is_full = true,
            "--fresh" => is_fresh = true,
            "--docs" => return write_page(),
            "--jobs" => match arguments.next().and_then(|jobs| jobs.parse().ok()) {
                Some(jobs) if jobs > 0 => at_once = jobs,
                _ => {
                    eprintln!("--jobs takes a number from 1 on");
                    return ExitCode::from(2);
                }
            },
            _ => asked.push(argument),
        }
    }
    let names = |row: &Row, id: &String| row.id.starts_with(&id.to_uppercase());
    let is_asked = |row: &&Row| asked.iter().any(|id| names(row, id));
    let is_unknown = |id: &&String| !id.contains(':') && !ROWS.iter().any(|row| names(row, id));
    if let Some(unknown) = asked.iter().find(is_unknown) {
        eprintln!("no such row or group: {unknown}");
        return ExitCode::from(2);
    }
    let mut rows: Vec<_> = ROWS
        .iter()
        .filter(|row| asked.is_empty() || is_asked(row))
        .collect();
    // Tests that are of no row.
    let others = asked.iter().filter(|asked| asked.contains(':'));
    let others = others.map(String::as_str);
    let others = others.chain(asked.is_empty().then_some(OTHERS));
    rows.extend(others.map(|tests| &*Box::leak(Box::new(Row::of_tests(tests)))));
    run(&rows, is_full, is_fresh, at_once)
}

fn run(rows: &[&Row], is_full: bool, is_fresh: bool, at_once: usize) -> ExitCode {
    let place = PathBuf::from(std::env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into()));
    let place = place.join("faults");
    let runner = Runner::build(rows, place.clone(), is_full).expect("the tests can be built");
    let mut kept = Kept::open(&place, is_full, is_fresh);
    let size = if is_full { "full" } else { "small" };
    let (mut green, mut red, mut not_yet, mut is_gap) = (0, 0, 0, false);
    let mut to_run = Vec::new();
    for row in rows {
        if let Some(line) = kept.lines.get(row.id) {
            println!("{line} size={size} (of an earlier run)");
            green += 1;
        } else {
            to_run.push(*row);
        }
    }
    let fared = |row: &Row, outcome| match outcome {
        Outcome::Green(fired) => {
            green += usize::from(row.is_listed());
            let line = format!("{} green fired={fired}", row.id);
            println!("{line} size={size}");
            if row.is_listed() {
                kept.keep(row.id, line);
            }
        }
        Outcome::Red(wrong) => {
            red += 1;
            println!("{} red size={size}", row.id);
            for what in wrong {
                println!("    {what}");
            }
        }
        Outcome::NotYet => {
            not_yet += 1;
            is_gap |= GATE.contains(&row.group());
            println!("{} not-yet {}", row.id, row.not_yet.unwrap_or("no test"));
        }
    };
    let ran = runner.run(&to_run, at_once, fared);
    ran.expect("the tests can be started");
    if is_full && rows.len() > ROWS.len() && red == 0 {
        let lines: Vec<_> = kept.lines.values().cloned().collect();
        std::fs::write(RESULTS, lines.join("\n") + "\n").expect("it can be written");
        write_page();
    }
    println!("green {green} red {red} not-yet {not_yet}");
    if red > 0 || is_gap {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn write_page() -> ExitCode {
    let results = std::fs::read_to_string(RESULTS).unwrap_or_default();
    std::fs::write(PAGE, docs::page(&results)).expect("it can be written");
    ExitCode::SUCCESS
}

/// Which rows were green before, of the same sources and in the full size.
struct Kept {
    file: Option<PathBuf>,
    lines: BTreeMap<String, String>,
}

impl Kept {
    fn open(place: &Path, is_full: bool, is_fresh: bool) -> Self {
        let file = is_full.then(sources).flatten();
        let file = file.map(|sources| place.join(format!("full-{sources}.txt")));
        let read = file.as_ref().filter(|_| !is_fresh);
        let text = read.and_then(|file| std::fs::read_to_string(file).ok());
        let text = text.unwrap_or_default();
        let lines = text.lines().filter_map(|line| {
            let id = line.split(' ').next()?;
            Some((id.to_owned(), line.to_owned()))
        });
        Self {
            lines: lines.collect(),
            file,
        }
    }

    fn keep(&mut self, id: &str, line: String) {
        self.lines.insert(id.to_owned(), line);
        let lines: Vec<_> = self.lines.values().cloned().collect();
        if let Some(file) = &self.file {
            std::fs::write(file, lines.join("\n") + "\n").expect("it can be written");
        }
    }
}

/// What names the state of the sources: the tree of the last commit, where nothing was changed since.
fn sources() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let is_clean = git(&[
        "status",
        "--porcelain",
        "--",
        "src",
        "migrations",
        "tests",
        "verify/faults",
    ])?
    .is_empty();
    is_clean.then(|| git(&["rev-parse", "HEAD^{tree}"]))?
}
