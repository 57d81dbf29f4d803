//! The clients, and the way to them, on which replies get lost.

use std::collections::BTreeMap;
use std::io::Result;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use faults::client::{Answer, Connection};
use faults::random::Random;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::options::Options;
use crate::server::{FAIL, PAUSE};

/// Clients at once, each with a connection of its own.
const CLIENTS: usize = 32;

/// How long a client retries.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a client is told to come again for. Everything else but 201 is a violation.
const REFUSALS: [&str; 7] = [
    "request-in-progress",
    "store-unavailable",
    "transaction-conflict",
    "answer-not-recorded",
    "overloaded",
    // The handler could not write, or was asked to fail.
    "500",
    "502",
];

/// What the clients saw, and what was kept from them.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// The first answer to each key, whether or not it reached the client.
    answers: BTreeMap<String, Answer>,
    /// Answers that reached their client.
    pub(crate) delivered: usize,
    /// Answers that the server had written, and that were thrown away on the way to the client.
    pub(crate) dropped: usize,
    /// Requests whose client was gone before there was an answer.
    pub(crate) hung_up: usize,
    /// Connections that could not be made, or broke by themselves.
    pub(crate) broken: usize,
    /// Refusals, by their kind.
    pub(crate) refused: BTreeMap<String, usize>,
    pub(crate) violations: Vec<String>,
}

/// How far the run is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Progress {
    /// Keys that were answered.
    pub(crate) answered: usize,
    /// There is no point in going on.
    pub(crate) given_up: bool,
}

/// The clients of one run.
#[derive(Debug)]
pub(crate) struct Traffic {
    options: Options,
    port: u16,
    progress: watch::Sender<Progress>,
    seen: Mutex<Seen>,
}

impl Traffic {
    pub(crate) fn new(options: Options, port: u16) -> Arc<Self> {
        Arc::new(Self {
            options,
            port,
            progress: watch::Sender::default(),
            seen: Mutex::default(),
        })
    }

    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    pub(crate) fn seen<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.seen.lock().unwrap())
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = String> {
        let seed = self.options.seed;
        (0..self.options.operations).map(move |n| key(seed, n))
    }

    /// Sends all the charges, or sends them again.
    pub(crate) async fn send(self: &Arc<Self>, errand: Errand) {
        let next = Arc::new(AtomicUsize::new(0));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let client = Client {
                traffic: self.clone(),
                connection: None,
            };
            clients.spawn(client.run(errand, next.clone()));
        }
        while let Some(ended) = clients.join_next().await {
            ended.expect("clients do not panic");
        }
    }

    /// Compares an answer with the first one to its key.
    fn compare(&self, key: &str, mut answer: Answer) {
        // What the layer documents not to replay, and its word for a replay.
        let differs = ["date", "idempotent-replayed"];
        answer
            .headers
            .retain(|(name, _)| !differs.contains(&name.as_str()));
        self.seen(|seen| match seen.answers.get(key) {
            None => drop(seen.answers.insert(key.to_owned(), answer)),
            Some(first) if *first == answer => {}
            Some(first) => {
                let (first, text) = (first.text(), answer.text());
                let violation = format!("key {key}: answered {first}, and then {text}");
                seen.violations.push(violation);
            }
        });
    }

    fn give_up(&self, violation: String) {
        self.seen(|seen| seen.violations.push(violation));
        self.progress
            .send_modify(|progress| progress.given_up = true);
    }
}

/// What the clients are to do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Errand {
    /// Each charge until it is answered.
    Charge,
    /// Each charge once more, when nothing is in the way.
    Replay,
}

/// What became of one request.
enum Met {
    Answered,
    /// Refused, lost or broken off.
    Again,
}

struct Client {
    traffic: Arc<Traffic>,
    connection: Option<Connection>,
}

