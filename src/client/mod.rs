//! A blocking client of the control socket, for the command line and for programs.
//!
//! One connection, one thread: `execute` sends a command and returns its answer; events that come
//! meanwhile are kept, in order, for `next_event`. No wait is without a deadline.

mod marks;
mod stop;
mod track;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};

pub use marks::Marks;
pub use stop::{Order, Stoppable};
pub use track::{Tracked, Tracking};

use crate::limits::CONTROL_ANSWER_BYTES_MAX;
use crate::sys::scm;

/// How long connecting, and then the greeting, may take. A daemon greets within milliseconds.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How long an answer may take. Commands return once accepted, so only a stuck daemon takes longer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// Something the daemon announced.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// For example `MIGRATION`.
    pub name: String,
    /// Its members; null if it has none.
    pub data: Value,
    /// When, by the daemon's clock since 1970.
    pub at: Duration,
}

/// Why the daemon did not do what it was asked, in words for an operator.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("no daemon listens on {path}: start it with `memferry sender --config FILE`, or name its socket with --socket ({source})", path = path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What connecting said.
        source: io::Error,
    },
    /// The socket is there, and this user may not use it.
    #[error("not allowed to use {path}: {reason}", path = path.display())]
    Denied {
        /// The socket.
        path: PathBuf,
        /// What the kernel or the daemon said.
        reason: String,
    },
    /// The daemon answered with an error.
    #[error("{desc}")]
    Command {
        /// QMP's class.
        class: String,
        /// For a person.
        desc: String,
        /// The daemon's stable code (`error.x-code`); empty if it sent none.
        code: String,
    },
    /// The connection ended or does not make sense.
    #[error("lost the daemon on {path} {doing}: {source}", path = path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// In the middle of what.
        doing: String,
        /// What happened.
        source: io::Error,
    },
}

impl ClientError {
    /// The daemon's code, if the daemon answered.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Command { code, .. } => Some(code),
            Self::Denied { .. } => Some(crate::control::code::ACCESS_DENIED),
            Self::Unreachable { .. } | Self::Broken { .. } => None,
        }
    }
}

/// A connection to a daemon, past the negotiation. `as_fd` polls readable when there is something to read.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    path: PathBuf,
    /// Bytes read and not yet used; the first `scanned` of them hold no newline.
    buffer: Vec<u8>,
    scanned: usize,
    events: VecDeque<Event>,
    /// Descriptors that came with what was read since the last command was sent.
    fds: VecDeque<OwnedFd>,
    next_id: u64,
    answer_deadline: Duration,
}

