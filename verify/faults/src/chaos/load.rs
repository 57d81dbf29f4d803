//! The clients.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Result, Write as _};
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::watch;

use super::checker::{Live, Sent, Verdict};
use super::counts::{Class, Counts};
use super::history::{Event, Outcome, Seen};
use super::options::Options;
use super::plan::{Manner, Operation, Rudeness, Variant};
use crate::client::{Answer, Connection};
use crate::random::Random;

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_millis(2000);
/// How long a subject that did not answer is left alone, by most.
const SUSPICION: u64 = 400;
/// Operations that wait for their last duplicate.
const MOST_WAITING: usize = 2000;
/// Idle connections of one client to one subject.
const MOST_IDLE: usize = 3;

/// How far the run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Faults come and go.
    Faults,
    /// No more of them: what is under way has to come to its end until then.
    Heal(Instant),
}

/// Where a subject is.
#[derive(Debug, Default)]
pub struct Target {
    /// Its port, or 0 while there is none.
    pub port: AtomicU16,
    /// In milliseconds of the run.
    suspected_until: AtomicU64,
}

/// Requests by their outcome.
#[derive(Debug, Default)]
pub struct Totals {
    /// All that were sent.
    pub sends: AtomicU64,
    /// Answered by the handler or from the record.
    pub answered: AtomicU64,
    /// Of these, those that said that they were replayed.
    pub replayed: AtomicU64,
    /// Of which nobody knows what came of them.
    pub unknown: AtomicU64,
    /// Operations that were begun.
    pub operations: AtomicU64,
    /// Requests of the brief route that were answered.
    pub brief: AtomicU64,
    /// Payloads under a key that another one has.
    pub mismatches: AtomicU64,
}

/// What clients share.
#[derive(Debug)]
pub struct World {
    /// Of the run.
    pub options: Options,
    /// Of faults.
    pub counts: Counts,
    /// Subjects.
    pub targets: Vec<Target>,
    /// Of requests.
    pub totals: Totals,
    /// How far the run is.
    pub phase: watch::Sender<Phase>,
    start: Instant,
    next: AtomicU64,
    sent: Mutex<Vec<Sent>>,
    verdicts: Mutex<Vec<Option<Verdict>>>,
    waiting: Mutex<Vec<Live>>,
    violations: Mutex<Vec<String>>,
    violation_count: AtomicUsize,
    history: Option<Mutex<BufWriter<File>>>,
}

/// More violations are only counted.
const MOST_VIOLATIONS: usize = 100;

impl World {
    /// Before anything is sent.
    ///
    /// # Panics
    ///
    /// When the history cannot be written.
    #[must_use]
    pub fn new(options: Options, subjects: usize) -> Arc<Self> {
        let history = options.history.as_ref().map(|path| {
            let file = File::create(path).expect("the history can be written");
            Mutex::new(BufWriter::new(file))
        });
        Arc::new(Self {
            counts: Counts::default(),
            targets: (0..subjects).map(|_| Target::default()).collect(),
            totals: Totals::default(),
            phase: watch::channel(Phase::Faults).0,
            start: Instant::now(),
            next: AtomicU64::new(0),
            sent: Mutex::default(),
            verdicts: Mutex::default(),
            waiting: Mutex::default(),
            violations: Mutex::default(),
            violation_count: AtomicUsize::new(0),
            history,
            options,
        })
    }

    /// Milliseconds of the run.
    #[must_use]
    pub fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Notes what did not hold.
    pub fn violated(&self, text: String) {
        self.violation_count.fetch_add(1, Ordering::Relaxed);
        let mut violations = lock(&self.violations);
        if violations.len() < MOST_VIOLATIONS {
            violations.push(text);
        }
    }

    /// What did not hold, as far as it is remembered, and how often something did not.
    #[must_use]
    pub fn violations(&self) -> (Vec<String>, usize) {
        let count = self.violation_count.load(Ordering::Relaxed);
        (lock(&self.violations).clone(), count)
    }

    /// What is left of all operations, by their numbers.
    #[must_use]
    pub fn verdicts(&self) -> Vec<Option<Verdict>> {
        lock(&self.verdicts).clone()
    }

    /// What is known of all requests, by their numbers.
    #[must_use]
    pub fn sent(&self) -> Vec<Sent> {
        lock(&self.sent).clone()
    }

