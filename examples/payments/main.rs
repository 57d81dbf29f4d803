//! A payment service whose retries are safe: the reference for services on PostgreSQL.
//!
//! `cargo run --example payments` starts it on a private, throw-away PostgreSQL, or on the database of
//! `DATABASE_URL`, and prints what to type. README.md, beside this file, says why each route is set as
//! it is.

mod auth;
mod charges;
mod database;
mod error;
mod ledger;
mod money;
mod notifications;
mod profile;
mod receiver;

use std::env;
use std::net::Ipv4Addr;
use std::process::ExitCode;
use std::time::Duration;

use axum::http::Uri;
use axum::routing::{get, patch, post};
use axum::{Router, middleware};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tower_idempotency::{
    ConfigError, DerivedKey, IdempotencyLayer, Lost, PgStore, Policy, Scope, Sweeper, Unknown,
};

use auth::Principal;
use database::Cluster;
use error::BoxError;

/// How long requests that are running may go on once the service was told to stop.
const GRACE: Duration = Duration::from_secs(10);

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What handlers work with.
#[derive(Debug, Clone)]
struct App {
    pool: PgPool,
    receiver: Uri,
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("payments: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<(), BoxError> {
    let listener = listen().await?;
    let address = listener.local_addr()?;
    let receiver = receiver_url(&format!("http://{address}/receiver"))?;

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

    // Records, in the schema `idempotency` of the same database.
    let store = PgStore::new(pool.clone());
    store.migrate().await?;
    let sweeper = tokio::spawn(Sweeper::new(store.clone()).run());

    // A key belongs to the account: a token that was refreshed stands for the same one.
    let scope = Scope::extension::<Principal>(|principal| principal.account);
    let idempotency = IdempotencyLayer::new(store.clone(), scope);
    let state = App {
        pool: pool.clone(),
        receiver,
    };
    let app = router(&idempotency, state)?;

    let stop = stop_signal()?;
    print_what_to_type(&format!("http://{address}"), &url);
    let (stopping, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, app).with_graceful_shutdown(async {
        stop.await;
        drop(stopping);
    });
    tokio::select! {
        served = server.into_future() => served?,
        // A client that never sends the rest of its request does not keep the service.
        () = async { drop(stopped.await); sleep(GRACE).await } => {}
    }

    // Handlers run to their end even if their clients have hung up: wait for those too.
    let report = idempotency.shutdown(GRACE).await;
    println!(
        "Stopped; {} requests were not finished.",
        report.unfinished.len()
    );
    sweeper.abort();
    let closing = async { tokio::join!(store.close(), pool.close()) };
    drop(timeout(GRACE, closing).await);
    Ok(())
}

/// One layer; each route has a clone of it, with a policy of its own.
fn router(idempotency: &IdempotencyLayer<PgStore>, app: App) -> Result<Router, ConfigError> {
    let with = |policy| idempotency.clone().with_policy(policy);

    let charge = rerunnable(Policy::critical()).with_ttl(7 * DAY);
    let capture = rerunnable(Policy::critical())
        .with_ttl(30 * DAY)
        .with_derived_key(DerivedKey::from_fn(|request, _| {
            Some(request.uri.path().to_owned())
        }));
    let refund = rerunnable(Policy::critical()).with_ttl(30 * DAY);
    let notification = rerunnable(Policy::high()).with_ttl(3 * DAY);
    let profile = Policy::low()
        .with_ttl(DAY)
        .with_scope(Scope::extension::<Principal>(|principal| principal.member));

    Ok(Router::new()
        // `get` comes after `layer`, and is not covered.
        .route(
            "/charges",
            post(charges::create)
                .layer(with(charge)?)
                .get(charges::list),
        )
        .route("/charges/{id}", get(charges::show))
        .route(
            "/charges/{id}/captures",
            post(charges::capture).layer(with(capture)?),
        )
        .route(
            "/charges/{id}/refunds",
            post(charges::refund).layer(with(refund)?),
        )
        .route(
            "/charges/{id}/notifications",
            post(notifications::create).layer(with(notification)?),
        )
        .route("/profile", patch(profile::update).layer(with(profile)?))
        // Added after the routes, so it is outermost: who asks is known before the key is looked at.
        .layer(middleware::from_fn(auth::authenticate))
        .with_state(app)
        .merge(receiver::routes()))
}

/// For handlers that find what an earlier attempt has done: one that was lost needs nobody to look at
/// it, since a retry runs again and meets its rows, or a receiver that knows its key.
fn rerunnable(policy: Policy) -> Policy {
    policy.with_lost(Lost::Rerun).with_unknown(Unknown::Release)
}

fn receiver_url(default: &str) -> Result<Uri, BoxError> {
    let url = env::var("RECEIVER_URL").unwrap_or_else(|_| default.into());
    match url.parse::<Uri>() {
        Ok(uri) if uri.scheme_str() == Some("http") => Ok(uri),
        _ => Err(format!("RECEIVER_URL={url} is not a URL that begins with http://").into()),
    }
}

async fn listen() -> Result<TcpListener, BoxError> {
    let port = env::var("PORT").unwrap_or_else(|_| "3000".into());
    let fix = "Choose another: PORT=3001 cargo run --example payments";
    let Ok(number) = port.parse::<u16>() else {
        return Err(format!("PORT={port} is not a port number (0 to 65535).\n{fix}").into());
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).await;
    listener.map_err(|error| format!("cannot listen on port {port}: {error}.\n{fix}").into())
}

/// Ctrl-C (SIGINT), or SIGTERM, which supervisors send.
#[cfg(unix)]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

#[cfg(not(unix))]
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { tokio::signal::ctrl_c().await.unwrap_or_default() })
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
"#
    );
}
