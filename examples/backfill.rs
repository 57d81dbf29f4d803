//! A backfill that may be started twice: every customer gets one mail.
//!
//! ```sh
//! cargo run --example backfill -- /tmp/shop.db & cargo run --example backfill -- /tmp/shop.db; wait
//! ```
//!
//! Each mail is an operation of its own, named by what it is for: whoever comes second is told that
//! it is being sent, or was. The records are in the SQLite file; the mails, which stand for an effect
//! that no transaction takes back, are lines of a file beside it.

use std::env;
use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqlitePool};
use tower_idempotency::{
    Boundary, Duplicates, Fingerprint, Identity, Policy, Ran, RunError, SqliteStore, Unknown,
};

const CUSTOMERS: u32 = 200;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let file = env::args().nth(1).map(PathBuf::from);
    let file = file.ok_or("usage: backfill FILE: the SQLite file for the records")?;
    let options = SqliteConnectOptions::new().filename(&file);
    let pool = SqlitePool::connect_lazy_with(options.create_if_missing(true));
    let store = SqliteStore::new(pool);
    store.migrate().await?;
    let boundary = Boundary::new(store);

    let (mut sent, mut others) = (0, 0);
    // Two that begin in different places wait less for each other.
    let start = std::process::id();
    for number in 0..CUSTOMERS {
        let customer = (start.wrapping_mul(67) % CUSTOMERS + number) % CUSTOMERS + 1;
        match mail(&boundary, customer, file.with_extension("mail")).await? {
            Ran::Fresh(()) => sent += 1,
            Ran::Replayed(()) => others += 1,
            // Nobody knows whether this mail has left: see the held records.
            other => eprintln!("customer {customer}: {other:?}"),
        }
    }
    println!("sent {sent}, sent by others {others}");
    let _ = boundary.shutdown(Duration::from_secs(10)).await;
    Ok(())
}

/// A mail sent twice is worse than one that a person has to look after (`critical`). Sending says
/// when it failed, so that the next backfill may try again (`Unknown::Release`).
async fn mail(
    boundary: &Boundary<SqliteStore>,
    customer: u32,
    outbox: PathBuf,
) -> Result<Ran<()>, RunError<std::io::Error>> {
    let name = customer.to_string();
    let identity = Identity::new("shop", "backfill 2026-11: price change", &name);
    let letter = format!("to customer {customer}: our prices change\n");
    let policy = Policy::critical()
        .with_unknown(Unknown::Release)
        .with_ttl(Duration::from_secs(90 * 24 * 3600))
        .with_duplicates(Duplicates::Wait(Duration::from_secs(5)));
    let fingerprint = Fingerprint::of_bytes(letter.as_bytes());
    boundary
        .run(identity, fingerprint, policy, |_context| async move {
            tokio::time::sleep(Duration::from_millis(2)).await; // as long as a mail server takes
            send(&outbox, &letter)
        })
        .await
}

fn send(outbox: &Path, letter: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(outbox)?;
    file.write_all(letter.as_bytes())
}
