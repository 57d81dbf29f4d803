//! Visits every state of both models within their bounds, and prints a line for each.

use std::process::ExitCode;

use model::lease::{Class, Handler, Lease};
use model::transaction::Transaction;
use model::{Bounds, Checkable, check};

const THREADS: usize = 2;

/// Two attempts of a key.
const SMALL: [Bounds; 1] = [Bounds::new(2, 1, 2, 2)];

const FULL: [Bounds; 3] = [SMALL[0], Bounds::new(3, 1, 3, 3), Bounds::new(2, 2, 2, 1)];

fn main() -> ExitCode {
    let bounds = match std::env::args().nth(1).as_deref() {
        None => &FULL[..],
        Some("--small") => &SMALL,
        Some(other) => {
            eprintln!("model: unknown option: {other} (there is --small)");
            return ExitCode::from(2);
        }
    };
    let mut holds = true;
    for &bounds in bounds {
        holds &= lease(bounds);
        holds &= transaction(bounds);
    }
    match holds {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn lease(bounds: Bounds) -> bool {
    let mut holds = true;
    for class in [Class::Critical, Class::High, Class::Medium] {
        for handler in [Handler::Asks, Handler::Phase] {
            let name = format!("lease {class:?} {handler:?}").to_lowercase();
            let fault = None;
            let model = Lease {
                bounds,
                class,
                handler,
                fault,
            };
            holds &= report(&name, bounds, model);
        }
    }
    holds
}

fn transaction(bounds: Bounds) -> bool {
    let mut holds = true;
    let kinds = [
        ("transaction", false, true),
        ("transaction entered again", false, false),
        ("transaction ended by handlers", true, true),
        ("the same, entered again", true, false),
    ];
    for (name, handler_commits, savepoint) in kinds {
        let model = Transaction {
            bounds,
            handler_commits,
            savepoint,
            fault: None,
        };
        holds &= report(name, bounds, model);
    }
    holds
}

/// A line for the model, and the steps of each failure.
fn report(name: &str, bounds: Bounds, model: impl Checkable) -> bool {
    let report = check(model, THREADS);
    println!(
        "{name:<30} {bounds} states {:>8} depth {:>3} seconds {:>6.1} properties ok {} failed {}",
        report.states,
        report.depth,
        report.took.as_secs_f64(),
        report.held,
        report.failures.len(),
    );
    for failure in &report.failures {
        println!("  FAILED: {}", failure.property);
        for step in failure.steps.iter().flatten() {
            println!("    {step}");
        }
    }
    report.failures.is_empty()
}
