//! Subjects as child processes, that never outlive their test.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::client::{Answer, Connection};
use crate::faketime::{self, Variables};
use crate::fired::fired;
use crate::signal;
use crate::wait::{PATIENCE, until};

/// Starts subjects from one binary.
#[derive(Debug, Clone, Copy)]
pub struct Launcher(pub &'static str);

/// A running subject. Killed when dropped.
#[derive(Debug)]
pub struct Subject {
    child: Child,
    /// Closed by the kernel when this process ends in whatever way, which ends the subject.
    _stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    log: PathBuf,
    /// Where it listens.
    pub port: u16,
}

impl Launcher {
    /// Starts a subject, and waits until it listens.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn start(self, settings: &impl Serialize) -> Subject {
        self.start_among(settings, Vec::new()).await
    }

    /// Starts a subject whose clock is so many seconds ahead, or behind.
    ///
    /// # Panics
    ///
    /// When it does not start, or its clock is right.
    pub async fn start_at(self, seconds: i64, settings: &impl Serialize) -> Subject {
        let subject = self.start_among(settings, faketime::ahead(seconds)).await;
        let here = SystemTime::UNIX_EPOCH.elapsed().expect("a clock");
        let there: i64 = subject.get("/clock").await.text().parse().expect("a time");
        let ahead = there / 1000 - i64::try_from(here.as_secs()).expect("a time");
        assert!((ahead - seconds).abs() < 60, "its clock is {ahead} s ahead");
        fired("application clock");
        subject
    }

    async fn start_among(self, settings: &impl Serialize, variables: Variables) -> Subject {
        let launcher = self;
        let settings = serde_json::to_string(settings).expect("settings are JSON");
        tokio::task::spawn_blocking(move || launcher.start_blocking(&settings, variables))
            .await
            .expect("starting does not panic")
    }

    /// Starts several subjects with the same settings.
    pub async fn start_all(self, count: usize, settings: &impl Serialize) -> Vec<Subject> {
        let starting = (0..count).map(|_| self.start(settings));
        futures_util::future::join_all(starting).await
    }

    /// Starts a subject that is to end by itself before it listens, and returns what it said.
    ///
    /// # Panics
    ///
    /// When it does not end, or as if all were well.
    pub async fn refuses(self, settings: &impl Serialize) -> String {
        let settings = serde_json::to_string(settings).expect("settings are JSON");
        let mut subject = self.spawn(&settings, Vec::new());
        let status = subject.ended().await;
        assert!(!status.success(), "{status}");
        subject.said()
    }

    fn start_blocking(self, settings: &str, variables: Variables) -> Subject {
        let mut subject = self.spawn(settings, variables);
        let port = subject.line().strip_prefix("port ").map(str::parse);
        subject.port = port.expect("the port comes first").expect("a number");
        subject
    }

    fn spawn(self, settings: &str, variables: Variables) -> Subject {
        let name = format!("faults-{}.log", crate::random::fresh_key());
        let log = std::env::temp_dir().join(name);
        let stderr = File::create(&log).expect("the temporary directory is writable");
        let mut child = Command::new(self.0)
            .arg(settings)
            .envs(variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("the subject starts");
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("stdout is a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Subject {
            child,
            _stdin: stdin,
            lines,
            log,
            port: 0,
        }
    }
}

impl Subject {
    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line it prints.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn line(&self) -> String {
        let line = self.lines.recv_timeout(PATIENCE);
        line.unwrap_or_else(|_| panic!("the subject is silent; it said: {}", self.said()))
    }

    /// What it logged.
    #[must_use]
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// `kill -9`, and the proof that it died of it.
    ///
    /// # Panics
    ///
    /// When it ended before by itself.
    pub fn kill(mut self) {
        use std::os::unix::process::ExitStatusExt as _;
        self.child.kill().expect("a child can be killed");
        let status = self.child.wait().expect("a child can be waited for");
        assert_eq!(status.signal(), Some(9), "it ended by itself: {status}");
        fired("kill");
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        signal::send(self.pid(), "TERM");
        fired("term");
    }

    /// SIGSTOP, until [`go_on`](Self::go_on).
    pub async fn stop(&self) {
        signal::stop(self.pid()).await;
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        signal::go_on(self.pid());
    }

    /// Waits until it has ended.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub async fn ended(&mut self) -> ExitStatus {
        let child = &mut self.child;
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(std::time::Instant::now() < deadline, "it does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Lets it open no more files than it has open, or any number again.
    ///
    /// # Panics
    ///
    /// Without util-linux, or when it has ended.
    pub fn limit_files(&self, limited: bool) {
        let is_open = |n: &usize| std::fs::symlink_metadata(self.file(*n)).is_ok();
        let free = (0..).find(|n| !is_open(n)).expect("there is a number");
        let most = if limited { free } else { 1000 };
        // What is lowered for good cannot be raised again.
        self.limit(&format!("--nofile={most}:"));
    }

    fn file(&self, number: usize) -> PathBuf {
        format!("/proc/{}/fd/{number}", self.pid()).into()
    }

    /// Waits until it was refused a file, as its log says.
    pub async fn is_out_of_files(&self) {
        until("an EMFILE", async || {
            self.said().contains("(os error 24)").then_some(())
        })
        .await;
        fired("EMFILE");
    }

    /// Lets it have so many bytes of memory more than it has.
    ///
    /// # Panics
    ///
    /// Without util-linux, or when it has ended.
    pub fn limit_memory(&self, more: usize) {
        let sizes = std::fs::read_to_string(format!("/proc/{}/statm", self.pid()));
        let sizes = sizes.expect("it runs");
        let pages = sizes.split(' ').next().map(str::parse::<usize>);
        let now = pages.expect("a size").expect("a number") * 4096;
        let most = now + more;
        self.limit(&format!("--as={most}:{most}"));
    }

    fn limit(&self, limit: &str) {
        let pid = self.pid().to_string();
        let status = Command::new("prlimit")
            .args(["--pid", &pid, limit])
            .status();
        assert!(status.expect("there is prlimit").success(), "{limit}");
    }

    /// Whether it runs.
    ///
    /// # Panics
    ///
    /// When the system does not say.
    pub fn is_running(&mut self) -> bool {
        self.child
            .try_wait()
            .expect("a child can be waited for")
            .is_none()
    }

    /// Waits for its end, and the proof that it was refused memory.
    ///
    /// # Panics
    ///
    /// When it ended otherwise.
    pub async fn ran_out_of_memory(mut self) {
        use std::os::unix::process::ExitStatusExt as _;
        let status = self.ended().await;
        assert_eq!(status.signal(), Some(6), "it ended otherwise: {status}");
        let said = self.said();
        assert!(said.contains("memory allocation of"), "{said}");
        fired("out of memory");
    }

    /// Waits until it accepts no more connections.
    pub async fn closed(&self) {
        until("the subject to stop listening", async || {
            Connection::open(self.port).await.is_err().then_some(())
        })
        .await;
    }

    /// How often the handler ran in this process.
    ///
    /// # Panics
    ///
    /// When it cannot be asked.
    pub async fn runs(&self) -> u64 {
        let answer = self.get("/runs").await;
        answer.text().parse().expect("a number")
    }

    /// Waits until the handler has run this often.
    pub async fn has_run(&self, times: u64) {
        until("the handler to run", async || {
            (self.runs().await >= times).then_some(())
        })
        .await;
    }

    /// A request without a body, and its answer.
    ///
    /// # Panics
    ///
    /// When there is no answer.
    pub async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path).await
    }

    /// Arms a [failpoint](crate::failpoint): `abort` the process there, `pause` what arrives there, or
    /// `pass`, which also lets go on what was paused.
    ///
    /// # Panics
    ///
    /// When there is no such action.
    pub async fn arm(&self, failpoint: &str, action: &str) {
        let path = format!("/failpoints/{failpoint}/{action}");
        let answer = self.ask("POST", &path).await;
        assert_eq!(answer.status, 204, "{}", answer.text());
    }

    /// Waits until something has arrived at a failpoint so many times.
    pub async fn has_reached(&self, failpoint: &str, times: usize) {
        let marker = crate::failpoint::marker(failpoint);
        until("the failpoint to be reached", async || {
            (self.said().matches(&marker).count() >= times).then_some(())
        })
        .await;
    }

    /// Waits for its end, and the proof that it was a failpoint's.
    ///
    /// # Panics
    ///
    /// When it was not.
    pub async fn aborted_at(mut self, failpoint: &str) {
        use std::os::unix::process::ExitStatusExt as _;
        let status = self.ended().await;
        assert_eq!(status.signal(), Some(6), "it ended otherwise: {status}");
        let marker = crate::failpoint::marker(failpoint);
        assert_eq!(self.said().matches(&marker).count(), 1, "at another point");
    }

    async fn ask(&self, method: &str, path: &str) -> Answer {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: subject\r\nconnection: close\r\n\r\n");
        let mut connection = Connection::open(self.port).await.expect("it listens");
        connection
            .write(request.as_bytes())
            .await
            .expect("it reads");
        connection.answer().await.expect("it answers")
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let said = self.said();
            let from = said.len().saturating_sub(100_000);
            let tail = said.get(from..).unwrap_or(&said);
            println!("--- the end of what subject {} said:\n{tail}", self.pid());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}
