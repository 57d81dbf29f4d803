//! Those who empty the queue. One is enough for what fits into one batch: the more wait for it, the more
//! travel together. More of them write where commits take long and a whole batch is waiting, so that one
//! flush of the disk does not wait for the other, and where one is held up.

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{Error, Postgres};
use tokio::sync::Notify;
use tokio::time::timeout;

use super::queue::{MAX_BATCH, Round, Size};
use super::{Group, MAX_WRITERS};
use crate::store::lent::Lent;
use crate::store::postgres::PgStore;
use crate::store::postgres::connection::{Done, is_locked};

/// How long a writer without work keeps its connection.
const LINGER: Duration = Duration::from_secs(1);

/// A writer that has been at one round for longer is held up, and does not count.
pub(super) const LATE: Duration = Duration::from_millis(100);

/// How long leases wait for the connection that will renew them. It is opened beside that of the writer.
const READY: Duration = Duration::from_millis(500);

/// The time of a commit for which another writer pays.
const SLOW_COMMIT: Duration = Duration::from_millis(1);

/// What a record costs within a statement; the rest of its time is that of the commit.
const OF_EACH: Duration = Duration::from_micros(20);

/// How often a writer lets everybody else run before it commits again, where a commit costs more than what
/// travels in it. Whoever was just answered soon asks for more, and comes along, rather than after it. Where
/// the others keep the runtime for longer than the round took, it does not wait for more of them.
const FOLLOWING: usize = 4;

/// Of more than so many, most have come while the round before was on its way, and whoever follows fills the
/// next one meanwhile: to wait for them pays only where the disk is slow.
const FEW: u32 = 16;

/// Lookups that wait for their own writer beside one that commits: they need no disk.
const LOOKUPS: usize = 8;

/// How many rounds are looked back on.
const REMEMBERED: usize = 31;

/// Who writes, and how many should.
#[derive(Debug, Default)]
pub(super) struct Writers {
    all: Vec<Writer>,
    started: u64,
    commits: Commits,
    is_closed: bool,
}

#[derive(Debug)]
struct Writer {
    name: u64,
    doing: Doing,
    wake: Arc<Notify>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Round(Instant),
}

/// What commits took lately, and how many writers keep the disk busy.
#[derive(Debug)]
struct Commits {
    took: [Duration; REMEMBERED],
    next: usize,
    writers: u128,
}

impl Default for Commits {
    fn default() -> Self {
        Self {
            took: [Duration::ZERO; REMEMBERED],
            next: 0,
            writers: 1,
        }
    }
}

impl Commits {
    /// Of a round: whether its commit costs more than what has travelled in it, and whoever follows should come
    /// along. One that only reads commits nothing.
    fn note(&mut self, took: Duration, size: Size) -> bool {
        if size.commits == 0 {
            return false;
        }
        let took = took.saturating_sub(OF_EACH * size.records);
        self.took[self.next] = took / size.commits;
        self.next = (self.next + 1) % REMEMBERED;
        let mut sorted = self.took;
        let (_, median, _) = sorted.select_nth_unstable(REMEMBERED / 2);
        self.writers = 1 + median.as_nanos() / SLOW_COMMIT.as_nanos();
        let is_dear = *median > OF_EACH * size.records;
        // The quickest were held up by nothing but the disk.
        let (_, quick, _) = sorted.select_nth_unstable(REMEMBERED / 8);
        is_dear && (size.records <= FEW || *quick > SLOW_COMMIT)
    }
}

/// A writer that is counted, and has to be run.
#[derive(Debug)]
pub(super) struct Started {
    name: u64,
    wake: Arc<Notify>,
}

impl Writers {
    /// There is work, so many writes and lookups: wakes a writer, or says that another one has to be started.
    pub(super) fn call(&mut self, writes: usize, lookups: usize) -> Option<Started> {
        if self.wake() {
            return None;
        }
        let is_full = self.all.len() >= MAX_WRITERS as usize;
        let in_time =
            |one: &&Writer| matches!(one.doing, Doing::Round(began) if began.elapsed() < LATE);
        let at_it = self.all.iter().filter(in_time).count();
        let for_commits = match writes {
            MAX_BATCH.. => self.commits.writers,
            _ => 1,
        };
        let wanted = for_commits.max(1 + u128::from(lookups >= LOOKUPS));
        (!is_full && (at_it as u128) < wanted).then(|| self.start())
    }

    /// Wakes a writer that has nothing to do, if there is one.
    fn wake(&mut self) -> bool {
        let idle = self.all.iter_mut().find(|one| one.doing == Doing::Nothing);
        if let Some(writer) = idle {
            writer.doing = Doing::Round(Instant::now());
            writer.wake.notify_one();
            return true;
        }
        false
    }

