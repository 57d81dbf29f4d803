//! HTTP/2 by hand, without compression of headers: a client that can break off in every way.
//!
//! [RFC 9113](https://www.rfc-editor.org/rfc/rfc9113), section 6.

use std::io::{ErrorKind, Result};

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::client::Pay;
use crate::fired::fired;
use crate::wait::PATIENCE;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;

/// Also END_STREAM of DATA and HEADERS.
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

const CANCEL: u32 = 8;

/// One connection, with "prior knowledge" of the protocol.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
}

struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When nobody listens.
    pub async fn open(port: u16) -> Result<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await?;
        let mut connection = Self { stream };
        connection.write(SETTINGS, 0, 0, &[]).await?;
        Ok(connection)
    }

    /// Sends a payment on a stream of its own: an odd number, each greater than those before.
    ///
    /// # Errors
    ///
    /// When the other end has gone.
    pub async fn pay(&mut self, stream: u32, pay: &Pay) -> Result<()> {
        let mut block = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/pay"),
            (":authority", "subject"),
            ("content-type", "application/json"),
            ("idempotency-key", &pay.key),
            ("x-tenant", &pay.tenant),
            ("x-behave", &pay.behave),
        ] {
            // A literal that is not indexed (RFC 7541, section 6.2.2).
            block.push(0);
            for text in [name, value] {
                block.push(
                    u8::try_from(text.len())
                        .ok()
                        .filter(|n| *n < 127)
                        .expect("short"),
                );
                block.extend_from_slice(text.as_bytes());
            }
        }
        self.write(HEADERS, END_HEADERS, stream, &block).await?;
        self.write(DATA, ACK, stream, pay.body.as_bytes()).await
    }

    /// Cancels one stream; the connection goes on. The server has read that when this returns.
    ///
    /// # Errors
    ///
    /// When the other end has gone.
    pub async fn rst_stream(&mut self, stream: u32) -> Result<()> {
        self.write(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
            .await?;
        self.ping().await?;
        fired("RST_STREAM");
        Ok(())
    }

    /// Says that no more streams are served, and why. The server has read that when this returns, or
    /// it has closed the connection.
    ///
    /// # Errors
    ///
    /// When the other end has gone before.
    pub async fn go_away(&mut self, error: u32) -> Result<()> {
        let payload = [0, error].map(u32::to_be_bytes).concat();
        self.write(GOAWAY, 0, 0, &payload).await?;
        let _ = self.ping().await;
        fired("GOAWAY");
        Ok(())
    }

    /// Closes with a reset.
    ///
    /// # Panics
    ///
    /// When the socket refuses.
    pub fn reset(self) {
        SockRef::from(&self.stream)
            .set_linger(Some(std::time::Duration::ZERO))
            .expect("a socket can linger");
        fired("reset");
    }

    /// Reads the body of the answer on a stream.
    ///
    /// # Errors
    ///
    /// A connection or stream that breaks off.
    pub async fn body(&mut self, stream: u32) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let frame = self.read().await?;
            match frame.kind {
                RST_STREAM if frame.stream == stream => {
                    return Err(ErrorKind::ConnectionReset.into());
                }
                DATA if frame.stream == stream => body.extend_from_slice(&frame.payload),
                _ => continue,
            }
            if frame.flags & ACK != 0 {
                return Ok(body);
            }
        }
    }

    async fn ping(&mut self) -> Result<()> {
        self.write(PING, 0, 0, &[7; 8]).await?;
        loop {
            let frame = self.read().await?;
            if frame.kind == PING && frame.flags & ACK != 0 {
                return Ok(());
            }
        }
    }

    async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len()).expect("a short frame");
        let mut frame = length.to_be_bytes()[1..].to_vec();
        frame.extend_from_slice(&[kind, flags]);
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        self.stream.write_all(&frame).await
    }

    /// The next frame that is not about the connection.
    async fn read(&mut self) -> Result<Frame> {
        let read = tokio::time::timeout(PATIENCE, self.read_frame()).await;
        let frame = read.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))?;
        if frame.kind == SETTINGS && frame.flags & ACK == 0 {
            self.write(SETTINGS, ACK, 0, &[]).await?;
        }
        Ok(frame)
    }

    async fn read_frame(&mut self) -> Result<Frame> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await?;
        Ok(Frame {
            kind: head[3],
            flags: head[4],
            stream: u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
            payload,
        })
    }
}
