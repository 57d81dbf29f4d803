//! A proxy between a subject and PostgreSQL that understands what passes through it.
//!
//! It passes on whole requests (up to a Sync, or a Query), keeps their order, and can do an
//! [`Action`] to those that [execute a statement](request), or to their [replies](reply). A fault counts
//! in here how often it [fired](Fault::fired), and a [`Traffic`] tells what a client did.
//!
//! ```text
//! let proxy = Proxy::start(&database.url).await;
//! let cut = proxy.on(reply("commit")).does(Action::Cut(Close::Reset));
//! let subject = SUBJECT.start(&Settings::new(&proxy.url(), "high")).await;
//! // ..
//! assert_eq!(cut.fired(), 1);
//! ```

mod connection;
mod exchange;
mod rule;
mod wire;

use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::fired::fired;
use connection::Connection;
pub use exchange::Exchange;
use rule::Rules;
pub use rule::{Action, Close, Fault, Match, Rule, reply, request};

/// More are refused.
const MOST_CONNECTIONS: usize = 1000;
/// More are passed on, and not logged.
const MOST_EXCHANGES: usize = 1 << 20;

/// A proxy in this process. What passes through it is cut when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    url: String,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    server: Mutex<String>,
    rules: Rules,
    switch: watch::Sender<Switch>,
    traffic: Mutex<Traffic>,
    /// Of exchanges that are logged.
    most_exchanges: usize,
}

/// What is done to all connections.
#[derive(Debug, Clone, Default)]
struct Switch {
    is_blackhole: bool,
    is_refusing: bool,
    cuts: u64,
    strandings: u64,
}

/// What passed so far.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    /// Connections that were opened.
    pub connections: u64,
    /// Bytes that reached the server.
    pub request_bytes: u64,
    /// Bytes that reached clients.
    pub reply_bytes: u64,
    /// In the order in which they reached the server.
    pub exchanges: Vec<Exchange>,
}

impl Traffic {
    /// What passed after `before`.
    #[must_use]
    pub fn since(mut self, before: &Self) -> Self {
        self.connections -= before.connections;
        self.request_bytes -= before.request_bytes;
        self.reply_bytes -= before.reply_bytes;
        self.exchanges.drain(..before.exchanges.len());
        self
    }

    /// How often the server was waited for, but for new connections.
    #[must_use]
    pub fn round_trips(&self) -> usize {
        let answered =
            |exchange: &&Exchange| exchange.status.is_some() && !exchange.executes("startup");
        self.exchanges.iter().filter(answered).count()
    }

    /// How many exchanges execute a statement that contains these words.
    #[must_use]
    pub fn executions(&self, words: &str) -> usize {
        let exchanges = self.exchanges.iter();
        exchanges
            .filter(|exchange| exchange.executes(words))
            .count()
    }

    /// How many exchanges failed with a SQLSTATE.
    #[must_use]
    pub fn failures(&self, sqlstate: &str) -> usize {
        let exchanges = self.exchanges.iter();
        exchanges
            .filter(|exchange| exchange.error.as_deref() == Some(sqlstate))
            .count()
    }
}

impl Proxy {
    /// In front of the server of a `postgres://` URL.
    ///
    /// # Panics
    ///
    /// When the URL names no server.
    pub async fn start(url: &str) -> Self {
        Self::start_with(url, MOST_EXCHANGES).await
    }

    /// One that logs no exchanges, to be used for as long as one likes.
    ///
    /// # Panics
    ///
    /// When the URL names no server.
    pub async fn start_forgetful(url: &str) -> Self {
        Self::start_with(url, 0).await
    }