    fn start(&mut self) -> Started {
        self.started += 1;
        let (name, wake) = (self.started, Arc::new(Notify::new()));
        self.all.push(Writer {
            name,
            doing: Doing::Round(Instant::now()),
            wake: wake.clone(),
        });
        Started { name, wake }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    pub(super) fn close(&mut self) {
        self.is_closed = true;
        for writer in &self.all {
            writer.wake.notify_one();
        }
    }

    fn is_doing(&mut self, name: u64, doing: Doing) {
        if let Some(writer) = self.all.iter_mut().find(|writer| writer.name == name) {
            writer.doing = doing;
        }
    }

    fn is_idle(&self, name: u64) -> bool {
        let mut all = self.all.iter();
        all.any(|writer| writer.name == name && writer.doing == Doing::Nothing)
    }

    fn end(&mut self, name: u64) {
        self.all.retain(|writer| writer.name != name);
    }
}

/// How long writers pass over what is locked, once one has met a lock. To do so they lock each record
/// before they write it, which costs log.
const WARY: Duration = Duration::from_secs(10);

/// A writer's connection.
#[derive(Debug)]
pub(in crate::store::postgres) struct Line {
    connection: Lent<Postgres>,
    store: PgStore,
    locks: Locks,
}

/// When one of the writers has last met a lock.
#[derive(Debug, Clone, Default)]
pub(super) struct Locks(Arc<Mutex<Option<Instant>>>);

impl Locks {
    fn met(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Line {
    pub(super) async fn run(
        &mut self,
        query: Query<'_, Postgres, PgArguments>,
    ) -> Result<Done, Error> {
        let done = self.store.run_on(&mut self.connection, query).await;
        if done.as_ref().is_err_and(is_locked) {
            *self.locks.met() = Some(Instant::now());
        }
        done
    }

    /// Whether what is locked is to be passed over.
    pub(super) fn is_wary(&self) -> bool {
        self.locks.met().is_some_and(|met| met.elapsed() < WARY)
    }

    pub(super) fn store(&self) -> &PgStore {
        &self.store
    }
}

/// A writer at work. Should its runtime be dropped, whoever is in the queue is told to come again.
pub(super) struct AtWork {
    group: Arc<Group>,
    name: u64,
    wake: Arc<Notify>,
}

impl Drop for AtWork {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        state.writers.end(self.name);
        let left = (state.writers.all.is_empty()).then(|| std::mem::take(&mut state.queues));
        // It may have been called, and never came to look.
        if !state.queues.is_empty() {
            state.writers.wake();
        }
        drop(state);
        drop(left);
    }
}

impl AtWork {
    pub(super) fn new(group: Arc<Group>, Started { name, wake }: Started) -> Self {
        Self { group, name, wake }
    }

    pub(super) async fn run(self) {
        let mut line = None;
        while let Some(round) = self.next().await {
            line = self.write(round, line).await;
        }
        if let Some(Line { connection, .. }) = line {
            connection.keep();
        }
    }

    /// What is queued; `None` when there was nothing for a while.
    async fn next(&self) -> Option<Round> {
        loop {
            if let Some(round) = self.take() {
                return Some(round);
            }
            if self.is_closed() {
                return None;
            }
            let woken = timeout(LINGER, self.wake.notified()).await;
            if woken.is_err() && self.leave() {
                return None;
            }
            // Whoever comes at the same moment comes along.
            tokio::task::yield_now().await;
        }
    }

    fn take(&self) -> Option<Round> {
        let mut state = self.group.lock();
        let round = state.queues.take();
        let doing = match round {
            Some(_) => Doing::Round(Instant::now()),
            None => Doing::Nothing,
        };
        state.writers.is_doing(self.name, doing);
        // What is left of what there is to write did not fit.
        if doing != Doing::Nothing && state.queues.writes() > 0 {
            self.group.call(state, MAX_BATCH);
        }
        round
    }

    /// Whether nobody has called it meanwhile.
    fn leave(&self) -> bool {
        let mut state = self.group.lock();
        let leaves = state.writers.is_idle(self.name);
        if leaves {
            state.writers.end(self.name);
        }
        leaves
    }

    fn is_closed(&self) -> bool {
        self.group.lock().writers.is_closed()
    }

    /// The line that it leaves, if it is of any more use. Whoever waits behind a round that is held up is
    /// helped by another writer.
    async fn write(&self, round: Round, line: Option<Line>) -> Option<Line> {
        let mut written = pin!(self.send(round, line));
        match timeout(LATE, &mut written).await {
            Ok(line) => line,
            Err(_held_up) => {
                self.group.help();
                written.await
            }
        }
    }

    async fn send(&self, round: Round, line: Option<Line>) -> Option<Line> {
        let group = &self.group;
        let mut line = match line {
            Some(line) => line,
            None => match group.connect().await {
                Ok(line) => line,
                Err(error) => {
                    round.fail(&Arc::new(error));
                    return None;
                }
            },
        };
        let (began, size) = (Instant::now(), round.size());
        if let Err(error) = round.run(&mut line, &group.alone).await {
            let cause: &dyn std::error::Error = &*error;
            tracing::warn!(error = cause, "a writer lost its connection");
            return None;
        }
        let took = began.elapsed();
        let follows = group.lock().writers.commits.note(took, size);
        if follows {
            let mut turns = 0..FOLLOWING;
            while turns.next().is_some() && began.elapsed() < took * 2 {
                tokio::task::yield_now().await;
            }
        }
        Some(line)
    }
}

impl Group {
    async fn connect(&self) -> Result<Line, Error> {
        let heartbeats = timeout(READY, self.prepare_for_heartbeats());
        let (connection, _late) = tokio::join!(self.pool.acquire(), heartbeats);
        Ok(Line {
            connection: Lent::new(connection?),
            store: self.alone.store.clone(),
            locks: self.locks.clone(),
        })
    }

    /// Leases that are about to be granted are renewed over another connection. To open it takes a good
    /// part of a short lease on a busy machine, so that it is opened before.
    async fn prepare_for_heartbeats(&self) {
        let alone = &self.alone.store;
        if alone.pool.size() == 0
            && let Ok(connection) = alone.acquire().await
        {
            connection.keep();
        }
    }
}
