use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use sqlx::Error;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::batch::{Complete, Delete, Insert, Select};
use super::writer::Line;
use crate::identity::RecordId;
use crate::store::StoreError;
use crate::store::postgres::PgStore;

/// The most of one kind that travel together: more make a statement slower than they save.
const MAX_BATCH: usize = 128;

/// One kind of statement that concurrent callers share.
pub(in crate::store::postgres) trait Request:
    fmt::Debug + Send + Sync + Sized + 'static
{
    type Answer: Send + 'static;

    fn id(&self) -> RecordId;

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

    fn answer(self, answer: Result<R::Answer, StoreError>) {
        // Whoever asked may be gone by now.
        drop(self.answer.send(answer));
    }

    /// In a task of its own: what holds it up must not hold up the writer. It ends with its caller, who
    /// takes back what is late.
    fn go_alone(mut self, store: &PgStore) {
        let store = store.clone();
        tokio::spawn(async move {
            tokio::select! {
                answer = self.request.alone(&store) => drop(self.answer.send(answer)),
                () = self.answer.closed() => {}
            }
        });
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
        self.completions.is_empty()
            && self.deletions.is_empty()
            && self.insertions.is_empty()
            && self.selections.is_empty()
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

/// Those of one id go one after the other: a statement changes a row only once.
fn take<R: Request>(queue: &mut VecDeque<Job<R>>) -> Vec<Job<R>> {
    let mut ids = HashSet::new();
    let mut taken = Vec::with_capacity(queue.len().min(MAX_BATCH));
    while taken.len() < MAX_BATCH {
        match queue.front() {
            Some(next) if ids.insert(next.request.id()) => taken.extend(queue.pop_front()),
            _ => break,
        }
    }
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
        Size::default()
            .and(self.completions.len(), true)
            .and(self.deletions.len(), true)
            .and(self.insertions.len(), true)
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
    pub(super) async fn run(self, line: &mut Line, alone: &PgStore) -> Result<(), Arc<Error>> {
        let broken = send(self.completions, line, alone, None).await;
        let broken = send(self.deletions, line, alone, broken).await;
        let broken = send(self.insertions, line, alone, broken).await;
        let broken = send(self.selections, line, alone, broken).await;
        broken.map_or(Ok(()), Err)
    }
}

/// What nobody waits for any more is not sent. What the server refuses as a whole is sent again one by one: one of them is to blame. Where the line
/// broke, nobody knows what was done: the callers come again, and recognise what is theirs.
async fn send<R: Request>(
    mut jobs: Vec<Job<R>>,
    line: &mut Line,
    alone: &PgStore,
    broken: Option<Arc<Error>>,
) -> Option<Arc<Error>> {
    jobs.retain(|job| !job.answer.is_closed());
    if jobs.is_empty() {
        return broken;
    }
    if let Some(error) = &broken {
        refuse(jobs, error);
        return broken;
    }
    let requests: Vec<_> = jobs.iter().map(|job| &job.request).collect();
    let error = match R::together(&requests, line).await {
        Ok(answers) => {
            distribute(jobs, answers, alone);
            return None;
        }
        Err(error) => Arc::new(error),
    };
    if error.as_database_error().is_some() {
        jobs.into_iter().for_each(|job| job.go_alone(alone));
    } else {
        refuse(jobs, &error);
    }
    (!line.is_usable_after(&error)).then_some(error)
}

fn distribute<R: Request>(jobs: Vec<Job<R>>, answers: Vec<Option<R::Answer>>, alone: &PgStore) {
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
