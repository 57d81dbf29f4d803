//! Runs the tests of rows, each in a process of its own, and asks whether its fault fired.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

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

/// What is left of a row, and how it fares so far.
#[derive(Debug)]
struct Left<'a> {
    jobs: Vec<Job<'a>>,
    count: usize,
    fired: usize,
    wrong: Vec<String>,
}

impl<'a> Left<'a> {
    fn of(jobs: Vec<Job<'a>>) -> Self {
        Self {
            count: jobs.len(),
            jobs,
            fired: 0,
            wrong: Vec::new(),
        }
    }

    fn outcome(&mut self) -> Outcome {
        if self.wrong.is_empty() {
            Outcome::Green(self.fired)
        } else {
            Outcome::Red(std::mem::take(&mut self.wrong))
        }
    }
}

/// The tests of some rows, built, by the names of their targets.
fn targets(rows: &[&Row]) -> io::Result<BTreeMap<String, Target>> {
    let mut names: Vec<_> = rows.iter().flat_map(|row| row.tests).collect();
    let target = |tests: &'static str| tests.split(':').next().unwrap_or(tests);
    names.sort_unstable();
    // Where none is named, cargo builds them all.
    if names.is_empty() {
        return Ok(BTreeMap::new());
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args([
        "test",
        "--no-run",
        // As `./scripts/test` builds it: what it has built is used.
        "--workspace",
        "--all-features",
        "--message-format=json-render-diagnostics",
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
    Ok(targets)
}

impl Runner {
    /// Builds the tests of some rows.
    ///
    /// # Errors
    ///
    /// When they cannot be built or listed.
    pub fn build(rows: &[&Row], logs: PathBuf, is_full: bool) -> io::Result<Self> {
        std::fs::create_dir_all(&logs)?;
        Ok(Self {
            targets: targets(rows)?,
            // The tests run elsewhere.
            logs: logs.canonicalize()?,
            is_full,
        })
    }

    /// Runs rows, so many tests at a time, and says how each fared as soon as it is known.
    ///
    /// # Errors
    ///
    /// When a test cannot be started.
    pub fn run(
        &self,
        rows: &[&Row],
        at_once: usize,
        mut fared: impl FnMut(&Row, Outcome),
    ) -> io::Result<()> {
        let mut left: Vec<_> = rows.iter().map(|row| Left::of(self.jobs(row))).collect();
        let jobs = Mutex::new(turns(rows, &mut left));
        let (done, results) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..at_once {
                let (jobs, done) = (&jobs, done.clone());
                scope.spawn(move || {
                    while let Some((row, turn)) = next(jobs) {
                        for job in turn {
                            let result = self.run_once(rows[row], &job);
                            // Nobody listens any more after an error.
                            if done.send((row, result)).is_err() {
                                return;
                            }
                        }
                    }
                });
            }
            drop(done);
            for row in rows.iter().filter(|row| self.tests(row).is_empty()) {
                fared(row, Outcome::NotYet);
            }
            for (row, result) in results {
                let left = &mut left[row];
                left.count -= 1;
                match result? {
                    Ok(faults) => left.fired += faults,
                    Err(what) => left.wrong.push(what),
                }
                if left.count == 0 {
                    fared(rows[row], left.outcome());
                }
            }
            Ok(())
        })
    }

    /// The tests of a row, as often as they are to be run.
    fn jobs(&self, row: &Row) -> Vec<Job<'_>> {
        let times = if row.size.2 == RUNS {
            row.times(self.is_full)
        } else {
            1
        };
        let tests = (0..times).flat_map(|_| self.tests(row)).enumerate();
        let job = |(place, (target, test))| Job {
            target,
            test,
            place,
        };
        tests.map(job).collect()
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
            thread::sleep(Duration::from_millis(20));
        };
        let faults = faults(&fired, row)?;
        let wrong = |what: &str| {
            // The next run of it writes another.
            let seconds = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
            let kept = log.with_extension(format!("{}.log", seconds.as_secs()));
            std::fs::rename(&log, &kept)?;
            Ok(Err(format!("{}: {what}; see {}", job.test, kept.display())))
        };
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

/// Tests of one row that run one after another.
type Turn<'a> = (usize, Vec<Job<'a>>);

fn turns<'a>(rows: &[&Row], left: &mut [Left<'a>]) -> VecDeque<Turn<'a>> {
    let mut turns = VecDeque::new();
    for (index, (row, left)) in rows.iter().zip(left).enumerate() {
        let jobs = left.jobs.drain(..);
        if row.is_heavy {
            turns.push_front((index, jobs.collect()));
        } else {
            turns.extend(jobs.map(|job| (index, vec![job])));
        }
    }
    turns
}

fn next<'a>(turns: &Mutex<VecDeque<Turn<'a>>>) -> Option<Turn<'a>> {
    turns.lock().expect("no panic holds it").pop_front()
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
