//! What happens to the server, on a leased route and on a transactional one.

mod backends;
mod bouncer;
mod disks;
mod durability;
mod failover;
mod isolation;
mod open;
mod schema;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use faults::client::{Answer, Pay};
use faults::cluster::Cluster;
use faults::database::Database;
use faults::process::Subject;
use faults::proxy::Proxy;
use faults::settings::Settings;
use faults::wait::until;
use futures_util::future::join_all;
use tokio::task::JoinHandle;

use crate::{SUBJECT, assert_replays};

/// Makes of each rule a test on a leased route and one on a transactional one.
#[macro_export]
macro_rules! on_both_routes {
    ($($rule:ident),+ $(,)?) => {
        mod leased {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                super::$rule($crate::database::Route::Leased).await;
            })+
        }
        mod transactional {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $rule() {
                super::$rule($crate::database::Route::Transactional).await;
            })+
        }
    };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// Its handler writes to a database of its own, which is not hurt.
    Leased,
    /// Its handler writes to where its record is.
    Transactional,
}

impl Route {
    /// Where its handlers write, when their records are at `url`.
    async fn ledger(self, url: &str) -> Database {
        match self {
            Self::Leased => Database::sqlite().await,
            Self::Transactional => Database::foreign(url).await,
        }
    }

    /// Of a process with records at `url` that is not patient.
    fn settings(self, url: &str, ledger: &Database) -> Settings {
        Settings::new(url, "high").with(|s| {
            s.ledger = ledger.url.clone();
            s.transactional = self == Self::Transactional;
            s.store_timeout = Some(500);
            s.settle_timeout = Some(1000);
            s.lease = Some(2000);
        })
    }

    /// What may be answered while the database is hurt.
    fn documents(self, kind: &str) -> bool {
        let retryable = [
            "201",
            "store-unavailable",
            "answer-not-recorded",
            "transaction-conflict",
            "request-in-progress",
        ];
        // A statement of the handler itself that failed is the handler's to answer.
        retryable.contains(&kind) || self == Self::Transactional && kind == "500"
    }
}

/// A server that is about to be hurt, and a process that keeps its records there.
struct Service {
    route: Route,
    settings: Settings,
    subject: Subject,
    ledger: Database,
    proxy: Proxy,
    cluster: Cluster,
}

impl Service {
    async fn start(route: Route) -> Self {
        Self::on(route, Cluster::start().await).await
    }

    async fn on(route: Route, cluster: Cluster) -> Self {
        Self::with(route, cluster, |_| {}).await
    }

    async fn with(route: Route, cluster: Cluster, change: impl FnOnce(&mut Settings)) -> Self {
        let ledger = route.ledger(&cluster.url()).await;
        let proxy = Proxy::start(&cluster.url()).await;
        let settings = route.settings(proxy.url(), &ledger).with(change);
        let subject = SUBJECT.start(&settings).await;
        Self {
            route,
            settings,
            subject,
            ledger,
            proxy,
            cluster,
        }
    }

    async fn send(&self, pay: &Pay) -> Answer {
        pay.send(self.subject.port).await.unwrap()
    }

    /// An answered request. A busy machine may be slow: then it is a retry that is answered.
    async fn paid(&self) -> Sent {
        let (pay, at) = (Pay::new(""), Instant::now());
        let answer = self.settled(&pay).await;
        assert_eq!(answer.status, 201, "{}", answer.text());
        Sent {
            pay,
            answer,
            at,
            took: at.elapsed(),
        }
    }

    /// Some answered requests.
    async fn paid_times(&self, times: usize) -> Vec<Sent> {
        let mut all = Vec::new();
        for _ in 0..times {
            all.push(self.paid().await);
        }
        all
    }

    /// How many effects a key has.
    async fn effects(&self, pay: &Pay) -> usize {
        match self.route {
            Route::Leased => self.ledger.runs(&pay.key).await.len(),
            Route::Transactional => self.ledger.effects(&pay.key).await,
        }
    }

