//! The command line.

use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::str::FromStr;

/// What `--help` prints.
pub const USAGE: &str = "\
Usage: chaos [options]

Options:
  --minutes M   how long there are faults; default 2, parts of a minute are fine
  --sends N     go on until so many requests were sent, for twice the minutes at most; default 0
  --seed S      repeats the choices of a run
  --clients N   clients at once; default 32
  --plant FAULT gives the system a fault, which has to be found:
                  double-effect  a handler sometimes writes its effect twice
                  lost-reply     a recorded answer is sometimes deleted
                  changed-byte   a byte of a recorded answer is sometimes changed
  --history F   writes every request and what came of it to a file, one line each
  --schedule    prints the faults of a seed, and does nothing
  --help        prints this text

Exit status: 0 if all is well; 1 if there is a violation, less than half of the requests were
answered, a class of faults never was, or fewer requests were sent than asked for; 2 for options that
make no sense; 129, 130 or 143 if interrupted.
";

/// What has to be done.
#[derive(Debug)]
pub enum Command {
    /// A run.
    Run(Options),
    /// Print the schedule of one.
    Schedule(Options),
    /// Print [`USAGE`].
    Help,
}

/// One run.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long there are faults.
    pub minutes: f64,
    /// How many requests are to be sent.
    pub sends: usize,
    /// Determines every choice.
    pub seed: u64,
    /// Clients at once.
    pub clients: usize,
    /// A fault that has to be found.
    pub plant: Option<Plant>,
    /// Where the history goes.
    pub history: Option<PathBuf>,
}

/// A fault of the system that is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// A handler sometimes writes its effect twice.
    DoubleEffect,
    /// A recorded answer is sometimes deleted.
    LostReply,
    /// A byte of a recorded answer is sometimes changed.
    ChangedByte,
}

impl FromStr for Plant {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "double-effect" => Ok(Self::DoubleEffect),
            "lost-reply" => Ok(Self::LostReply),
            "changed-byte" => Ok(Self::ChangedByte),
            _ => Err(()),
        }
    }
}

/// Reads the arguments.
///
/// # Errors
///
/// What is wrong with them.
pub fn parse(arguments: &[String]) -> Result<Command, String> {
    let mut options = Options {
        minutes: 2.0,
        sends: 0,
        seed: RandomState::new().hash_one(()),
        clients: 32,
        plant: None,
        history: None,
    };
    let mut only_schedule = false;
    let mut arguments = arguments.iter().map(String::as_str);
    while let Some(option) = arguments.next() {
        match option {
            "--help" | "-h" => return Ok(Command::Help),
            "--schedule" => {
                only_schedule = true;
                continue;
            }
            _ => {}
        }
        let value = arguments.next();
        let value = value.ok_or_else(|| format!("{option} takes a value, or is unknown"))?;
        match option {
            "--minutes" => options.minutes = read(option, value)?,
            "--sends" => options.sends = read(option, value)?,
            "--seed" => options.seed = read(option, value)?,
            "--clients" => options.clients = read(option, value)?,
            "--plant" => options.plant = Some(read(option, value)?),
            "--history" => options.history = Some(value.into()),
            _ => return Err(format!("unknown option: {option}")),
        }
    }
    if !(0.01..=10_000.0).contains(&options.minutes) {
        return Err("--minutes must be 0.01 to 10000".into());
    }
    if !(1..=500).contains(&options.clients) {
        return Err("--clients must be 1 to 500".into());
    }
    Ok(match only_schedule {
        true => Command::Schedule(options),
        false => Command::Run(options),
    })
}

fn read<T: FromStr>(option: &str, value: &str) -> Result<T, String> {
    let read = value.parse();
    read.map_err(|_| format!("{option} does not take {value}"))
}
