//! Messages of the frontend and backend protocol, version 3.
//!
//! <https://www.postgresql.org/docs/current/protocol-message-formats.html>

use std::io::{Error, ErrorKind, Result};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Nothing that is tested here is as long.
const LONGEST: usize = 64 << 20;

/// What an untyped first message asks for, where it is not a session.
pub(super) const CANCEL: u32 = 80_877_102;
pub(super) const SSL: u32 = 80_877_103;
pub(super) const GSSENC: u32 = 80_877_104;

/// A whole message, with its type and length.
#[derive(Debug, Clone)]
pub(super) struct Message(pub(super) Bytes);

impl Message {
    pub(super) fn kind(&self) -> u8 {
        self.0[0]
    }

    pub(super) fn body(&self) -> &[u8] {
        &self.0[5..]
    }

    /// The strings at the beginning of the body.
    pub(super) fn strings<const N: usize>(&self) -> [String; N] {
        strings(self.body())
    }

    /// Of an error: its SQLSTATE.
    pub(super) fn sqlstate(&self) -> Option<String> {
        let mut fields = self.body().split(|&byte| byte == 0);
        let code = fields.find(|field| field.first() == Some(&b'C'))?;
        Some(String::from_utf8_lossy(&code[1..]).into_owned())
    }
}

/// Strings that each end with a zero.
pub(super) fn strings<const N: usize>(bytes: &[u8]) -> [String; N] {
    let mut strings = bytes.split(|&byte| byte == 0);
    std::array::from_fn(|_| {
        let string = strings.next().unwrap_or_default();
        String::from_utf8_lossy(string).into_owned()
    })
}

/// A statement for the server, as a message.
pub(super) fn query(text: &str) -> Bytes {
    let length = u32::try_from(text.len() + 5).expect("a short statement");
    let parts = [b"Q", &length.to_be_bytes()[..], text.as_bytes(), b"\0"];
    Bytes::from(parts.concat())
}

/// One end of a connection, message by message.
#[derive(Debug)]
pub(super) struct Messages<R> {
    reader: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: BytesMut::new(),
        }
    }

    /// The next message; `None` at the end.
    ///
    /// # Cancel safety
    ///
    /// What was read is kept.
    pub(super) async fn next(&mut self) -> Result<Option<Message>> {
        loop {
            if let Some(message) = self.take(1)? {
                return Ok(Some(Message(message)));
            }
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Whether a whole message was read already.
    pub(super) fn has_more(&self) -> bool {
        matches!(self.length(1), Ok(Some(length)) if self.buffer.len() >= length)
    }

    /// The first message, which has no type, and what it asks for.
    pub(super) async fn first(&mut self) -> Result<Option<(u32, Bytes)>> {
        loop {
            if let Some(message) = self.take(0)? {
                let mut code = message.slice(4..);
                let code = code.try_get_u32().map_err(Error::other)?;
                return Ok(Some((code, message)));
            }
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// For what is said before there is a session.
    pub(super) fn writer(&mut self) -> &mut R {
        &mut self.reader
    }

    fn take(&mut self, before: usize) -> Result<Option<Bytes>> {
        let length = self.length(before)?;
        let whole = length.filter(|&length| self.buffer.len() >= length);
        Ok(whole.map(|length| self.buffer.split_to(length).freeze()))
    }

    /// Of the message that begins the buffer, with the bytes before its length.
    fn length(&self, before: usize) -> Result<Option<usize>> {
        let Some(bytes) = self.buffer.get(before..before + 4) else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let length = before + length as usize;
        if (before + 4..=LONGEST).contains(&length) {
            Ok(Some(length))
        } else {
            Err(ErrorKind::InvalidData.into())
        }
    }
}
