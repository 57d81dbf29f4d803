//! Requests over a real socket, and their answers.

use std::io::{Read, Write};
use std::net::TcpStream;

use crate::bench::PATIENCE;

/// Two tokens of one account, and one of another.
pub const ADA: &str = "ada-monday";
pub const ADA_REFRESHED: &str = "ada-tuesday";
pub const GRACE: &str = "grace-monday";

/// Sends requests of Ada's account, but for [`Client::charge`].
#[derive(Clone)]
pub struct Client(pub String);

impl Client {
    pub fn charge(&self, token: &str, key: &str, amount: i64) -> Answer {
        let payload = format!(r#"{{"amount": {amount}, "currency": "EUR"}}"#);
        self.send("POST", "/charges", token, Some(key), &payload)
    }

    /// A charge of Ada's whose answer nobody reads.
    pub fn begin_charge(&self, key: &str, amount: i64) -> TcpStream {
        let payload = format!(r#"{{"amount": {amount}, "currency": "EUR"}}"#);
        let headers = headers(ADA, Some(key));
        self.open("POST", "/charges", &headers, &payload).unwrap()
    }

    /// The id of a new charge of 1,250.
    pub fn new_charge(&self, key: &str) -> String {
        let made = self.charge(ADA, key, 1250);
        assert_eq!(made.status, 201, "{}", made.body);
        made.member("id")
    }

    pub fn captured_charge(&self, key: &str) -> String {
        let id = self.new_charge(key);
        assert_eq!(self.capture(&id, None).status, 201);
        id
    }

    pub fn capture(&self, id: &str, key: Option<&str>) -> Answer {
        self.send("POST", &format!("/charges/{id}/captures"), ADA, key, "")
    }

    pub fn refund(&self, id: &str, key: &str, amount: i64) -> Answer {
        let path = format!("/charges/{id}/refunds");
        let payload = format!(r#"{{"amount": {amount}}}"#);
        self.send("POST", &path, ADA, Some(key), &payload)
    }

    pub fn notify(&self, id: &str, key: &str) -> Answer {
        let path = format!("/charges/{id}/notifications");
        self.send("POST", &path, ADA, Some(key), "")
    }

    /// `None` if the service is gone before it answers.
    pub fn try_notify(&self, id: &str, key: &str) -> Option<Answer> {
        let path = format!("/charges/{id}/notifications");
        let answer = self
            .exchange("POST", &path, &headers(ADA, Some(key)), "")
            .ok();
        answer
            .filter(|text| !text.is_empty())
            .map(|text| Answer::parse(&text))
    }

    pub fn get(&self, path: &str) -> Answer {
        self.send("GET", path, ADA, None, "")
    }

    pub fn send(
        &self,
        method: &str,
        path: &str,
        token: &str,
        key: Option<&str>,
        payload: &str,
    ) -> Answer {
        let headers = headers(token, key);
        let answer = self.exchange(method, path, &headers, payload).unwrap();
        Answer::parse(&answer)
    }

    pub fn exchange(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        payload: &str,
    ) -> std::io::Result<String> {
        let mut answer = String::new();
        self.open(method, path, headers, payload)?
            .read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn open(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        payload: &str,
    ) -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.0)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: payments\r\nConnection: close\r\n\
             {headers}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{payload}",
            payload.len()
        )?;
        Ok(stream)
    }
}

fn headers(token: &str, key: Option<&str>) -> String {
    let key = key.map(|key| format!("Idempotency-Key: {key}\r\n"));
    let key = key.unwrap_or_default();
    format!("Authorization: Bearer {token}\r\n{key}")
}

/// Status, headers but for the moment's (`Date`), and body.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub status: u16,
    headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let (first, headers) = head.split_once("\r\n").unwrap();
        let headers = headers.lines().map(|line| line.split_once(": ").unwrap());
        let mut answer = Self {
            status: first.split(' ').nth(1).unwrap().parse().unwrap(),
            headers: headers.map(|(n, v)| (n.into(), v.into())).collect(),
            body: body.to_owned(),
        };
        answer.take("date");
        answer
    }

    pub fn is_replay(&self) -> bool {
        self.header("idempotent-replayed") == Some("true")
    }

    /// The first answer, if this is a replay of it.
    pub fn replayed(mut self) -> Self {
        assert_eq!(self.take("idempotent-replayed").as_deref(), Some("true"));
        self
    }

    /// A text of a JSON body.
    pub fn member(&self, name: &str) -> String {
        let body: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        body[name].as_str().expect(&self.body).to_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers.find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.headers.iter().position(|(n, _)| n == name)?;
        Some(self.headers.remove(at).1)
    }
}
