//! One control connection, from the greeting to its end.
//!
//! Three things happen side by side: requests are read, in-band commands run one after the other, and
//! lines are written. In-band commands wait in a bounded queue; once it is full nothing more is read
//! from this client, which is how QEMU pushes back too. Out-of-band commands do not stand in that queue.
//!
//! When the client has sent everything, what it asked for is still done and answered. A command that
//! has begun is never broken off.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::events::EventBus;
use super::outbox::{Outbox, Parcel};
use super::parse::{Item, Splitter};
use super::request::{self, Request};
use super::{
    Answer, Call, ClientId, CommandError, CommandInfo, Commands, ErrorClass, FdTable, code, encode,
};
use crate::limits::{CONTROL_IN_BAND_MAX, CONTROL_OUT_OF_BAND_MAX, CONTROL_REQUEST_BYTES_MAX};
use crate::sys::scm;

/// Bytes read at once. A request is rarely longer.
const READ_BYTES: usize = 16 * 1024;

/// The commands the server answers itself.
const OWN: &[&str] = &[
    "qmp_capabilities",
    "query-version",
    "query-commands",
    "getfd",
    "closefd",
];

/// What every session of a server shares.
#[derive(Debug)]
pub(super) struct Shared<C> {
    pub(super) commands: Arc<C>,
    pub(super) events: EventBus,
    pub(super) shutdown: CancellationToken,
    /// How long a client may leave an answer unread.
    pub(super) reply_deadline: Duration,
}

/// Serves one client until it leaves or the server stops.
pub(super) async fn run<C: Commands>(stream: UnixStream, shared: Arc<Shared<C>>) {
    let outbox = Arc::new(Outbox::default());
    let member = shared.events.join(outbox.clone());
    let gone = CancellationToken::new();
    let (queue, jobs) = mpsc::channel(CONTROL_IN_BAND_MAX - 1);
    let session = Arc::new(Session {
        commands: shared.commands.clone(),
        outbox: outbox.clone(),
        fds: FdTable::default(),
        client: member.id,
        gone: gone.clone(),
    });
    outbox.owe(encode::greeting());

    let out_of_band = TaskTracker::new();
    let reading = async {
        let reader = Reader {
            stream: &stream,
            session: &session,
            queue,
            out_of_band: &out_of_band,
            slots: Arc::new(Semaphore::new(CONTROL_OUT_OF_BAND_MAX)),
            negotiated: None,
        };
        tokio::select! {
            () = reader.run() => {}
            () = shared.shutdown.cancelled() => {}
            () = gone.cancelled() => {}
        }
        // Whoever waits for this client's word need not wait for its commands to end. Only the server
        // stopping is not the client's leaving.
        if !shared.shutdown.is_cancelled() {
            gone.cancel();
        }
        out_of_band.close();
    };
    let working = async {
        session.work(jobs).await;
        out_of_band.wait().await;
        outbox.close();
    };
    let writing = async {
        if let Err(error) = write(&stream, &outbox, shared.reply_deadline).await {
            tracing::debug!(client = %member.id, %error, "control client lost");
            outbox.close();
        }
        gone.cancel();
    };
    tokio::join!(reading, working, writing);
    let dropped = outbox.events_dropped();
    if dropped > 0 {
        tracing::info!(client = %member.id, dropped, "control client did not keep up with events");
    }
}

/// One client's side of the commands.
#[derive(Debug)]
struct Session<C> {
    commands: Arc<C>,
    outbox: Arc<Outbox>,
    fds: FdTable,
    client: ClientId,
    gone: CancellationToken,
}

impl<C: Commands> Session<C> {
    /// Runs in-band commands in order, until no more can come.
    async fn work(&self, mut jobs: mpsc::Receiver<Request>) {
        while let Some(request) = jobs.recv().await {
            self.outbox.room().await;
            self.answer(request).await;
        }
    }

    async fn answer(&self, request: Request) {
        let Request {
            id,
            command,
            arguments,
            out_of_band,
        } = request;
        let (result, fds) = match self.execute(command, arguments, out_of_band).await {
            Ok(Answer { value, fds }) => (Ok(value), fds),
            Err(error) => (Err(error), Vec::new()),
        };
        self.outbox.owe(Parcel {
            line: encode::answer(id.as_ref(), result),
            fds: fds.into(),
        });
    }

