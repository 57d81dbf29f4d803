//! One connection through the proxy.

use std::collections::VecDeque;
use std::io::Result;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::SockRef;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::watch;

use super::exchange::{Request, Session, raise};
use super::rule::{Action, Close, Fault};
use super::wire::{self, Message, Messages};
use super::{Shared, Switch};
use crate::fired::fired;
use crate::wait::PATIENCE;

/// How a connection ends.
enum End {
    Closed(Close),
    ClientGone,
    Silent { server_open: bool },
}

/// A request that the server has not answered to the end.
struct Waiting {
    /// Its place in the log.
    exchange: usize,
    fault: Option<Fault>,
    /// Whether something else was sent to the server in its place, that fails.
    is_replaced: bool,
}

pub(super) struct Connection {
    shared: Arc<Shared>,
    switch: watch::Receiver<Switch>,
    /// What had been done when it was accepted.
    before: Switch,
    id: u64,
    waiting: Mutex<VecDeque<Waiting>>,
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, id: u64) -> Self {
        let before = shared.switch.borrow().clone();
        Self {
            switch: shared.switch.subscribe(),
            before,
            shared,
            id,
            waiting: Mutex::default(),
        }
    }

    /// Serves it to its end. Errors of its sockets are ends like others.
    pub(super) async fn serve(self, mut client: TcpStream) {
        let mut startup = Messages::new(&mut client);
        // In this order, because what is sent after a switch must not pass any more.
        let opened = tokio::select! {
            biased;
            end = self.switched() => {
                self.finish(end, client, None).await;
                return;
            }
            opened = self.open(&mut startup) => opened,
        };
        let Ok(Some((mut server, first))) = opened else {
            return;
        };
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let mut replies = Messages::new(from_server);
        let end = tokio::select! {
            biased;
            end = self.switched() => Ok(end),
            end = self.requests(from_client, to_server, first) => end,
            end = self.replies(&mut replies, to_client) => end,
        };
        let end = end.unwrap_or(End::Closed(Close::Fin));
        if matches!(end, End::ClientGone) {
            reset(client);
            // Not longer than anything may take; the server is closed then.
            let _ = tokio::time::timeout(PATIENCE, self.drain(&mut replies)).await;
        } else {
            self.finish(end, client, Some(server)).await;
        }
    }

    async fn finish(&self, end: End, client: TcpStream, server: Option<TcpStream>) {
        match end {
            End::Closed(Close::Fin) | End::ClientGone => {}
            End::Closed(Close::Reset) => {
                reset(client);
                reset_all(server);
            }
            End::Silent { server_open } => {
                let kept = server.filter(|_| server_open);
                self.cut().await;
                reset_all(kept.into_iter().chain([client]));
            }
        }
    }

    /// Until somebody asks for a session. Nothing is encrypted, so that everything can be read.
    async fn open(
        &self,
        client: &mut Messages<&mut TcpStream>,
    ) -> Result<Option<(TcpStream, Bytes)>> {
        loop {
            let Some((code, message)) = client.first().await? else {
                return Ok(None);
            };
            self.passable().await;
            if matches!(code, wire::SSL | wire::GSSENC) {
                client.writer().write_all(b"N").await?;
                continue;
            }
            let server = self.shared.server();
            let mut server = TcpStream::connect(server).await?;
            server.set_nodelay(true)?;
            if code == wire::CANCEL {
                server.write_all(&message).await?;
                return Ok(None);
            }
            return Ok(Some((server, message)));
        }
    }

    async fn requests(
        &self,
        from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        first: Bytes,
    ) -> Result<End> {
        let mut messages = Messages::new(from);
        let mut session = Session::default();
        let mut startup = Request {
            bytes: BytesMut::from(&first[..]),
            is_answered: true,
            ..Request::default()
        };
        startup.exchange.executed.push("startup".to_owned());
        if let Some(end) = self.request(startup, &mut to).await? {
            return Ok(end);
        }
        while let Ok(Some(message)) = messages.next().await {
            let Some(request) = session.note(&message) else {
                continue;
            };
            if let Some(end) = self.request(request, &mut to).await? {
                return Ok(end);
            }
        }
        // The server works on what it has got, and then reads its end of file.
        to.shutdown().await?;
        std::future::pending().await
    }

    /// Passes one request on, or ends the connection.
    async fn request(&self, mut request: Request, to: &mut WriteHalf<'_>) -> Result<Option<End>> {
        self.passable().await;
        request.exchange.connection = self.id;
        let rules = &self.shared.rules;
        let on_request = request.is_answered.then_some(&request.exchange);
        let on_request = on_request.and_then(|exchange| rules.find(exchange, false));
        let mut end = None;
        let mut is_replaced = false;
        match on_request.as_ref().map(Fault::fire) {
            None => {}
            Some(Action::Delay(time)) => tokio::time::sleep(*time).await,
            Some(Action::Hold) => {
                if let Some(fault) = &on_request {
                    fault.released().await;
                }
            }
            Some(Action::Cut(how)) => return Ok(Some(End::Closed(*how))),
            Some(&Action::Blackhole { server_open }) => {
                return Ok(Some(End::Silent { server_open }));
            }
            Some(Action::CutClient) => end = Some(End::ClientGone),
            Some(Action::Fail(sqlstate)) => {
                request.bytes = BytesMut::from(&raise(sqlstate, &request.exchange)[..]);
                is_replaced = true;
            }
        }
        self.passable().await;
        self.shared.count(|traffic| {
            traffic.request_bytes += request.bytes.len() as u64;
        });
        if request.is_answered {
            let fault = rules.find(&request.exchange, true);
            let exchange = self.shared.log(request.exchange);
            self.waiting().push_back(Waiting {
                exchange,
                fault,
                is_replaced,
            });
        }
        if to.write_all(&request.bytes).await.is_err() {
            // What the server said last is still to be passed on.
            std::future::pending::<()>().await;
        }
        Ok(end)
    }

    async fn replies(
        &self,
        from: &mut Messages<ReadHalf<'_>>,
        mut to: WriteHalf<'_>,
    ) -> Result<End> {
        let mut ready = BytesMut::new();
        let mut withheld = BytesMut::new();
        while let Some(message) = from.next().await? {
            let (fault, passes) = self.note(&message);
            let out = if fault.is_some() {
                &mut withheld
            } else {
                &mut ready
            };
            if passes {
                out.extend_from_slice(&message.0);
            }
            let mut passed = Ok(());
            if let Some(fault) = fault.filter(|_| message.kind() == b'Z') {
                passed = self.pass(&mut ready, &mut to).await;
                if let Some(end) = act(&fault).await {
                    return Ok(end);
                }
                ready.unsplit(withheld.split());
            }
            if passed.is_ok() && !from.has_more() {
                passed = self.pass(&mut ready, &mut to).await;
            }
            if passed.is_err() {
                return Ok(End::ClientGone);
            }
        }
        // A reply that is withheld and breaks off is passed on as far as it came.
        ready.unsplit(withheld);
        self.pass(&mut ready, &mut to).await?;
        Ok(End::Closed(Close::Fin))
    }

    async fn pass(&self, bytes: &mut BytesMut, to: &mut WriteHalf<'_>) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.passable().await;
        self.shared
            .count(|traffic| traffic.reply_bytes += bytes.len() as u64);
        to.write_all(&bytes.split()).await
    }

    /// Reads what a client that is gone had asked for.
    async fn drain(&self, from: &mut Messages<ReadHalf<'_>>) -> Result<()> {
        while !self.waiting().is_empty() {
            let Some(message) = from.next().await? else {
                break;
            };
            self.note(&message);
        }
        Ok(())
    }

    /// Logs a message of the server: what is to be done to the reply that it is part of, and
    /// whether the client is to see it.
    fn note(&self, message: &Message) -> (Option<Fault>, bool) {
        let kind = message.kind();
        let mut waiting = self.waiting();
        let Some(front) = waiting.front() else {
            return (None, true);
        };
        let (fault, exchange) = (front.fault.clone(), front.exchange);
        if kind == b'E' && !front.is_replaced {
            count(message.sqlstate());
        }
        let passes = !front.is_replaced || matches!(kind, b'E' | b'Z');
        if kind == b'Z' {
            waiting.pop_front();
        }
        drop(waiting);
        self.shared.answered(exchange, |exchange| match kind {
            b'C' if passes => {
                let [tag] = message.strings();
                exchange.tags.push(tag);
            }
            b'E' => exchange.error = message.sqlstate(),
            b'Z' => exchange.status = message.body().first().map(|&status| status.into()),
            _ => {}
        });
        (fault, passes)
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().expect("no panic holds it")
    }

    /// Waits while nothing passes.
    async fn passable(&self) {
        let mut switch = self.switch.clone();
        // The sender lives as long as this does.
        let _ = switch.wait_for(|switch| !switch.is_blackhole).await;
    }

    /// Ends when all connections that were there are cut.
    async fn cut(&self) {
        let mut switch = self.switch.clone();
        let _ = switch.wait_for(|now| now.cuts > self.before.cuts).await;
    }

    /// Ends when something is done to all connections that were there.
    async fn switched(&self) -> End {
        let before = &self.before;
        let mut switch = self.switch.clone();
        let changed = |now: &Switch| now.cuts > before.cuts || now.strandings > before.strandings;
        match switch.wait_for(changed).await {
            Ok(now) if now.cuts == before.cuts => End::Silent { server_open: true },
            _ => End::Closed(Close::Reset),
        }
    }
}

/// What is done to a reply; whether that ends the connection.
async fn act(fault: &Fault) -> Option<End> {
    match fault.fire() {
        Action::Delay(time) => tokio::time::sleep(*time).await,
        Action::Hold => fault.released().await,
        Action::Cut(how) => return Some(End::Closed(*how)),
        Action::CutClient => return Some(End::ClientGone),
        &Action::Blackhole { server_open } => return Some(End::Silent { server_open }),
        Action::Fail(_) => {}
    }
    None
}

/// What the server itself failed with, where that is a fault of this table: it has no resources left, it
/// ended one of two transactions, or it is read-only.
fn count(sqlstate: Option<String>) {
    let sqlstate = sqlstate.unwrap_or_default();
    if sqlstate.starts_with("53") || sqlstate.starts_with("40") || sqlstate == "25006" {
        fired(&format!("server error {sqlstate}"));
    }
}

fn reset_all(streams: impl IntoIterator<Item = TcpStream>) {
    streams.into_iter().for_each(reset);
}

pub(super) fn reset(stream: TcpStream) {
    // A socket that is closed already needs no reset.
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    drop(stream);
}
