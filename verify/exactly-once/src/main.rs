//! Charges, their messages and what these bring about: once each, end to end, whatever is killed.
//!
//! The *driver* sends charges to a *server*, and loses about half of its replies. The [`server`] has
//! a transactional route, an outbox and a relay, which posts the messages to a [`consumer`] with an
//! inbox. Meanwhile the driver kills both and crashes the database ([`chaos`]); the clients retry
//! until they are answered ([`traffic`]). At the end, everything has to be there once ([`audit`]).
//!
//! Server and consumer are this same program, started with their settings as JSON.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a harness, which fails by panicking"
)]

mod audit;
mod chaos;
mod consumer;
mod driver;
mod options;
mod server;
mod traffic;

use std::error::Error;
use std::process::ExitCode;

use faults::signal::interrupted;
use serde::{Deserialize, Serialize};

use crate::options::{Command, USAGE};

/// What a process of this program is, other than the driver.
#[derive(Debug, Serialize, Deserialize)]
enum Role {
    Server(server::Settings),
    Consumer(consumer::Settings),
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role] = &arguments[..]
        && let Ok(role) = serde_json::from_str(role)
    {
        return match play(role).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("exactly-once: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match options::parse(&arguments) {
        Ok(Command::Help) => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        Ok(Command::Run(options)) => tokio::select! {
            is_clean = driver::run(options) => ExitCode::from(u8::from(!is_clean)),
            status = interrupted() => ExitCode::from(status),
        },
        Err(error) => {
            eprintln!("exactly-once: {error} (see --help)");
            ExitCode::from(2)
        }
    }
}

async fn play(role: Role) -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .init();
    faults::subject::end_with_parent();
    match role {
        Role::Server(settings) => server::run(settings).await,
        Role::Consumer(settings) => consumer::run(settings).await,
    }
}
