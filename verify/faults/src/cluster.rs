//! A PostgreSQL server of a test's own, to be stopped, crashed and frozen.

use std::hash::{BuildHasher as _, RandomState};
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::SystemTime;

use sqlx::postgres::{PgConnection, PgPoolOptions};
use sqlx::{AssertSqlSafe, Connection as _};

use crate::faketime::{self, Variables};
use crate::fired::fired;
use crate::random::{Random, fresh_key};
use crate::signal;
use crate::wait::until;

/// A private server on 127.0.0.1, on a free port. Stopped and removed when dropped, and when this
/// process ends in any other way.
#[derive(Debug)]
pub struct Cluster {
    programs: PathBuf,
    pub(crate) directory: PathBuf,
    port: u16,
    pub(crate) password: String,
    /// Whether it waits for its disk; a crash of the server alone loses nothing without.
    syncs: bool,
    /// What [`set_clock`](Self::set_clock) changes.
    clock: Option<PathBuf>,
    tuning: Tuning,
    /// Waits for the end of its standard input, and then cleans up.
    janitor: Child,
}

/// What a server is started with beside what is always so.
#[derive(Debug, Clone, Default)]
pub struct Tuning {
    /// Options of its command line, such as `-c max_connections=300`; the last of a name counts.
    pub options: String,
    /// Variables of its environment.
    pub variables: Variables,
}

const CLEAN_UP: &str = r#"
trap '' INT TERM HUP
cat >/dev/null
pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null) && {
    kill -CONT "$pid"
    kill -QUIT "$pid"
    i=0
    while kill -0 "$pid" 2>/dev/null && [ $i -lt 50 ]; do sleep 0.1; i=$((i + 1)); done
    kill -KILL "$pid"
} 2>/dev/null
for disk in "$1"/disk-*; do umount -l "$disk"; done 2>/dev/null
rm -rf "$1"
"#;

impl Cluster {
    /// Creates and starts a server that does not wait for its disk.
    ///
    /// # Panics
    ///
    /// Without the programs of a server: `TEST_PG_BIN`, or Debian's place for them.
    pub async fn start() -> Self {
        Self::start_as(false).await
    }

    /// Creates and starts a server that waits for its disk, to measure it.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start) does.
    pub async fn start_durable() -> Self {
        Self::start_as(true).await
    }

    /// Creates and starts a server whose clock can be set.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start) does, and without libfaketime.
    pub async fn start_with_clock() -> Self {
        Self::start_made(|| {
            let mut cluster = Self::prepare(false);
            let clock = cluster.directory.join("clock");
            std::fs::write(&clock, "+0").expect("it is writable");
            cluster.clock = Some(clock);
            cluster.init(&[]);
            cluster
        })
        .await
    }

    /// The same with settings of its own.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start) does.
    pub async fn start_tuned(tuning: Tuning) -> Self {
        Self::start_made(move || {
            let mut cluster = Self::prepare(true);
            cluster.tuning = tuning;
            cluster.init(&[]);
            cluster
        })
        .await
    }

    /// What it is started with from the next [`boot`](Self::boot) on.
    pub fn tune(&mut self, tuning: Tuning) {
        self.tuning = tuning;
    }

    async fn start_as(syncs: bool) -> Self {
        Self::start_made(move || {
            let cluster = Self::prepare(syncs);
            cluster.init(&[]);
            cluster
        })
        .await
    }

    /// Starts what was made, on a port that is free.
    pub(crate) async fn start_made(make: impl FnOnce() -> Self + Send + 'static) -> Self {
        let cluster = tokio::task::spawn_blocking(make).await;
        let mut cluster = cluster.expect("creating does not panic");
        for _ in 0..5 {
            if cluster.try_boot() {
                return cluster;
            }
            cluster.port = free_port();
        }
        panic!("the server does not start: {}", cluster.log());
    }

