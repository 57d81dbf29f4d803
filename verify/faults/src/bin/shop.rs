//! The process that has recovery points, and the one that relays.

use std::error::Error;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let argument = std::env::args().nth(1);
    let argument = argument.ok_or("usage: shop '{\"store\": \"postgres://..\", ..}'")?;
    faults::shop::run(serde_json::from_str(&argument)?).await
}
