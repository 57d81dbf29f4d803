//! Does the steps of a schedule.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::postgres::PgPool;
use tokio::sync::watch;

use super::checker::{Logged, accounts};
use super::counts::Class;
use super::load::{Phase, World};
use super::plan::MARK;
use super::schedule::{Lane, Step, Steps};
use super::service::Settings;
use crate::cluster::Cluster;
use crate::process::{Launcher, Subject};
use crate::proxy::{Action, Close, Fault, Proxy, reply, request};
use crate::signal;

/// What commits a transactional route.
const COMMIT: &str = "commit and chain";
/// What claims, of a leased one.
const CLAIM: &str = "$5, 'running', $6";
/// What records its answer.
const COMPLETE: &str = "state = 'completed', answer = $3";

/// A subject, whichever process it is at the moment, and the proxy in front of it.
#[derive(Debug)]
pub struct Place {
    number: usize,
    world: Arc<World>,
    launcher: Launcher,
    settings: Settings,
    /// In front of its store.
    pub proxy: Proxy,
    subject: Option<Subject>,
    logged: Arc<Mutex<Logged>>,
}

impl Place {
    /// Starts the first process.
    pub async fn start(
        number: usize,
        world: &Arc<World>,
        launcher: Launcher,
        settings: &Settings,
        logged: &Arc<Mutex<Logged>>,
    ) -> Self {
        let proxy = Proxy::start_forgetful(&settings.store).await;
        let settings = Settings {
            store: proxy.url().to_owned(),
            ..settings.clone()
        };
        let mut place = Self {
            number,
            world: world.clone(),
            launcher,
            settings,
            proxy,
            subject: None,
            logged: logged.clone(),
        };
        place.boot().await;
        place
    }

    async fn boot(&mut self) {
        let subject = self.launcher.start(&self.settings).await;
        self.set_port(subject.port);
        self.subject = Some(subject);
    }

    fn set_port(&self, port: u16) {
        use std::sync::atomic::Ordering;
        let target = &self.world.targets[self.number];
        target.port.store(port, Ordering::Relaxed);
    }

    /// What the process counts at the moment.
    ///
    /// # Panics
    ///
    /// When it does not run.
    pub async fn accounts(&self) -> String {
        let subject = self.subject.as_ref().expect("it runs");
        subject.get("/accounts").await.text()
    }

    /// Does steps until the faults are over.
    pub async fn suffer(mut self, mut phase: watch::Receiver<Phase>) -> Self {
        for step in Steps::new(self.world.options.seed, Lane::Subject(self.number)) {
            tokio::select! {
                () = tokio::time::sleep(step.gap) => {}
                _ = phase.wait_for(|phase| *phase != Phase::Faults) => break,
            }
            self.take(step).await;
            self.proxy.heal();
        }
        self
    }

    async fn take(&mut self, step: Step) {
        let proxy = &self.proxy;
        let mut count = 1;
        match step.class {
            Class::Kill => {
                signal::send(self.pid(), "KILL");
                self.restart().await;
            }
            Class::Terminate => {
                signal::send(self.pid(), "TERM");
                self.restart().await;
            }
            Class::Stop => {
                signal::stop(self.pid()).await;
                tokio::time::sleep(step.window).await;
                signal::go_on(self.pid());
            }
            Class::Cut => proxy.cut(),
            Class::Blackhole => {
                proxy.blackhole();
                tokio::time::sleep(step.window).await;
            }
            Class::Strand => {
                proxy.strand();
                tokio::time::sleep(step.window).await;
            }
            Class::Refuse => {
                proxy.refuse();
                proxy.cut();
                tokio::time::sleep(step.window).await;
            }
            _ => {
                let rule = self.rule(step);
                tokio::time::sleep(step.window).await;
                count = rule.map_or(0, |rule| rule.fired());
            }
        }
        self.world.counts.add(step.class, count as u64);
    }