    /// A place for a server.
    pub(crate) fn prepare(syncs: bool) -> Self {
        let directory = std::env::temp_dir().join(format!("faults-{}", fresh_key()));
        std::fs::create_dir(&directory).expect("the temporary directory is writable");
        let janitor = Command::new("sh")
            .args(["-c", CLEAN_UP, "sh"])
            .arg(&directory)
            .stdin(Stdio::piped())
            .spawn()
            .expect("there is a shell");
        let cluster = Self {
            programs: programs(),
            directory,
            port: free_port(),
            password: fresh_key(),
            syncs,
            clock: None,
            tuning: Tuning::default(),
            janitor,
        };
        let secret = cluster.directory.join("password");
        std::fs::write(secret, &cluster.password).expect("it is writable");
        give_to_owner(&cluster.directory);
        cluster
    }

    /// Makes its data.
    pub(crate) fn init(&self, options: &[String]) {
        let secret = self.directory.join("password");
        // An unoptimised client takes a tenth of a second for each exchange of SCRAM, and the tests of
        // recovery count the time until all connections are made anew.
        run(self
            .program("initdb")
            .args(["--username=postgres", "--auth=password"])
            .args(["--encoding=UTF8", "--no-locale", "--no-sync"])
            .arg(format!("--pwfile={}", secret.display()))
            .args(options));
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> String {
        let (password, port) = (&self.password, self.port);
        format!("postgres://postgres:{password}@127.0.0.1:{port}/postgres")
    }

    /// Starts it again.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub fn boot(&self) {
        assert!(self.try_boot(), "it does not start again: {}", self.log());
    }

    /// Ends it: `fast` or `immediate`, which is a crash.
    ///
    /// # Panics
    ///
    /// When it does not end.
    pub fn shut(&self, mode: &str) {
        run(self.program("pg_ctl").args(["-m", mode, "-w", "stop"]));
        fired("server stop");
    }

    /// Ends it, if it has not ended by itself.
    pub fn shut_if_running(&self) {
        let mut stop = self.program("pg_ctl");
        // It fails where there is nothing to be ended.
        let _ = stop.args(["-m", "immediate", "-w", "stop"]).output();
    }

    /// Stops all its processes where they stand; connections stay open, and new ones are accepted by
    /// the kernel.
    ///
    /// # Panics
    ///
    /// When they do not stop.
    pub async fn freeze(&self) {
        // The postmaster first: it makes no new ones then.
        signal::stop(self.postmaster()).await;
        for child in signal::children(self.postmaster()) {
            signal::send(child, "STOP");
        }
        until("every process to be stopped", async || {
            let mut children = signal::children(self.postmaster()).into_iter();
            children
                .all(|pid| matches!(signal::state(pid), Some('T' | 'Z') | None))
                .then_some(())
        })
        .await;
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        for child in signal::children(self.postmaster()) {
            signal::send(child, "CONT");
        }
        signal::send(self.postmaster(), "CONT");
    }

    /// Kills one of its processes with SIGKILL, upon which the server ends all others and recovers.
    ///
    /// # Panics
    ///
    /// When the server does not say that the process died of it.
    pub async fn kill_backend(&self, pid: u32) {
        signal::send(pid, "KILL");
        let died = format!("(PID {pid}) was terminated by signal 9");
        self.says(&died).await;
        fired("backend kill");
    }

    /// Waits until the server's log has these words.
    pub async fn says(&self, words: &str) {
        until(&format!("the server to say: {words}"), async || {
            self.log().contains(words).then_some(())
        })
        .await;
    }

    /// A connection as superuser.
    ///
    /// # Panics
    ///
    /// When there is none to be had.
    pub async fn connect(&self) -> PgConnection {
        let connection = PgConnection::connect(&self.url()).await;
        connection.expect("the server accepts connections")
    }

    /// Runs statements as superuser, each in a transaction of its own.
    ///
    /// # Panics
    ///
    /// When one fails.
    pub async fn execute(&self, statements: &[&str]) {
        let mut connection = self.connect().await;
        for statement in statements {
            let statement = sqlx::raw_sql(AssertSqlSafe((*statement).to_owned()));
            let done = statement.execute(&mut connection).await;
            done.expect("the statement can be executed");
        }
    }

