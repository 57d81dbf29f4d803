//! Operations outside of HTTP: the same record, lease and policy, by `Boundary`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a test may panic, and has no users"
)]

mod common;

#[path = "cases/backend.rs"]
mod backend;
#[path = "cases/flaky.rs"]
mod flaky;

use std::io::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use backend::{Backend, Memory, Postgres, Sqlite};
use common::database::TestDatabase;
use sqlx::{PgPool, Row as _};
use tokio::sync::Notify;
use tower_idempotency::store::{Existing, Resolution};
use tower_idempotency::{
    Boundary, Code, Duplicates, Fingerprint, Identity, Lost, PgStore, Policy, Ran, RunError, Store,
};

macro_rules! on_every_store {
    ($($case:ident),* $(,)?) => {
        mod memory { $( #[tokio::test] async fn $case() {
            super::$case(<crate::Memory as crate::Backend>::start().await).await;
        } )* }
        mod sqlite { $( #[tokio::test] async fn $case() {
            super::$case(<crate::Sqlite as crate::Backend>::start().await).await;
        } )* }
        mod postgres { $( #[tokio::test] async fn $case() {
            super::$case(<crate::Postgres as crate::Backend>::start().await).await;
        } )* }
    };
}

on_every_store!(
    it_runs_once_and_everybody_gets_its_result,
    t13_who_comes_while_it_runs_is_told_so_and_later_gets_the_result,
    who_waits_gets_the_result,
    another_fingerprint_is_a_mismatch_and_runs_nothing,
    a_job_that_fails_may_run_again_where_the_policy_says,
    a_job_that_fails_is_not_run_again_where_the_policy_says,
    a_job_that_fails_is_held_where_the_policy_says,
    a_job_that_panics_is_refused_by_name,
    a_job_runs_on_when_nobody_waits_for_it,
    a_lost_job_is_run_again_where_the_policy_says,
    a_policy_that_cannot_work_is_refused_by_name,
    a_result_of_another_type_is_told_and_nothing_is_run,
    a_boundary_that_is_shut_down_runs_nothing,
    an_identity_that_no_store_can_keep_is_refused_and_never_run_unprotected,
);

fn identity() -> Identity {
    Identity::new("acme", "import", "2026-11-22")
}

fn file() -> Fingerprint {
    Fingerprint::of_bytes(b"orders.csv")
}

/// Counts the runs of a job.
#[derive(Clone, Default)]
struct Runs(Arc<AtomicUsize>);

