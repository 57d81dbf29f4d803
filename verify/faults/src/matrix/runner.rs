//! Runs the tests of rows, each in a process of its own, and asks whether its fault fired.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::{RUNS, Row};

/// A test that takes longer is killed, and red. `FAULTS_PATIENCE` says otherwise, in seconds.
const LONGEST: u64 = 600;
/// In the full size.
const LONGEST_FULL: u64 = 3600;

/// What the clients of the tests count.
const REQUEST: &str = "request";

/// How a row fared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Each test passed, and each had its fault; how many faults there were.
    Green(usize),
    /// What was wrong, one line for each test.
    Red(Vec<String>),
    /// There is no test.
    NotYet,
}

/// The tests of this workspace, built.
#[derive(Debug)]
pub struct Runner {
    targets: BTreeMap<String, Target>,
    logs: PathBuf,
    is_full: bool,
}

#[derive(Debug)]
struct Target {
    program: PathBuf,
    /// Where its package is: the tests look for files from there.
    directory: PathBuf,
    tests: Vec<String>,
}

/// One test, to be run once.
#[derive(Debug, Clone)]
struct Job<'a> {
    target: &'a Target,
    test: &'a str,
    place: usize,
}

impl Runner {
    /// Builds the tests of some rows.
    ///
    /// # Errors
    ///
    /// When they cannot be built or listed.
    pub fn build(rows: &[&Row], logs: PathBuf, is_full: bool) -> io::Result<Self> {
        let mut names: Vec<_> = rows.iter().flat_map(|row| row.tests).collect();
        let target = |tests: &'static str| tests.split(':').next().unwrap_or(tests);
        names.sort_unstable();
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
        cargo.args([
            "test",
            "--no-run",
            // As `./scripts/test` builds it: what it has built is used.
            "--workspace",
            "--all-features",
            "--message-format=json",
        ]);
        for name in names {
            cargo.args(["--test", target(name)]);
        }
        let mut child = cargo.stdout(Stdio::piped()).spawn()?;
        let mut targets = BTreeMap::new();
        for line in BufReader::new(child.stdout.take().expect("it is piped")).lines() {
            if let Some((name, target)) = built(&line?)? {
                targets.insert(name, target);
            }
        }
        if !child.wait()?.success() {
            return Err(io::Error::other("the tests cannot be built"));
        }
        std::fs::create_dir_all(&logs)?;
        Ok(Self {
            targets,
            // The tests run elsewhere.
            logs: logs.canonicalize()?,
            is_full,
        })
    }

