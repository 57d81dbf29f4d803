//! A payment service whose retries are safe: the reference for services on PostgreSQL.
//!
//! `cargo run --example payments` starts it on a private, throw-away PostgreSQL, or on the database of
//! `DATABASE_URL`, with a consumer of its messages in a second process, and prints what to type.
//! README.md, beside this file, says why everything is as it is.

mod auth;
mod charges;
mod consumer;
mod database;
mod error;
mod events;
mod hooks;
mod ledger;
mod money;
mod notifications;
mod process;
mod profile;
mod receiver;
mod routes;
mod sign;
mod statement;
mod states;

use std::env;
use std::process::ExitCode;

use axum::http::Uri;
use sqlx::PgPool;
use tokio::time::timeout;
use tower_idempotency::inbox::InboxSweeper;
use tower_idempotency::outbox::{HttpPublisher, Relay};
use tower_idempotency::{IdempotencyLayer, PgStore, Scope, Sweeper};

use auth::Principal;
use consumer::Consumer;
use database::Cluster;
use error::BoxError;
use process::GRACE;

/// What handlers work with.
#[derive(Debug, Clone)]
struct App {
    pool: PgPool,
    receiver: Uri,
}

const USAGE: &str = "usage:
  payments                    the service, its database and its consumer
  payments consumer           a consumer alone: needs DATABASE_URL
  payments sign TYPE CHARGE   prints an event of the bank as a curl command";

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match arguments[..] {
        [] => serve().await,
        ["consumer"] => consumer::run().await,
        ["sign", kind, charge] => sign::command(kind, charge).map(|curl| println!("{curl}")),
        _ => Err(USAGE.into()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("payments: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<(), BoxError> {
    let listener = process::listen("3000").await?;
    let address = listener.local_addr()?;
    let receiver = receiver_url(&format!("http://{address}/receiver"))?;
    let elsewhere = consumer_elsewhere()?;
    let bank = hooks::layer()?;

    // Dropped last, when everything that uses it has ended.
    let (_cluster, url) = match database::url() {
        Some(url) => (None, url),
        None => {
            let cluster = Cluster::start()?;
            let url = cluster.url.clone();
            (Some(cluster), url)
        }
    };
    let pool = database::open(&url)
        .await
        .map_err(|error| format!("cannot use the database: {error}"))?;

    // Records, messages and what was taken in, in the schema `idempotency` of the same database.
    let store = PgStore::new(pool.clone());
    store.migrate().await?;
    let (records, inbox) = (
        Sweeper::new(store.clone()),
        InboxSweeper::new(store.clone()),
    );
    let sweeping = tokio::spawn(async { tokio::join!(records.run(), inbox.run()) });

    // Each process of the service may have a relay. Whichever is alive sends what was committed.
    let (_consumer, publisher) = match elsewhere {
        Some(publisher) => (None, publisher),
        None => {
            let consumer = Consumer::start(&url)?;
            let publisher = HttpPublisher::new(&consumer.url)?;
            (Some(consumer), publisher)
        }
    };
    let relay = Relay::new(store.clone(), publisher).spawn();

    // A key belongs to the account: a token that was refreshed stands for the same one.
    let scope = Scope::extension::<Principal>(|principal| principal.account);
    let idempotency = IdempotencyLayer::new(store.clone(), scope);
    let state = App {
        pool: pool.clone(),
        receiver,
    };
    let app = routes::router(&idempotency, bank, state)?;

    let stop = process::stop_signal()?;
    print_what_to_type(&format!("http://{address}"), &url);
    process::serve(listener, app, stop).await?;

    // Handlers run to their end even if their clients have hung up: wait for those too.
    let report = idempotency.shutdown(GRACE).await;
    println!(
        "Stopped; {} requests were not finished.",
        report.unfinished.len()
    );
    // What it has not sent stays in the outbox, for the next relay.
    relay.shutdown(GRACE).await;
    sweeping.abort();
    let closing = async { tokio::join!(store.close(), pool.close()) };
    drop(timeout(GRACE, closing).await);
    Ok(())
}

/// To a consumer that somebody else has started.
fn consumer_elsewhere() -> Result<Option<HttpPublisher>, BoxError> {
    let Ok(url) = env::var("CONSUMER_URL") else {
        return Ok(None);
    };
    let publisher = HttpPublisher::new(&url);
    let publisher = publisher.map_err(|error| format!("CONSUMER_URL={url}: {error}"))?;
    Ok(Some(publisher))
}

fn receiver_url(default: &str) -> Result<Uri, BoxError> {
    let url = env::var("RECEIVER_URL").unwrap_or_else(|_| default.into());
    match url.parse::<Uri>() {
        Ok(uri) if uri.scheme_str() == Some("http") => Ok(uri),
        _ => Err(format!("RECEIVER_URL={url} is not a URL that begins with http://").into()),
    }
}

fn print_what_to_type(service: &str, database: &str) {
    // With the password of a server that is not ours, it is nobody's business.
    let database = match database::url() {
        Some(_) => "that of DATABASE_URL",
        None => database,
    };
    println!(
        r#"Listening on {service}
Database: {database}

Make a charge of 12.50 euros:

    curl -i {service}/charges -H 'Authorization: Bearer ada-monday' \
        -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' \
        -d '{{"amount": 1250, "currency": "EUR"}}'

The same again, with a token that was refreshed in between: the first answer, marked as replayed.

    curl -i {service}/charges -H 'Authorization: Bearer ada-tuesday' \
        -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' \
        -d '{{"amount": 1250, "currency": "EUR"}}'

What the consumer, another process, has made of the message about it:

    curl {service}/statement -H 'Authorization: Bearer ada-monday'
"#
    );
}
