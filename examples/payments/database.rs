//! The database of `DATABASE_URL`, or a private one that ends with the service.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use sqlx::PgPool;

use crate::error::BoxError;
use crate::process;

/// Connects, and creates the schema `payments` where it is not there yet.
pub(crate) async fn open(url: &str) -> Result<PgPool, BoxError> {
    let pool = PgPool::connect(url).await?;
    let mut transaction = pool.begin().await?;
    sqlx::raw_sql(include_str!("schema.sql"))
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(pool)
}

pub(crate) fn url() -> Option<String> {
    env::var("DATABASE_URL").ok().filter(|url| !url.is_empty())
}

const NO_PROGRAMS: &str = "there is no PostgreSQL 14 or later to start. Any of these helps:
  ./scripts/test --setup                 installs one, and asks before
  PG_BIN=/path/to/bin                    the directory of initdb, pg_ctl and postgres
  DATABASE_URL=postgres://user@host/db   a server that runs already";

/// A throw-away server. It is removed when the value is dropped, or its process is gone.
pub(crate) struct Cluster {
    shell: Child,
    pub(crate) url: String,
}

impl Cluster {
    pub(crate) fn start() -> Result<Self, BoxError> {
        let mut command = Command::new("sh");
        command
            .args(["-c", include_str!("cluster.sh")])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        process::in_a_group_of_its_own(&mut command);
        unprivileged(&mut command);
        let mut shell = command.spawn().map_err(|error| {
            format!("cannot start a private PostgreSQL: {error}\n{NO_PROGRAMS}")
        })?;
        let mut directory = String::new();
        if let Some(said) = shell.stdout.take() {
            BufReader::new(said).read_line(&mut directory)?;
        }
        if directory.is_empty() {
            let failure = match shell.wait()?.code() {
                Some(3) => NO_PROGRAMS,
                _ => "the private PostgreSQL did not start; see above",
            };
            return Err(failure.into());
        }
        let directory = directory.trim_end();
        let url = format!("postgres://payments@localhost:5432/postgres?host={directory}");
        Ok(Self { shell, url })
    }
}

impl Drop for Cluster {
    /// The end of its input tells the shell to clean up.
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        drop(self.shell.wait());
    }
}

/// PostgreSQL does not run as root.
#[cfg(unix)]
fn unprivileged(command: &mut Command) {
    use std::os::unix::process::CommandExt;

    if id(&["-u"]) == Some(0) {
        let users = ["postgres", "nobody"].into_iter();
        let mut ids = users.filter_map(|user| Some((id(&["-u", user])?, id(&["-g", user])?)));
        if let Some((user, group)) = ids.next() {
            command.uid(user).gid(group);
        }
    }
}

#[cfg(not(unix))]
fn unprivileged(_: &mut Command) {}

#[cfg(unix)]
fn id(arguments: &[&str]) -> Option<u32> {
    let output = Command::new("id").args(arguments).output().ok()?;
    std::str::from_utf8(&output.stdout)
        .ok()?
        .trim()
        .parse()
        .ok()
}