    /// Sets its clock so many seconds ahead of this machine's, or behind it, while it runs.
    ///
    /// # Panics
    ///
    /// When the server does not show it.
    pub async fn set_clock(&self, seconds: i64) {
        let clock = self.clock.as_ref().expect("started with a clock");
        let next = clock.with_extension("next");
        std::fs::write(&next, format!("{seconds:+}")).expect("it is writable");
        std::fs::rename(&next, clock).expect("it is writable");
        let session = PgPoolOptions::new().max_connections(1);
        let session = session.connect(&self.url()).await.expect("it runs");
        until("the server's clock to be set", async || {
            let now = sqlx::query_scalar("select extract(epoch from clock_timestamp())::int8");
            let there: i64 = now.fetch_one(&session).await.expect("it runs");
            let here = SystemTime::UNIX_EPOCH.elapsed().expect("a clock").as_secs();
            let ahead = there - i64::try_from(here).expect("a time");
            ((ahead - seconds).abs() <= 5).then_some(())
        })
        .await;
        fired("database clock");
    }

    pub(crate) fn postmaster(&self) -> u32 {
        let file = std::fs::read_to_string(self.directory.join("data/postmaster.pid"));
        let file = file.expect("the server runs");
        let pid = file.lines().next().map(str::parse);
        pid.expect("a line").expect("a number")
    }

    fn try_boot(&self) -> bool {
        let options = format!(
            "-p {} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' \
             -c max_connections=200 -c fsync={} {}",
            self.port, self.syncs, self.tuning.options
        );
        let clock = self.clock.as_deref().map(faketime::by_file);
        let status = self
            .program("pg_ctl")
            .envs(clock.unwrap_or_default())
            .envs(self.tuning.variables.iter().cloned())
            .args(["-w", "-t", "60", "-o", &options, "-l"])
            .arg(self.directory.join("log"))
            .arg("start")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    }

    /// All that it has said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// A program of the server, run by its owner: PostgreSQL refuses to run as root.
    pub(crate) fn program(&self, name: &str) -> Command {
        let path = self.programs.join(name);
        let mut command = match owner() {
            Some(owner) => {
                let mut command = Command::new("runuser");
                command.args(["-u", owner, "--"]).arg(path);
                command
            }
            None => Command::new(path),
        };
        command
            .arg("-D")
            .arg(self.directory.join("data"))
            .current_dir(&self.directory)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            // Ctrl-C in a terminal is for this process, which ends the server in order.
            .process_group(0);
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().expect("the program is there");
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Whatever it is that only the server's owner may have.
pub(crate) fn give_to_owner(path: &Path) {
    if let Some(owner) = owner() {
        run(Command::new("chown").args(["-R", owner]).arg(path));
    }
}

/// Whom servers run as, where this process may not run them itself.
pub(crate) fn owner() -> Option<&'static str> {
    let is_root = std::fs::metadata("/proc/self")
        .is_ok_and(|process| std::os::unix::fs::MetadataExt::uid(&process) == 0);
    is_root.then_some("postgres")
}

/// Below the ports that systems give to outgoing connections: a server that starts again must find
/// its port free.
///
/// # Panics
///
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    let mut random = Random::from_seed(RandomState::new().hash_one(()));
    let ports = std::iter::repeat_with(|| 20_000 + random.below(12_000));
    ports
        .take(1000)
        .filter_map(|port| u16::try_from(port).ok())
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("there are free ports")
}

fn programs() -> PathBuf {
    if let Some(given) = std::env::var_os("TEST_PG_BIN") {
        return given.into();
    }
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter();
    let versions = versions
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()));
    let newest = versions.max_by_key(|path| version(path));
    let newest = newest.expect("this test needs the programs of PostgreSQL: set TEST_PG_BIN");
    newest.join("bin")
}

fn version(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.parse().ok()
}
