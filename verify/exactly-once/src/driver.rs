//! One run, from the empty database to the last line.

use std::sync::Arc;
use std::time::{Duration, Instant};

use faults::cluster::{Cluster, free_port};
use faults::process::Launcher;
use sqlx::postgres::{PgPool, PgPoolOptions};
use tower_idempotency::PgStore;

use crate::audit::{Books, audit, left_open, unsent};
use crate::chaos::{Fallen, Site, consumer_kills};
use crate::options::Options;
use crate::traffic::{Errand, Seen, Traffic};
use crate::{Role, consumer, server};

/// No unique keys: what happens twice has to show.
const TABLES: &str = "
create table ledger (
    charge uuid not null default gen_random_uuid(), key text not null, amount text not null
);
create table effect (message text not null, key text not null)";

/// How long the system has to come to rest when nothing is in its way any more.
const PATIENCE: Duration = Duration::from_secs(120);

/// Of a hundred replies, so many have to be lost on their way.
const DROPPED: usize = 40;

/// Whether there was no violation.
pub(crate) async fn run(options: Options) -> bool {
    eprintln!("exactly-once: --seed {}", options.seed);
    let begun = Instant::now();
    let cluster = Arc::new(Cluster::start().await);
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .connect_lazy(&cluster.url())
        .expect("the URL is one");
    prepare(&pool).await.expect("the tables can be made");

    let (server, consumer) = roles(&options, cluster.url());
    let Role::Server(server::Settings { port, .. }) = server else {
        unreachable!("it is the server's");
    };
    let traffic = Traffic::new(options, port);
    let mut site = Site::start(cluster, launcher(), server, consumer).await;
    let (fallen, ()) = tokio::join!(
        site.strike(&options, traffic.progress()),
        traffic.send(Errand::Charge)
    );
    let answered = traffic.progress().borrow().answered;
    eprintln!("{answered} answered after {:.1?}", begun.elapsed());

    let unsent = rest("every message is sent", async || unsent(&pool).await).await;
    traffic.send(Errand::Replay).await;
    let open = rest("every transaction has ended", async || {
        left_open(&pool).await
    })
    .await;
    let books = audit(&pool, traffic.keys()).await;
    let mut books = books.expect("the tables can be read");
    books.violations.extend(unsent.into_iter().chain(open));
    drop((site, pool));
    traffic.seen(|seen| report(&options, answered, fallen, seen, books))
}

async fn prepare(pool: &PgPool) -> Result<(), Box<dyn std::error::Error>> {
    PgStore::new(pool.clone()).migrate().await?;
    sqlx::raw_sql(TABLES).execute(pool).await?;
    Ok(())
}

fn roles(options: &Options, database: String) -> (Role, Role) {
    let (port, consumer) = (free_port(), free_port());
    let server = server::Settings {
        database: database.clone(),
        port,
        consumer,
        plant: options.plant,
    };
    let consumer = consumer::Settings {
        database,
        port: consumer,
    };
    (Role::Server(server), Role::Consumer(consumer))
}

/// This program.
fn launcher() -> Launcher {
    let path = std::env::current_exe().expect("this program is a file");
    let path = path.to_str().expect("its path is text");
    Launcher(path.to_owned().leak())
}

/// Waits until nothing is left.
async fn rest(what: &str, ask: impl AsyncFn() -> Result<i64, sqlx::Error>) -> Option<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = ask().await;
        if matches!(left, Ok(0)) {
            return None;
        }
        if Instant::now() > deadline {
            return Some(format!("not in {PATIENCE:?}: {what}: {left:?}"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn report(
    options: &Options,
    answered: usize,
    fallen: Fallen,
    seen: &mut Seen,
    books: Books,
) -> bool {
    eprintln!(
        "{} delivered, {} dropped, {} hung up before, {} broken off, refused {:?}, {} kills of the consumer",
        seen.delivered,
        seen.dropped,
        seen.hung_up,
        seen.broken,
        seen.refused,
        fallen.consumer_kills
    );
    let mut violations = std::mem::take(&mut seen.violations);
    violations.extend(books.violations);
    violations.extend(missing(options, fallen, seen));
    for violation in &violations {
        println!("violation: {violation}");
    }
    println!(
        "operations {answered} ledger {} outbox {} effects {} dropped {} kills {} restarts {} violations {}",
        books.ledger,
        books.outbox,
        books.effects,
        seen.dropped,
        fallen.kills,
        fallen.restarts,
        violations.len()
    );
    violations.is_empty()
}

/// What did not happen that should have been survived.
fn missing(options: &Options, fallen: Fallen, seen: &Seen) -> Vec<String> {
    let happened = [
        ("kills of the server", fallen.kills, options.kills),
        (
            "restarts of the database",
            fallen.restarts,
            options.restarts,
        ),
        (
            "kills of the consumer",
            fallen.consumer_kills,
            consumer_kills(options),
        ),
    ];
    let happened = happened.iter().filter(|(_, count, asked)| count < asked);
    let mut missing: Vec<String> = happened
        .map(|(what, count, asked)| format!("{count} {what}, not {asked}"))
        .collect();
    let replies = seen.delivered + seen.dropped;
    if seen.dropped * 100 < replies * DROPPED {
        missing.push(format!("{} of {replies} replies dropped", seen.dropped));
    }
    missing
}
