//! Transactions of the same identities between the steps of leased claims.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};
use tower_idempotency::Lost;
use tower_idempotency::TransactionalStore;
use tower_idempotency::store::conformance::Subject;
use tower_idempotency::store::{Begun, CommitError, Entry, Verdict, Writes};

use super::reference::{Call, KEYS, Told};
use super::world::{World, completion, failed};
use super::{Postgres, Sqlite, config, failing, must_hold, runtime};

const LIMIT: Duration = Duration::from_secs(60);

type Transaction<S> = <<S as Subject>::Store as TransactionalStore>::Transaction;

/// A store with a table of a handler's writes, each the token of its attempt.
trait Transactional: Subject<Store: TransactionalStore> {
    /// While a transaction is open, everybody else waits.
    const HAS_ONE_WRITER: bool;

    fn empty(&self) -> impl Future<Output = ()>;
    fn write(&self, within: &mut Transaction<Self>, token: u64) -> impl Future<Output = ()>;
    fn written(&self) -> impl Future<Output = BTreeSet<u64>>;
}

macro_rules! transactional {
    ($subject:ty, $has_one_writer:expr, $insert:expr) => {
        impl Transactional for $subject {
            const HAS_ONE_WRITER: bool = $has_one_writer;

            async fn empty(&self) {
                let table = "create table if not exists written (token bigint not null)";
                for sql in [table, "delete from written"] {
                    sqlx::query(sql).execute(&self.pool).await.unwrap();
                }
            }

            async fn write(&self, within: &mut Transaction<Self>, token: u64) {
                let insert = sqlx::query($insert).bind(token.cast_signed());
                insert.execute(&mut **within).await.unwrap();
            }

            async fn written(&self) -> BTreeSet<u64> {
                let tokens = sqlx::query_scalar::<_, i64>("select token from written");
                let tokens = tokens.fetch_all(&self.pool).await.unwrap();
                tokens.into_iter().map(i64::cast_unsigned).collect()
            }
        }
    };
}

transactional!(Sqlite, true, "insert into written values (?1)");
transactional!(Postgres, false, "insert into written values ($1)");

/// An open transaction is named by how many were opened before it.
#[derive(Debug, Clone)]
enum Step {
    Leased(super::Step),
    Begin {
        key: usize,
        body: usize,
        lost: Lost,
    },
    BeginAgain {
        of: usize,
    },
    Write {
        open: usize,
    },
    Commit {
        open: usize,
        writes: Writes,
        held: bool,
        answer: u8,
        reference: Option<u8>,
    },
    Rollback {
        open: usize,
    },
    Confirm {
        of: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let open = || 0..2_usize;
    let writes = prop_oneof![3 => Just(Writes::Keep), 1 => Just(Writes::Undo)];
    let held = proptest::bool::weighted(0.2);
    let reference = proptest::option::of(0..2_u8);
    prop_oneof![
        6 => super::step().prop_map(Step::Leased),
        4 => (0..KEYS, 0..2_usize, super::lost())
            .prop_map(|(key, body, lost)| Step::Begin { key, body, lost }),
        1 => (0..4_usize).prop_map(|of| Step::BeginAgain { of }),
        3 => open().prop_map(|open| Step::Write { open }),
        4 => (open(), writes, held, 0..3_u8, reference)
            .prop_map(|(open, writes, held, answer, reference)| {
                Step::Commit { open, writes, held, answer, reference }
            }),
        1 => open().prop_map(|open| Step::Rollback { open }),
        2 => (0..4_usize).prop_map(|of| Step::Confirm { of }),
    ]
}

struct Open<T> {
    transaction: T,
    call: Call,
    has_written: bool,
}

struct Bank<'a, S: Transactional> {
    world: World<'a, S>,
    open: Vec<Open<Transaction<S>>>,
    written: BTreeSet<u64>,
}