    /// A fault of single messages.
    fn rule(&self, step: Step) -> Option<Fault> {
        let times = 1 + usize::try_from(step.choice % 6).unwrap_or(0);
        let end = match step.choice % 4 {
            0 => Action::Cut(Close::Fin),
            1 => Action::CutClient,
            2 => Action::Blackhole { server_open: true },
            _ => Action::Cut(Close::Reset),
        };
        let delay = Action::Delay(Duration::from_millis(5 + step.choice % 300));
        let (matching, times, action) = match step.class {
            Class::Delay => (request(""), 10 * times, delay),
            Class::LostClaim => (reply(CLAIM), times, end),
            Class::LostCompletion => (reply(COMPLETE), times, end),
            Class::LostCommit => (reply(COMMIT), times, end),
            Class::CommitLost => (request(COMMIT), times, end),
            Class::Conflict => (request(COMMIT), times, Action::Fail("40001")),
            _ => return None,
        };
        Some(self.proxy.on(matching).times(times).does(action))
    }

    fn pid(&self) -> u32 {
        self.subject.as_ref().expect("it runs").pid()
    }

    /// The process is about to end: another one follows.
    async fn restart(&mut self) {
        self.end().await;
        self.boot().await;
    }

    async fn end(&mut self) {
        let Some(mut subject) = self.subject.take() else {
            return;
        };
        let status = subject.ended().await;
        self.set_port(0);
        // One that was killed could not say what it had counted.
        if status.code().is_some() {
            self.check_accounts(&subject.line());
        }
        let log = subject.said();
        self.world
            .keep_log(&format!("subject {}, {status}", self.number), &log);
        self.read_log(&log);
    }

    /// Ends the process for good.
    pub async fn finish(mut self) {
        signal::send(self.pid(), "TERM");
        self.end().await;
    }

    fn check_accounts(&self, line: &str) {
        if let Some(violation) = accounts(line) {
            self.world.violated(violation);
        }
    }

    fn read_log(&self, log: &str) {
        let mut logged = self.logged.lock().expect("no panic holds it");
        for line in log.lines() {
            if line.contains(MARK) {
                let text = format!("I-12: a key or a payload is in the log: {line}");
                self.world.violated(text);
            }
            let Some(id) = id(line) else { continue };
            if line.contains("not recorded in time") {
                logged.unrecorded.insert(id.to_owned());
            }
        }
    }
}

/// The record that a line is about.
fn id(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(" id=")?;
    rest.split(' ').next()
}

/// Crashes the server, and processes of it, until the faults are over.
pub async fn crash(
    world: Arc<World>,
    cluster: Arc<Cluster>,
    pool: PgPool,
    mut phase: watch::Receiver<Phase>,
) {
    for step in Steps::new(world.options.seed, Lane::Server) {
        tokio::select! {
            () = tokio::time::sleep(step.gap) => {}
            _ = phase.wait_for(|phase| *phase != Phase::Faults) => break,
        }
        match step.class {
            Class::Restart => {
                let cluster = cluster.clone();
                let restart = move || {
                    cluster.shut("immediate");
                    cluster.boot();
                };
                let restarted = tokio::task::spawn_blocking(restart).await;
                restarted.expect("the server starts again");
                world.counts.add(step.class, 1);
            }
            _ => {
                if let Some(pid) = backend(&pool, step.choice).await {
                    world.counts.add(step.class, kill(pid).into());
                }
            }
        }
    }
}

/// The process of one of the connections of the subjects.
async fn backend(pool: &PgPool, choice: u64) -> Option<i32> {
    const BACKENDS: &str = "
        select pid from pg_stat_activity
        where backend_type = 'client backend' and application_name like 'tower-idempotency%'
        order by state = 'active' desc, pid";
    let backends: Vec<i32> = sqlx::query_scalar(BACKENDS).fetch_all(pool).await.ok()?;
    let count = u64::try_from(backends.len())
        .ok()
        .filter(|count| *count > 0)?;
    backends.get(usize::try_from(choice % count).ok()?).copied()
}

/// Whether it was still there.
fn kill(pid: i32) -> bool {
    let status = std::process::Command::new("sh")
        .args([
            "-c",
            "kill -KILL \"$1\" 2>/dev/null",
            "sh",
            &pid.to_string(),
        ])
        .status();
    status.is_ok_and(|status| status.success())
}
