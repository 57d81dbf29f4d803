//! Random faults and a checker: see `--help`. A subject is this same program, started with its
//! settings as JSON.

#![allow(clippy::expect_used, reason = "a harness, which fails by panicking")]

use std::process::ExitCode;
use std::time::Duration;

use faults::chaos::options::{Command, USAGE, parse};
use faults::chaos::{run, schedule, service};
use faults::process::Launcher;
use faults::signal::interrupted;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [settings] = &arguments[..]
        && let Ok(settings) = serde_json::from_str(settings)
    {
        return match service::run(settings).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("chaos: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match parse(&arguments) {
        Ok(Command::Help) => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Command::Schedule(options)) => {
            let time = Duration::from_secs_f64(60.0 * options.minutes);
            let schedule = schedule::describe(options.seed, run::SUBJECTS, time);
            print!("seed {}\n{schedule}", options.seed);
            ExitCode::SUCCESS
        }
        Ok(Command::Run(options)) => tokio::select! {
            is_well = run::run(options, myself()) => ExitCode::from(u8::from(!is_well)),
            status = interrupted() => ExitCode::from(status),
        },
        Err(error) => {
            eprintln!("chaos: {error} (see --help)");
            ExitCode::from(2)
        }
    }
}

fn myself() -> Launcher {
    let path = std::env::current_exe().expect("a program has a path");
    let path = path.into_os_string().into_string();
    Launcher(path.expect("the path is text").leak())
}
