//! Transcripts with a real socket: what a client sends, and what it must get.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::limits::{CONTROL_IN_BAND_MAX, CONTROL_REQUEST_BYTES_MAX};

mod socket;

/// Commands to play with. `wait` ends when the test lets it.
struct Toy {
    waiting: AtomicUsize,
    begun: Notify,
    permits: Semaphore,
}

impl Toy {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            waiting: AtomicUsize::new(0),
            begun: Notify::new(),
            permits: Semaphore::new(0),
        })
    }
}

impl Commands for Toy {
    fn table(&self) -> &'static [CommandInfo] {
        const fn info(name: &'static str, oob: bool) -> CommandInfo {
            CommandInfo { name, oob }
        }
        const TABLE: &[CommandInfo] = &[
            info("echo", false),
            info("wait", false),
            info("ping", true),
            info("huge", false),
            info("take", false),
            info("give", false),
        ];
        TABLE
    }

    async fn execute(&self, call: Call) -> Result<Answer, CommandError> {
        let answer = match call.command.as_str() {
            "echo" | "ping" => Ok(call.arguments),
            "wait" => {
                self.waiting.fetch_add(1, Ordering::SeqCst);
                self.begun.notify_one();
                let _permit = self.permits.acquire().await.unwrap();
                Ok(json!({}))
            }
            "huge" => Ok(json!("x".repeat(7 * 1024 * 1024))),
            "take" => {
                #[derive(serde::Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Take {
                    fdname: String,
                }
                let take: Take = call.parse()?;
                let fd = call
                    .fds
                    .take(&take.fdname)
                    .ok_or_else(|| CommandError::new(code::NO_DESCRIPTOR, "no such descriptor"))?;
                Ok(json!(inode(&fd)))
            }
            "give" => {
                let fd: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
                let value = json!(inode(&fd));
                let fds = vec![fd];
                return Ok(Answer { value, fds });
            }
            other => unreachable!("{other} is not in the table"),
        };
        answer.map(Answer::from)
    }
}

fn inode(fd: &impl AsFd) -> u64 {
    nix::sys::stat::fstat(fd.as_fd()).unwrap().st_ino
}

struct Fixture {
    _directory: tempfile::TempDir,
    path: PathBuf,
    toy: Arc<Toy>,
    events: EventBus,
    shutdown: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

impl Fixture {
    fn start() -> Self {
        Self::with_deadline(Duration::from_secs(60))
    }

    fn with_deadline(reply_deadline: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/control.sock");
        let toy = Toy::new();
        let events = EventBus::new();
        let shutdown = CancellationToken::new();
        let mut server = Server::bind(&path, Access::default()).unwrap();
        server.set_reply_deadline(reply_deadline);
        let serving = server.serve(toy.clone(), events.clone(), shutdown.clone());
        Self {
            _directory: directory,
            path,
            toy,
            events,
            shutdown,
            server: tokio::spawn(serving),
        }
    }

    async fn raw(&self) -> Client {
        let mut client = Client(BufReader::new(
            UnixStream::connect(&self.path).await.unwrap(),
        ));
        assert!(client.line().await["QMP"]["version"]["qemu"]["major"].is_u64());
        client
    }

