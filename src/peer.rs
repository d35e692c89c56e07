//! The peer conversation: connections, preambles, and messages with a heartbeat under them.
//!
//! A conversation is a reader task and a heartbeat task around one connection. Whoever holds it reads
//! messages at leisure; silence longer than the stall timeout, a broken connection and damaged bytes
//! all arrive as the one error that ends it. What is said is the business of `sender` and `receiver`.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpSocket, TcpStream, UnixStream, lookup_host};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::either::Either;
use tokio_util::task::AbortOnDropHandle;

use crate::channel::{Suspect, within_host};
use crate::endpoint::Endpoint;
use crate::sys::tcp;
use crate::wire::{
    FRAME_BYTES, FrameHeader, FrameKind, FromReceiver, FromSender, Hex128, PREAMBLE_BYTES,
    Preamble, Purpose, Status, WireError,
};

/// Messages that may wait for their reader. The protocol never has more than a few under way.
const MESSAGES_WAITING_MAX: usize = 16;

/// How long the last word of a conversation may take to be heard.
const FAREWELL: Duration = Duration::from_secs(1);

/// A connection of either kind.
pub type Connection = Either<TcpStream, UnixStream>;

/// Why there is no conversation (any more).
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Nobody could be reached.
    #[error("cannot connect to {endpoint}: {source}: is a receiver listening there?")]
    Connect {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: io::Error,
    },
    /// The connection broke or was closed.
    #[error("the connection to the peer was lost: {0}")]
    Lost(io::Error),
    /// The peer said nothing, not even a heartbeat.
    #[error("the peer said nothing for {seconds} s (stall-timeout)")]
    Silent {
        /// How long.
        seconds: f32,
    },
    /// The peer said nothing, and its kernel is there.
    #[error(
        "the peer said nothing for {seconds} s (stall-timeout), though its host answers: it hangs"
    )]
    Hung {
        /// How long.
        seconds: f32,
    },
    /// The peer sent what is not the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer turned the connection away.
    #[error("the peer turned the connection away: {0}")]
    Turned(&'static str),
}

impl PeerError {
    /// Whether the connection is to blame, and another one may do better.
    #[must_use]
    pub fn is_loss(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Lost(_)
            | Self::Silent { .. }
            | Self::Hung { .. }
            | Self::Turned(_) => true,
            // Whoever answered once in this language has not forgotten it: the first bytes are damaged.
            Self::Wire(error) => matches!(
                error,
                WireError::Damaged { .. } | WireError::Illegal { field: "magic", .. }
            ),
        }
    }

    /// The stable code under which this error is reported.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "unreachable",
            Self::Lost(_) => "connection-lost",
            Self::Silent { .. } => "peer-silent",
            Self::Hung { .. } => "peer-hung",
            Self::Wire(error) => error.code(),
            Self::Turned(_) => "refused",
        }
    }
}

/// Connects to a receiver and introduces the connection; also gives the protocol version that both speak. Waits
/// at most `patience` for each step.
pub async fn connect(
    endpoint: &Endpoint,
    preamble: Preamble,
    patience: Duration,
) -> Result<(Connection, u16), PeerError> {
    let unreachable = |source| PeerError::Connect {
        endpoint: endpoint.clone(),
        source,
    };
    let connecting = async {
        match endpoint {
            Endpoint::Tcp { host, port } => {
                let stream = connect_tcp(host, *port).await?;
                stream.set_nodelay(true)?;
                Ok(Either::Left(stream))
            }
            Endpoint::Unix(path) => UnixStream::connect(path).await.map(Either::Right),
        }
    };
    let mut connection = match timeout(patience, connecting).await {
        Ok(connected) => connected.map_err(unreachable)?,
        Err(_) => return Err(unreachable(io::ErrorKind::TimedOut.into())),
    };
    let exchange = async {
        connection
            .write_all(&preamble.encode())
            .await
            .map_err(PeerError::Lost)?;
        read_preamble(&mut connection).await
    };
    let Ok(answer) = timeout(patience, exchange).await else {
        return Err(PeerError::Silent {
            seconds: patience.as_secs_f32(),
        });
    };
    let answer = answer?;
    check_answer(preamble.purpose, &answer)?;
    Ok((connection, answer.common_version()))
}

