//! What a client asks for, and what it is answered.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};

use super::wire::Message;

/// Everything up to a ReadyForQuery: one round trip.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Which connection it was on, counted from 0.
    pub connection: u64,
    /// Statements that were prepared.
    pub prepared: Vec<String>,
    /// Statements that were executed, in the order in which they were: in lower case, with single
    /// spaces. That of a new connection is `startup`.
    pub executed: Vec<String>,
    /// Tags of the commands that were completed.
    pub tags: Vec<String>,
    /// SQLSTATE of the error, if there was one.
    pub error: Option<String>,
    /// The state of the transaction afterwards (`I`, `T` or `E`), once the server has said so.
    pub status: Option<char>,
}

impl Exchange {
    /// Whether one of the statements executed contains these words.
    #[must_use]
    pub fn executes(&self, words: &str) -> bool {
        let words = normal(words);
        self.executed.iter().any(|text| text.contains(&words))
    }
}

/// In lower case, with single spaces.
pub(super) fn normal(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

/// Messages of a client that are passed on together.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) bytes: BytesMut,
    pub(super) exchange: Exchange,
    /// Whether the server ends its reply to them with ReadyForQuery.
    pub(super) is_answered: bool,
}

/// What a client has prepared.
#[derive(Debug, Default)]
pub(super) struct Session {
    statements: HashMap<String, String>,
    portals: HashMap<String, String>,
    request: Request,
}

impl Session {
    /// Notes a message of the client. The messages that are ready to be passed on, if it is the
    /// last of them.
    pub(super) fn note(&mut self, message: &Message) -> Option<Request> {
        self.request.bytes.extend_from_slice(&message.0);
        match message.kind() {
            b'P' => {
                let [name, text] = message.strings();
                let text = normal(&text);
                self.request.exchange.prepared.push(text.clone());
                self.statements.insert(name, text);
            }
            b'B' => {
                let [portal, statement] = message.strings();
                let text = self.statements.get(&statement).cloned();
                self.portals.insert(portal, text.unwrap_or_default());
            }
            b'E' => {
                let [portal] = message.strings();
                let text = self.portals.get(&portal).cloned();
                self.request
                    .exchange
                    .executed
                    .push(text.unwrap_or_default());
            }
            b'C' => self.close(message),
            b'Q' => {
                let [text] = message.strings();
                self.request.exchange.executed.push(normal(&text));
                return Some(self.end(true));
            }
            b'S' | b'F' => return Some(self.end(true)),
            // Describe is part of what the next Sync ends.
            b'D' => {}
            // Passwords, Flush, data of a copy, the end.
            _ => return Some(self.end(false)),
        }
        None
    }

    fn close(&mut self, message: &Message) {
        let Some((&kind, name)) = message.body().split_first() else {
            return;
        };
        let [name] = super::wire::strings(name);
        match kind {
            b'S' => self.statements.remove(&name),
            _ => self.portals.remove(&name),
        };
    }

    fn end(&mut self, is_answered: bool) -> Request {
        let mut request = std::mem::take(&mut self.request);
        request.is_answered = is_answered;
        request
    }
}

/// A statement that makes the server itself fail with a SQLSTATE, and its transaction with it. A
/// commit that fails leaves no transaction behind.
pub(super) fn raise(sqlstate: &str, instead_of: &Exchange) -> Bytes {
    let ends = instead_of.executes("commit");
    let rollback = if ends { "rollback;" } else { "" };
    super::wire::query(&format!(
        "{rollback} do $$ begin raise exception using errcode = '{sqlstate}', message = 'injected'; end $$"
    ))
}
