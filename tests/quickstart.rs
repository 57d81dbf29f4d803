//! The quickstart keeps its promises: the real program, on a real socket, killed and started again.
#![cfg(unix)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    unreachable_pub,
    reason = "tests fail by panicking"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

const BOOK: &str = r#"{"item": "book"}"#;
const TWO_BOOKS: &str = r#"{"item": "book", "quantity": 2}"#;

#[test]
fn the_first_answer_is_a_created_order_and_where_to_find_it() {
    let directory = Directory::new("first");
    let server = Server::start(&directory);

    let first = server.order("order-1", BOOK);

    assert_eq!(first.status, 201);
    assert_eq!(first.body, r#"{"id":1,"item":"book","quantity":1}"#);
    assert_eq!(first.header("idempotent-replayed"), None);
    let shown = server.get(first.header("location").unwrap());
    assert_eq!((shown.status, shown.body), (200, first.body));
}

#[test]
fn a_retry_after_kill_9_and_a_restart_gets_the_first_answer_byte_for_byte() {
    let directory = Directory::new("killed");
    let mut server = Server::start(&directory);
    let first = server.order("order-1", BOOK);
    assert!(!server.stop("KILL").success());

    let server = Server::start(&directory);
    let mut replay = server.order("order-1", BOOK);

    assert_eq!(replay.take("idempotent-replayed").as_deref(), Some("true"));
    assert_eq!(replay, first);
}

#[test]
fn the_list_shows_one_order_after_retries_and_a_restart() {
    let directory = Directory::new("listed");
    let mut server = Server::start(&directory);
    for _ in 0..3 {
        server.order("order-1", BOOK);
    }
    server.stop("KILL");

    let server = Server::start(&directory);
    server.order("order-1", BOOK);

    let list = server.get("/orders");
    assert_eq!(list.body, r#"[{"id":1,"item":"book","quantity":1}]"#);
}

#[test]
fn another_payload_under_the_same_key_is_a_conflict_and_orders_nothing() {
    let directory = Directory::new("conflict");
    let server = Server::start(&directory);
    server.order("order-1", BOOK);

    let refused = server.order("order-1", TWO_BOOKS);

    assert_eq!(refused.status, 409);
    assert!(refused.body.contains(r#""code":"key-reused""#));
    assert!(!server.get("/orders").body.contains(r#""quantity":2"#));
}

#[test]
fn a_refused_order_leaves_its_key_free() {
    let directory = Directory::new("refused");
    let server = Server::start(&directory);
    for wrong in [
        "{",
        "{}",
        r#"{"item": ""}"#,
        r#"{"item": "book", "quantity": "2"}"#,
    ] {
        let refused = server.order("order-1", wrong);
        assert!((400..500).contains(&refused.status), "{wrong}");
        assert!(refused.body.starts_with(r#"{"error":"#), "{wrong}");
    }

    assert_eq!(server.order("order-1", BOOK).status, 201);
}

#[test]
fn it_says_where_it_listens_and_keeps_its_data_and_that_the_tenant_is_a_demo() {
    let directory = Directory::new("said");
    let server = Server::start(&directory);

    let said = server.said.join("\n");

    assert!(said.contains(&server.address), "{said}");
    assert!(said.contains(directory.file().to_str().unwrap()), "{said}");
    assert!(said.contains("Demo only"), "{said}");
}

#[test]
fn sigint_ends_it_with_exit_code_0() {
    let directory = Directory::new("sigint");
    let mut server = Server::start(&directory);
    server.order("order-1", BOOK);

    assert_eq!(server.stop("INT").code(), Some(0));
}

#[test]
fn sigterm_ends_it_with_exit_code_0() {
    let directory = Directory::new("sigterm");
    let mut server = Server::start(&directory);
    server.order("order-1", BOOK);

    assert_eq!(server.stop("TERM").code(), Some(0));
}

#[test]
fn a_taken_port_is_named_with_the_fix() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let directory = Directory::new("taken");

    let said = refusal(command(&directory).env("PORT", &port));

    assert!(said.contains(&format!("port {port} is taken")), "{said}");
    assert!(
        said.contains("PORT=3001 cargo run --example quickstart"),
        "{said}"
    );
}

#[test]
fn a_port_that_is_no_number_is_named_with_the_fix() {
    let directory = Directory::new("port");

    let said = refusal(command(&directory).env("PORT", "http"));

    assert!(said.contains("PORT=http"), "{said}");
    assert!(
        said.contains("PORT=3001 cargo run --example quickstart"),
        "{said}"
    );
}

#[test]
fn an_unusable_place_for_the_database_is_named_with_the_fix() {
    let directory = Directory::new("place");
    let file = directory.0.join("missing").join("quickstart.db");

    let said = refusal(command(&directory).env("QUICKSTART_DB", &file));

    assert!(said.contains(file.to_str().unwrap()), "{said}");
    assert!(said.contains("QUICKSTART_DB=./quickstart.db"), "{said}");
}

/// A directory of one test, removed with the value.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let name = format!("quickstart-{}-{test}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        Self(directory)
    }

    fn file(&self) -> PathBuf {
        self.0.join("quickstart.db")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The example, which `cargo test` has built next to this test.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let program = profile.join("examples").join("quickstart");
    assert!(
        program.is_file(),
        "{} is not there: run `cargo build --example quickstart` first, since `cargo test --test` \
         builds no examples",
        program.display()
    );
    program
}

fn command(directory: &Directory) -> Command {
    let mut command = Command::new(program());
    command
        .env("PORT", "0")
        .env("QUICKSTART_DB", directory.file())
        .stdin(Stdio::null());
    command
}

/// What it prints when it refuses to start.
fn refusal(command: &mut Command) -> String {
    let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = Running(command.spawn().unwrap());
    assert_eq!(process.wait().code(), Some(1));
    let mut said = String::new();
    let mut pipe = process.0.stderr.take().unwrap();
    pipe.read_to_string(&mut said).unwrap();
    said
}

/// A process that does not outlive its test.
struct Running(Child);

impl Running {
    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Server {
    process: Running,
    address: String,
    said: Vec<String>,
}

impl Server {
    fn start(directory: &Directory) -> Self {
        let mut command = command(directory);
        let mut process = Running(command.stdout(Stdio::piped()).spawn().unwrap());
        let pipe = process.0.stdout.take().unwrap();
        let (lines, said) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        let next = || said.recv_timeout(PATIENCE).expect("it says what to type");
        let mut said = vec![next()];
        while !said[said.len() - 1].starts_with("    curl http://") {
            said.push(next());
        }
        let address = said[0].split('/').nth(2).expect("it says where it listens");
        Self {
            process,
            address: address.to_owned(),
            said,
        }
    }

    fn stop(&mut self, signal: &str) -> ExitStatus {
        let id = self.process.0.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &id]).status();
        assert!(sent.unwrap().success());
        self.process.wait()
    }

    fn order(&self, key: &str, payload: &str) -> Answer {
        let head = format!(
            "POST /orders HTTP/1.1\r\nIdempotency-Key: {key}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n",
            payload.len()
        );
        self.send(&head, payload)
    }

    fn get(&self, path: &str) -> Answer {
        self.send(&format!("GET {path} HTTP/1.1\r\n"), "")
    }

    fn send(&self, head: &str, payload: &str) -> Answer {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let rest = "Host: quickstart\r\nX-Tenant-Id: acme\r\nConnection: close\r\n\r\n";
        write!(stream, "{head}{rest}{payload}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        Answer::parse(&answer)
    }
}

/// Status, headers but for the moment's (`Date`), and body.
#[derive(Debug, PartialEq)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Self {
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

    fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        headers.find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    fn take(&mut self, name: &str) -> Option<String> {
        let at = self.headers.iter().position(|(n, _)| n == name)?;
        Some(self.headers.remove(at).1)
    }
}