    /// The same, for many of which one after the other is asked.
    async fn runs(&self, pay: &Pay) -> usize {
        self.ledger.runs(&pay.key).await.len()
    }

    /// Retries until the key is settled.
    async fn settled(&self, pay: &Pay) -> Answer {
        settled(pay, self.subject.port).await
    }

    /// With the faults off: what was answered is answered again, nothing ran twice, no key is stuck.
    async fn holds(&self, sent: &[Sent]) {
        let mut kinds = BTreeMap::new();
        for Sent { pay, answer, .. } in sent {
            *kinds.entry(answer.kind()).or_insert(0) += 1;
            assert!(self.route.documents(&answer.kind()), "{answer:?}");
            let settled = self.settled(pay).await;
            if answer.status == 201 {
                assert_replays(&settled, answer);
            }
            let effects = self.runs(pay).await;
            if settled.status == 201 {
                assert_eq!(effects, 1, "{}", settled.text());
            } else {
                assert_eq!(settled.kind(), "attempt-lost");
                assert!(self.route == Route::Leased && effects <= 1, "{effects}");
            }
        }
        println!("{:?}: {kinds:?}", self.route);
        if self.route == Route::Transactional {
            assert_eq!(self.ledger.unpaired().await, 0);
            self.ledger.is_clean().await;
        }
    }
}

/// Serves as before the fault, within five seconds of its end; and soon on all connections, each of which
/// takes an unoptimised build on a busy machine a while to make.
async fn recovers(subject: &Subject) {
    let back = Instant::now();
    let serves = async |at_once: usize| {
        let pays: Vec<_> = (0..at_once).map(|_| Pay::new("")).collect();
        let answers = join_all(pays.iter().map(|pay| pay.send(subject.port))).await;
        let mut answers = answers.into_iter().map(Result::unwrap);
        let is_good = |answer: Answer| answer.status == 201 && !answer.is_unprotected();
        answers.all(is_good).then_some(())
    };
    until("the store to be used again", || serves(1)).await;
    let took = back.elapsed();
    println!("recovered after {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    until("all connections to be good", || serves(10)).await;
}

/// Retries until there is something else to say than that it runs or cannot run.
async fn settled(pay: &Pay, port: u16) -> Answer {
    until("a key to be settled", async || {
        let answer = pay.send(port).await.unwrap();
        let waits = [
            "request-in-progress",
            "store-unavailable",
            "answer-not-recorded",
            "transaction-conflict",
        ];
        (!waits.contains(&&*answer.kind())).then_some(answer)
    })
    .await
}

/// A request and what it was answered.
#[derive(Debug)]
struct Sent {
    pay: Pay,
    answer: Answer,
    at: Instant,
    took: Duration,
}

async fn sent(pay: &Pay, port: u16) -> Sent {
    let at = Instant::now();
    let answer = pay.send(port).await.unwrap();
    Sent {
        pay: pay.clone(),
        answer,
        at,
        took: at.elapsed(),
    }
}

/// Clients that send one request after the other, until they are told to end.
struct Load {
    is_over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Sent>>>,
}

impl Load {
    fn of(clients: usize, behave: &'static str, port: u16) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let client = |is_over: Arc<AtomicBool>| async move {
            let mut all = Vec::new();
            while !is_over.load(Ordering::SeqCst) {
                let sent = sent(&Pay::new(behave), port).await;
                if sent.answer.status == 503 {
                    // Clients wait when they are told to; not as long as they are told.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                all.push(sent);
            }
            all
        };
        let clients = (0..clients).map(|_| tokio::spawn(client(is_over.clone())));
        Self {
            clients: clients.collect(),
            is_over,
        }
    }

    async fn end(self) -> Vec<Sent> {
        self.is_over.store(true, Ordering::SeqCst);
        let clients = join_all(self.clients).await;
        clients.into_iter().flat_map(Result::unwrap).collect()
    }
}

fn count(sent: &[Sent], kind: &str) -> usize {
    let is_kind = |sent: &&Sent| sent.answer.kind() == kind;
    sent.iter().filter(is_kind).count()
}
