//! The command line.

use std::path::PathBuf;

pub(crate) const USAGE: &str = "\
Usage: bench [--short | --large] [--only S1,S2,..] [--shim FILE] [--out FILE]
                      [--million ROWS]
       bench plot FILE.. DIRECTORY
       bench kill-writers [--times N]
       bench overlap [--minutes M]
";

/// What has to be done.
#[derive(Debug)]
pub(crate) enum Command {
    Run(Options),
    Plot {
        results: Vec<PathBuf>,
        directory: PathBuf,
    },
    KillWriters {
        times: u64,
    },
    Overlap {
        minutes: f64,
    },
    Help,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    Short,
    Full,
    /// What takes millions of records.
    Large,
}

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) extent: Extent,
    /// Limits, such as `S4`; all where it is empty.
    pub(crate) only: Vec<String>,
    /// What slows flushes down.
    pub(crate) shim: Option<PathBuf>,
    pub(crate) out: PathBuf,
    /// How many records stand for a million, to try it out.
    pub(crate) million: u32,
}

pub(crate) fn parse(arguments: &[String]) -> Result<Command, String> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match &arguments[..] {
        ["plot", results @ .., directory] if !results.is_empty() => Ok(Command::Plot {
            results: results.iter().map(PathBuf::from).collect(),
            directory: directory.into(),
        }),
        ["kill-writers"] => Ok(Command::KillWriters { times: 1000 }),
        ["kill-writers", "--times", times] => Ok(Command::KillWriters {
            times: number(times)?,
        }),
        ["overlap"] => Ok(Command::Overlap { minutes: 10.0 }),
        ["overlap", "--minutes", minutes] => Ok(Command::Overlap {
            minutes: number(minutes)?,
        }),
        ["--help" | "-h"] => Ok(Command::Help),
        options => run(options).map(Command::Run),
    }
}

fn run(arguments: &[&str]) -> Result<Options, String> {
    let mut options = Options {
        extent: Extent::Full,
        only: Vec::new(),
        shim: None,
        out: "target/bench/results.jsonl".into(),
        million: 1_000_000,
    };
    let mut arguments = arguments.iter();
    while let Some(option) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{option} takes a value"));
        match *option {
            "--short" => options.extent = Extent::Short,
            "--large" => options.extent = Extent::Large,
            "--only" => options.only = value()?.split(',').map(str::to_owned).collect(),
            "--shim" => options.shim = Some(value()?.into()),
            "--million" => options.million = number(value()?)?,
            "--out" => options.out = value()?.into(),
            _ => return Err(format!("unknown option: {option}")),
        }
    }
    Ok(options)
}

fn number<T: std::str::FromStr>(value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{value} is no number"))
}