    /// Operations that wait for their last duplicate.
    #[must_use]
    pub fn waiting(&self) -> Vec<Live> {
        std::mem::take(&mut *lock(&self.waiting))
    }

    fn operation(&self) -> Operation {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.totals.operations.fetch_add(1, Ordering::Relaxed);
        let mut verdicts = lock(&self.verdicts);
        let length = usize::try_from(number).unwrap_or(usize::MAX) + 1;
        if verdicts.len() < length {
            verdicts.resize(length, None);
        }
        Operation::new(self.options.seed, number)
    }

    fn number_a_send(&self) -> usize {
        self.totals.sends.fetch_add(1, Ordering::Relaxed);
        let mut sent = lock(&self.sent);
        sent.push(Sent::default());
        sent.len() - 1
    }

    /// Takes the end of a request into the history.
    fn note(&self, live: &mut Live, event: Event) {
        let totals = &self.totals;
        match &event.outcome {
            Outcome::Answered(seen) => {
                let is_answer = seen.is_replayed || seen.said.code.is_none();
                totals
                    .answered
                    .fetch_add(is_answer.into(), Ordering::Relaxed);
                let is_replayed = u64::from(seen.is_replayed);
                totals.replayed.fetch_add(is_replayed, Ordering::Relaxed);
            }
            Outcome::Unknown(_) => drop(totals.unknown.fetch_add(1, Ordering::Relaxed)),
            Outcome::NotSent => {}
        }
        if let Some(history) = &self.history {
            let key = &live.operation.key;
            let (scope, route) = (live.operation.scope, live.operation.route.path());
            let written = writeln!(lock(history), "{scope} {route} {key} {event}");
            written.expect("the history can be written");
        }
        let send = event.send;
        let sent = live.end(event);
        lock(&self.sent)[send] = sent;
    }

    /// Beside the history, if it is written.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub fn keep_log(&self, whose: &str, log: &str) {
        let Some(history) = &self.options.history else {
            return;
        };
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(history.with_added_extension("log"));
        let until = self.now();
        let written =
            file.and_then(|mut file| write!(file, "--- {whose}, until {until} ms\n{log}"));
        written.expect("the log can be written");
    }

    /// The operation is over, for its clients.
    pub fn finish(&self, live: Live) {
        let number = usize::try_from(live.operation.number).unwrap_or(usize::MAX);
        let (violations, verdict) = live.finish();
        violations.into_iter().for_each(|text| self.violated(text));
        lock(&self.verdicts)[number] = Some(verdict);
    }

    fn phase(&self) -> Phase {
        *self.phase.borrow()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic holds it")
}

/// One client, with a few connections.
#[derive(Debug)]
pub struct Client {
    world: Arc<World>,
    random: Mutex<Random>,
    idle: Vec<Mutex<Vec<(u16, Connection)>>>,
}

impl Client {
    /// The nth one.
    #[must_use]
    pub fn new(world: &Arc<World>, number: usize) -> Self {
        Self {
            random: Mutex::new(Random::from_seed(
                world.options.seed ^ (number as u64) << 40,
            )),
            idle: world.targets.iter().map(|_| Mutex::default()).collect(),
            world: world.clone(),
        }
    }

    /// Operations, one after the other, until the faults are over.
    pub async fn run(self) {
        while self.world.phase() == Phase::Faults {
            let mut live = Live::new(self.world.operation());
            self.until_settled(&mut live).await;
            if live.is_settled() {
                self.send_again(&mut live).await;
            }
            if !live.operation.comes_back {
                self.world.finish(live);
            } else if let Some(mut earlier) = self.put_off(live) {
                self.send(&mut earlier, Variant::Own, 1).await;
                self.world.finish(earlier);
            }
        }
    }

    /// Keeps the operation for later, and takes an earlier one.
    fn put_off(&self, live: Live) -> Option<Live> {
        let mut waiting = lock(&self.world.waiting);
        if waiting.len() < MOST_WAITING {
            waiting.push(live);
            return None;
        }
        let place = lock(&self.random).below(MOST_WAITING as u64);
        let place = usize::try_from(place).unwrap_or(0);
        Some(std::mem::replace(&mut waiting[place], live))
    }

