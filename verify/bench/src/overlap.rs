//! Four processes whose clients use the same keys at the same time: the server never has to break a
//! deadlock, and no handler runs twice.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use faults::random::Random;
use tokio::task::JoinSet;

use crate::http1::{Connection, Template};
use crate::keys::text;
use crate::soak::{Tally, Told, add, arena, read, tracked};

const PROCESSES: usize = 4;

const CLIENTS: usize = 64;

/// After so much time, other keys are used.
const TURN: u128 = 50;

/// Keys of a turn: fewer than clients, so that some meet.
const KEYS: u64 = 24;

const DEADLOCKS: &str = "
select deadlocks from pg_stat_database where datname = current_database()";

/// The answers of the last turns, by turn and key.
type Answers = Mutex<HashMap<(u64, u64), Vec<u8>>>;

struct Shared {
    began: Instant,
    tally: Tally,
    answers: Answers,
    is_over: AtomicBool,
}

/// Whether there was no violation.
pub(crate) async fn run(minutes: f64) -> bool {
    let mut arena = arena().await;
    let team = arena.field(tracked(PROCESSES)).await;
    let ports = team.load().ports;
    let shared = Arc::new(Shared {
        began: Instant::now(),
        tally: Tally::default(),
        answers: Mutex::default(),
        is_over: AtomicBool::new(false),
    });
    let mut clients = JoinSet::new();
    for index in 0..CLIENTS {
        clients.spawn(client(ports[index % PROCESSES], index, shared.clone()));
    }
    tokio::time::sleep(Duration::from_secs_f64(minutes * 60.0)).await;
    shared.is_over.store(true, Ordering::SeqCst);
    while let Some(client) = clients.join_next().await {
        client.expect("no client panics");
    }
    let logged = arena.cluster.log().matches("deadlock detected").count() as u64;
    let deadlocks = arena.count(DEADLOCKS).await.max(logged);
    let (executions, duplicates) = (arena.executions().await, arena.duplicates().await);
    let tally = &shared.tally;
    let requests = read(&tally.answered) + read(&tally.refused);
    let overlapping = requests.saturating_sub(executions);
    let violations = tally.violations() + deadlocks + duplicates;
    println!(
        "requests {requests} executions {executions} overlapping {overlapping} refused {} deadlocks \
         {deadlocks} lost {} different {} duplicate {duplicates} hanging {} violations {violations}",
        read(&tally.refused),
        read(&tally.lost),
        read(&tally.different),
        read(&tally.hanging),
    );
    violations == 0 && overlapping > 0
}

async fn client(port: u16, index: usize, shared: Arc<Shared>) {
    let mut connection = Connection::open(port).await.expect("it listens");
    let mut request = Template::charge(None);
    let mut random = Random::from_seed(index as u64);
    while !shared.is_over.load(Ordering::SeqCst) {
        let turn = shared.began.elapsed().as_millis() / TURN;
        let turn = u64::try_from(turn).expect("it does not take that long");
        let key = random.below(KEYS);
        request.put(&text(turn, key));
        match shared.tally.ask(&mut connection, &request).await {
            Told::Answer(answer) => shared.compare(turn, key, answer),
            Told::ComeAgain | Told::Lost => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

impl Shared {
    /// With what others were told.
    fn compare(&self, turn: u64, key: u64, answer: Vec<u8>) {
        let mut answers = self.answers.lock().expect("nobody panicked");
        if answers.len() > 100_000 {
            answers.retain(|(of, _), _| of + 1000 > turn);
        }
        let first = answers.entry((turn, key)).or_insert_with(|| answer.clone());
        if *first != answer {
            add(&self.tally.different);
        }
    }
}
