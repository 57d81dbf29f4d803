//! The proxy does what its rules say, and nothing else.

use std::time::{Duration, Instant};

use faults::database::Database;
use faults::ledger::Ledger;
use faults::proxy::{Action, Close, Exchange, Proxy, reply, request};
use faults::wait::until;
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{Connection as _, Error, Executor as _};

/// A database with a table, and a proxy in front of it.
struct Place {
    proxy: Proxy,
    /// Past the proxy.
    pool: PgPool,
    _database: Database,
}

impl Place {
    async fn new() -> Self {
        let database = Database::postgres().await;
        let Ledger::Postgres(pool) = database.ledger.clone() else {
            panic!("it is PostgreSQL");
        };
        pool.execute("create table note (n int)").await.unwrap();
        Self {
            proxy: Proxy::start(&database.url).await,
            pool,
            _database: database,
        }
    }

    async fn connect(&self) -> PgConnection {
        PgConnection::connect(self.proxy.url()).await.unwrap()
    }

    async fn notes(&self) -> i64 {
        let count = sqlx::query_scalar("select count(*) from note");
        count.fetch_one(&self.pool).await.unwrap()
    }

    /// Whether somebody has a transaction open, or is connected at all.
    async fn others(&self) -> i64 {
        let others = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
            where datname = current_database() and application_name = 'through'",
        );
        others.fetch_one(&self.pool).await.unwrap()
    }
}

/// Prepared, and executed in a second round trip the first time.
async fn insert(connection: &mut PgConnection, n: i32) -> Result<(), Error> {
    let query = sqlx::query("insert into note values ($1)").bind(n);
    query.execute(connection).await.map(drop)
}

async fn insert_and_commit(connection: &mut PgConnection, n: i32) -> Result<(), Error> {
    let mut transaction = connection.begin().await?;
    insert(&mut transaction, n).await?;
    transaction.commit().await
}