    async fn until_settled(&self, live: &mut Live) {
        let (at_once, is_contested) = (live.operation.at_once, live.operation.is_contested);
        let mut variant = Variant::Own;
        self.send_at_once(live, at_once, is_contested).await;
        let mut pause = 10;
        while !live.is_settled() {
            if let Phase::Heal(deadline) = self.world.phase()
                && Instant::now() > deadline
            {
                return live.stuck("within one lease and 5 s after all faults were over");
            }
            let jitter = lock(&self.random).below(pause);
            tokio::time::sleep(Duration::from_millis(pause + jitter)).await;
            pause = (pause * 2).min(160);
            let answer = self.send(live, variant, 1).await;
            let is_reused = answer.is_some_and(|seen| seen.code() == "key-reused");
            if is_reused && !live.is_settled() && is_contested {
                variant = variant.other();
            }
        }
    }

    /// The key stands for one of the payloads now.
    async fn send_again(&self, live: &mut Live) {
        let variant = live.variant().unwrap_or(Variant::Own);
        if live.operation.is_mismatched && !live.is_held() {
            self.send(live, variant.other(), 1).await;
        }
        while live.sends < live.operation.sends {
            let left = live.operation.sends - live.sends;
            self.send(live, variant, left.min(2)).await;
        }
    }

    async fn send_at_once(&self, live: &mut Live, count: usize, is_contested: bool) {
        let variants = (0..count).map(|nth| match nth {
            1 if is_contested => Variant::Rival,
            _ => Variant::Own,
        });
        self.send_all(live, variants.collect()).await;
    }

    /// The last answer, if there was one.
    async fn send(&self, live: &mut Live, variant: Variant, count: u32) -> Option<Seen> {
        self.send_all(live, vec![variant; count as usize]).await
    }

    async fn send_all(&self, live: &mut Live, variants: Vec<Variant>) -> Option<Seen> {
        let operation = live.operation.clone();
        let is_healing = self.world.phase() != Phase::Faults;
        let requests: Vec<_> = variants
            .into_iter()
            .map(|variant| {
                let mut manner = Manner::new(self.world.options.seed, &operation, live.sends);
                if is_healing {
                    manner.behave.clear();
                    manner.rudeness = Rudeness::None;
                }
                let is_late = live.begin(variant);
                if variant == Variant::Rival {
                    let mismatches = &self.world.totals.mismatches;
                    mismatches.fetch_add(1, Ordering::Relaxed);
                }
                (variant, manner, is_late)
            })
            .collect();
        let requests = requests.into_iter();
        let sending = requests
            .map(|(variant, manner, is_late)| self.request(&operation, variant, manner, is_late));
        let mut last = None;
        for event in join_all(sending).await {
            if let Outcome::Answered(seen) = &event.outcome {
                last = Some(seen.clone());
            }
            self.world.note(live, event);
        }
        last
    }

    async fn request(
        &self,
        operation: &Operation,
        variant: Variant,
        manner: Manner,
        is_late: bool,
    ) -> Event {
        let world = &self.world;
        let (send, sent, subject) = (world.number_a_send(), world.now(), self.choose());
        let body = operation.body(variant);
        let request = format!(
            "POST {} HTTP/1.1\r\nhost: subject\r\ncontent-type: application/json\r\n\
             idempotency-key: {}\r\nx-tenant: {}\r\nx-send: {send}\r\nx-behave: {}\r\n\
             content-length: {}\r\n\r\n{body}",
            operation.route.path(),
            operation.key,
            operation.scope,
            manner.behave,
            body.len()
        );
        let outcome = self.exchange(subject, &request, manner.rudeness).await;
        if matches!(
            outcome,
            Outcome::NotSent | Outcome::Unknown(SILENT | BROKEN)
        ) {
            let until = world.now() + SUSPICION;
            let target = &world.targets[subject];
            target.suspected_until.store(until, Ordering::Relaxed);
        }
        Event {
            send,
            variant,
            is_late,
            subject,
            behave: manner.behave,
            sent,
            ended: world.now(),
            outcome,
        }
    }

    /// Mostly one of which nothing bad is known, as a balancer would.
    fn choose(&self) -> usize {
        let targets = &self.world.targets;
        let now = self.world.now();
        let mut random = lock(&self.random);
        let mut any = || usize::try_from(random.below(targets.len() as u64)).unwrap_or(0);
        let mut choice = any();
        for _ in 0..3 {
            let target = &targets[choice];
            let is_suspect = target.suspected_until.load(Ordering::Relaxed) > now;
            if !is_suspect && target.port.load(Ordering::Relaxed) > 0 {
                break;
            }
            choice = any();
        }
        choice
    }

