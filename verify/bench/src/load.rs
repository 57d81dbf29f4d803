//! Connections that each send a request when the answer to the last one is there, on one thread.

use std::io::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Barrier, oneshot};
use tokio::task::JoinSet;

use crate::http1::{Connection, Template};
use crate::keys::{Keys, Version};

/// What is asked, again and again.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ask {
    /// Each request under a new key.
    Fresh(Version),
    /// Each connection repeats so many requests of its own, which were answered before.
    Replays(usize),
    /// What no layer covers.
    Get,
}

/// Whose cookie the requests carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sessions {
    None,
    /// One client sends them all.
    One,
    /// Each connection is a client of its own.
    Each,
}

#[derive(Debug, Clone)]
pub(crate) struct Load {
    /// Connections are spread over them.
    pub(crate) ports: Vec<u16>,
    pub(crate) connections: usize,
    pub(crate) ask: Ask,
    /// Bytes of each answer.
    pub(crate) answer: usize,
    pub(crate) sessions: Sessions,
    /// How many requests there are a second, over all connections; else as many as are answered.
    pub(crate) pace: Option<f64>,
}

/// A load on its way.
#[derive(Debug)]
pub(crate) struct Running {
    counts: Arc<Counts>,
    ready: oneshot::Receiver<()>,
    thread: JoinHandle<Result<Vec<u32>>>,
}

#[derive(Debug, Default)]
struct Counts {
    done: AtomicU64,
    failed: AtomicU64,
    is_measured: AtomicBool,
    is_over: AtomicBool,
}

/// All that was sent, from the first request on.
#[derive(Debug)]
pub(crate) struct Sent {
    /// Microseconds of each request that was measured, sorted.
    pub(crate) latencies: Vec<u32>,
    pub(crate) done: u64,
    pub(crate) failed: u64,
}

impl Load {
    /// Starts it.
    pub(crate) fn start(self) -> Running {
        let counts = Arc::new(Counts::default());
        let (sender, ready) = oneshot::channel();
        let shared = counts.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build()?;
            runtime.block_on(drive_all(self, shared, sender))
        });
        Running {
            counts,
            ready,
            thread,
        }
    }
}

impl Running {
    /// Waits until all connections send what is to be measured.
    pub(crate) async fn ready(&mut self) {
        // Where it fails, its end says why.
        let _ = (&mut self.ready).await;
    }

    /// Requests that were answered until now.
    pub(crate) fn done(&self) -> u64 {
        self.counts.done.load(Ordering::Relaxed)
    }

    pub(crate) fn measure(&self, is_measured: bool) {
        self.counts
            .is_measured
            .store(is_measured, Ordering::Relaxed);
    }

    /// Ends it with the requests that are under way.
    pub(crate) async fn end(self) -> Result<Sent> {
        self.counts.is_over.store(true, Ordering::Relaxed);
        let thread = self.thread;
        let ended = tokio::task::spawn_blocking(move || thread.join()).await?;
        let mut latencies = ended.map_err(|_| Error::other("the load panicked"))??;
        latencies.sort_unstable();
        Ok(Sent {
            latencies,
            done: self.counts.done.load(Ordering::Relaxed),
            failed: self.counts.failed.load(Ordering::Relaxed),
        })
    }
}

async fn drive_all(
    load: Load,
    counts: Arc<Counts>,
    ready: oneshot::Sender<()>,
) -> Result<Vec<u32>> {
    let cookie = match load.sessions {
        Sessions::One => Some(Connection::open(load.ports[0]).await?.cookie().await?),
        Sessions::None | Sessions::Each => None,
    };
    let load = Arc::new(load);
    let barrier = Arc::new(Barrier::new(load.connections + 1));
    let mut clients = JoinSet::new();
    for index in 0..load.connections {
        let (load, counts, barrier) = (load.clone(), counts.clone(), barrier.clone());
        let cookie = cookie.clone();
        clients.spawn(async move {
            let client = Client::open(&load, index, cookie, counts).await?;
            barrier.wait().await;
            client.drive(&load, index).await
        });
    }
    tokio::select! {
        _ = barrier.wait() => {}
        Some(Ok(Err(error))) = clients.join_next() => return Err(error),
    }
    let _ = ready.send(());
    let mut latencies = Vec::new();
    while let Some(client) = clients.join_next().await {
        latencies.append(&mut client??);
    }
    Ok(latencies)
}

struct Client {
    connection: Connection,
    template: Template,
    keys: Keys,
    counts: Arc<Counts>,
    answer: usize,
}

impl Client {
    /// Connects, and sends what will be repeated.
    async fn open(
        load: &Load,
        index: usize,
        cookie: Option<String>,
        counts: Arc<Counts>,
    ) -> Result<Self> {
        let port = load.ports[index % load.ports.len()];
        let mut connection = Connection::open(port).await?;
        let cookie = match load.sessions {
            Sessions::Each => Some(connection.cookie().await?),
            Sessions::None | Sessions::One => cookie,
        };
        let mut client = Self {
            connection,
            template: match load.ask {
                Ask::Get => Template::get(),
                _ => Template::charge(cookie.as_deref()),
            },
            keys: Keys::new(load.ask),
            counts,
            answer: load.answer,
        };
        for _ in 0..client.keys.repeated() {
            if !client.ask().await? {
                return Err(Error::other("what is to be repeated has failed"));
            }
        }
        Ok(client)
    }

    async fn drive(mut self, load: &Load, index: usize) -> Result<Vec<u32>> {
        let mut latencies = Vec::new();
        let share = |rate: f64| Duration::from_secs_f64(index_count(load.connections) / rate);
        let mut ticks = load
            .pace
            .map(|rate| ticks(share(rate), index, load.connections));
        while !self.counts.is_over.load(Ordering::Relaxed) {
            if let Some(ticks) = &mut ticks {
                ticks.tick().await;
            }
            let asked = Instant::now();
            self.ask().await?;
            if self.counts.is_measured.load(Ordering::Relaxed) {
                latencies.push(u32::try_from(asked.elapsed().as_micros()).unwrap_or(u32::MAX));
            }
        }
        Ok(latencies)
    }

    /// Whether the answer was the right one.
    async fn ask(&mut self) -> Result<bool> {
        if let Some(key) = self.keys.next() {
            self.template.put(&key);
        }
        let answer = self.connection.ask(&self.template).await?;
        let is_right = answer.status == 201 && answer.length == self.answer;
        self.counts.done.fetch_add(1, Ordering::Relaxed);
        if !is_right {
            self.counts.failed.fetch_add(1, Ordering::Relaxed);
            if answer.status != 201 && answer.status < 500 {
                let kind = ErrorKind::InvalidData;
                return Err(Error::new(
                    kind,
                    format!("an answer with {}", answer.status),
                ));
            }
        }
        Ok(is_right)
    }
}

#[expect(clippy::cast_precision_loss, reason = "there are few connections")]
fn index_count(connections: usize) -> f64 {
    connections as f64
}

/// Those of different connections are spread over the time between them.
fn ticks(period: Duration, index: usize, connections: usize) -> tokio::time::Interval {
    let offset = period.mul_f64(index_count(index) / index_count(connections));
    tokio::time::interval_at(tokio::time::Instant::now() + offset, period)
}
