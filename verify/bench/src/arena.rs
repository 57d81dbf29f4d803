//! The server that all variants share, and the turns they take on it.

use std::path::Path;
use std::time::{Duration, Instant};

use faults::cluster::{Cluster, Tuning};
use faults::process::{Launcher, Subject};
use sqlx::{PgConnection, PgPool};
use tower_idempotency::PgStore;

use crate::Role;
use crate::load::{Ask, Load};
use crate::meter::Meter;
use crate::naive;
use crate::sample::Sample;
use crate::serve::{Settings, Work};
use crate::variants::Variant;

/// The pools of all variants together are larger than what a server allows where nothing is said.
/// All else is as PostgreSQL has it.
pub(crate) const OPTIONS: &str = "-c max_connections=400";

const SCHEMA: &str = "
create table charge (
    id bigint generated always as identity primary key, account text not null, amount bigint not null
);
create unlogged table execution (key text not null);";

const EMPTY: &str = "truncate idempotency.record, peer.record, charge, execution";

/// What a record takes, of those that answer.
const STORED: &str = "
select avg(pg_column_size(record.*))::float8
from (select * from idempotency.record limit 1000) as record";

/// The database of the large tables.
const LARGE: &str = "large";

/// How long a slice is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) repetitions: usize,
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
}

/// Which tables are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Such that are emptied before each slice.
    Small,
    /// Such that keep what they have.
    Large,
}

/// One of those that take turns.
#[derive(Debug, Clone)]
pub(crate) struct Entrant {
    pub(crate) variant: Variant,
    pub(crate) work: Work,
    pub(crate) ask: Ask,
    pub(crate) connections: usize,
    pub(crate) answer: usize,
    /// Processes of it.
    pub(crate) processes: usize,
    pub(crate) place: Place,
}

/// Its processes.
#[derive(Debug)]
pub(crate) struct Team {
    entrant: Entrant,
    subjects: Vec<Subject>,
}

#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) cluster: Cluster,
    pub(crate) admin: PgConnection,
    meter: Meter,
    launcher: Launcher,
    pub(crate) pace: Pace,
}

impl Arena {
    pub(crate) async fn open(pace: Pace) -> Self {
        let tuning = Tuning {
            options: OPTIONS.into(),
            variables: Vec::new(),
        };
        let cluster = Cluster::start_tuned(tuning).await;
        prepare(&cluster.url()).await;
        let (admin, meter) = (cluster.connect().await, Meter::of(&cluster).await);
        let program = std::env::current_exe().expect("it runs");
        let program = program.into_os_string().into_string().expect("it is text");
        Self {
            cluster,
            admin,
            meter,
            launcher: Launcher(program.leak()),
            pace,
        }
    }

    /// Lets its server flush more slowly from now on, or as it can.
    pub(crate) async fn slow_down(&mut self, shim: Option<(&Path, Duration)>) {
        let variables = shim.map(|(shim, delay)| {
            vec![
                ("LD_PRELOAD", shim.display().to_string()),
                ("FLUSH_DELAY_US", delay.as_micros().to_string()),
            ]
        });
        self.cluster.shut("fast");
        self.cluster.tune(Tuning {
            options: OPTIONS.into(),
            variables: variables.unwrap_or_default(),
        });
        self.cluster.boot();
        self.admin = self.cluster.connect().await;
        self.meter = Meter::of(&self.cluster).await;
    }

    /// Samples of each entrant, one a repetition.
    pub(crate) async fn rounds(&mut self, entrants: &[Entrant]) -> Vec<Vec<Sample>> {
        let mut teams = Vec::new();
        for entrant in entrants {
            teams.push(self.field(entrant.clone()).await);
        }
        let mut samples = vec![Vec::new(); teams.len()];
        for _ in 0..self.pace.repetitions {
            for (team, samples) in teams.iter().zip(&mut samples) {
                samples.push(self.slice(team).await);
            }
        }
        samples
    }

    pub(crate) async fn field(&self, entrant: Entrant) -> Team {
        let settings = self.settings(&entrant);
        let subjects = self.serve(entrant.processes, &settings).await;
        Team { entrant, subjects }
    }

    pub(crate) fn settings(&self, entrant: &Entrant) -> Settings {
        Settings {
            variant: entrant.variant,
            database: self.url(entrant.place),
            answer: entrant.answer,
            work: entrant.work,
        }
    }

    pub(crate) fn url(&self, place: Place) -> String {
        let url = self.cluster.url();
        let (server, _) = url.rsplit_once('/').expect("it names a database");
        match place {
            Place::Small => url,
            Place::Large => format!("{server}/{LARGE}"),
        }
    }

    pub(crate) async fn serve(&self, processes: usize, settings: &Settings) -> Vec<Subject> {
        let role = Role::Serve(settings.clone());
        self.launcher.start_all(processes, &role).await
    }