    async fn exchange(&self, subject: usize, request: &str, rudeness: Rudeness) -> Outcome {
        let port = self.world.targets[subject].port.load(Ordering::Relaxed);
        let Ok(mut connection) = self.connection(subject, port).await else {
            return Outcome::NotSent;
        };
        if connection.write(request.as_bytes()).await.is_err() {
            return Outcome::Unknown(BROKEN);
        }
        let counts = &self.world.counts;
        match rudeness {
            Rudeness::None => {}
            Rudeness::Fin(after) => {
                tokio::time::sleep(Duration::from_millis(after)).await;
                connection.fin();
                counts.add(Class::Fin, 1);
                return Outcome::Unknown("closed");
            }
            Rudeness::Reset(after) => {
                tokio::time::sleep(Duration::from_millis(after)).await;
                connection.reset();
                counts.add(Class::Reset, 1);
                return Outcome::Unknown("reset");
            }
            Rudeness::Drop => {
                let begun = tokio::time::timeout(PATIENCE, connection.read_at_least(1)).await;
                if matches!(begun, Ok(Ok(1..))) {
                    counts.add(Class::Drop, 1);
                }
                connection.reset();
                return Outcome::Unknown("dropped");
            }
        }
        match tokio::time::timeout(PATIENCE, connection.answer()).await {
            Ok(Ok(answer)) => {
                self.keep(subject, port, connection, &answer);
                Outcome::Answered(Seen::new(&answer))
            }
            Ok(Err(_)) => Outcome::Unknown(BROKEN),
            Err(_) => Outcome::Unknown(SILENT),
        }
    }

    async fn connection(&self, subject: usize, port: u16) -> Result<Connection> {
        let mut idle = std::mem::take(&mut *lock(&self.idle[subject]));
        idle.retain(|(its_port, _)| *its_port == port);
        let kept = idle.pop();
        lock(&self.idle[subject]).append(&mut idle);
        match kept {
            Some((_, connection)) => Ok(connection),
            None if port == 0 => Err(std::io::ErrorKind::ConnectionRefused.into()),
            None => Connection::open(port).await,
        }
    }

    fn keep(&self, subject: usize, port: u16, connection: Connection, answer: &Answer) {
        let mut idle = lock(&self.idle[subject]);
        if answer.header("connection") != Some("close") && idle.len() < MOST_IDLE {
            idle.push((port, connection));
        }
    }

    /// The last duplicates, when all is well: each is a replay in the end, and nothing else but a refusal
    /// before.
    pub async fn replay(self, waiting: Arc<Mutex<Vec<Live>>>) {
        loop {
            let next = lock(&waiting).pop();
            let Some(mut live) = next else { return };
            let was_held = live.is_held();
            let deadline = Instant::now() + Duration::from_secs(6);
            loop {
                let variant = live.variant().unwrap_or(Variant::Own);
                match self.send(&mut live, variant, 1).await {
                    Some(seen) if seen.is_replayed => break,
                    // Held was a claim that nobody ran under, and that was given up then.
                    Some(seen)
                        if was_held && (!live.is_held() || seen.code() == "outcome-unknown") =>
                    {
                        break;
                    }
                    other if Instant::now() > deadline => {
                        live.not_replayed(&format!("{other:?}"));
                        break;
                    }
                    _ => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
            self.world.finish(live);
        }
    }
}

const SILENT: &str = "silent";
const BROKEN: &str = "broken";

/// Requests whose answers are kept for a short time only, for the sweepers; nothing is said of them.
pub async fn send_brief(world: Arc<World>) {
    let mut number = 0_u64;
    while world.phase() == Phase::Faults {
        number += 1;
        let target = &world.targets[usize::try_from(number).unwrap_or(0) % world.targets.len()];
        let port = target.port.load(Ordering::Relaxed);
        let request = format!(
            "POST /brief HTTP/1.1\r\nhost: subject\r\nidempotency-key: brief-{number}\r\n\
             x-tenant: acme\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        let exchange = async {
            let mut connection = Connection::open(port).await?;
            connection.write(request.as_bytes()).await?;
            connection.answer().await
        };
        if let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, exchange).await
            && answer.status == 200
        {
            world.totals.brief.fetch_add(1, Ordering::Relaxed);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