    async fn execute(
        &self,
        command: String,
        arguments: Value,
        out_of_band: bool,
    ) -> Result<Answer, CommandError> {
        let call = Call {
            command,
            arguments,
            fds: self.fds.clone(),
            client: self.client,
            gone: self.gone.clone(),
        };
        let name = call.command.as_str();
        let info = self.commands.table().iter().find(|info| info.name == name);
        if info.is_none() && !OWN.contains(&name) {
            return Err(not_found(format!("The command {name} has not been found")));
        }
        if out_of_band && !info.is_some_and(|info| info.oob) {
            return Err(CommandError::new(
                code::BAD_REQUEST,
                format!("The command {name} does not support OOB"),
            ));
        }
        let own = match name {
            "qmp_capabilities" => Err(not_found(
                "Capabilities negotiation is already complete, command ignored",
            )),
            "query-version" => call.parse::<Nothing>().map(|_| encode::version()),
            "query-commands" => call
                .parse::<Nothing>()
                .map(|_| command_list(self.commands.table())),
            "getfd" => {
                let named: Named = call.parse()?;
                self.fds.name_oldest(named.fdname).map(|()| json!({}))
            }
            "closefd" => {
                let named: Named = call.parse()?;
                self.fds.close(&named.fdname).map(|()| json!({}))
            }
            _ => return self.commands.execute(call).await,
        };
        own.map(Answer::from)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    fdname: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Negotiation {
    #[serde(default)]
    enable: Vec<Capability>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Capability {
    Oob,
}

/// What the negotiation settled.
#[derive(Debug, Clone, Copy)]
struct Negotiated {
    oob: bool,
}

struct Reader<'a, C> {
    stream: &'a UnixStream,
    session: &'a Arc<Session<C>>,
    queue: mpsc::Sender<Request>,
    out_of_band: &'a TaskTracker,
    slots: Arc<Semaphore>,
    negotiated: Option<Negotiated>,
}

impl<C: Commands> Reader<'_, C> {
    /// Reads and hands out requests until the client has no more to say.
    async fn run(mut self) {
        let mut splitter = Splitter::default();
        let mut buffer = vec![0; READ_BYTES];
        while let Some(bytes) = self.receive(&mut buffer).await {
            let mut rest = &buffer[..bytes];
            while let Some(item) = splitter.next(&mut rest) {
                // Else a client that only asks and never reads would have us keep every answer.
                self.session.outbox.room().await;
                match item {
                    Item::Message(message) => self.message(&message).await,
                    Item::Garbage(why) => self.refuse(request::garbage(why)),
                    Item::TooLarge => {
                        let desc =
                            format!("The request is larger than {CONTROL_REQUEST_BYTES_MAX} bytes");
                        let error = CommandError::new(code::TOO_LARGE, desc);
                        return self.refuse(request::Refusal { id: None, error });
                    }
                }
            }
        }
    }

    /// The next bytes; `None` at the end of the stream.
    async fn receive(&self, buffer: &mut [u8]) -> Option<usize> {
        let receive = || scm::receive(self.stream.as_fd(), buffer);
        let received = self.stream.async_io(Interest::READABLE, receive).await;
        let received = received.ok().filter(|received| received.bytes > 0)?;
        if received.fds_lost || !self.session.fds.arrived(received.fds) {
            // The next getfd would give a descriptor the name of another one: better no session.
            let error = CommandError::new(
                code::NO_DESCRIPTOR,
                "Descriptors were lost: too many at once, or too many open in the daemon",
            );
            self.refuse(request::Refusal { id: None, error });
            return None;
        }
        Some(received.bytes)
    }

    async fn message(&mut self, message: &[u8]) {
        let oob = self.negotiated.is_some_and(|negotiated| negotiated.oob);
        let request = match request::read(message, oob) {
            Ok(request) => request,
            Err(refusal) => return self.refuse(refusal),
        };
        if self.negotiated.is_none() {
            return self.negotiate(request);
        }
        if !request.out_of_band {
            // The other end lives as long as this session.
            let _ = self.queue.send(request).await;
            return;
        }
        let Ok(slot) = self.slots.clone().acquire_owned().await else {
            return;
        };
        let session = self.session.clone();
        self.out_of_band.spawn(async move {
            session.answer(request).await;
            drop(slot);
        });
    }

    fn negotiate(&mut self, request: Request) {
        let id = request.id.clone();
        match self.settle(request) {
            Ok(negotiated) => {
                self.negotiated = Some(negotiated);
                let line = encode::answer(id.as_ref(), Ok(json!({})));
                self.session.outbox.owe_and_open(line);
            }
            Err(error) => self.refuse(request::Refusal { id, error }),
        }
    }

    fn settle(&self, request: Request) -> Result<Negotiated, CommandError> {
        if request.command != "qmp_capabilities" {
            return Err(not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        let wanted: Negotiation = super::arguments::parse(request.arguments)?;
        Ok(Negotiated {
            oob: wanted.enable.contains(&Capability::Oob),
        })
    }

    fn refuse(&self, refusal: request::Refusal) {
        let line = encode::answer(refusal.id.as_ref(), Err(refusal.error));
        self.session.outbox.owe(line);
    }
}

fn not_found(desc: impl Into<String>) -> CommandError {
    CommandError::new(code::COMMAND_NOT_FOUND, desc).with_class(ErrorClass::CommandNotFound)
}

fn command_list(table: &[CommandInfo]) -> Value {
    let names = OWN
        .iter()
        .copied()
        .chain(table.iter().map(|info| info.name));
    names.map(|name| json!({"name": name})).collect()
}

/// Writes the outbox until it is closed and empty. Fails when the client is gone, or leaves an answer
/// unread for `deadline`. Unread events alone are no offence: they are dropped where they are queued.
async fn write(stream: &UnixStream, outbox: &Outbox, deadline: Duration) -> io::Result<()> {
    while let Some(Parcel { line, fds }) = outbox.first().await {
        let (mut rest, mut fds) = (&line[..], &fds[..]);
        while !rest.is_empty() {
            let send = || scm::send(stream.as_fd(), rest, fds);
            match stream.try_io(Interest::WRITABLE, send) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => (rest, fds) = (&rest[written..], &[]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let overdue = async {
                        outbox.owing().await;
                        tokio::time::sleep(deadline).await;
                    };
                    tokio::select! {
                        ready = stream.writable() => ready?,
                        () = overdue => return Err(io::ErrorKind::TimedOut.into()),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        outbox.written();
    }
    Ok(())
}