    async fn start_with(url: &str, most_exchanges: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("there are free ports");
        let address = listener.local_addr().expect("it is bound").to_string();
        let (before, server, after) = split(url).expect("postgres://user@host:port/database");
        let shared = Arc::new(Shared {
            server: Mutex::new(server.to_owned()),
            rules: Rules::default(),
            switch: watch::channel(Switch::default()).0,
            traffic: Mutex::default(),
            most_exchanges,
        });
        Self {
            url: format!("{before}{address}{after}"),
            accepting: tokio::spawn(accept(listener, shared.clone())),
            shared,
        }
    }

    /// The URL that leads through it.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A rule for some messages. Of those that match, the oldest counts.
    pub fn on(&self, matching: Match) -> Rule<'_> {
        Rule::new(&self.shared.rules, matching)
    }

    /// Leads new connections to another server, as a failover does.
    ///
    /// # Panics
    ///
    /// When the URL names no server.
    pub fn lead_to(&self, url: &str) {
        let (_, server, _) = split(url).expect("postgres://user@host:port/database");
        server.clone_into(&mut self.shared.server.lock().expect("no panic holds it"));
    }

    /// Passes nothing on, of whatever connection, until it is [healed](Self::heal).
    pub fn blackhole(&self) {
        fired("proxy blackhole");
        self.switch(|switch| switch.is_blackhole = true);
    }

    /// Passes nothing on of the connections that are there, for ever; new ones are served.
    pub fn strand(&self) {
        fired("proxy strand");
        self.switch(|switch| switch.strandings += 1);
    }

    /// Resets new connections, until it is [healed](Self::heal).
    pub fn refuse(&self) {
        fired("proxy refuse");
        self.switch(|switch| switch.is_refusing = true);
    }

    /// Resets the connections that are there, silent ones too.
    pub fn cut(&self) {
        fired("proxy cut all");
        self.switch(|switch| switch.cuts += 1);
    }

    /// Ends all faults: rules, and what was done to all. What was cut or has fallen silent stays so.
    pub fn heal(&self) {
        self.shared.rules.clear();
        self.switch(|switch| {
            switch.is_blackhole = false;
            switch.is_refusing = false;
        });
    }

    /// What passed so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.shared
            .traffic
            .lock()
            .expect("no panic holds it")
            .clone()
    }

    fn switch(&self, change: impl FnOnce(&mut Switch)) {
        self.shared.switch.send_modify(change);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Shared {
    fn server(&self) -> String {
        self.server.lock().expect("no panic holds it").clone()
    }

    fn count(&self, change: impl FnOnce(&mut Traffic)) {
        change(&mut self.traffic.lock().expect("no panic holds it"));
    }

    /// Its place in the log.
    fn log(&self, exchange: Exchange) -> usize {
        let mut traffic = self.traffic.lock().expect("no panic holds it");
        let place = traffic.exchanges.len();
        if place == self.most_exchanges {
            return usize::MAX;
        }
        traffic.exchanges.push(exchange);
        place
    }

    fn answered(&self, place: usize, change: impl FnOnce(&mut Exchange)) {
        self.count(|traffic| {
            if let Some(exchange) = traffic.exchanges.get_mut(place) {
                change(exchange);
            }
        });
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Dropped with this task, and with it all connections.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                let is_refusing = shared.switch.borrow().is_refusing;
                if is_refusing || connections.len() >= MOST_CONNECTIONS {
                    connection::reset(client);
                    continue;
                }
                connections.spawn(serve(shared.clone(), client));
            }
        }
    }
}

async fn serve(shared: Arc<Shared>, client: TcpStream) {
    let mut id = 0;
    shared.count(|traffic| {
        id = traffic.connections;
        traffic.connections += 1;
    });
    if client.set_nodelay(true).is_ok() {
        Connection::new(shared, id).serve(client).await;
    }
}

/// Before the server, the server, and after.
fn split(url: &str) -> Option<(&str, &str, &str)> {
    let start = url.rfind('@')? + 1;
    let end = url[start..].find('/').map_or(url.len(), |at| start + at);
    let server = &url[start..end];
    server
        .contains(':')
        .then(|| (&url[..start], server, &url[end..]))
}
