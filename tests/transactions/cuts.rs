//! PostgreSQL behind a wire that is cut at the commit, or at what follows a transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tower_idempotency::{IdempotencyLayer, PgStore, Policy, Scope};

use crate::bank::postgres::Bank;
use crate::bank::{Banking, Sinks, paid};
use crate::site::{Runs, Site, eventually, policy};

#[derive(Clone, Copy, PartialEq)]
pub enum Cut {
    /// The server commits, and its answer is lost.
    Acknowledgement,
    /// The commit is lost, and the server does not know: it keeps the transaction open.
    Commit,
    /// The server rolls back and begins another transaction, and its answer is lost before anything is
    /// entered in that.
    Restart,
}

impl Cut {
    fn statement(self) -> &'static [u8] {
        match self {
            Self::Acknowledgement | Self::Commit => b"commit and chain",
            Self::Restart => b"rollback; start transaction",
        }
    }
}

/// Cuts the first connection on which such a statement is sent.
pub struct Wire {
    port: u16,
    pub cuts: Arc<AtomicUsize>,
    /// Ends the server's side of a connection that was cut before the commit.
    end: Arc<Notify>,
}

impl Wire {
    async fn start(server: (String, u16), cut: Cut) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let wire = Self {
            port: listener.local_addr().unwrap().port(),
            cuts: Arc::default(),
            end: Arc::default(),
        };
        let (cuts, end) = (wire.cuts.clone(), wire.end.clone());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect((server.0.as_str(), server.1));
                let server = server.await.unwrap();
                tokio::spawn(carry(client, server, cut, cuts.clone(), end.clone()));
            }
        });
        wire
    }
}

async fn carry(
    mut client: TcpStream,
    mut server: TcpStream,
    cut: Cut,
    cuts: Arc<AtomicUsize>,
    end: Arc<Notify>,
) {
    let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(length @ 1..) = read else { return };
                let statement = cut.statement();
                let mut sent = up[..length].windows(statement.len());
                if sent.any(|bytes| bytes == statement) && cuts.fetch_add(1, Ordering::SeqCst) == 0 {
                    if cut != Cut::Commit {
                        server.write_all(&up[..length]).await.unwrap();
                        assert!(server.read(&mut down).await.unwrap() > 0);
                        return;
                    }
                    drop(client);
                    end.notified().await;
                    return;
                }
                if server.write_all(&up[..length]).await.is_err() { return }
            }
            read = server.read(&mut down) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&down[..length]).await.is_err() { return }
            }
        }
    }
}

/// The bank's database at the other end of a wire.
pub async fn far(bank: &Bank, cut: Cut) -> (PgPool, Wire) {
    let url: PgConnectOptions = bank.database.url.parse().unwrap();
    let wire = Wire::start((url.get_host().to_owned(), url.get_port()), cut).await;
    let url = url.host("127.0.0.1").port(wire.port);
    (PgPoolOptions::new().connect_lazy_with(url), wire)
}

async fn wired(bank: &Bank, runs: &Runs, policy: Policy, cut: Cut) -> (Site, Wire) {
    let (pool, wire) = far(bank, cut).await;
    let store = PgStore::new(pool);
    let layer = IdempotencyLayer::new(store, Scope::header("x-tenant").unwrap())
        .with_policy(policy)
        .unwrap()
        .transactional();
    let routes = bank.routes(runs).route_layer(layer);
    let site = Site::start(routes.with_state(Sinks::default())).await;
    (site, wire)
}

#[tokio::test]
async fn t3_a_commit_whose_acknowledgement_is_lost_is_answered_and_replayed() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let policy = policy().with_reruns(3);
    let (site, wire) = wired(&bank, &runs, policy, Cut::Acknowledgement).await;
    let first = paid(&site, "a", "201").await;
    assert_eq!(wire.cuts.load(Ordering::SeqCst), 1);
    first.assert_run(1);
    paid(&site, "a", "201").await.assert_replay_of(&first);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

#[tokio::test]
async fn t3_a_commit_that_never_arrives_is_run_again_once_the_old_one_is_gone() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let (site, wire) = wired(&bank, &runs, policy().with_reruns(1), Cut::Commit).await;
    let end = async {
        // The probe meets the old transaction first.
        let waits = async || {
            let waiting = "select count(*) from pg_locks l join pg_stat_activity a using (pid)
                where a.datname = current_database() and not l.granted";
            sqlx::query_scalar::<_, i64>(waiting)
                .fetch_one(&bank.pool)
                .await
                .unwrap()
                > 0
        };
        eventually("the probe waits", waits).await;
        assert_eq!(bank.records().await, 0);
        wire.end.notify_one();
    };
    let (answer, ()) = tokio::join!(paid(&site, "a", "201"), end);
    answer.assert_run(2);
    paid(&site, "a", "201").await.assert_replay_of(&answer);
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

#[tokio::test]
async fn t3_a_commit_nobody_can_tell_of_is_a_503_and_never_runs_beside_the_old_one() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let policy = policy()
        .with_reruns(3)
        .with_settle_timeout(Duration::from_millis(700));
    let (site, wire) = wired(&bank, &runs, policy, Cut::Commit).await;
    let first = paid(&site, "a", "201").await;
    first.assert_problem(503, "answer-not-recorded");
    assert_eq!(wire.cuts.load(Ordering::SeqCst), 1);
    let retry = paid(&site, "a", "201").await;
    retry.assert_problem(409, "request-in-progress");
    wire.end.notify_one();
    eventually("the old transaction is over", async || {
        let answer = paid(&site, "a", "201").await;
        answer.status == 201
    })
    .await;
    assert_eq!((bank.ledger().await, bank.records().await), (1, 1));
}

#[tokio::test]
async fn t3_a_refusal_whose_rollback_is_not_acknowledged_is_not_recorded_and_its_key_is_free() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let (site, wire) = wired(&bank, &runs, policy(), Cut::Restart).await;
    let first = paid(&site, "a", "402").await;
    first.assert_problem(503, "transaction-conflict");
    assert_eq!(wire.cuts.load(Ordering::SeqCst), 1);
    assert_eq!((bank.ledger().await, bank.records().await), (0, 0));
    let retry = paid(&site, "a", "402").await;
    assert_eq!((retry.status.as_u16(), retry.is_replay()), (402, false));
    assert_eq!(retry.json()["run"], 2);
    paid(&site, "a", "402").await.assert_replay_of(&retry);
    assert_eq!((bank.ledger().await, bank.records().await), (0, 1));
}

#[tokio::test]
async fn t3_a_refusal_whose_rollback_is_not_acknowledged_is_run_again_where_the_policy_says() {
    let (bank, runs) = (Bank::start().await, Runs::free());
    let (site, wire) = wired(&bank, &runs, policy().with_reruns(1), Cut::Restart).await;
    let refused = paid(&site, "a", "402").await;
    assert_eq!((refused.status.as_u16(), refused.is_replay()), (402, false));
    assert_eq!(refused.json()["run"], 2);
    assert!(wire.cuts.load(Ordering::SeqCst) > 0);
    paid(&site, "a", "402").await.assert_replay_of(&refused);
    assert_eq!((bank.ledger().await, bank.records().await), (0, 1));
}
