//! The process that the faults are injected into.

use std::error::Error;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let argument = std::env::args().nth(1);
    let argument = argument.ok_or("usage: subject '{\"store\": \"sqlite:PATH\", ..}'")?;
    faults::subject::run(serde_json::from_str(&argument)?).await
}