impl Connection {
    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = open(path).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Denied {
                path: path.to_owned(),
                reason: "the file's permissions do not let this user in (be root, or a member of its group)".into(),
            },
            _ => ClientError::Unreachable {
                path: path.to_owned(),
                source,
            },
        })?;
        let mut connection = Self {
            stream,
            path: path.to_owned(),
            buffer: Vec::new(),
            scanned: 0,
            events: VecDeque::new(),
            fds: VecDeque::new(),
            next_id: 0,
            answer_deadline: ANSWER_DEADLINE,
        };
        connection.negotiate()?;
        Ok(connection)
    }

    /// Waits for answers no longer than this from now on, instead of a minute.
    pub fn set_answer_deadline(&mut self, deadline: Duration) {
        self.answer_deadline = deadline;
    }

    /// Sends a command and waits for its answer. `arguments` is an object, or null for none.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let doing = || format!("while executing {command}");
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.fds.clear();
        self.send(request.to_string().as_bytes())
            .map_err(|error| self.broken(doing(), error))?;
        let deadline = Instant::now() + self.answer_deadline;
        loop {
            let message = self
                .message(deadline)
                .map_err(|error| self.broken(doing(), error))?;
            match classify(message) {
                Message::Event(event) => self.events.push_back(event),
                Message::Answer {
                    id: Some(of),
                    result,
                } if of == id => return result,
                // An answer to nothing we know: we gave up on that one earlier.
                Message::Answer { id: Some(_), .. } => {}
                // Without an id it is about the stream as a whole.
                Message::Answer {
                    result: Err(error), ..
                } => return Err(error),
                Message::Answer { .. } | Message::Other => {
                    let error = io::Error::other("the answer is not QMP");
                    return Err(self.broken(doing(), error));
                }
            }
        }
    }

    /// Hands `fd` to the daemon under `name`, for a command that refers to it by that name.
    pub fn send_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), ClientError> {
        // The byte is white space between messages; a descriptor cannot travel without one.
        let sent = scm::send(self.stream.as_fd(), b" ", &[fd]);
        sent.map_err(|error| self.broken("while passing a descriptor".into(), error))?;
        self.execute("getfd", json!({"fdname": name})).map(|_| ())
    }

    /// Sends a command whose answer comes with a descriptor, such as `region-take`.
    pub fn execute_for_fd(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<(Value, OwnedFd), ClientError> {
        let answer = self.execute(command, arguments)?;
        let missing = || io::Error::other("no descriptor came with the answer");
        match self.fds.pop_front() {
            Some(fd) => Ok((answer, fd)),
            None => Err(self.broken(format!("while executing {command}"), missing())),
        }
    }

    /// The next event, those of the past first; `None` when there is none within `timeout`.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + timeout;
        loop {
            match self.message(deadline) {
                Ok(message) => {
                    if let Message::Event(event) = classify(message) {
                        return Ok(Some(event));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(None),
                Err(error) => return Err(self.broken("while waiting for an event".into(), error)),
            }
        }
    }

    fn negotiate(&mut self) -> Result<(), ClientError> {
        let greeting = self
            .message(Instant::now() + CONNECT_DEADLINE)
            .map_err(|error| self.broken("before its greeting".into(), error))?;
        if greeting.get("QMP").is_none() {
            return Err(match classify(greeting) {
                Message::Answer {
                    result: Err(ClientError::Command { desc, .. }),
                    ..
                } => ClientError::Denied {
                    path: self.path.clone(),
                    reason: desc,
                },
                _ => self.broken(
                    "before its greeting".into(),
                    io::Error::other("it does not speak QMP"),
                ),
            });
        }
        self.execute("qmp_capabilities", Value::Null).map(|_| ())
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // A daemon that died meanwhile is an error, and `write` on a socket makes it a signal in
        // programs that kept the default.
        let mut rest = bytes;
        while !rest.is_empty() {
            match nix::sys::socket::send(self.stream.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(timed_out(errno.into())),
            }
        }
        self.stream.flush()
    }

    /// The next line, parsed. What was read of an unfinished line stays for the next call.
    fn message(&mut self, deadline: Instant) -> io::Result<Value> {
        loop {
            if let Some(end) = self.buffer[self.scanned..].iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.scanned + end).collect();
                self.scanned = 0;
                return serde_json::from_slice(&line).map_err(io::Error::from);
            }
            self.scanned = self.buffer.len();
            // An answer at its limit still fits; twice that is not our daemon.
            if self.scanned > 2 * CONTROL_ANSWER_BYTES_MAX {
                return Err(io::Error::other("a line without end"));
            }
            self.fill(deadline)?;
        }
    }

    fn fill(&mut self, deadline: Instant) -> io::Result<()> {
        // What has already arrived is read even when the time is up.
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut readable = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut readable, left) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        let mut chunk = [0; 16 * 1024];
        let received = match scm::receive(self.stream.as_fd(), &mut chunk) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) =>
            {
                return Ok(());
            }
            received => received?,
        };
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&chunk[..received.bytes]);
        self.fds.extend(received.fds);
        Ok(())
    }

    fn broken(&self, doing: String, source: io::Error) -> ClientError {
        ClientError::Broken {
            path: self.path.clone(),
            doing,
            source: match source.kind() {
                io::ErrorKind::UnexpectedEof => {
                    io::Error::new(source.kind(), "it closed the connection")
                }
                io::ErrorKind::TimedOut => {
                    io::Error::new(source.kind(), "it did not answer in time")
                }
                _ => source,
            },
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A deadline of a socket shows as "would block"; callers ask for one kind only.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

/// `UnixStream::connect` with a deadline: with the daemon's queue full it would wait for ever.
fn open(path: &Path) -> io::Result<UnixStream> {
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let seconds = i64::try_from(CONNECT_DEADLINE.as_secs()).unwrap_or(i64::MAX);
    setsockopt(&fd, sockopt::SendTimeout, &TimeVal::new(seconds, 0))?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?).map_err(|errno| timed_out(errno.into()))?;
    Ok(UnixStream::from(fd))
}

enum Message {
    Event(Event),
    Answer {
        id: Option<u64>,
        result: Result<Value, ClientError>,
    },
    Other,
}

fn classify(mut message: Value) -> Message {
    if let Some(name) = message["event"].as_str() {
        let stamp = &message["timestamp"];
        let at = Duration::from_secs(stamp["seconds"].as_u64().unwrap_or(0))
            + Duration::from_micros(stamp["microseconds"].as_u64().unwrap_or(0));
        return Message::Event(Event {
            name: name.to_owned(),
            data: message["data"].clone(),
            at,
        });
    }
    let id = message["id"].as_u64();
    if let Some(error) = message.get("error") {
        let text = |member: &str| error[member].as_str().unwrap_or_default().to_owned();
        let result = Err(ClientError::Command {
            class: text("class"),
            desc: text("desc"),
            code: text("x-code"),
        });
        return Message::Answer { id, result };
    }
    match message.get_mut("return") {
        Some(value) => Message::Answer {
            id,
            result: Ok(value.take()),
        },
        None => Message::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixListener;
    use std::thread;

    /// A daemon of prepared lines: each request gets the next answer.
    fn daemon(answers: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            for (turn, answer) in answers.iter().enumerate() {
                if turn > 0 && stream.read(&mut buffer).unwrap_or(0) == 0 {
                    return;
                }
                stream.write_all(answer.as_bytes()).unwrap();
            }
            let _ = stream.read(&mut buffer);
        });
        (directory, path)
    }

    const GREETING: &str = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\r\n";

    #[test]
    fn events_during_a_command_are_kept_in_order() {
        let (_directory, path) = daemon(&[
            GREETING,
            "{\"return\":{},\"id\":0}\r\n",
            "{\"event\":\"A\",\"data\":{\"n\":1},\"timestamp\":{\"seconds\":5,\"microseconds\":7}}\r\n\
             {\"event\":\"B\"}\r\n{\"return\":{\"x\":1},\"id\":1}\r\n{\"event\":\"C\"}\r\n",
        ]);
        let mut connection = Connection::connect(&path).unwrap();
        assert_eq!(
            connection.execute("go", json!({})).unwrap(),
            json!({"x": 1})
        );
        let mut next = || {
            connection
                .next_event(Duration::from_secs(30))
                .unwrap()
                .unwrap()
        };
        let first = next();
        assert_eq!(
            (first.name.as_str(), first.data["n"].as_u64()),
            ("A", Some(1))
        );
        assert_eq!(first.at, Duration::from_micros(5_000_007));
        assert_eq!((next().name, next().name), ("B".into(), "C".into()));
        assert_eq!(connection.next_event(Duration::ZERO).unwrap(), None);
    }

    #[test]
    fn an_error_keeps_its_code_and_an_end_says_when() {
        let (_directory, path) = daemon(&[
            GREETING,
            "{\"return\":{},\"id\":0}\r\n",
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\",\"x-code\":\"exists\"},\"id\":1}\r\n",
        ]);
        let mut connection = Connection::connect(&path).unwrap();
        let error = connection.execute("go", Value::Null).unwrap_err();
        assert_eq!(
            (error.code(), error.to_string().as_str()),
            (Some("exists"), "no")
        );
        let error = connection
            .execute("more", Value::Null)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("while executing more: it closed the connection"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_daemon_and_a_refusal_read_differently() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none");
        let error = Connection::connect(&path).unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { .. }));
        assert!(
            error.to_string().contains("memferry sender --config"),
            "{error}"
        );
        let (_directory, path) =
            daemon(&["{\"error\":{\"class\":\"GenericError\",\"desc\":\"uid 7 may not\"}}\r\n"]);
        let error = Connection::connect(&path).unwrap_err();
        assert!(matches!(error, ClientError::Denied { .. }));
        assert!(error.to_string().ends_with("uid 7 may not"), "{error}");
    }
}
