//! HTTP/1.1 by hand: a client that can do what well-behaved ones cannot.

use std::io::{Error, ErrorKind, Result};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::fired::fired;
use crate::wait::{PATIENCE, until};

/// A keyed `POST /pay`.
#[derive(Debug, Clone)]
pub struct Pay {
    /// `idempotency-key`.
    pub key: String,
    /// `x-tenant`.
    pub tenant: String,
    /// `x-behave`: see [`crate::subject`].
    pub behave: String,
    /// The body, as it is.
    pub body: String,
}

impl Pay {
    /// A payment under a new key.
    #[must_use]
    pub fn new(behave: &str) -> Self {
        Self {
            key: crate::random::fresh_key(),
            tenant: "acme".into(),
            behave: behave.into(),
            body: r#"{"amount":100}"#.into(),
        }
    }

    /// The same payment to a handler that behaves otherwise.
    #[must_use]
    pub fn behaving(&self, behave: &str) -> Self {
        Self {
            behave: behave.into(),
            ..self.clone()
        }
    }

    /// Another payment under the same key.
    #[must_use]
    pub fn with_body(&self, body: &str) -> Self {
        Self {
            body: body.into(),
            ..self.clone()
        }
    }

    /// The head, up to the line that says how long the body is.
    fn begin(&self) -> String {
        format!(
            "POST /pay HTTP/1.1\r\nhost: subject\r\ncontent-type: application/json\r\n\
             idempotency-key: {}\r\nx-tenant: {}\r\nx-behave: {}\r\n",
            self.key, self.tenant, self.behave
        )
    }

    /// The head of a body with a length.
    #[must_use]
    pub fn head(&self) -> String {
        format!(
            "{}content-length: {}\r\n\r\n",
            self.begin(),
            self.body.len()
        )
    }

    /// The whole request.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        (self.head() + &self.body).into_bytes()
    }

    /// The whole request, its body in two chunks without a length; without `last`, it never ends.
    #[must_use]
    pub fn chunked(&self, last: bool) -> Vec<u8> {
        let (one, two) = self.body.split_at(self.body.len() / 2);
        let mut bytes = self.begin() + "transfer-encoding: chunked\r\n\r\n";
        for part in [one, two] {
            bytes += &format!("{:x}\r\n{part}\r\n", part.len());
        }
        if last {
            bytes += "0\r\n\r\n";
        }
        bytes.into_bytes()
    }

    /// Sends it, and reads the answer.
    ///
    /// # Errors
    ///
    /// A connection that cannot be made, or breaks off.
    pub async fn send(&self, port: u16) -> Result<Answer> {
        let mut connection = self.begin_on(port).await?;
        connection.answer().await
    }

    /// Sends it, and leaves the answer to be read.
    ///
    /// # Errors
    ///
    /// A connection that cannot be made, or breaks off.
    pub async fn begin_on(&self, port: u16) -> Result<Connection> {
        let mut connection = Connection::open(port).await?;
        connection.write(&self.bytes()).await?;
        Ok(connection)
    }
}