impl<S: Transactional> Bank<'_, S> {
    async fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let waits = S::HAS_ONE_WRITER && !self.open.is_empty();
        match *step {
            Step::Write { open } | Step::Commit { open, .. } | Step::Rollback { open }
                if open >= self.open.len() =>
            {
                return Ok(());
            }
            Step::Write { open } => {
                let open = &mut self.open[open];
                let token = open.call.token;
                self.world.subject.write(&mut open.transaction, token).await;
                open.has_written = true;
            }
            Step::Rollback { open } => {
                let open = self.open.remove(open);
                let store = self.world.subject.store();
                let rolled_back = store
                    .rollback(open.transaction, self.world.request(open.call).token)
                    .await;
                rolled_back.unwrap();
            }
            Step::Commit {
                open,
                writes,
                held,
                answer,
                reference,
            } => {
                let open = self.open.remove(open);
                let entry = Entry {
                    writes,
                    held,
                    completion: completion(answer, reference),
                };
                self.commit(step, open, &entry, answer, reference).await?;
            }
            _ if waits => return Ok(()),
            Step::Leased(ref leased) => self.world.step(leased).await?,
            Step::Begin { key, body, lost } => {
                let call = self.world.call(key, body, lost);
                self.begin(step, call).await?;
            }
            Step::BeginAgain { of } => {
                let call = self.world.past(of);
                self.begin(step, call).await?;
            }
            Step::Confirm { of } => self.confirm(step, self.world.past(of)).await?,
        }
        prop_assert_eq!(
            self.world.subject.written().await,
            self.written.clone(),
            "{:?}",
            step
        );
        self.world.look(step).await
    }

    async fn begin(&mut self, step: &Step, call: Call) -> Result<(), TestCaseError> {
        let expected = match () {
            () if self.open.iter().any(|open| open.call.key == call.key) => Told::Locked,
            () if self.world.reference.is_recorded(call.key) => Told::Recorded,
            () => Told::Opened,
        };
        let (request, store) = (self.world.request(call), self.world.subject.store());
        let mut begun = store.begin(&request, LIMIT).await;
        // What a commit refused is rolled back soon after.
        let late = tokio::time::Instant::now() + Duration::from_secs(10);
        while matches!(begun, Ok(Begun::Locked))
            && expected != Told::Locked
            && tokio::time::Instant::now() < late
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
            begun = store.begin(&request, LIMIT).await;
        }
        let told = match begun {
            Ok(Begun::Open(transaction)) => {
                self.open.push(Open {
                    transaction,
                    call,
                    has_written: false,
                });
                Told::Opened
            }
            Ok(Begun::Locked) => Told::Locked,
            Ok(Begun::Recorded) => Told::Recorded,
            Err(error) => failed(&error),
        };
        prop_assert_eq!(told, expected, "{:?}", step);
        Ok(())
    }

    async fn commit(
        &mut self,
        step: &Step,
        open: Open<Transaction<S>>,
        entry: &Entry,
        answer: u8,
        reference: Option<u8>,
    ) -> Result<(), TestCaseError> {
        let (call, request) = (open.call, self.world.request(open.call));
        let store = self.world.subject.store();
        let told = match store.commit(open.transaction, &request, entry).await {
            Ok(_) => Told::Done,
            Err(CommitError::Recorded) => Told::Recorded,
            Err(other) => Told::Failed(format!("{other:?}")),
        };
        let expected = self
            .world
            .reference
            .commit(call, entry.held, answer, reference);
        prop_assert_eq!(&told, &expected, "{:?}", step);
        if told == Told::Done {
            self.world.committed(call, (!entry.held).then_some(answer));
            if open.has_written && entry.writes == Writes::Keep {
                self.written.insert(call.token);
            }
        }
        Ok(())
    }

    /// Of an attempt whose transaction is over, as the contract has it.
    async fn confirm(&mut self, step: &Step, call: Call) -> Result<(), TestCaseError> {
        if self.open.iter().any(|open| open.call.token == call.token) {
            return Ok(());
        }
        let request = self.world.request(call);
        let told = match self.world.subject.store().confirm(&request).await {
            Ok(Verdict::Committed(_)) => Told::Done,
            Ok(Verdict::Recorded) => Told::Recorded,
            Ok(Verdict::RolledBack) => Told::RolledBack,
            Err(error) => failed(&error),
        };
        prop_assert_eq!(told, self.world.reference.confirm(call), "{:?}", step);
        Ok(())
    }
}

async fn run(subject: &impl Transactional, steps: Vec<Step>) -> Result<(), TestCaseError> {
    subject.empty().await;
    let mut bank = Bank {
        world: World::new(subject).await,
        open: Vec::new(),
        written: BTreeSet::new(),
    };
    for step in &steps {
        bank.step(step).await?;
    }
    for open in bank.open {
        let rolled_back = subject
            .store()
            .rollback(open.transaction, bank.world.request(open.call).token);
        rolled_back.await.unwrap();
    }
    Ok(())
}

#[test]
fn any_sequence_of_transactions_and_claims_on_sqlite_is_as_on_the_model() {
    let runtime = runtime();
    let sqlite = runtime.block_on(Sqlite::new());
    let runner = TestRunner::new(config(16));
    must_hold(failing(&runtime, runner, step(), async |steps| {
        run(&sqlite, steps).await
    }));
}

#[test]
fn any_sequence_of_transactions_and_claims_on_postgres_is_as_on_the_model() {
    let runtime = runtime();
    let postgres = runtime.block_on(Postgres::new());
    let runner = TestRunner::new(config(16));
    must_hold(failing(&runtime, runner, step(), async |steps| {
        run(&postgres, steps).await
    }));
}
