//! The command line.

use std::hash::{BuildHasher as _, RandomState};

use serde::{Deserialize, Serialize};

pub(crate) const USAGE: &str = "\
Usage: exactly-once [options]

Options:
  --operations N  charges, each under a key of its own; default 1000, at least 100
  --kills N       kills of the server; default 10
  --restarts N    crashes of the database; default 10
  --seed N        repeats the choices of a run
  --plant FAULT   gives the system a fault, which has to be found:
                    double-effect  the ledger is sometimes written past the transaction
                    lost-message   the relay is sometimes told that a message was sent
  --help          print this text
";

/// What has to be done.
#[derive(Debug)]
pub(crate) enum Command {
    Run(Options),
    Help,
}

/// One run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) operations: usize,
    pub(crate) kills: usize,
    pub(crate) restarts: usize,
    pub(crate) seed: u64,
    pub(crate) plant: Option<Plant>,
}

/// A fault of the system that is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Plant {
    DoubleEffect,
    LostMessage,
}

pub(crate) fn parse(arguments: &[String]) -> Result<Command, String> {
    let mut options = Options {
        operations: 1000,
        kills: 10,
        restarts: 10,
        seed: RandomState::new().hash_one(()),
        plant: None,
    };
    let mut arguments = arguments.iter().map(String::as_str);
    while let Some(option) = arguments.next() {
        if matches!(option, "--help" | "-h") {
            return Ok(Command::Help);
        }
        let value = || arguments.next().ok_or(format!("{option} takes a value"));
        match option {
            "--operations" => options.operations = number(option, value)?,
            "--kills" => options.kills = number(option, value)?,
            "--restarts" => options.restarts = number(option, value)?,
            "--seed" => options.seed = number(option, value)?,
            "--plant" => options.plant = Some(plant(value)?),
            _ => return Err(format!("unknown option: {option}")),
        }
    }
    // Fewer would end before all the blows have fallen, or be dropped unevenly by chance.
    let fewest = 100.max(10 * options.kills.saturating_add(options.restarts));
    if options.operations < fewest {
        return Err(format!("--operations must be at least {fewest}"));
    }
    Ok(Command::Run(options))
}

fn number<'a, T: std::str::FromStr>(
    option: &str,
    value: impl FnOnce() -> Result<&'a str, String>,
) -> Result<T, String> {
    let value = value()?;
    let number = value.parse();
    number.map_err(|_| format!("{option} takes a number, not {value}"))
}

fn plant<'a>(value: impl FnOnce() -> Result<&'a str, String>) -> Result<Plant, String> {
    match value()? {
        "double-effect" => Ok(Plant::DoubleEffect),
        "lost-message" => Ok(Plant::LostMessage),
        other => Err(format!("--plant does not know {other}")),
    }
}