/// One TCP connection to a subject.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When nobody listens.
    pub async fn open(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Writes some bytes.
    ///
    /// # Errors
    ///
    /// When the other end has gone.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Says that nothing more will be sent, and stays to read.
    ///
    /// # Errors
    ///
    /// When the other end has gone.
    pub async fn half_close(&mut self) -> Result<()> {
        fired("half-close");
        self.stream.shutdown().await
    }

    /// Which connection it is, to ask the kernel what became of it.
    ///
    /// # Panics
    ///
    /// When it is not connected.
    #[must_use]
    pub fn ends(&self) -> Ends {
        let port = |address: Result<std::net::SocketAddr>| address.expect("a connection").port();
        Ends {
            client: port(self.stream.local_addr()),
            server: port(self.stream.peer_addr()),
        }
    }

    /// Closes in order: the other end reads an end of file.
    pub fn fin(self) {
        fired("fin");
        drop(self.stream);
    }

    /// Closes with a reset.
    ///
    /// # Panics
    ///
    /// When the socket refuses.
    pub fn reset(self) {
        SockRef::from(&self.stream)
            .set_linger(Some(Duration::ZERO))
            .expect("a socket can linger");
        fired("reset");
        drop(self.stream);
    }

    /// Reads until at least this many bytes came, or the end.
    ///
    /// # Errors
    ///
    /// A connection that breaks off.
    pub async fn read_at_least(&mut self, count: usize) -> Result<usize> {
        while self.buffer.len() < count {
            if self.read_more().await? == 0 {
                break;
            }
        }
        Ok(self.buffer.len())
    }

    /// Reads one answer.
    ///
    /// # Errors
    ///
    /// A connection that breaks off, or an answer that takes too long.
    pub async fn answer(&mut self) -> Result<Answer> {
        tokio::time::timeout(PATIENCE, self.read_answer())
            .await
            .unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
    }

    async fn read_answer(&mut self) -> Result<Answer> {
        let head = loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                break self.take(end + 4);
            }
            self.need_more().await?;
        };
        let mut answer = Answer::parse(&head)?;
        answer.body = if let Some(length) = answer.header("content-length") {
            let length = length.parse().map_err(Error::other)?;
            self.exactly(length).await?
        } else if answer.header("transfer-encoding").is_some() {
            self.chunks().await?
        } else {
            Vec::new()
        };
        Ok(answer)
    }

    async fn chunks(&mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = loop {
                if let Some(end) = find(&self.buffer, b"\r\n") {
                    break self.take(end + 2);
                }
                self.need_more().await?;
            };
            let length = String::from_utf8_lossy(&line);
            let length = usize::from_str_radix(length.trim(), 16).map_err(Error::other)?;
            let chunk = self.exactly(length + 2).await?;
            if length == 0 {
                return Ok(body);
            }
            body.extend_from_slice(&chunk[..length]);
        }
    }

    async fn exactly(&mut self, length: usize) -> Result<Vec<u8>> {
        while self.buffer.len() < length {
            self.need_more().await?;
        }
        Ok(self.take(length))
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        let rest = self.buffer.split_off(length);
        std::mem::replace(&mut self.buffer, rest)
    }

    async fn need_more(&mut self) -> Result<()> {
        match self.read_more().await? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn read_more(&mut self) -> Result<usize> {
        self.stream.read_buf(&mut self.buffer).await
    }
}

/// The ports of a connection, which may be gone.
#[derive(Debug, Clone, Copy)]
pub struct Ends {
    client: u16,
    server: u16,
}

impl Ends {
    /// The state of the server's end, or `None` when the server has closed it.
    ///
    /// # Panics
    ///
    /// Without `/proc`.
    #[must_use]
    pub fn state_of_server(self) -> Option<String> {
        let table = std::fs::read_to_string("/proc/net/tcp").expect("proc is mounted");
        let (local, remote) = (
            format!(":{:04X}", self.server),
            format!(":{:04X}", self.client),
        );
        table.lines().find_map(|line| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            let is_it = fields.get(1)?.ends_with(&local) && fields.get(2)?.ends_with(&remote);
            (is_it && fields[3] != TIME_WAIT).then(|| fields[3].to_owned())
        })
    }

    /// Waits until the server has closed its end.
    pub async fn closed_by_server(self) {
        until("the server to close", async || {
            self.state_of_server().is_none().then_some(())
        })
        .await;
    }

    /// Waits until the end of file has arrived where the server has not read it.
    pub async fn closed_unseen(self) {
        until("the end of file to arrive", async || {
            (self.state_of_server().as_deref() == Some(CLOSE_WAIT)).then_some(())
        })
        .await;
    }
}

/// States in `/proc/net/tcp`.
const TIME_WAIT: &str = "06";
const CLOSE_WAIT: &str = "08";

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Answer {
    fn parse(head: &[u8]) -> Result<Self> {
        let head = String::from_utf8_lossy(head);
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1));
        let status = status.and_then(|status| status.parse().ok());
        let headers = lines.filter_map(|line| line.split_once(':'));
        Ok(Self {
            status: status.ok_or(ErrorKind::InvalidData)?,
            headers: headers
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
                .collect(),
            body: Vec::new(),
        })
    }

    /// The first value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    /// Whether it says that it was given before.
    #[must_use]
    pub fn is_replayed(&self) -> bool {
        self.header("idempotent-replayed") == Some("true")
    }

    /// Whether it says that nothing protected it.
    #[must_use]
    pub fn is_unprotected(&self) -> bool {
        self.header("idempotency-unprotected") == Some("true")
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The `code` of the layer's own answers.
    #[must_use]
    pub fn code(&self) -> Option<String> {
        let document: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        Some(document.get("code")?.as_str()?.to_owned())
    }

    /// The status, or the code of the layer's own answers: for counting.
    #[must_use]
    pub fn kind(&self) -> String {
        self.code().unwrap_or_else(|| self.status.to_string())
    }
}
