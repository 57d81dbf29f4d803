//! Group commit: what concurrent callers ask of the store travels together, in one statement and one
//! commit for each kind, over connections that do nothing else. A writer takes what is queued as soon
//! as it is free; nobody waits for a batch to fill.

mod batch;
mod queue;
mod writer;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::PgStore;
use crate::store::StoreError;

pub(super) use batch::{Complete, Delete, Insert, Select};
pub(super) use queue::Request;
use queue::{Alone, Job, Queues};
use writer::{AtWork, LATE, Locks, Writers};

/// The most that is queued or on its way. Whoever comes then waits for a place.
const PLACES: usize = 2048;

/// The most connections that write at once.
pub(super) const MAX_WRITERS: u32 = 4;

/// The queue of a store, and those who empty it.
#[derive(Debug)]
pub(super) struct Group {
    alone: Alone,
    pool: PgPool,
    places: Arc<Semaphore>,
    patience: Duration,
    state: Mutex<State>,
    met: Met,
    locks: Locks,
}

#[derive(Debug, Default)]
struct State {
    queues: Queues,
    writers: Writers,
}

/// Of a thousand claims, how many met a record lately. It only decides what is asked first, so that a
/// lost update does no harm.
#[derive(Debug, Default)]
struct Met(AtomicU32);

const HALF: u32 = 500;

impl Met {
    fn share(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// The last few dozen weigh most.
    fn note(&self, met: bool) {
        let share = self.share();
        self.0.store(
            (share * 31 + if met { 1000 } else { 0 }) / 32,
            Ordering::Relaxed,
        );
    }
}

impl Group {
    /// `alone` is the same store without group commit.
    pub(super) fn new(alone: PgStore, pool: PgPool, patience: Duration) -> Self {
        Self {
            alone: Alone::new(alone),
            pool,
            places: Arc::new(Semaphore::new(PLACES)),
            patience,
            state: Mutex::default(),
            met: Met::default(),
            locks: Locks::default(),
        }
    }

    /// Whether of the last claims most met a record.
    pub(super) fn expects_a_record(&self) -> bool {
        self.met.share() > HALF
    }

    /// # Cancel safety
    ///
    /// What is still queued when its caller is gone is not sent. What was sent may have been done.
    pub(super) async fn submit<R: Request>(
        self: &Arc<Self>,
        request: R,
    ) -> Result<R::Answer, StoreError> {
        let place = timeout(self.patience, self.places.clone().acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(StoreError::unavailable("too much is queued for the store"));
        };
        let (answer, answered) = oneshot::channel();
        self.push(Job::new(request, answer, place));
        self.heard(answered).await
    }

    /// A writer lives in the runtime of whoever called it first, which may do something else by now: who
    /// waits looks after the queue, and not for ever.
    async fn heard<T>(
        self: &Arc<Self>,
        mut answered: oneshot::Receiver<Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let give_up = Instant::now() + self.patience * 2;
        loop {
            match timeout(LATE, &mut answered).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(_dropped)) => return Err(StoreError::unavailable("the writer ended")),
                Err(_late) if Instant::now() < give_up => self.help(),
                Err(_late) => {
                    return Err(StoreError::unavailable("nothing is heard of the writer"));
                }
            }
        }
    }

    fn push<R: Request>(self: &Arc<Self>, job: Job<R>) {
        let mut state = self.lock();
        if state.writers.is_closed() {
            drop(state);
            return job.answer(Err(StoreError::unavailable("the store is closed")));
        }
        R::queue(&mut state.queues).push_back(job);
        let writes = state.queues.writes();
        self.call(state, writes);
    }

    /// A writer is held up: another one takes what is queued behind it.
    fn help(self: &Arc<Self>) {
        let state = self.lock();
        if !state.queues.is_empty() {
            let writes = state.queues.writes();
            self.call(state, writes);
        }
    }

    fn call(self: &Arc<Self>, mut state: MutexGuard<'_, State>, writes: usize) {
        let lookups = state.queues.selections.len();
        let started = state.writers.call(writes, lookups);
        drop(state);
        if let Some(started) = started {
            tokio::spawn(AtWork::new(self.clone(), started).run());
        }
    }

    /// What became of a claim.
    pub(super) fn claimed(&self, met_a_record: bool) {
        self.met.note(met_a_record);
    }

    /// Lets the writers end once the queue is empty, and closes their connections.
    pub(super) async fn close(&self) {
        self.lock().writers.close();
        self.pool.close().await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