    /// Runs a row.
    ///
    /// # Errors
    ///
    /// When a test cannot be started.
    pub fn run(&self, row: &Row) -> io::Result<Outcome> {
        let tests = self.tests(row);
        if tests.is_empty() {
            return Ok(Outcome::NotYet);
        }
        let times = if row.size.2 == RUNS {
            row.times(self.is_full)
        } else {
            1
        };
        let mut jobs = VecDeque::new();
        for _ in 0..times {
            for (target, test) in &tests {
                let place = jobs.len();
                jobs.push_back(Job {
                    target,
                    test,
                    place,
                });
            }
        }
        let jobs = Mutex::new(jobs);
        let results = Mutex::new(Vec::new());
        let workers = std::thread::available_parallelism()?.get().min(4);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some(job) = next(&jobs) {
                        let result = self.run_once(row, &job);
                        results.lock().expect("no panic holds it").push(result);
                    }
                });
            }
        });
        let results = results.into_inner().expect("no panic holds it");
        let mut fired = 0;
        let mut wrong = Vec::new();
        for result in results {
            match result? {
                Ok(faults) => fired += faults,
                Err(what) => wrong.push(what),
            }
        }
        Ok(if wrong.is_empty() {
            Outcome::Green(fired)
        } else {
            Outcome::Red(wrong)
        })
    }

    fn patience(&self) -> Duration {
        let asked = std::env::var("FAULTS_PATIENCE").ok();
        let asked = asked.and_then(|seconds| seconds.parse().ok());
        let longest = if self.is_full { LONGEST_FULL } else { LONGEST };
        Duration::from_secs(asked.unwrap_or(longest))
    }

    fn tests(&self, row: &Row) -> Vec<(&Target, &str)> {
        let own = format!("{}_", row.id.to_lowercase());
        let found = row.tests.iter().flat_map(|place| {
            let (target, prefix) = place.split_once(':').unwrap_or((place, &own));
            let target = self.targets.get(target);
            let tests = target
                .into_iter()
                .flat_map(|target| target.tests.iter().map(move |test| (target, test.as_str())));
            let prefix = prefix.to_owned();
            let is_meant = move |test: &str| match prefix.as_str() {
                "others" => !test.split("::").any(is_of_a_row),
                prefix => test.split("::").any(|part| part.starts_with(prefix)),
            };
            tests.filter(move |(_, test)| is_meant(test))
        });
        found.collect()
    }

    /// How many faults there were, or what was wrong.
    fn run_once(&self, row: &Row, job: &Job<'_>) -> io::Result<Result<usize, String>> {
        let name = format!("{}-{}", row.id.replace(':', "-"), job.place);
        let (log, fired) = (
            self.logs.join(format!("{name}.log")),
            self.logs.join(format!("{name}.fired")),
        );
        let _ = std::fs::remove_file(&fired);
        let output = File::create(&log)?;
        let mut child = Command::new(&job.target.program)
            .args(["--exact", job.test, "--nocapture", "--test-threads=1"])
            .current_dir(&job.target.directory)
            .env("CARGO_MANIFEST_DIR", &job.target.directory)
            .env("FAULTS_FIRED", &fired)
            .env("FAULTS_SIZE", if self.is_full { "full" } else { "small" })
            .stdin(Stdio::null())
            .stderr(output.try_clone()?)
            .stdout(output)
            .spawn()?;
        let deadline = Instant::now() + self.patience();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                child.kill()?;
                break child.wait()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let faults = faults(&fired, row)?;
        let wrong = |what: &str| Ok(Err(format!("{}: {what}; see {}", job.test, log.display())));
        if !status.success() {
            return wrong(&format!("failed ({status})"));
        }
        if faults == 0 && row.is_listed() {
            return wrong("its fault never fired");
        }
        std::fs::remove_file(&log)?;
        let _ = std::fs::remove_file(&fired);
        Ok(Ok(faults))
    }
}

/// A letter, two digits and an underscore.
fn is_of_a_row(name: &str) -> bool {
    matches!(
        name.as_bytes(),
        [b'a'..=b'k', b'0'..=b'9', b'0'..=b'9', b'_', ..]
    )
}

fn next<'a>(jobs: &Mutex<VecDeque<Job<'a>>>) -> Option<Job<'a>> {
    jobs.lock().expect("no panic holds it").pop_front()
}

/// A test program, of a line of cargo's JSON.
fn built(line: &str) -> io::Result<Option<(String, Target)>> {
    let message: serde_json::Value = serde_json::from_str(line)?;
    let (Some(program), Some(manifest), Some(name)) = (
        message["executable"].as_str(),
        message["manifest_path"].as_str(),
        message["target"]["name"].as_str(),
    ) else {
        return Ok(None);
    };
    if message["target"]["kind"][0] != "test" {
        return Ok(None);
    }
    let directory = Path::new(manifest)
        .parent()
        .map(Path::to_owned)
        .unwrap_or_default();
    let listed = Command::new(program)
        .args(["--list", "--format", "terse"])
        .current_dir(&directory)
        .output()?;
    let listed = String::from_utf8_lossy(&listed.stdout);
    let tests = listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"));
    let target = Target {
        program: program.into(),
        directory,
        tests: tests.map(str::to_owned).collect(),
    };
    Ok(Some((name.to_owned(), target)))
}

/// How many faults were counted. A request is one only where odd requests are the fault.
fn faults(path: &Path, row: &Row) -> io::Result<usize> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let of_requests = matches!(row.group(), 'F' | 'H');
    let faults = text.lines().filter(|line| of_requests || *line != REQUEST);
    Ok(faults.count())
}
