//! A PgBouncer in transaction mode, which gives each transaction a session of somebody else's.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::cluster::{free_port, give_to_owner, owner};
use crate::fired::fired;
use crate::random::fresh_key;
use crate::wait::until;

const NEEDED: &str = "this test needs PgBouncer (`apt-get install --no-install-recommends pgbouncer`), \
                      or PGBOUNCER_BIN set to it";

/// As few as make it sure that they are shared.
const SERVER_CONNECTIONS: usize = 2;

/// Ends it with the process that holds the other end of its standard input.
const RUN: &str = r#"
trap '' INT TERM HUP
directory=$1
shift
"$@" <&- &
cat >/dev/null
kill -KILL "$(cat "$directory/pid")" 2>/dev/null
rm -rf "$directory"
"#;

/// A private PgBouncer. Ended and removed when dropped, and when this process ends in any other way.
#[derive(Debug)]
pub struct Bouncer {
    directory: PathBuf,
    runner: Child,
    /// The same database, through it.
    pub url: String,
}

impl Bouncer {
    /// Before the server of a `postgres://user:password@host:port/..` URL.
    ///
    /// # Panics
    ///
    /// Without the program, or where it does not start.
    pub async fn start(url: &str) -> Self {
        let (user, password, host, server_port, rest) = split(url).expect("a whole URL");
        let directory = std::env::temp_dir().join(format!("faults-{}", fresh_key()));
        std::fs::create_dir(&directory).expect("the temporary directory is writable");
        let port = free_port();
        let place = directory.display();
        let settings = format!(
            "[databases]
* = host={host} port={server_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {place}/users
pool_mode = transaction
default_pool_size = {SERVER_CONNECTIONS}
max_client_conn = 1000
ignore_startup_parameters = extra_float_digits
logfile = {place}/log
pidfile = {place}/pid
"
        );
        let write = |name: &str, text: &str| {
            std::fs::write(directory.join(name), text).expect("it is writable");
        };
        write("pgbouncer.ini", &settings);
        write("users", &format!("\"{user}\" \"{password}\"\n"));
        give_to_owner(&directory);
        let mut command = Command::new("sh");
        command.args(["-c", RUN, "sh"]).arg(&directory);
        if let Some(owner) = owner() {
            command.args(["runuser", "-u", owner, "--"]);
        }
        let runner = command
            .arg(program())
            .arg(directory.join("pgbouncer.ini"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("there is a shell");
        let bouncer = Self {
            url: format!("postgres://{user}:{password}@127.0.0.1:{port}/{rest}"),
            directory,
            runner,
        };
        until("PgBouncer to start", async || {
            bouncer.log().contains("process up").then_some(())
        })
        .await;
        bouncer
    }

    /// That more clients than it has sessions of the server are connected: they share them.
    ///
    /// # Panics
    ///
    /// When they are not, or it has opened more.
    pub fn is_shared(&self) {
        let log = self.log();
        let clients = log.matches(" login attempt: ").count();
        let servers = log.matches(" new connection to server ").count();
        let gone = log
            .lines()
            .filter(|line| line.contains(" LOG S-") && line.contains(" closing "));
        let servers = servers - gone.count();
        println!("PgBouncer: {clients} clients, {servers} sessions of the server");
        assert!((1..=SERVER_CONNECTIONS).contains(&servers), "{log}");
        assert!(clients > SERVER_CONNECTIONS, "{log}");
        fired("pgbouncer shares");
    }

    /// All that it has said.
    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        drop(self.runner.stdin.take());
        let _ = self.runner.wait();
    }
}

fn program() -> PathBuf {
    let given = std::env::var_os("PGBOUNCER_BIN").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<_> = std::env::split_paths(&path).collect();
    places.push("/usr/sbin".into());
    let found = places.into_iter().map(|place| place.join("pgbouncer"));
    let mut candidates = given.into_iter().chain(found);
    candidates.find(|program| program.is_file()).expect(NEEDED)
}

/// User, password, host, port, and the rest.
fn split(url: &str) -> Option<(&str, &str, &str, &str, &str)> {
    let (_, url) = url.split_once("://")?;
    let (user, url) = url.split_once(':')?;
    let (password, url) = url.split_once('@')?;
    let (host, url) = url.split_once(':')?;
    let (port, rest) = url.split_once('/')?;
    Some((user, password, host, port, rest))
}