impl Runs {
    fn add(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

async fn import<S: Store>(
    boundary: &Boundary<S>,
    policy: Policy,
    runs: &Runs,
) -> Result<Ran<usize>, RunError<Error>> {
    let runs = runs.clone();
    boundary
        .run(
            identity(),
            file(),
            policy,
            |_| async move { Ok(runs.add()) },
        )
        .await
}

async fn an_identity_that_no_store_can_keep_is_refused_and_never_run_unprotected<B: Backend>(
    backend: B,
) {
    let boundary = Boundary::new(backend.store().clone());
    for identity in [
        Identity::new("ac\0me", "import", "1"),
        Identity::new("acme", "im\0port", "1"),
        Identity::new("acme", "import", "\0"),
    ] {
        let runs = Runs::default();
        let job = runs.clone();
        // The class that runs a job all the same while its store is down.
        let ran: Result<Ran<usize>, RunError<Error>> = boundary
            .run(
                identity,
                file(),
                Policy::low(),
                |_| async move { Ok(job.add()) },
            )
            .await;
        let refused = matches!(ran, Err(RunError::Refused(Code::KeyInvalid)));
        assert!(refused, "{ran:?}");
        assert_eq!(runs.count(), 0);
    }
}

async fn fail<S: Store>(
    boundary: &Boundary<S>,
    policy: Policy,
) -> Result<Ran<usize>, RunError<Error>> {
    boundary
        .run(identity(), file(), policy, |_| async {
            Err(Error::other("no disk"))
        })
        .await
}

async fn it_runs_once_and_everybody_gets_its_result(backend: impl Backend) {
    let (here, there) = (
        Boundary::new(backend.store()),
        Boundary::new(backend.store()),
    );
    let runs = Runs::default();
    assert_eq!(
        import(&here, Policy::high(), &runs).await.unwrap(),
        Ran::Fresh(1)
    );
    for boundary in [&here, &there, &here] {
        let ran = import(boundary, Policy::high(), &runs).await.unwrap();
        assert_eq!(ran, Ran::Replayed(1));
    }
    assert_eq!(runs.count(), 1);
}

async fn t13_who_comes_while_it_runs_is_told_so_and_later_gets_the_result(backend: impl Backend) {
    let (here, there) = (
        Boundary::new(backend.store()),
        Boundary::new(backend.store()),
    );
    let (begun, leave) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let job = {
        let (begun, leave) = (begun.clone(), leave.clone());
        here.run(identity(), file(), Policy::high(), |context| async move {
            assert_eq!(context.identity(), &identity());
            begun.notify_one();
            leave.notified().await;
            Ok::<_, Error>(7)
        })
    };
    let meanwhile = async {
        begun.notified().await;
        for boundary in [&here, &there] {
            let ran = import(boundary, Policy::high(), &Runs::default()).await;
            assert_eq!(ran.unwrap(), Ran::InProgress);
        }
        leave.notify_one();
    };
    let (ran, ()) = tokio::join!(job, meanwhile);
    assert_eq!(ran.unwrap(), Ran::Fresh(7));
    let later = import(&there, Policy::high(), &Runs::default()).await;
    assert_eq!(later.unwrap(), Ran::Replayed(7));
}

async fn who_waits_gets_the_result(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let (begun, leave) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let job = {
        let (begun, leave) = (begun.clone(), leave.clone());
        boundary.run(identity(), file(), Policy::high(), |_| async move {
            begun.notify_one();
            leave.notified().await;
            Ok::<_, Error>(7)
        })
    };
    let waiter = async {
        begun.notified().await;
        let patient = Policy::high().with_duplicates(Duplicates::Wait(Duration::from_secs(30)));
        let runs = Runs::default();
        let waits = import(&boundary, patient, &runs);
        let (ran, ()) = tokio::join!(waits, async {
            tokio::task::yield_now().await;
            leave.notify_one();
        });
        ran.unwrap()
    };
    let (first, second) = tokio::join!(job, waiter);
    assert_eq!((first.unwrap(), second), (Ran::Fresh(7), Ran::Replayed(7)));
}

async fn another_fingerprint_is_a_mismatch_and_runs_nothing(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let runs = Runs::default();
    import(&boundary, Policy::high(), &runs).await.unwrap();
    let other = Fingerprint::of_bytes(b"customers.csv");
    let counted = runs.clone();
    let ran = boundary.run(identity(), other, Policy::high(), |_| async move {
        Ok::<_, Error>(counted.add())
    });
    assert_eq!(ran.await.unwrap(), Ran::Mismatch);
    assert_eq!(runs.count(), 1);
}

async fn a_job_that_fails_may_run_again_where_the_policy_says(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let failed = fail(&boundary, Policy::medium()).await.unwrap_err();
    assert!(matches!(failed, RunError::Failed(error) if error.to_string() == "no disk"));
    let ran = import(&boundary, Policy::medium(), &Runs::default()).await;
    assert_eq!(ran.unwrap(), Ran::Fresh(1));
}

async fn a_job_that_fails_is_not_run_again_where_the_policy_says(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    assert!(fail(&boundary, Policy::high()).await.is_err());
    let runs = Runs::default();
    let ran = import(&boundary, Policy::high(), &runs).await.unwrap();
    assert_eq!((ran, runs.count()), (Ran::Lost, 0));
}

async fn a_job_that_fails_is_held_where_the_policy_says(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let critical = Policy::critical().with_volatile_store(true);
    assert!(fail(&boundary, critical.clone()).await.is_err());
    let runs = Runs::default();
    let ran = import(&boundary, critical.clone(), &runs).await.unwrap();
    assert_eq!((ran, runs.count()), (Ran::Held, 0));

    let store = backend.store();
    let held = store.list_held(None, 10).await.unwrap().remove(0);
    let release = store.resolve(&held.identity, held.token, &Resolution::Release);
    release.await.unwrap();
    let ran = import(&boundary, critical, &runs).await.unwrap();
    assert_eq!(ran, Ran::Fresh(1));
}

async fn a_job_that_panics_is_refused_by_name(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let ran = boundary.run(identity(), file(), Policy::high(), |_| async {
        if std::hint::black_box(true) {
            panic!("as asked");
        }
        Ok::<usize, Error>(1)
    });
    let refused = ran.await.unwrap_err();
    assert!(matches!(refused, RunError::Refused(Code::HandlerPanicked)));
    let later = import(&boundary, Policy::high(), &Runs::default()).await;
    assert_eq!(later.unwrap(), Ran::Lost);
}

async fn a_job_runs_on_when_nobody_waits_for_it(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let (begun, leave) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let job = {
        let (begun, leave) = (begun.clone(), leave.clone());
        boundary.run(identity(), file(), Policy::high(), |_| async move {
            begun.notify_one();
            leave.notified().await;
            Ok::<_, Error>(7)
        })
    };
    tokio::select! {
        _ = job => panic!("it waits"),
        () = begun.notified() => {}
    }
    leave.notify_one();
    let report = boundary.shutdown(Duration::from_secs(30)).await;
    assert!(report.unfinished.is_empty());
    let found = backend.store().lookup(&identity(), &file()).await.unwrap();
    assert!(matches!(found, Some(Existing::Completed(_))));
}

async fn a_lost_job_is_run_again_where_the_policy_says(backend: impl Backend) {
    let policy = Policy::high().with_lost(Lost::Rerun);
    let store = backend.store();
    let claim = tower_idempotency::store::ClaimRequest {
        identity: identity(),
        fingerprint: file(),
        token: tower_idempotency::store::Token::random().unwrap(),
        lost: Lost::Rerun,
        lease: Duration::from_secs(30),
        ttl: Duration::from_secs(3600),
    };
    store.claim(&claim).await.unwrap();
    backend.age(Duration::from_secs(60)).await;
    let boundary = Boundary::new(store);
    let ran = import(&boundary, policy, &Runs::default()).await.unwrap();
    assert_eq!(ran, Ran::Fresh(1));
}

async fn a_policy_that_cannot_work_is_refused_by_name(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let endless = Policy::high().with_ttl(Duration::ZERO);
    let refused = import(&boundary, endless, &Runs::default()).await;
    assert!(matches!(refused, Err(RunError::Policy(error)) if error.field() == "ttl"));
}

async fn a_result_of_another_type_is_told_and_nothing_is_run(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    import(&boundary, Policy::high(), &Runs::default())
        .await
        .unwrap();
    let runs = Runs::default();
    let counted = runs.clone();
    let ran = boundary.run(identity(), file(), Policy::high(), |_| async move {
        Ok::<_, Error>(counted.add().to_string())
    });
    assert!(matches!(ran.await, Err(RunError::Result(_))));
    assert_eq!(runs.count(), 0);
}

async fn a_boundary_that_is_shut_down_runs_nothing(backend: impl Backend) {
    let boundary = Boundary::new(backend.store());
    let _ = boundary.shutdown(Duration::ZERO).await;
    let runs = Runs::default();
    let refused = import(&boundary, Policy::high(), &runs).await;
    assert!(matches!(
        refused,
        Err(RunError::Refused(Code::ShuttingDown))
    ));
    assert_eq!(runs.count(), 0);
}

/// A database with a table to write to.
struct Books {
    store: PgStore,
    pool: PgPool,
    _database: TestDatabase,
}

impl Books {
    async fn open() -> Self {
        let database = TestDatabase::create().await;
        let pool = database.pool(4).await;
        let store = PgStore::new(pool.clone());
        store.migrate().await.unwrap();
        let create = sqlx::query("create table book (note text)");
        create.execute(&pool).await.unwrap();
        Self {
            store,
            pool,
            _database: database,
        }
    }

    async fn lines(&self) -> i64 {
        let count = sqlx::query("select count(*) from book");
        count.fetch_one(&self.pool).await.unwrap().get(0)
    }
}

async fn write(
    boundary: &Boundary<PgStore>,
    fails: usize,
) -> Result<Ran<usize>, RunError<sqlx::Error>> {
    let runs = Runs::default();
    let job = move |_context, mut tx: tower_idempotency::postgres::Tx| {
        let run = runs.add();
        async move {
            let insert = sqlx::query("insert into book (note) values ('line')");
            insert.execute(&mut *tx).await?;
            if run <= fails {
                sqlx::query("select * from nowhere")
                    .execute(&mut *tx)
                    .await?;
            }
            Ok(run)
        }
    };
    boundary
        .run_in_transaction(identity(), file(), Policy::high(), job)
        .await
}

#[tokio::test]
async fn a_jobs_writes_and_its_result_commit_together() {
    let books = Books::open().await;
    let boundary = Boundary::new(books.store.clone());
    assert_eq!(write(&boundary, 0).await.unwrap(), Ran::Fresh(1));
    assert_eq!(write(&boundary, 0).await.unwrap(), Ran::Replayed(1));
    assert_eq!(books.lines().await, 1);
}

#[tokio::test]
async fn a_job_that_fails_in_its_transaction_leaves_nothing_and_may_run_again() {
    let books = Books::open().await;
    let boundary = Boundary::new(books.store.clone());
    assert!(matches!(
        write(&boundary, 1).await,
        Err(RunError::Failed(_))
    ));
    assert_eq!(books.lines().await, 0);
    assert_eq!(write(&boundary, 0).await.unwrap(), Ran::Fresh(1));
    assert_eq!(books.lines().await, 1);
}

#[tokio::test]
async fn a_boundary_of_a_layer_shares_its_records_with_the_routes() {
    let books = Books::open().await;
    let scope = tower_idempotency::Scope::global();
    let layer = tower_idempotency::IdempotencyLayer::<PgStore>::new(books.store.clone(), scope);
    let boundary = Boundary::from(layer.clone());
    import(&boundary, Policy::high(), &Runs::default())
        .await
        .unwrap();
    assert_eq!(layer.stats().executed, 1);
}

/// The phase's closure runs in the first attempt alone, which is lost after it.
#[tokio::test]
async fn a_lost_job_is_resumed_after_its_last_finished_phase() {
    let books = Books::open().await;
    let (here, there) = (
        Boundary::new(books.store.clone()),
        Boundary::new(books.store.clone()),
    );
    let policy = || Policy::high().with_lost(Lost::Rerun);
    let (runs, saved) = (Runs::default(), Arc::new(Notify::new()));
    let job = |stays: bool| {
        let (runs, saved) = (runs.clone(), saved.clone());
        move |_context, phases: tower_idempotency::postgres::Phases| async move {
            let line = phases
                .run("written", async |db| {
                    let insert = sqlx::query("insert into book (note) values ('line')");
                    insert.execute(db).await?;
                    Ok::<_, sqlx::Error>(runs.add())
                })
                .await
                .unwrap();
            saved.notify_one();
            if stays {
                std::future::pending::<()>().await;
            }
            Ok::<_, Error>(line)
        }
    };
    let lost = here.run_in_phases(identity(), file(), policy(), job(true));
    tokio::select! {
        _ = lost => panic!("it stays"),
        () = saved.notified() => {}
    }
    let over = "update idempotency.record set leased_until = clock_timestamp()";
    sqlx::query(over).execute(&books.pool).await.unwrap();
    let ran = there.run_in_phases(identity(), file(), policy(), job(false));
    assert_eq!(ran.await.unwrap(), Ran::Fresh(1));
    assert_eq!((books.lines().await, runs.count()), (1, 1));
}
