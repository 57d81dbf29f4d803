//! The process that the faults are injected into.

use std::error::Error;

use faults::settings::Settings;
use tokio::runtime::Builder;

fn main() -> Result<(), Box<dyn Error>> {
    let argument = std::env::args().nth(1);
    let argument = argument.ok_or("usage: subject '{\"store\": \"sqlite:PATH\", ..}'")?;
    let settings: Settings = serde_json::from_str(&argument)?;
    let mut runtime = Builder::new_multi_thread();
    if let Some(workers) = settings.workers {
        runtime.worker_threads(workers);
    }
    let runtime = runtime.enable_all().build()?;
    runtime.block_on(faults::subject::run(settings))
}
