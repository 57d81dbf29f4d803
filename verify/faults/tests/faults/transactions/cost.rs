//! What a transactional request costs the database: counted, on a server of its own.

use faults::client::{Answer, Pay};
use faults::cluster::Cluster;
use faults::database::Database;
use faults::process::Subject;
use faults::proxy::{Exchange, Proxy, Traffic};
use faults::wait::until;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _};

use super::{BEGIN, COMMIT, LOOKUP, RECORD, WRITE, behind};
use crate::assert_replays;

/// Of the handler's own transaction: BEGIN, its write, COMMIT.
const OWN_ROUND_TRIPS: usize = 3;

struct Place {
    subject: Subject,
    proxy: Proxy,
    _database: Database,
    cluster: Cluster,
}

impl Place {
    /// Nobody else asks the server for anything, and it does nothing by itself.
    async fn new() -> Self {
        let cluster = Cluster::start().await;
        let mut admin = PgConnection::connect(&cluster.url()).await.unwrap();
        for sql in [
            "alter system set autovacuum = off",
            "select pg_reload_conf()",
        ] {
            let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut admin).await;
            done.unwrap();
        }
        let database = Database::foreign(&cluster.url()).await;
        let proxy = Proxy::start(&cluster.url()).await;
        let subject = behind(&proxy, &database, |s| s.replay_cache = false).await;
        Self {
            subject,
            proxy,
            _database: database,
            cluster,
        }
    }

    async fn sent(&self, pay: &Pay) -> (Answer, Cost) {
        let (traffic, ids) = (self.proxy.traffic(), self.next_id().await);
        let answer = pay.send(self.subject.port).await.unwrap();
        assert_eq!(answer.status, 201, "{}", answer.text());
        let ids = self.next_id().await - ids;
        let traffic = self.proxy.traffic().since(&traffic);
        (answer, Cost { traffic, ids })
    }

    async fn next_id(&self) -> i64 {
        let mut connection = PgConnection::connect(&self.cluster.url()).await.unwrap();
        let next = "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint";
        let next = sqlx::query_scalar(next).fetch_one(&mut connection).await;
        connection.close().await.unwrap();
        next.unwrap()
    }

    /// A request and its replay, when nothing is prepared for the first time.
    async fn warm(&self) -> [Cost; 2] {
        until("every statement to be prepared", async || {
            let pay = Pay::new("");
            let (first, fresh) = self.sent(&pay).await;
            let (again, replay) = self.sent(&pay).await;
            assert_replays(&again, &first);
            let mut exchanges = fresh
                .traffic
                .exchanges
                .iter()
                .chain(&replay.traffic.exchanges);
            exchanges
                .all(|exchange| exchange.prepared.is_empty())
                .then_some([fresh, replay])
        })
        .await
    }
}

#[derive(Debug)]
struct Cost {
    traffic: Traffic,
    ids: i64,
}

impl Cost {
    /// Those that the client waits for: not the ping of a connection that is given back, nor the
    /// end of the empty transaction that its commit was chained to.
    fn round_trips(&self) -> Vec<&Exchange> {
        let exchanges = self.traffic.exchanges.iter();
        // Nobody waits for a connection that goes back to its pool.
        let returns = |one: &Exchange| one.executes("rollback") || one.executes("as asked");
        let waited = |one: &&Exchange| !one.executed.is_empty() && !returns(one);
        exchanges.filter(waited).collect()
    }
}

/// Beyond those of the handler's own transaction: one lookup, and the record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t3_a_request_costs_two_round_trips_more_than_the_transaction_of_its_handler() {
    let place = Place::new().await;
    let [fresh, replay] = place.warm().await;
    let round_trips = fresh.round_trips();
    let statements = [LOOKUP, BEGIN, WRITE, RECORD, COMMIT];
    assert_eq!(round_trips.len(), OWN_ROUND_TRIPS + 2, "{round_trips:?}");
    for (round_trip, statement) in round_trips.iter().zip(statements) {
        assert!(round_trip.executes(statement), "{round_trip:?}");
    }
    let round_trips = replay.round_trips();
    assert_eq!(round_trips.len(), 1, "{round_trips:?}");
    assert!(round_trips[0].executes(LOOKUP));
}

/// What a refused handler has written and undone took one of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t3_a_request_takes_one_transaction_id_and_a_replay_none_and_no_transaction() {
    let place = Place::new().await;
    let [fresh, replay] = place.warm().await;
    assert_eq!(fresh.ids, 1);
    assert_eq!(replay.ids, 0);
    assert_eq!(replay.traffic.executions("begin"), 0);
    assert_eq!(replay.traffic.executions("enter"), 0);
    let refused = Pay::new("status=404");
    let before = place.next_id().await;
    let answer = refused.send(place.subject.port).await.unwrap();
    assert_eq!(answer.status, 404);
    assert_eq!(place.next_id().await - before, 2);
}
