use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use sqlx::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::batch::{Complete, Delete, Insert, Select, complete_and_insert};
use super::writer::Line;
use crate::identity::RecordId;
use crate::store::StoreError;
use crate::store::postgres::PgStore;
use crate::store::postgres::connection::is_locked;

/// The most of one kind that travel together: more make a statement slower than they save.
pub(super) const MAX_BATCH: usize = 128;

/// And of their bytes, unless one has more by itself: a statement that takes longer than its callers wait
/// would be sent again and again.
const MAX_BYTES: usize = 1 << 20;

/// How many that share their ids with others are passed over, so that others need not wait for them.
const MAX_PASSED: usize = 4 * MAX_BATCH;

/// One kind of statement that concurrent callers share.
pub(in crate::store::postgres) trait Request:
    fmt::Debug + Send + Sync + Sized + 'static
{
    type Answer: Send + 'static;

    fn id(&self) -> RecordId;

    /// Whether it ends an attempt, or begins one.
    const WRITES: bool = true;

    /// The bytes that are not small by nature.
    fn weight(&self) -> usize {
        0
    }

    fn queue(queues: &mut Queues) -> &mut VecDeque<Job<Self>>;

    /// One statement for all of them, whose ids differ; `None` for those that were passed over, which
    /// go alone.
    fn together(
        requests: &[&Self],
        line: &mut Line,
    ) -> impl Future<Output = Result<Vec<Option<Self::Answer>>, Error>> + Send;

    fn alone(
        &self,
        store: &PgStore,
    ) -> impl Future<Output = Result<Self::Answer, StoreError>> + Send;
}

/// A request, and who waits for its answer.
#[derive(Debug)]
pub(in crate::store::postgres) struct Job<R: Request> {
    request: R,
    answer: oneshot::Sender<Result<R::Answer, StoreError>>,
    _place: OwnedSemaphorePermit,
}

impl<R: Request> Job<R> {
    pub(super) fn new(
        request: R,
        answer: oneshot::Sender<Result<R::Answer, StoreError>>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            request,
            answer,
            _place: place,
        }
    }

    pub(super) fn answer(self, answer: Result<R::Answer, StoreError>) {
        // Whoever asked may be gone by now.
        drop(self.answer.send(answer));
    }

    /// In a task of its own: what holds it up must not hold up the writer. It ends with its caller, who
    /// takes back what is late.
    fn go_alone(mut self, alone: &Alone) {
        let Alone {
            store,
            places,
            for_reads,
        } = alone.clone();
        tokio::spawn(async move {
            let gone = async {
                let _turn = match R::WRITES {
                    true => None,
                    false => Some(for_reads.acquire().await),
                };
                let _place = places.acquire().await;
                self.request.alone(&store).await
            };
            tokio::select! {
                answer = gone => drop(self.answer.send(answer)),
                () = self.answer.closed() => {}
            }
        });
    }
}

/// Where what cannot go with the others goes alone. Not on all connections at once: heartbeats need them. What
/// is read, and may be large, leaves half of them to what is written.
#[derive(Debug, Clone)]
pub(super) struct Alone {
    pub(super) store: PgStore,
    places: Arc<Semaphore>,
    for_reads: Arc<Semaphore>,
}

impl Alone {
    pub(super) fn new(store: PgStore) -> Self {
        let connections = store.pool.options().get_max_connections();
        let places = usize::try_from(connections.saturating_sub(2).max(1)).unwrap_or(1);
        Self {
            store,
            places: Arc::new(Semaphore::new(places)),
            for_reads: Arc::new(Semaphore::new(places.div_ceil(2))),
        }
    }
}

/// What waits for a writer, by kind.
#[derive(Debug, Default)]
pub(in crate::store::postgres) struct Queues {
    pub(super) completions: VecDeque<Job<Complete>>,
    pub(super) deletions: VecDeque<Job<Delete>>,
    pub(super) insertions: VecDeque<Job<Insert>>,
    pub(super) selections: VecDeque<Job<Select>>,
}

/// What a writer takes at once. Answers are recorded first: their claims have waited longest.
#[derive(Debug)]
pub(super) struct Round {
    completions: Vec<Job<Complete>>,
    deletions: Vec<Job<Delete>>,
    insertions: Vec<Job<Insert>>,
    selections: Vec<Job<Select>>,
}

impl Queues {
    pub(super) fn is_empty(&self) -> bool {
        self.writes() == 0 && self.selections.is_empty()
    }

    pub(super) fn writes(&self) -> usize {
        self.completions.len() + self.deletions.len() + self.insertions.len()
    }

    /// `None` when nothing waits.
    pub(super) fn take(&mut self) -> Option<Round> {
        let round = Round {
            completions: take(&mut self.completions),
            deletions: take(&mut self.deletions),
            insertions: take(&mut self.insertions),
            selections: take(&mut self.selections),
        };
        (round.size().records > 0).then_some(round)
    }
}

