//! HTTP/1.1 by hand: as little work as there can be, the same for every server.

use std::io::{Error, Result};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Bytes of a request's body.
const BODY: usize = 256;

/// A request whose key can be changed in its place.
#[derive(Debug)]
pub(crate) struct Template {
    bytes: Vec<u8>,
    key: usize,
}

impl Template {
    pub(crate) fn charge(cookie: Option<&str>) -> Self {
        let cookie = cookie.map(|cookie| format!("cookie: {cookie}\r\n"));
        let head = format!(
            "POST /charges HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
             content-length: {BODY}\r\n{}idempotency-key: ",
            cookie.unwrap_or_default()
        );
        let key = head.len();
        let mut bytes = head.into_bytes();
        bytes.extend([b'-'; 36]);
        bytes.extend(b"\r\n\r\n");
        bytes.extend(body());
        Self { bytes, key }
    }

    pub(crate) fn get() -> Self {
        Self {
            bytes: b"GET /charges HTTP/1.1\r\nhost: bench\r\n\r\n".to_vec(),
            key: 0,
        }
    }

    pub(crate) fn put(&mut self, key: &[u8; 36]) {
        self.bytes[self.key..self.key + 36].copy_from_slice(key);
    }
}

fn body() -> Vec<u8> {
    const BEGIN: &[u8] = br#"{"account":"acme","amount":100,"currency":"EUR","description":""#;
    let mut body = BEGIN.to_vec();
    body.resize(BODY - 2, b'd');
    body.extend(b"\"}");
    body
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Bytes of the body.
    pub(crate) length: usize,
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
}

impl Connection {
    pub(crate) async fn open(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            buffer: vec![0; 16 << 10],
            filled: 0,
        })
    }

    pub(crate) async fn ask(&mut self, request: &Template) -> Result<Answer> {
        self.stream.write_all(&request.bytes).await?;
        let head = self.read_head().await?;
        let (status, length) = parse(&self.buffer[..head])
            .ok_or_else(|| Error::other("an answer that is not understood"))?;
        self.read_rest(head + length).await?;
        Ok(Answer { status, length })
    }

    /// The body of what was just answered.
    pub(crate) fn body(&self, answer: Answer) -> &[u8] {
        let end = self.filled;
        &self.buffer[end - answer.length..end]
    }

    /// Begins a session.
    pub(crate) async fn cookie(&mut self) -> Result<String> {
        let ask = b"GET /session HTTP/1.1\r\nhost: bench\r\n\r\n";
        self.stream.write_all(ask).await?;
        let head = self.read_head().await?;
        let head = String::from_utf8_lossy(&self.buffer[..head]).into_owned();
        let cookie = head
            .lines()
            .find_map(|line| line.strip_prefix("set-cookie: "));
        let cookie = cookie.and_then(|cookie| cookie.split(';').next());
        let cookie = cookie.ok_or_else(|| Error::other("no session begins"))?;
        Ok(cookie.to_owned())
    }

    /// Where it ends.
    async fn read_head(&mut self) -> Result<usize> {
        self.filled = 0;
        loop {
            self.read_more().await?;
            if let Some(end) = find(&self.buffer[..self.filled], b"\r\n\r\n") {
                return Ok(end + 4);
            }
        }
    }

    async fn read_rest(&mut self, end: usize) -> Result<()> {
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        while self.filled < end {
            self.read_more().await?;
        }
        Ok(())
    }

    async fn read_more(&mut self) -> Result<()> {
        let read = self.stream.read(&mut self.buffer[self.filled..]).await?;
        if read == 0 {
            return Err(Error::other("the server has hung up"));
        }
        self.filled += read;
        Ok(())
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Status and length of the body; the servers write the names of headers in lower case.
fn parse(head: &[u8]) -> Option<(u16, usize)> {
    let status = number(head.get(9..12)?)?;
    let after = find(head, b"content-length: ").map(|at| &head[at + 16..]);
    let length = match after {
        Some(after) => number(after)?,
        None => 0,
    };
    Some((u16::try_from(status).ok()?, length))
}

/// The digits that it begins with.
fn number(digits: &[u8]) -> Option<usize> {
    let end = digits.iter().position(|byte| !byte.is_ascii_digit());
    let digits = &digits[..end.unwrap_or(digits.len())];
    std::str::from_utf8(digits).ok()?.parse().ok()
}