/// Tries one address of `host` after the other.
async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut refused = io::Error::other("the name has no address");
    for to in lookup_host((host, port)).await? {
        let socket = match to {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        within_host::prepare(socket.as_fd(), to);
        match socket.connect(to).await {
            Ok(stream) => return Ok(stream),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// Reads a preamble. Not bounded in time: the caller is.
pub async fn read_preamble(connection: &mut Connection) -> Result<Preamble, PeerError> {
    let mut bytes = [0; PREAMBLE_BYTES];
    connection
        .read_exact(&mut bytes)
        .await
        .map_err(PeerError::Lost)?;
    Ok(Preamble::decode(&bytes)?)
}

fn check_answer(purpose: Purpose, answer: &Preamble) -> Result<(), PeerError> {
    let reason = match answer.status {
        Status::Ok if answer.purpose != purpose => "it answered another kind of connection",
        Status::Ok => return Ok(()),
        Status::Version => {
            let (oldest, newest) = (answer.version_oldest, answer.version);
            return Err(WireError::Version { oldest, newest }.into());
        }
        Status::Token => "no transfer has this token",
        Status::Epoch => "the connection belongs to an epoch that is over",
        Status::Stream => "that stream is connected already",
        Status::Peer => "this host's address is not in its receive.allow-peers",
        Status::Busy => "it takes no further transfers now (receive.max-transfers)",
    };
    Err(PeerError::Turned(reason))
}

/// The address that a connection really went to: a name may lead elsewhere the next time.
#[must_use]
pub fn reached(connection: &Connection, endpoint: &Endpoint) -> Endpoint {
    match connection {
        Either::Left(tcp) => tcp.peer_addr().map_or_else(
            |_| endpoint.clone(),
            |at| Endpoint::Tcp {
                host: at.ip().to_string(),
                port: at.port(),
            },
        ),
        Either::Right(_) => endpoint.clone(),
    }
}

/// How long an answer from the other end takes; nothing on one host.
#[must_use]
pub fn round_trip(connection: &Connection) -> Duration {
    match connection {
        Either::Left(tcp) => tcp::round_trip(tcp.as_fd()).unwrap_or_default(),
        Either::Right(_) => Duration::ZERO,
    }
}

/// The connection as a descriptor, for a stream's thread. It stays non-blocking.
pub fn into_descriptor(connection: Connection) -> io::Result<OwnedFd> {
    match connection {
        Either::Left(tcp) => Ok(tcp.into_std()?.into()),
        Either::Right(unix) => Ok(unix.into_std()?.into()),
    }
}

/// Messages of one direction.
pub trait Message: Serialize + DeserializeOwned + Send + 'static {
    /// The heartbeat.
    fn alive() -> Self;
    /// Whether this is it.
    fn is_alive(&self) -> bool;
    /// A piece of the final blob; nothing where none can come.
    fn of_blob(piece: Vec<u8>) -> Option<Self>;
    /// Its bytes on the wire.
    fn frame(&self) -> Vec<u8> {
        FrameHeader::frame(self)
    }
}

impl Message for FromSender {
    fn alive() -> Self {
        Self::Alive {}
    }
    fn is_alive(&self) -> bool {
        matches!(self, Self::Alive {})
    }
    fn of_blob(piece: Vec<u8>) -> Option<Self> {
        Some(Self::Blob(piece))
    }
    fn frame(&self) -> Vec<u8> {
        match self {
            Self::Blob(piece) => FrameHeader::frame_blob(piece),
            message => FrameHeader::frame(message),
        }
    }
}

impl Message for FromReceiver {
    fn alive() -> Self {
        Self::Alive {}
    }
    fn is_alive(&self) -> bool {
        matches!(self, Self::Alive {})
    }
    fn of_blob(_piece: Vec<u8>) -> Option<Self> {
        None
    }
}

/// One side of a peer conversation: sends `Out`, hears `In`.
///
/// Its tasks own the connection: a future of this type that is dropped half way cuts no message in
/// two and loses none.
#[derive(Debug)]
pub struct Conversation<Out, In> {
    outgoing: mpsc::Sender<Outgoing>,
    incoming: mpsc::Receiver<Result<In, PeerError>>,
    patience: Duration,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
    _out: std::marker::PhantomData<fn(Out)>,
}

/// A frame to be written, and who wants to know that it was.
type Outgoing = (Vec<u8>, oneshot::Sender<io::Result<()>>);

impl<Out: Message, In: Message> Conversation<Out, In> {
    /// Starts a conversation over a connection whose preambles are exchanged. The peer may be silent
    /// for `patience` before it counts as gone.
    #[must_use]
    pub fn start(connection: Connection, patience: Duration) -> Self {
        // To look at once nothing is heard any more. It goes with the task that listens.
        let socket = match &connection {
            Either::Left(tcp) => tcp.as_fd().try_clone_to_owned().ok(),
            Either::Right(unix) => unix.as_fd().try_clone_to_owned().ok(),
        };
        let (reader, writer) = tokio::io::split(connection);
        let (messages, incoming) = mpsc::channel(MESSAGES_WAITING_MAX);
        let (outgoing, frames) = mpsc::channel(1);
        let heartbeat = Out::alive().frame();
        Self {
            outgoing,
            incoming,
            patience,
            reader: AbortOnDropHandle::new(tokio::spawn(listen(
                reader, socket, messages, patience,
            ))),
            writer: AbortOnDropHandle::new(tokio::spawn(talk(writer, frames, heartbeat, patience))),
            _out: std::marker::PhantomData,
        }
    }

    /// Says `message`; returns when the kernel has all of it. Once it was taken it is said, even if
    /// this future is dropped.
    pub async fn say(&self, message: &Out) -> Result<(), PeerError> {
        let gone = || PeerError::Lost(io::ErrorKind::NotConnected.into());
        let (written, result) = oneshot::channel();
        let say = async {
            self.outgoing
                .send((message.frame(), written))
                .await
                .map_err(|_| gone())?;
            result.await.map_err(|_| gone())?.map_err(PeerError::Lost)
        };
        match timeout(self.patience, say).await {
            Ok(said) => said,
            Err(_) => Err(PeerError::Silent {
                seconds: self.patience.as_secs_f32(),
            }),
        }
    }

    /// The next message that is not a heartbeat. Dropping the future loses nothing.
    pub async fn hear(&mut self) -> Result<In, PeerError> {
        match self.incoming.recv().await {
            Some(message) => message,
            None => Err(PeerError::Lost(io::ErrorKind::NotConnected.into())),
        }
    }

    /// What was said, or how it ended, without waiting.
    pub fn heard(&mut self) -> Option<Result<In, PeerError>> {
        match self.incoming.try_recv() {
            Ok(message) => Some(message),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(Err(PeerError::Lost(io::ErrorKind::NotConnected.into())))
            }
        }
    }

    /// Ends a conversation after its last word: says that there is no more, and lets the peer hang up
    /// first. Closing with its heartbeats unread would make the kernel throw our last word away.
    pub async fn farewell(self) {
        let Self {
            outgoing,
            mut incoming,
            reader,
            writer,
            ..
        } = self;
        drop(outgoing);
        let end = async {
            let _ = writer.await;
            while incoming.recv().await.is_some_and(|message| message.is_ok()) {}
        };
        let _ = timeout(FAREWELL, end).await;
        drop(reader);
    }
}

/// Writes frames, and a heartbeat when there was none for a while; closes our direction at the end.
async fn talk(
    mut writer: WriteHalf<Connection>,
    mut frames: mpsc::Receiver<Outgoing>,
    heartbeat: Vec<u8>,
    patience: Duration,
) {
    // Four beats within the peer's patience, and one a second if it is long: a lost packet or a busy
    // second is not yet a death.
    let pause = (patience / 4).min(Duration::from_secs(1));
    loop {
        // The reader notices what is wrong with the connection, and says so.
        match timeout(pause, frames.recv()).await {
            Ok(Some((frame, written))) => {
                let _ = written.send(writer.write_all(&frame).await);
            }
            Ok(None) => break,
            Err(_) => {
                if writer.write_all(&heartbeat).await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = writer.shutdown().await;
}

async fn listen<In: Message>(
    mut reader: ReadHalf<Connection>,
    socket: Option<OwnedFd>,
    messages: mpsc::Sender<Result<In, PeerError>>,
    patience: Duration,
) {
    loop {
        let read = match timeout(patience, read_message(&mut reader)).await {
            Ok(read) => read,
            Err(_) => Err(gone_silent(socket.as_ref(), patience)),
        };
        let last = read.is_err();
        if read.as_ref().is_ok_and(Message::is_alive) {
            continue;
        }
        if messages.send(read).await.is_err() || last {
            return;
        }
    }
}

/// Who is to blame that nothing is heard. Our own heartbeats were under way all the time.
fn gone_silent(socket: Option<&OwnedFd>, patience: Duration) -> PeerError {
    let seconds = patience.as_secs_f32();
    match socket.map(|socket| Suspect::of(socket.as_fd(), patience)) {
        Some(Suspect::Peer | Suspect::Destination) => PeerError::Hung { seconds },
        Some(Suspect::Network | Suspect::Unknown) | None => PeerError::Silent { seconds },
    }
}

/// Reads one message. Not bounded in time: the caller is.
pub async fn read_message<In: Message>(
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<In, PeerError> {
    let mut header = [0; FRAME_BYTES];
    reader
        .read_exact(&mut header)
        .await
        .map_err(PeerError::Lost)?;
    let header = FrameHeader::decode(&header)?;
    let mut body = vec![0; header.length];
    reader
        .read_exact(&mut body)
        .await
        .map_err(PeerError::Lost)?;
    match header.kind {
        FrameKind::Message => Ok(header.body(&body)?),
        FrameKind::Blob => {
            header.check(&body)?;
            In::of_blob(body).ok_or_else(|| header.out_of_place().into())
        }
    }
}

/// Tells a caller that there is no version in common.
pub async fn answer_version(connection: &mut Connection) -> Result<(), PeerError> {
    // Its preamble cannot be repeated: only its versions could be read.
    let ours = Preamble::new(Purpose::Conversation, Hex128::ZERO, 0);
    answer(connection, &ours, Status::Version).await
}

/// Answers a caller's preamble.
pub async fn answer(
    connection: &mut Connection,
    caller: &Preamble,
    status: Status,
) -> Result<(), PeerError> {
    connection
        .write_all(&caller.answer(status).encode())
        .await
        .map_err(PeerError::Lost)
}
