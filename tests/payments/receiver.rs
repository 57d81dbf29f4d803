//! A foreign system that does what the test says, and remembers the keys it was sent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver as Channel};
use std::thread;

use crate::bench::PATIENCE;

#[derive(Clone, Copy)]
pub enum Step {
    Answer(u16),
    /// Takes the request, and closes the connection.
    HangUp,
    /// Takes the request, and never answers.
    Silence,
}

pub struct Receiver {
    pub url: String,
    keys: Channel<String>,
}

impl Receiver {
    /// One step for each request, in order; there must not be more.
    pub fn new(steps: &'static [Step]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/events", listener.local_addr().unwrap());
        let (sender, keys) = mpsc::channel();
        thread::spawn(move || {
            let mut silent = Vec::new();
            for step in steps {
                let (mut stream, _) = listener.accept().unwrap();
                let (key, _) = read_request(&stream);
                match step {
                    Step::Answer(status) => {
                        let head = format!("HTTP/1.1 {status} Said\r\nContent-Length: 0\r\n\r\n");
                        stream.write_all(head.as_bytes()).unwrap();
                    }
                    Step::HangUp => drop(stream),
                    Step::Silence => silent.push(stream),
                }
                if sender.send(key).is_err() {
                    return;
                }
            }
            // Whoever was left without an answer waits until the service is gone.
            for mut stream in silent {
                drop(stream.read(&mut [0]));
            }
        });
        Self { url, keys }
    }

    /// The key of the next request, waited for.
    pub fn key(&self) -> String {
        self.keys.recv_timeout(PATIENCE).expect("it is called")
    }

    pub fn was_called_again(&self) -> bool {
        self.keys.try_recv().is_ok()
    }
}

/// The key of a request, and all of it: closing a connection with bytes in it would reset it.
pub fn read_request(stream: &TcpStream) -> (String, Vec<u8>) {
    let mut reader = BufReader::new(stream);
    let (mut key, mut length, mut request) = (String::new(), 0, Vec::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        request.extend(line.bytes());
        match line.trim_end().split_once(": ") {
            Some(("idempotency-key", value)) => value.clone_into(&mut key),
            Some(("content-length", value)) => length = value.parse().unwrap(),
            Some(_) => {}
            None if line.trim_end().is_empty() => break,
            None => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    request.extend(body);
    (key, request)
}