    async fn client(&self) -> Client {
        let mut client = self.raw().await;
        client
            .send(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#)
            .await;
        assert_eq!(client.line().await, json!({"return": {}}));
        client
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    async fn send(&mut self, text: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(text.as_ref()).await.unwrap();
    }

    async fn line(&mut self) -> Value {
        let mut line = String::new();
        let read = self.0.read_line(&mut line);
        tokio::time::timeout(Duration::from_secs(30), read)
            .await
            .expect("the server says something")
            .unwrap();
        assert!(line.is_ascii() && line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    async fn ask(&mut self, text: &str) -> Value {
        self.send(text).await;
        self.line().await
    }

    async fn desc(&mut self, text: impl AsRef<[u8]>) -> String {
        self.send(text).await;
        self.line().await["error"]["desc"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// The server closes without another word. What it has not read then makes that a reset.
    async fn at_end(&mut self) -> bool {
        let mut rest = Vec::new();
        let closed = self.0.read_to_end(&mut rest);
        let _ = tokio::time::timeout(Duration::from_secs(30), closed)
            .await
            .expect("the server closes the connection");
        rest.is_empty()
    }

    fn pass(&self, fds: &[&OwnedFd]) {
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        sendmsg::<()>(
            self.0.get_ref().as_raw_fd(),
            &[std::io::IoSlice::new(b" ")],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
    }
}

#[tokio::test]
async fn glued_and_split_messages_are_answered_in_order_without_any_newline() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let text = r#"{"execute":"echo","id":1}{"execute":"echo","arguments":{"é":"}"},"id":"é😀"}"#;
    let want = [
        json!({"return": {}, "id": 1}),
        json!({"return": {"é": "}"}, "id": "é😀"}),
    ];
    client.send(text).await;
    assert_eq!([client.line().await, client.line().await], want);
    for byte in text.as_bytes() {
        client.send([*byte]).await;
    }
    assert_eq!([client.line().await, client.line().await], want);
}

#[tokio::test]
async fn the_session_survives_garbage_and_says_what_was_wrong() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let deep = "[".repeat(1000);
    for (text, want) in [
        ("bad\n", "JSON parse error, expected '{'"),
        ("{\"execute\": bad}", "JSON parse error, "),
        (
            "{\"execute\":\"echo\x01",
            "JSON parse error, control character",
        ),
        ("{]\n", "JSON parse error, brackets do not match"),
        (&format!("{deep}\n"), "JSON parse error, nested too deeply"),
        ("[1]", "QMP input must be a JSON object"),
        (
            r#"{"execute":"nope"}"#,
            "The command nope has not been found",
        ),
        (
            r#"{"execute":"echo","extra":1}"#,
            "QMP input member 'extra' is unexpected",
        ),
        (
            r#"{"execute":"query-version","arguments":{"bogus":1}}"#,
            "Parameter 'bogus' is unexpected",
        ),
        (r#"{"execute":"getfd"}"#, "Parameter 'fdname' is missing"),
        (
            r#"{"execute":"getfd","arguments":{"fdname":"x"}}"#,
            "No file descriptor supplied via SCM_RIGHTS",
        ),
        (
            r#"{"execute":"closefd","arguments":{"fdname":"x"}}"#,
            "File descriptor named 'x' not found",
        ),
        (
            r#"{"exec-oob":"echo"}"#,
            "The command echo does not support OOB",
        ),
        (
            r#"{"execute":"qmp_capabilities"}"#,
            "Capabilities negotiation is already complete, command ignored",
        ),
    ] {
        let desc = client.desc(text).await;
        assert!(desc.starts_with(want), "{text:?}: {desc}");
        let echoed = client.ask("\x01{\"execute\":\"echo\",\"id\":[]}").await;
        assert_eq!(echoed, json!({"return": {}, "id": []}), "after {text:?}");
    }
    let answer = client.ask(r#"{"execute":"nope","id":{"a":null}}"#).await;
    assert_eq!(answer["error"]["class"], "CommandNotFound");
    assert_eq!(answer["error"]["x-code"], code::COMMAND_NOT_FOUND);
    assert_eq!(answer["id"], json!({"a": null}));
}

#[tokio::test]
async fn an_oversized_request_ends_the_session_with_an_error() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let huge = format!("{{\"execute\":\"{}", "x".repeat(CONTROL_REQUEST_BYTES_MAX));
    assert!(client.desc(huge).await.contains("larger than"));
    assert!(client.at_end().await);
}

#[tokio::test]
async fn before_negotiation_there_are_neither_commands_nor_events() {
    let fixture = Fixture::start();
    let mut client = fixture.raw().await;
    fixture.events.publish("EARLY", json!({}));
    let want = "Expecting capabilities negotiation with 'qmp_capabilities'";
    assert_eq!(client.desc(r#"{"execute":"echo"}"#).await, want);
    let bad = r#"{"execute":"qmp_capabilities","arguments":{"enable":["magic"]}}"#;
    assert!(client.desc(bad).await.contains("enable.0"));
    assert_eq!(
        client.ask(r#"{"execute":"qmp_capabilities"}"#).await,
        json!({"return": {}})
    );
    fixture.events.publish("LATE", json!({"n": 1}));
    let event = client.line().await;
    assert_eq!(
        (&event["event"], &event["data"]),
        (&json!("LATE"), &json!({"n": 1}))
    );
    assert!(event["timestamp"]["seconds"].as_u64() > Some(1_600_000_000));
    // Not asked for in the negotiation, so it does not exist.
    let desc = client.desc(r#"{"exec-oob":"ping"}"#).await;
    assert_eq!(desc, "QMP input member 'exec-oob' is unexpected");
}

#[tokio::test]
async fn out_of_band_overtakes_a_pending_command_and_in_band_does_not() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    client
        .send(r#"{"execute":"wait","id":1}{"execute":"echo","id":2}"#)
        .await;
    fixture.toy.begun.notified().await;
    let answer = client.ask(r#"{"exec-oob":"ping","id":3}"#).await;
    assert_eq!(answer["id"], 3);
    fixture.toy.permits.add_permits(1);
    assert_eq!(client.line().await["id"], 1);
    assert_eq!(client.line().await["id"], 2);
}

#[tokio::test]
async fn more_in_band_commands_than_the_queue_holds_are_all_answered_in_order() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let count = CONTROL_IN_BAND_MAX * 3;
    for id in 0..count {
        client
            .send(format!("{{\"execute\":\"wait\",\"id\":{id}}}"))
            .await;
    }
    fixture.toy.begun.notified().await;
    assert_eq!(
        fixture.toy.waiting.load(Ordering::SeqCst),
        1,
        "one after the other"
    );
    fixture.toy.permits.add_permits(1);
    for id in 0..count {
        assert_eq!(client.line().await["id"], id);
    }
}

#[tokio::test]
async fn a_client_that_has_sent_everything_still_gets_its_answers() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    client
        .send(r#"{"execute":"echo","id":1}{"execute":"echo","id":2}"#)
        .await;
    client.0.get_mut().shutdown().await.unwrap();
    assert_eq!(client.line().await["id"], 1);
    assert_eq!(client.line().await["id"], 2);
    assert!(client.at_end().await);
}

#[tokio::test]
async fn descriptors_get_their_names_in_the_order_they_came() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let (a, b) = UnixStream::pair().unwrap();
    let (a, b) = (
        OwnedFd::from(a.into_std().unwrap()),
        OwnedFd::from(b.into_std().unwrap()),
    );
    client.pass(&[&a, &b]);
    client.pass(&[&a]);
    let get = |name: &str| format!(r#"{{"execute":"getfd","arguments":{{"fdname":"{name}"}}}}"#);
    let take = |name: &str| format!(r#"{{"execute":"take","arguments":{{"fdname":"{name}"}}}}"#);
    assert_eq!(client.ask(&get("x")).await, json!({"return": {}}));
    assert_eq!(client.ask(&get("y")).await, json!({"return": {}}));
    assert_eq!(client.ask(&take("y")).await, json!({"return": inode(&b)}));
    // The third replaces the first under its name.
    assert_eq!(client.ask(&get("x")).await, json!({"return": {}}));
    assert_eq!(client.ask(&take("x")).await, json!({"return": inode(&a)}));
    assert_eq!(client.desc(take("x")).await, "no such descriptor");
    // Another connection has its own.
    let mut other = fixture.client().await;
    assert_eq!(
        other.desc(get("x")).await,
        "No file descriptor supplied via SCM_RIGHTS"
    );
}

#[tokio::test]
async fn many_clients_are_greeted_at_once_and_one_waiting_holds_up_nobody() {
    let fixture = Fixture::start();
    let mut waiting = fixture.client().await;
    waiting.send(r#"{"execute":"wait"}"#).await;
    fixture.toy.begun.notified().await;
    let mut clients = Vec::new();
    for _ in 0..50 {
        clients.push(fixture.client().await);
    }
    fixture.events.publish("ALL", json!({}));
    for client in &mut clients {
        assert_eq!(client.line().await["event"], "ALL");
        assert_eq!(
            client.ask(r#"{"execute":"echo"}"#).await,
            json!({"return": {}})
        );
    }
    fixture.toy.permits.add_permits(1);
    assert_eq!(waiting.line().await["event"], "ALL");
    assert_eq!(waiting.line().await, json!({"return": {}}));
}

#[tokio::test]
async fn own_commands_are_listed_beside_the_daemons() {
    let fixture = Fixture::start();
    let mut client = fixture.client().await;
    let list = client.ask(r#"{"execute":"query-commands"}"#).await;
    let names: Vec<_> = list["return"].as_array().unwrap().iter().collect();
    for name in [
        "qmp_capabilities",
        "getfd",
        "closefd",
        "query-version",
        "echo",
        "ping",
    ] {
        assert!(names.contains(&&json!({"name": name})), "{name}");
    }
    let version = client.ask(r#"{"execute":"query-version"}"#).await;
    assert_eq!(version["return"], encode::version());
}

#[tokio::test]
async fn an_answer_brings_its_descriptor_and_the_next_one_has_none() {
    let fixture = Fixture::start();
    let path = fixture.path.clone();
    let taken = tokio::task::spawn_blocking(move || {
        let mut client = crate::client::Connection::connect(&path).unwrap();
        let (told, fd) = client.execute_for_fd("give", json!({})).unwrap();
        assert_eq!(told, json!(inode(&fd)));
        assert!(client.execute_for_fd("ping", json!({})).is_err());
    });
    taken.await.unwrap();
}
