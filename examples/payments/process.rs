//! How a process of this example begins and ends.

use std::env;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::error::BoxError;

/// How long what is running may go on once the process was told to stop.
pub(crate) const GRACE: Duration = Duration::from_secs(10);

/// On `PORT`, or on the port of those who do not care.
pub(crate) async fn listen(default: &str) -> Result<TcpListener, BoxError> {
    let port = env::var("PORT").unwrap_or_else(|_| default.into());
    let fix = "Choose another: PORT=3001 cargo run --example payments";
    let Ok(number) = port.parse::<u16>() else {
        return Err(format!("PORT={port} is not a port number (0 to 65535).\n{fix}").into());
    };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, number)).await;
    listener.map_err(|error| format!("cannot listen on port {port}: {error}.\n{fix}").into())
}

/// Answers requests until `stop`, and then those that are running, for at most [`GRACE`].
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), BoxError> {
    let (stopping, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, app).with_graceful_shutdown(async {
        stop.await;
        drop(stopping);
    });
    tokio::select! {
        served = server.into_future() => served?,
        // A client that never sends the rest of its request does not keep the process.
        () = async { drop(stopped.await); sleep(GRACE).await } => {}
    }
    Ok(())
}

/// Ctrl-C (SIGINT), or SIGTERM, which supervisors send.
#[cfg(unix)]
pub(crate) fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
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
pub(crate) fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { tokio::signal::ctrl_c().await.unwrap_or_default() })
}

/// Ctrl-C is for the service, which ends what it has started when it needs it no more.
#[cfg(unix)]
pub(crate) fn in_a_group_of_its_own(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    command.process_group(0);
}

#[cfg(not(unix))]
pub(crate) fn in_a_group_of_its_own(_: &mut Command) {}