    /// # Panics
    ///
    /// When the load breaks off, or handlers ran more or less often than they were to.
    async fn slice(&mut self, team: &Team) -> Sample {
        self.reset(team.entrant.place).await;
        let before = runs(&team.subjects).await;
        let load = team.load();
        let keys = load.ask;
        let mut running = load.start();
        running.ready().await;
        tokio::time::sleep(self.pace.warm_up).await;
        let pids: Vec<u32> = team.subjects.iter().map(Subject::pid).collect();
        running.measure(true);
        let (began, used) = (running.done(), self.meter.read(&pids).await);
        tokio::time::sleep(self.pace.measured).await;
        let (ended, spent) = (running.done(), self.meter.read(&pids).await - used);
        running.measure(false);
        let variant = team.entrant.variant;
        let sent = running.end().await;
        let sent = sent.unwrap_or_else(|error| panic!("{variant}: {error}"));
        let ran = runs(&team.subjects).await - before;
        let expected = match keys {
            Ask::Fresh(_) => sent.done,
            Ask::Replays(each) => (each * team.entrant.connections) as u64,
            Ask::Get => 0,
        };
        assert!(
            ran == expected || variant.runs_always() || sent.failed > 0,
            "{variant}: {ran} runs for {expected} operations"
        );
        let stored = self.stored(&team.entrant).await;
        Sample::of(ended - began, spent, &sent, stored)
    }

    /// How many commits are written for each operation; `None` where the server cannot tell.
    pub(crate) async fn commits(&mut self, entrant: &Entrant) -> Option<f64> {
        const TELLS: &str = "create extension if not exists pg_walinspect";
        sqlx::raw_sql(TELLS).execute(&mut self.admin).await.ok()?;
        let team = self.field(entrant.clone()).await;
        let began = self.flushed().await;
        let mut running = team.load().start();
        running.ready().await;
        tokio::time::sleep(self.pace.measured).await;
        let sent = running.end().await.expect("they are answered");
        Some(ratio(self.committed(&began).await, sent.done))
    }

    async fn flushed(&mut self) -> String {
        const FLUSHED: &str = "select pg_current_wal_flush_lsn()::text";
        let flushed = sqlx::query_scalar(FLUSHED).fetch_one(&mut self.admin);
        flushed.await.expect("it answers")
    }

    /// Commits since a place of the log.
    async fn committed(&mut self, began: &str) -> u64 {
        const COMMITTED: &str = "
            select count from pg_get_wal_stats($1::text::pg_lsn, pg_current_wal_flush_lsn(), true)
            where \"resource_manager/record_type\" = 'Transaction/COMMIT'";
        let committed = sqlx::query_scalar(COMMITTED).bind(began);
        let committed: i64 = committed
            .fetch_one(&mut self.admin)
            .await
            .expect("it answers");
        u64::try_from(committed).expect("a count")
    }

    async fn reset(&mut self, place: Place) {
        if place == Place::Small {
            self.execute(EMPTY).await;
        }
        // Each slice begins with the same distance to the next one.
        self.execute("checkpoint").await;
    }

    async fn stored(&mut self, entrant: &Entrant) -> f64 {
        if !entrant.variant.is_own() || entrant.place == Place::Large {
            return 0.0;
        }
        let stored = sqlx::query_scalar(STORED).fetch_one(&mut self.admin).await;
        let stored: Option<f64> = stored.expect("it answers");
        stored.unwrap_or_default()
    }

    /// Makes the large tables, with nothing in them.
    pub(crate) async fn enlarge(&mut self) -> PgPool {
        self.execute("create database large").await;
        let url = self.url(Place::Large);
        prepare(&url).await;
        PgPool::connect(&url).await.expect("it accepts connections")
    }

    /// How long a commit takes that nobody shares, at least of some.
    pub(crate) async fn commit_time(&mut self) -> Duration {
        let mut least = Duration::MAX;
        for _ in 0..20 {
            let asked = Instant::now();
            self.execute("insert into charge (account, amount) values ('acme', 1)")
                .await;
            least = least.min(asked.elapsed());
        }
        least
    }

    /// # Panics
    ///
    /// When the server refuses.
    pub(crate) async fn execute(&mut self, sql: &'static str) {
        let done = sqlx::raw_sql(sql).execute(&mut self.admin).await;
        done.expect("the statement can be executed");
    }
}

impl Team {
    pub(crate) fn load(&self) -> Load {
        let entrant = &self.entrant;
        Load {
            ports: self.subjects.iter().map(|subject| subject.port).collect(),
            connections: entrant.connections,
            ask: entrant.ask,
            answer: entrant.answer,
            sessions: entrant.variant.sessions(),
            pace: None,
        }
    }
}

/// Makes the tables of all variants.
async fn prepare(url: &str) {
    let pool = PgPool::connect(url).await;
    let pool = pool.expect("it accepts connections");
    let store = PgStore::new(pool.clone());
    store.migrate().await.expect("it can be migrated");
    store.close().await;
    for schema in [naive::SCHEMA, SCHEMA] {
        let made = sqlx::raw_sql(schema).execute(&pool).await;
        made.expect("the tables can be made");
    }
}

async fn runs(subjects: &[Subject]) -> u64 {
    let mut runs = 0;
    for subject in subjects {
        runs += subject.runs().await;
    }
    runs
}

#[expect(clippy::cast_precision_loss, reason = "they are not that many")]
fn ratio(one: u64, other: u64) -> f64 {
    one as f64 / other as f64
}