/// Those of one id go one after the other: a statement changes a row only once. What nobody waits for
/// any more is not taken.
fn take<R: Request>(queue: &mut VecDeque<Job<R>>) -> Vec<Job<R>> {
    let (mut ids, mut bytes) = (HashSet::new(), 0);
    let mut taken = Vec::with_capacity(queue.len().min(MAX_BATCH));
    let mut passed = Vec::new();
    while taken.len() < MAX_BATCH && passed.len() < MAX_PASSED {
        let Some(next) = queue.pop_front() else { break };
        if next.answer.is_closed() {
            continue;
        }
        bytes += next.request.weight();
        if bytes > MAX_BYTES && !taken.is_empty() {
            queue.push_front(next);
            break;
        }
        if ids.insert(next.request.id()) {
            taken.push(next);
        } else {
            passed.push(next);
        }
    }
    passed
        .into_iter()
        .rev()
        .for_each(|job| queue.push_front(job));
    taken
}

/// How much there is in a round.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Size {
    pub(super) records: u32,
    pub(super) commits: u32,
}

impl Size {
    fn and(self, records: usize, writes: bool) -> Self {
        Self {
            records: self
                .records
                .saturating_add(u32::try_from(records).unwrap_or(u32::MAX)),
            commits: self.commits + u32::from(writes && records > 0),
        }
    }
}

impl Round {
    pub(super) fn size(&self) -> Size {
        let recorded = self.completions.len() + self.insertions.len();
        Size::default()
            .and(recorded, true)
            .and(self.deletions.len(), true)
            .and(self.selections.len(), false)
    }

    /// Nothing of it was sent.
    pub(super) fn fail(self, error: &Arc<Error>) {
        refuse(self.completions, error);
        refuse(self.deletions, error);
        refuse(self.insertions, error);
        refuse(self.selections, error);
    }

    /// # Errors
    ///
    /// When the line is of no more use; everybody has been answered all the same.
    pub(super) async fn run(self, line: &mut Line, alone: &Alone) -> Result<(), Arc<Error>> {
        let (completions, insertions) = (wanted(self.completions), wanted(self.insertions));
        let broken = if completions.is_empty() || insertions.is_empty() {
            let broken = send(completions, line, alone, None).await;
            send(insertions, line, alone, broken).await
        } else {
            send_both(completions, insertions, line, alone).await
        };
        let broken = send(wanted(self.deletions), line, alone, broken).await;
        let broken = send(wanted(self.selections), line, alone, broken).await;
        broken.map_or(Ok(()), Err)
    }
}

/// What nobody waits for any more is not sent.
fn wanted<R: Request>(mut jobs: Vec<Job<R>>) -> Vec<Job<R>> {
    jobs.retain(|job| !job.answer.is_closed());
    jobs
}

/// One after the other, or in one statement where there are both: it is one commit less.
async fn send_both(
    completions: Vec<Job<Complete>>,
    insertions: Vec<Job<Insert>>,
    line: &mut Line,
    alone: &Alone,
) -> Option<Arc<Error>> {
    let was_wary = line.is_wary();
    let sent = complete_and_insert(&requests(&completions), &requests(&insertions), line).await;
    match sent {
        Ok((completed, inserted)) => {
            distribute(completions, completed, alone);
            distribute(insertions, inserted, alone);
            None
        }
        Err(error) if is_locked(&error) => {
            let broken = send(completions, line, alone, None).await;
            if was_wary {
                // The claims are to blame: what was completed was passed over where it is locked.
                fail(insertions, &Arc::new(error), alone);
                return broken;
            }
            // It may have taken long: who is gone by now has taken its claim back.
            send(wanted(insertions), line, alone, broken).await
        }
        Err(error) => {
            let error = Arc::new(error);
            fail(completions, &error, alone);
            fail(insertions, &error, alone);
            Some(error)
        }
    }
}

async fn send<R: Request>(
    jobs: Vec<Job<R>>,
    line: &mut Line,
    alone: &Alone,
    broken: Option<Arc<Error>>,
) -> Option<Arc<Error>> {
    if jobs.is_empty() {
        return broken;
    }
    if let Some(error) = &broken {
        refuse(jobs, error);
        return broken;
    }
    match R::together(&requests(&jobs), line).await {
        Ok(answers) => {
            distribute(jobs, answers, alone);
            None
        }
        Err(error) => {
            let error = Arc::new(error);
            fail(jobs, &error, alone);
            (!is_locked(&error)).then_some(error)
        }
    }
}

fn requests<R: Request>(jobs: &[Job<R>]) -> Vec<&R> {
    jobs.iter().map(|job| &job.request).collect()
}

/// What is refused as a whole is sent again one by one: one of them is to blame. Where the line broke,
/// nobody knows what was done: the callers come again, and recognise what is theirs.
fn fail<R: Request>(jobs: Vec<Job<R>>, error: &Arc<Error>, alone: &Alone) {
    match **error {
        Error::Io(_) | Error::Tls(_) | Error::WorkerCrashed => refuse(jobs, error),
        _ => jobs.into_iter().for_each(|job| job.go_alone(alone)),
    }
}

fn distribute<R: Request>(jobs: Vec<Job<R>>, answers: Vec<Option<R::Answer>>, alone: &Alone) {
    for (job, answer) in jobs.into_iter().zip(answers) {
        match answer {
            Some(answer) => job.answer(Ok(answer)),
            None => job.go_alone(alone),
        }
    }
}

fn refuse<R: Request>(jobs: Vec<Job<R>>, error: &Arc<Error>) {
    for job in jobs {
        job.answer(Err(StoreError::unavailable(error.clone())));
    }
}
