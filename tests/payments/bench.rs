//! The real program, on a database of its own.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use sqlx::{PgPool, PgTransaction};

use crate::client::Client;
use crate::common::database::TestDatabase;

pub const PATIENCE: Duration = Duration::from_secs(30);

/// A service on a database of its own, and the test's connections to that.
pub struct Bench {
    pub service: Service,
    pub pool: PgPool,
    pub database: TestDatabase,
}

impl Bench {
    pub async fn new() -> Self {
        Self::with(&[]).await
    }

    /// With these variables in the environment of the service.
    pub async fn with(env: &[(&str, &str)]) -> Self {
        let database = TestDatabase::create().await;
        Self {
            service: Service::start(on(&database).envs(env.iter().copied())),
            pool: database.pool(5).await,
            database,
        }
    }

    /// With a consumer that is not a child of the service, and may end before it.
    pub async fn with_consumer() -> (Self, Consumer) {
        let database = TestDatabase::create().await;
        let consumer = Consumer::start(&mut on(&database));
        let url = format!("http://{}/events", consumer.address);
        let bench = Self {
            service: Service::start(on(&database).env("CONSUMER_URL", url)),
            pool: database.pool(5).await,
            database,
        };
        (bench, consumer)
    }

    /// Kills the service with a signal that nothing can catch.
    pub fn kill(&mut self) {
        assert!(!self.service.stop("KILL").success());
    }

    pub fn restart(&mut self, env: &[(&str, &str)]) {
        self.service = Service::start(on(&self.database).envs(env.iter().copied()));
    }

    /// Another consumer, on a port, or on any (0).
    pub fn consumer(&self, port: &str) -> Consumer {
        Consumer::start(on(&self.database).env("PORT", port))
    }

    pub async fn number(&self, select: &'static str) -> i64 {
        sqlx::query_scalar(select)
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    /// Polls until a `select count(*)` says `wanted`.
    pub async fn until(&self, select: &'static str, wanted: i64) {
        let deadline = Instant::now() + PATIENCE;
        while self.number(select).await != wanted {
            assert!(Instant::now() < deadline, "never {wanted}: {select}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn execute(&self, statement: &'static str) {
        sqlx::raw_sql(statement).execute(&self.pool).await.unwrap();
    }

    /// Nobody writes to the ledger until the transaction ends.
    pub async fn closed_ledger(&self) -> PgTransaction<'static> {
        self.closed("lock table payments.ledger in share mode")
            .await
    }

    /// What a statement locks stays locked until the transaction ends.
    pub async fn closed(&self, lock: &'static str) -> PgTransaction<'static> {
        let mut transaction = self.pool.begin().await.unwrap();
        let lock = sqlx::raw_sql(lock);
        lock.execute(&mut *transaction).await.unwrap();
        transaction
    }

    /// Lets a minute pass for every lease.
    pub async fn end_leases(&self) {
        let age = "update idempotency.record set leased_until = leased_until - interval '1 minute'";
        self.execute(age).await;
    }
}

fn on(database: &TestDatabase) -> Command {
    let mut command = command();
    command.env("DATABASE_URL", &database.url);
    command
}

/// The example, which `cargo test` has built next to this test.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join("payments");
    assert!(
        program.is_file(),
        "{} is not there: run `cargo build --example payments` first, since `cargo test --test` \
         builds no examples",
        program.display()
    );
    program
}

pub fn command() -> Command {
    let mut command = Command::new(program());
    command
        .env("PORT", "0")
        .env_remove("DATABASE_URL")
        .env_remove("RECEIVER_URL")
        .env_remove("CONSUMER_URL")
        .env_remove("BANK_SECRET")
        .stdin(Stdio::null());
    command
}

/// What it prints when it refuses to start.
pub fn refusal(command: &mut Command) -> String {
    let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Running(command.spawn().unwrap());
    assert_eq!(process.wait().code(), Some(1));
    let mut said = String::new();
    let mut pipe = process.0.stderr.take().unwrap();
    pipe.read_to_string(&mut said).unwrap();
    said
}

/// A process that does not outlive its test.
struct Running(Child);

impl Running {
    fn stop(&mut self, signal: &str) -> ExitStatus {
        let id = self.0.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &id]).status();
        assert!(sent.unwrap().success());
        self.wait()
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct Service {
    process: Running,
    pub client: Client,
    pub said: Vec<String>,
}

impl Service {
    pub fn start(command: &mut Command) -> Self {
        let (process, said) = start(command);
        let next = || said.recv_timeout(PATIENCE).expect("it says what to type");
        let mut said = vec![next()];
        while !said[said.len() - 1].starts_with("    curl") {
            said.push(next());
        }
        let address = said[0].split('/').nth(2).expect("it says where it listens");
        let client = Client(address.to_owned());
        Self {
            process,
            client,
            said,
        }
    }

    pub fn stop(&mut self, signal: &str) -> ExitStatus {
        self.process.stop(signal)
    }

    pub fn id(&self) -> u32 {
        self.process.0.id()
    }
}

/// The consumer, started by the test.
pub struct Consumer {
    process: Running,
    /// `127.0.0.1:` and its port.
    pub address: String,
}

impl Consumer {
    fn start(command: &mut Command) -> Self {
        let (process, said) = start(command.arg("consumer").stdin(Stdio::piped()));
        let said = said.recv_timeout(PATIENCE).expect("it says where it is");
        let address = said.split('/').nth(2).expect("it says where it listens");
        Self {
            process,
            address: address.to_owned(),
        }
    }

    pub fn kill(&mut self) {
        assert!(!self.process.stop("KILL").success());
    }
}

/// A process, and what it says line by line.
fn start(command: &mut Command) -> (Running, mpsc::Receiver<String>) {
    let mut process = Running(command.stdout(Stdio::piped()).spawn().unwrap());
    let pipe = process.0.stdout.take().unwrap();
    let (lines, said) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            let _ = lines.send(line);
        }
    });
    (process, said)
}
