//! The consumer, a process of its own: takes in each message of the relay once.

use std::env;
use std::io::{self, BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use axum::{Json, Router};
use sqlx::PgPool;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tower_idempotency::PgStore;
use tower_idempotency::inbox::{self, InboxSweeper, Once};

use crate::error::BoxError;
use crate::events::Event;
use crate::process::{self, GRACE};
use crate::{database, statement};

/// Whose message ids they are.
const SOURCE: &str = "payments";

/// Ends with a signal, or with its standard input: when the service is gone, kill -9 included, so is
/// the consumer that it has started.
pub(crate) async fn run() -> Result<(), BoxError> {
    let url = database::url().ok_or("the consumer needs the DATABASE_URL of the service")?;
    let listener = process::listen("3001").await?;
    let pool = database::open(&url).await?;
    let store = PgStore::new(pool.clone());
    store.migrate().await?;
    let sweeper = tokio::spawn(InboxSweeper::new(store.clone()).run());

    let app = Router::new().route("/events", post(receive));
    let signal = process::stop_signal()?;
    let input = end_of_input();
    println!("Listening on http://{}/events", listener.local_addr()?);
    let stop = async {
        tokio::select! {
            () = signal => {}
            _ = input => {}
        }
    };
    process::serve(listener, app.with_state(pool.clone()), stop).await?;
    sweeper.abort();
    let closing = async { tokio::join!(store.close(), pool.close()) };
    drop(timeout(GRACE, closing).await);
    Ok(())
}

/// 2xx means that the effect is committed, by whomever. Anything else brings the message again, but for
/// what can never be taken in (400, 422): that is dead, and a person has to look.
async fn receive(
    State(pool): State<PgPool>,
    headers: HeaderMap,
    Json(event): Json<Event>,
) -> StatusCode {
    let header = |name| Some(headers.get(name)?.to_str().ok()?.to_owned());
    let (Some(id), Some(topic)) = (header("webhook-id"), header("message-topic")) else {
        return StatusCode::BAD_REQUEST;
    };
    // In a task of its own, which a relay that hangs up does not cut short.
    let taken = tokio::spawn(async move { take_in(&pool, &id, &topic, &event).await });
    match taken.await.map_err(BoxError::from).flatten() {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(cause) => {
            tracing::warn!(%cause, "not taken in");
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

/// That it was taken in commits together with what came of it.
async fn take_in(pool: &PgPool, id: &str, topic: &str, event: &Event) -> Result<(), BoxError> {
    let mut transaction = pool.begin().await?;
    if inbox::once(&mut transaction, SOURCE, id).await? == Once::First {
        statement::add(&mut transaction, topic, event).await?;
    }
    Ok(transaction.commit().await?)
}

/// Read by a thread that nobody waits for: a task would keep the runtime from ending.
fn end_of_input() -> oneshot::Receiver<()> {
    let (ended, end) = oneshot::channel();
    thread::spawn(move || {
        drop(io::copy(&mut io::stdin().lock(), &mut io::sink()));
        drop(ended);
    });
    end
}

/// A consumer that the service has started, and that ends with it.
pub(crate) struct Consumer {
    process: Child,
    /// Where it takes messages.
    pub(crate) url: String,
}

impl Consumer {
    pub(crate) fn start(database: &str) -> Result<Self, BoxError> {
        let mut command = Command::new(env::current_exe()?);
        command
            .arg("consumer")
            .env("DATABASE_URL", database)
            .env("PORT", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        process::in_a_group_of_its_own(&mut command);
        let mut process = command.spawn()?;
        let mut said = String::new();
        if let Some(pipe) = process.stdout.take() {
            BufReader::new(pipe).read_line(&mut said)?;
        }
        match said.trim_end().strip_prefix("Listening on ") {
            Some(url) => Ok(Self {
                url: url.to_owned(),
                process,
            }),
            None => Err("the consumer did not start; see above".into()),
        }
    }
}

impl Drop for Consumer {
    /// The end of its input tells it to stop.
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        drop(self.process.wait());
    }
}
