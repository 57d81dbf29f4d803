//! What the soak checks share: clients that are patient, and what they find.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::timeout;

use crate::arena::{Arena, Entrant};
use crate::http1::{Connection, Template};
use crate::options::Extent;
use crate::serve::Work;
use crate::suite::{at_base, pace};
use crate::variants::Variant;

/// After which a request counts as one that is never answered.
const HANGING: Duration = Duration::from_secs(30);

/// Keys under which a handler ran more than once.
const DUPLICATES: &str = "
select count(*) from (select from execution group by key having count(*) > 1) as duplicate";

const EXECUTIONS: &str = "select count(*) from execution";

/// What clients found.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Requests with their answer.
    pub(crate) answered: AtomicU64,
    /// Those that were told to come again.
    pub(crate) refused: AtomicU64,
    /// Answers that were given once, and are another now.
    pub(crate) different: AtomicU64,
    /// Answers that say that the outcome is not known.
    pub(crate) lost: AtomicU64,
    /// Requests without any answer.
    pub(crate) hanging: AtomicU64,
}

/// What a client was told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Answer(Vec<u8>),
    ComeAgain,
    Lost,
}

impl Tally {
    /// Sends a request once.
    ///
    /// # Panics
    ///
    /// When the connection breaks.
    pub(crate) async fn ask(&self, connection: &mut Connection, request: &Template) -> Told {
        let Ok(answer) = timeout(HANGING, connection.ask(request)).await else {
            add(&self.hanging);
            return Told::Lost;
        };
        let answer = answer.expect("the server answers");
        match answer.status {
            201 => {
                add(&self.answered);
                Told::Answer(connection.body(answer).to_vec())
            }
            409 | 503 => {
                add(&self.refused);
                Told::ComeAgain
            }
            status => {
                eprintln!("an answer with {status}");
                add(&self.lost);
                Told::Lost
            }
        }
    }

    pub(crate) fn violations(&self) -> u64 {
        [&self.different, &self.lost, &self.hanging]
            .map(read)
            .iter()
            .sum()
    }
}

pub(crate) fn add(count: &AtomicU64) {
    count.fetch_add(1, Ordering::SeqCst);
}

pub(crate) fn read(count: &AtomicU64) -> u64 {
    count.load(Ordering::SeqCst)
}

pub(crate) async fn arena() -> Arena {
    Arena::open(pace(Extent::Short)).await
}

/// Processes whose handlers tell of each run.
pub(crate) fn tracked(processes: usize) -> Entrant {
    Entrant {
        work: Work::Track,
        processes,
        ..at_base(Variant::Leased)
    }
}

impl Arena {
    pub(crate) async fn executions(&mut self) -> u64 {
        self.count(EXECUTIONS).await
    }

    pub(crate) async fn duplicates(&mut self) -> u64 {
        self.count(DUPLICATES).await
    }

    pub(crate) async fn count(&mut self, sql: &'static str) -> u64 {
        let count = sqlx::query_scalar(sql).fetch_one(&mut self.admin).await;
        let count: i64 = count.expect("it answers");
        u64::try_from(count).expect("a count")
    }
}
