//! How fast it is, beside what people would write or take in its place: over real sockets, on one
//! private server, taking turns.
//!
//! Each variant ([`variants`]) is a process of its own, which is this program started with its settings
//! as JSON ([`serve`]). The parent sends the requests ([`load`]), reads what the processes use
//! ([`meter`]) and compares what was measured in one round ([`arena`]) with the limits ([`limits`]).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a harness, which fails by panicking"
)]

mod arena;
mod axes;
mod base;
mod growth;
mod http1;
mod keys;
mod kills;
mod limits;
mod load;
mod memory;
mod meter;
mod naive;
mod options;
mod overlap;
mod peer;
mod plot;
mod report;
mod sample;
mod serve;
mod soak;
mod suite;
mod svg;
mod variants;

use std::error::Error;
use std::process::ExitCode;

use faults::signal::interrupted;
use serde::{Deserialize, Serialize};

use crate::options::{Command, USAGE};

/// What a process of this program is, other than the one that measures.
#[derive(Debug, Serialize, Deserialize)]
enum Role {
    Serve(serve::Settings),
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("there are threads");
    runtime.block_on(begin())
}

async fn begin() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role] = &arguments[..]
        && let Ok(role) = serde_json::from_str(role)
    {
        return match play(role).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bench: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match options::parse(&arguments) {
        Ok(command) => tokio::select! {
            is_well = obey(command) => ExitCode::from(u8::from(!is_well)),
            status = interrupted() => ExitCode::from(status),
        },
        Err(error) => {
            eprintln!("bench: {error} (see --help)");
            ExitCode::from(2)
        }
    }
}

async fn obey(command: Command) -> bool {
    match command {
        Command::Help => {
            print!("{USAGE}");
            true
        }
        Command::Run(options) => suite::run(options).await,
        Command::Plot { results, directory } => plot::run(&results, &directory),
        Command::KillWriters { times } => kills::run(times).await,
        Command::Overlap { minutes } => overlap::run(minutes).await,
    }
}

async fn play(role: Role) -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing::Level::WARN)
        .init();
    faults::subject::end_with_parent();
    match role {
        Role::Serve(settings) => serve::run(settings).await,
    }
}
