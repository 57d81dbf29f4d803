//! What work costs: the time of processors, and bytes of the write-ahead log.

use faults::cluster::Cluster;
use faults::signal::children;
use sqlx::PgConnection;
use std::fs;
use std::ops::Sub;
use std::time::Instant;

/// What the server and the servers of a variant have used until a moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Used {
    at: Instant,
    /// Microseconds.
    pub(crate) database: u64,
    pub(crate) application: u64,
    /// Bytes.
    pub(crate) log: u64,
}

/// What was used between two moments.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spent {
    pub(crate) seconds: f64,
    pub(crate) database: u64,
    pub(crate) application: u64,
    pub(crate) log: u64,
}

impl Sub for Used {
    type Output = Spent;

    fn sub(self, earlier: Self) -> Spent {
        Spent {
            seconds: (self.at - earlier.at).as_secs_f64(),
            database: self.database.saturating_sub(earlier.database),
            application: self.application.saturating_sub(earlier.application),
            log: self.log.saturating_sub(earlier.log),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Meter {
    admin: PgConnection,
    postmaster: u32,
}

impl Meter {
    pub(crate) async fn of(cluster: &Cluster) -> Self {
        let mut admin = cluster.connect().await;
        let backend = sqlx::query_scalar("select pg_backend_pid()");
        let backend: i32 = backend.fetch_one(&mut admin).await.expect("it answers");
        let backend = u32::try_from(backend).expect("a process");
        let postmaster = field(backend, PARENT).expect("proc is mounted");
        Self {
            admin,
            postmaster: u32::try_from(postmaster).expect("a process"),
        }
    }

    /// Now, with these processes as the application.
    pub(crate) async fn read(&mut self, application: &[u32]) -> Used {
        const LOG: &str = "select (pg_current_wal_insert_lsn() - '0/0')::int8";
        let log = sqlx::query_scalar(LOG).fetch_one(&mut self.admin).await;
        let log: i64 = log.expect("it answers");
        Used {
            at: Instant::now(),
            database: self.database(),
            application: application.iter().map(|pid| own(*pid)).sum(),
            log: u64::try_from(log).expect("a place"),
        }
    }

    /// Those that have ended are counted by the postmaster.
    fn database(&self) -> u64 {
        let ended = (
            field(self.postmaster, ENDED_USER),
            field(self.postmaster, ENDED_SYSTEM),
        );
        let ended = ended.0.unwrap_or(0) + ended.1.unwrap_or(0);
        let live = children(self.postmaster).into_iter().map(own);
        live.sum::<u64>() + own(self.postmaster) + ended * TICK
    }
}

/// Numbers of proc(5), less the two fields before the state.
const PARENT: usize = 1;
const USER: usize = 11;
const SYSTEM: usize = 12;
const ENDED_USER: usize = 13;
const ENDED_SYSTEM: usize = 14;

/// Microseconds of a tick, of which Linux tells its programs that there are 100 a second.
const TICK: u64 = 10_000;

fn own(pid: u32) -> u64 {
    (field(pid, USER).unwrap_or(0) + field(pid, SYSTEM).unwrap_or(0)) * TICK
}

/// One that has ended has none.
fn field(pid: u32, number: usize) -> Option<u64> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = line.rsplit_once(") ")?;
    fields.split(' ').nth(number)?.parse().ok()
}