fn sqlstate(error: &Error) -> Option<String> {
    let database = error.as_database_error()?;
    database.code().map(|code| code.into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_reply_is_cut_is_committed_and_its_client_sees_an_error() {
    for action in [
        Action::Cut(Close::Reset),
        Action::Cut(Close::Fin),
        Action::CutClient,
    ] {
        let place = Place::new().await;
        let cut = place.proxy.on(reply("commit")).does(action.clone());
        let mut connection = place.connect().await;
        let error = insert_and_commit(&mut connection, 1).await.unwrap_err();
        assert!(matches!(error, Error::Io(_)), "{action:?}: {error}");
        assert_eq!(cut.fired(), 1);
        assert_eq!(place.notes().await, 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_cut_never_reaches_the_server() {
    for how in [Close::Reset, Close::Fin] {
        let place = Place::new().await;
        let cut = place.proxy.on(request("commit")).does(Action::Cut(how));
        let mut connection = place.connect().await;
        let error = insert_and_commit(&mut connection, 1).await.unwrap_err();
        assert!(matches!(error, Error::Io(_)), "{error}");
        assert_eq!(cut.fired(), 1);
        assert_eq!(place.notes().await, 0);
        assert_eq!(place.proxy.traffic().executions("commit"), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_whose_client_is_cut_is_executed_to_its_end() {
    let place = Place::new().await;
    let cut = place.proxy.on(request("insert into note"));
    let cut = cut.does(Action::CutClient);
    let mut connection = place.connect().await;
    let slow = connection.execute("insert into note select 1 from pg_sleep(0.2)");
    assert!(matches!(slow.await.unwrap_err(), Error::Io(_)));
    assert_eq!(cut.fired(), 1);
    until("the statement to be executed", async || {
        (place.notes().await == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_are_matched_whether_they_are_prepared_or_not() {
    let place = Place::new().await;
    let mut connection = place.connect().await;
    // Prepared while there is no rule; from now on only bound and executed.
    insert(&mut connection, 1).await.unwrap();
    let fail = place.proxy.on(request("INSERT  into note")).times(3);
    let fail = fail.does(Action::Fail("40001"));
    let prepared_earlier = insert(&mut connection, 2).await;
    let by_text = connection.execute("insert into note\n values (3)").await;
    let unnamed = sqlx::query("insert into note select $1").bind(4);
    let unnamed = unnamed.persistent(false).execute(&mut connection).await;
    for failed in [prepared_earlier, by_text.map(drop), unnamed.map(drop)] {
        assert_eq!(sqlstate(&failed.unwrap_err()).as_deref(), Some("40001"));
    }
    assert_eq!(fail.fired(), 3);
    // Three times are over.
    insert(&mut connection, 5).await.unwrap();
    assert_eq!(place.notes().await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_nth_occurrence_is_counted_over_all_connections() {
    let place = Place::new().await;
    let fail = place.proxy.on(request("insert into note")).nth(3);
    let fail = fail.does(Action::Fail("53100"));
    for n in 1..=4 {
        let mut connection = place.connect().await;
        assert_eq!(insert(&mut connection, n).await.is_err(), n == 3);
    }
    assert_eq!(fail.fired(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_is_failed_fails_its_transaction_and_leaves_the_connection_usable() {
    let place = Place::new().await;
    let fail = place.proxy.on(request("insert into note")).nth(2);
    let fail = fail.does(Action::Fail("40P01"));
    let mut connection = place.connect().await;
    let mut transaction = connection.begin().await.unwrap();
    insert(&mut transaction, 1).await.unwrap();
    let error = insert(&mut transaction, 2).await.unwrap_err();
    assert_eq!(sqlstate(&error).as_deref(), Some("40P01"));
    let after = insert(&mut transaction, 3).await.unwrap_err();
    assert_eq!(sqlstate(&after).as_deref(), Some("25P02"));
    transaction.rollback().await.unwrap();
    insert(&mut connection, 4).await.unwrap();
    assert_eq!(fail.fired(), 1);
    assert_eq!(place.notes().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_failed_commits_nothing_and_ends_the_transaction() {
    let place = Place::new().await;
    let fail = place.proxy.on(request("commit"));
    let fail = fail.does(Action::Fail("40001"));
    let mut connection = place.connect().await;
    let error = insert_and_commit(&mut connection, 1).await.unwrap_err();
    assert_eq!(sqlstate(&error).as_deref(), Some("40001"));
    assert_eq!(fail.fired(), 1);
    insert_and_commit(&mut connection, 2).await.unwrap();
    assert_eq!(place.notes().await, 1);
    let failed = place.proxy.traffic().exchanges;
    let failed = failed.iter().find(|exchange| exchange.error.is_some());
    assert_eq!(failed.unwrap().status, Some('I'));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_held_is_passed_on_when_it_is_released() {
    let place = Place::new().await;
    let hold = place.proxy.on(request("insert into note"));
    let hold = hold.does(Action::Hold);
    let mut connection = place.connect().await;
    let inserting = tokio::spawn(async move { insert(&mut connection, 1).await });
    hold.has_fired(1).await;
    assert_eq!(place.notes().await, 0);
    assert!(!inserting.is_finished());
    hold.release();
    inserting.await.unwrap().unwrap();
    assert_eq!(place.notes().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_released_arrives_although_its_client_is_gone() {
    let place = Place::new().await;
    let hold = place.proxy.on(request("commit")).does(Action::Hold);
    let mut connection = place.connect().await;
    let committing = tokio::spawn(async move { insert_and_commit(&mut connection, 1).await });
    hold.has_fired(1).await;
    committing.abort();
    assert!(committing.await.unwrap_err().is_cancelled());
    hold.release();
    until("the commit to be answered", async || {
        let exchanges = place.proxy.traffic().exchanges;
        let commit = exchanges.iter().find(|one| one.executes("commit"));
        commit
            .is_some_and(|commit| commit.tags == ["COMMIT"])
            .then_some(())
    })
    .await;
    assert_eq!(place.notes().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_that_is_held_is_executed_already() {
    let place = Place::new().await;
    let hold = place.proxy.on(reply("insert into note"));
    let hold = hold.does(Action::Hold);
    let mut connection = place.connect().await;
    let inserting = tokio::spawn(async move { insert(&mut connection, 1).await });
    hold.has_fired(1).await;
    assert_eq!(place.notes().await, 1);
    assert!(!inserting.is_finished());
    hold.release();
    inserting.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_delayed_takes_that_long() {
    const DELAY: Duration = Duration::from_millis(150);
    let place = Place::new().await;
    let delay = place.proxy.on(request("insert into note"));
    let delay = delay.does(Action::Delay(DELAY));
    let mut connection = place.connect().await;
    let sent = Instant::now();
    insert(&mut connection, 1).await.unwrap();
    assert!(sent.elapsed() >= DELAY);
    assert_eq!(delay.fired(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_connection_stays_open_on_the_sides_that_it_should() {
    for server_open in [true, false] {
        let place = Place::new().await;
        let silent = place.proxy.on(request("insert into note"));
        let silent = silent.does(Action::Blackhole { server_open });
        let mut connection = place.connect().await;
        let name = "set application_name = 'through'";
        connection.execute(name).await.unwrap();
        let mut inserting = tokio::spawn(async move { insert(&mut connection, 1).await });
        silent.has_fired(1).await;
        if !server_open {
            until("the server's side to be closed", async || {
                (place.others().await == 0).then_some(())
            })
            .await;
        }
        let waited = tokio::time::timeout(Duration::from_millis(50), &mut inserting).await;
        assert!(waited.is_err(), "it was answered");
        assert_eq!(place.others().await, i64::from(server_open));
        place.proxy.cut();
        assert!(matches!(inserting.await.unwrap(), Err(Error::Io(_))));
        assert_eq!(place.notes().await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_is_a_blackhole_passes_on_what_it_kept_when_it_is_healed() {
    let place = Place::new().await;
    let mut connection = place.connect().await;
    place.proxy.blackhole();
    let before = place.proxy.traffic();
    let inserting = tokio::spawn(async move { insert(&mut connection, 1).await });
    let new = PgConnection::connect(place.proxy.url());
    let new = tokio::time::timeout(Duration::from_millis(50), new).await;
    assert!(new.is_err(), "it was answered");
    let passed = place.proxy.traffic().since(&before);
    assert_eq!((passed.request_bytes, passed.reply_bytes), (0, 0));
    place.proxy.heal();
    inserting.await.unwrap().unwrap();
    place.connect().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_refuses_cuts_and_strands_what_it_should() {
    let place = Place::new().await;
    let mut connection = place.connect().await;
    place.proxy.refuse();
    let refused = PgConnection::connect(place.proxy.url()).await;
    assert!(matches!(refused, Err(Error::Io(_))));
    insert(&mut connection, 1).await.unwrap();
    place.proxy.heal();
    place.proxy.cut();
    assert!(matches!(
        insert(&mut connection, 2).await,
        Err(Error::Io(_))
    ));
    let mut connection = place.connect().await;
    place.proxy.strand();
    let stranded = tokio::time::timeout(Duration::from_millis(50), insert(&mut connection, 3));
    assert!(stranded.await.is_err(), "it was answered");
    insert(&mut place.connect().await, 4).await.unwrap();
    assert_eq!(place.notes().await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_trips_are_counted_and_what_they_did_is_noted() {
    let place = Place::new().await;
    let mut connection = place.connect().await;
    // Whatever a new connection asks.
    insert_and_commit(&mut connection, 1).await.unwrap();
    let before = place.proxy.traffic();
    assert_eq!(before.connections, 1);
    insert_and_commit(&mut connection, 2).await.unwrap();
    let _: i64 = sqlx::query_scalar("select count(*) from note where n > $1")
        .bind(0)
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert!(connection.execute("select nonsense").await.is_err());
    // sqlx tells of an error before the server has said that it is ready again.
    let traffic = until("the end of the last exchange", async || {
        let traffic = place.proxy.traffic().since(&before);
        let last = traffic.exchanges.last();
        last.is_some_and(|last| last.status.is_some())
            .then_some(traffic)
    })
    .await;
    let count = "select count(*) from note where n > $1";
    let exchange = |executed: &str, tag: &str, status| Exchange {
        executed: vec![executed.to_owned()],
        tags: vec![tag.to_owned()],
        status: Some(status),
        ..Exchange::default()
    };
    let expected = [
        exchange("begin", "BEGIN", 'T'),
        exchange("insert into note values ($1)", "INSERT 0 1", 'T'),
        exchange("commit", "COMMIT", 'I'),
        Exchange {
            prepared: vec![count.to_owned()],
            status: Some('I'),
            ..Exchange::default()
        },
        exchange(count, "SELECT 1", 'I'),
        Exchange {
            tags: Vec::new(),
            error: Some("42703".to_owned()),
            ..exchange("select nonsense", "", 'I')
        },
    ];
    assert_eq!(traffic.exchanges, expected);
    assert_eq!(traffic.round_trips(), expected.len());
    assert_eq!(traffic.failures("42703"), 1);
    assert!(traffic.request_bytes > 0 && traffic.reply_bytes > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_replies_and_many_connections_come_through_in_order() {
    let place = Place::new().await;
    let (sum, numbers) = ("select n from generate_series(1, 100000) n", 1..=100_000);
    let reading = (0..8).map(|_| async {
        let mut connection = place.connect().await;
        let read = sqlx::query_scalar::<_, i32>(sum);
        read.fetch_all(&mut connection).await.unwrap()
    });
    for read in futures_util::future::join_all(reading).await {
        assert!(read.into_iter().eq(numbers.clone()));
    }
}