impl Client {
    async fn run(mut self, errand: Errand, next: Arc<AtomicUsize>) {
        let Options {
            operations, seed, ..
        } = self.traffic.options;
        while !self.traffic.progress.borrow().given_up {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= operations {
                return;
            }
            let (key, mut random) = (key(seed, n), random(seed, n));
            let amount = 100 + random.below(10_000);
            match errand {
                Errand::Charge => self.charge(&key, amount, &mut random).await,
                Errand::Replay => self.replay(&key, amount).await,
            }
        }
    }

    async fn charge(&mut self, key: &str, amount: u64, random: &mut Random) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.try_charge(key, amount, random).await {
                Ok(Met::Answered) => break,
                Ok(Met::Again) => {}
                Err(_) => {
                    self.connection = None;
                    self.traffic.seen(|seen| seen.broken += 1);
                }
            }
            if Instant::now() > deadline {
                return self.traffic.give_up(format!("key {key}: never answered"));
            }
            tokio::time::sleep(Duration::from_millis(10 + random.below(60))).await;
        }
        self.traffic.seen(|seen| seen.delivered += 1);
        let progress = &self.traffic.progress;
        progress.send_modify(|progress| progress.answered += 1);
    }

    /// One request, and what the way does to it and to its answer.
    async fn try_charge(&mut self, key: &str, amount: u64, random: &mut Random) -> Result<Met> {
        let mut headers = format!("{PAUSE}: {}\r\n", random.below(5));
        if random.below(16) == 0 {
            headers += &format!("{FAIL}: 1\r\n");
        }
        let (hangs_up, resets) = (random.below(12) == 0, random.below(2) == 0);
        let is_dropped = random.below(2) == 0;
        self.write(key, amount, &headers).await?;
        if hangs_up {
            self.disconnect(resets);
            self.traffic.seen(|seen| seen.hung_up += 1);
            return Ok(Met::Again);
        }
        let answer = self.read().await?;
        if answer.status != 201 {
            return Ok(self.refused(key, &answer));
        }
        self.traffic.compare(key, answer);
        if is_dropped {
            self.disconnect(resets);
            self.traffic.seen(|seen| seen.dropped += 1);
            return Ok(Met::Again);
        }
        Ok(Met::Answered)
    }

    fn refused(&self, key: &str, answer: &Answer) -> Met {
        let kind = answer.kind();
        if !REFUSALS.contains(&kind.as_str()) {
            let violation = format!("key {key}: refused with {} {kind}", answer.status);
            self.traffic.seen(|seen| seen.violations.push(violation));
        }
        self.traffic
            .seen(|seen| *seen.refused.entry(kind).or_default() += 1);
        Met::Again
    }

    async fn replay(&mut self, key: &str, amount: u64) {
        let answer = match self.write(key, amount, "").await {
            Ok(()) => self.read().await,
            Err(error) => Err(error),
        };
        let violation = match answer {
            Ok(answer) if answer.is_replayed() => return self.traffic.compare(key, answer),
            Ok(answer) => format!("key {key}: not replayed but {}", answer.kind()),
            Err(error) => format!("key {key}: not replayed: {error}"),
        };
        self.connection = None;
        self.traffic.seen(|seen| seen.violations.push(violation));
    }

    async fn write(&mut self, key: &str, amount: u64, headers: &str) -> Result<()> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            empty => empty.insert(Connection::open(self.traffic.port).await?),
        };
        let body = amount.to_string();
        let request = format!(
            "POST /charges HTTP/1.1\r\nhost: server\r\nidempotency-key: {key}\r\n{headers}\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        connection.write(request.as_bytes()).await
    }

    async fn read(&mut self) -> Result<Answer> {
        let connection = self.connection.as_mut().expect("it was written to");
        connection.answer().await
    }

    fn disconnect(&mut self, resets: bool) {
        match self.connection.take() {
            Some(connection) if resets => connection.reset(),
            Some(connection) => connection.fin(),
            None => {}
        }
    }
}

fn key(seed: u64, n: usize) -> String {
    format!("{seed:016x}-{n}")
}

/// The same for an operation of a run, whoever of the clients sends it.
fn random(seed: u64, n: usize) -> Random {
    Random::from_seed(seed.rotate_left(32) ^ (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
