//! Connections: who calls, and where the call belongs.
//!
//! Until a caller has introduced itself it costs a slot. There are few; when they are used up the
//! oldest silent caller loses its own, never the newcomer, so that silence cannot keep anybody out.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::daemon::DaemonError;
use crate::endpoint::Endpoint;
use crate::limits::SILENT_CALLERS_MAX;
use crate::peer::{self, Connection, Conversation, PeerError};
use crate::wire::{FromReceiver, FromSender, Purpose, Status, WireError};

use super::Receiver;
use super::attempt;
use super::entry::Entry;
use super::error::AttemptError;

type Talk = Conversation<FromReceiver, FromSender>;

/// How long a caller may take for its 64 bytes, or for the first message of a conversation.
pub(super) const GREETING: Duration = Duration::from_secs(10);

/// How long the attempts may take to end their threads when the receiver is to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Pause after a failed accept: out of descriptors the next try would fail at once, and so on.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, Endpoint),
}

/// Everything the receiver listens on.
#[derive(Debug)]
pub(super) struct Listeners(Vec<Listener>);

impl Listeners {
    pub(super) async fn bind(endpoints: &[Endpoint]) -> Result<Self, DaemonError> {
        let mut listeners = Vec::new();
        for endpoint in endpoints {
            let failed = DaemonError::setup(format!("listen on {endpoint} (receive.listen)"));
            let bound = match endpoint {
                Endpoint::Tcp { host, port } => TcpListener::bind((host.as_str(), *port))
                    .await
                    .map(Listener::Tcp),
                Endpoint::Unix(path) => {
                    // What a receiver that died left behind answers nobody, so it can go.
                    let socket =
                        std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
                    if socket && std::os::unix::net::UnixStream::connect(path).is_err() {
                        let _ = std::fs::remove_file(path);
                    }
                    UnixListener::bind(path)
                        .map(|listener| Listener::Unix(listener, endpoint.clone()))
                }
            };
            listeners.push(bound.map_err(failed)?);
        }
        Ok(Self(listeners))
    }

    /// Where it listens, with the ports the kernel chose.
    pub(super) fn addresses(&self) -> Vec<String> {
        let address = |listener: &Listener| match listener {
            Listener::Tcp(tcp) => tcp
                .local_addr()
                .map_or_else(|_| "tcp:?".to_owned(), |at| format!("tcp:{at}")),
            Listener::Unix(_, endpoint) => endpoint.to_string(),
        };
        self.0.iter().map(address).collect()
    }

    /// Takes callers in until `shutdown`; then waits, not for ever, until the attempts have ended their threads.
    pub(super) async fn serve(self, receiver: &Arc<Receiver>, shutdown: CancellationToken) {
        let calls = TaskTracker::new();
        let silent = Arc::new(Silent::default());
        let mut accepting = JoinSet::new();
        for listener in self.0 {
            let (receiver, silent) = (Arc::clone(receiver), Arc::clone(&silent));
            let (calls, shutdown) = (calls.clone(), shutdown.clone());
            accepting.spawn(async move {
                loop {
                    match listener.accept().await {
                        Ok((connection, from)) => {
                            let call = Call {
                                receiver: Arc::clone(&receiver),
                                silent: Arc::clone(&silent),
                                from,
                                shutdown: shutdown.clone(),
                            };
                            silent.add(|slot| {
                                calls.spawn(call.answer(connection, slot)).abort_handle()
                            });
                        }
                        Err(error) => {
                            tracing::warn!(%error, "cannot accept a connection");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
            });
        }
        shutdown.cancelled().await;
        accepting.shutdown().await;
        calls.close();
        if timeout(STOP_DEADLINE, calls.wait()).await.is_err() {
            tracing::warn!("not all connections have ended; they end with this process");
        }
    }
}

impl Listener {
    async fn accept(&self) -> std::io::Result<(Connection, From)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((
                    Either::Left(stream),
                    From {
                        text: address.to_string(),
                        ip: Some(address.ip()),
                    },
                ))
            }
            Self::Unix(listener, endpoint) => {
                let (stream, _) = listener.accept().await?;
                Ok((
                    Either::Right(stream),
                    From {
                        text: endpoint.to_string(),
                        ip: None,
                    },
                ))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, Endpoint::Unix(path)) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Who calls.
#[derive(Debug)]
struct From {
    text: String,
    ip: Option<IpAddr>,
}

/// Callers that have not introduced themselves, oldest first.
#[derive(Debug, Default)]
struct Silent(Mutex<(u64, VecDeque<(u64, AbortHandle)>)>);

impl Silent {
    /// Starts a caller's task, and gives the oldest silent one up if there are too many.
    fn add(&self, start: impl FnOnce(u64) -> AbortHandle) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slots.0 += 1;
        let slot = slots.0;
        if slots.1.len() >= SILENT_CALLERS_MAX
            && let Some((_, oldest)) = slots.1.pop_front()
        {
            tracing::info!("too many callers that say nothing: dropping the oldest");
            oldest.abort();
        }
        slots.1.push_back((slot, start(slot)));
    }

    /// The caller has introduced itself, or is gone.
    fn remove(&self, slot: u64) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slots.1.retain(|(other, _)| *other != slot);
    }
}

struct Call {
    receiver: Arc<Receiver>,
    silent: Arc<Silent>,
    from: From,
    shutdown: CancellationToken,
}

impl Call {
    /// Hands the connection to where it belongs. The caller keeps its slot until it has said what it
    /// wants: a preamble costs a hostile one as little as silence.
    async fn answer(self, mut connection: Connection, slot: u64) {
        let from = self.from.text.clone();
        let greeted = timeout(GREETING, self.greet(&mut connection)).await;
        self.silent.remove(slot);
        let greeting = match greeted {
            Ok(Ok(greeting)) => greeting,
            Ok(Err(error)) => return tracing::info!(from, %error, "a caller that is no sender"),
            Err(_) => return tracing::info!(from, "a caller that says nothing"),
        };
        match greeting {
            Greeting::Turned(status) => tracing::info!(from, ?status, "turned a connection away"),
            Greeting::Stream(entry, epoch, stream) => {
                entry.take_in(epoch, stream, connection).await;
            }
            Greeting::Illegal(error) => {
                tracing::info!(from, %error, "a conversation that began with what is not allowed");
                refuse(connection, error.code(), &error.to_string()).await;
            }
            Greeting::Conversation(first) => match *first {
                FromSender::Offer(offer) => {
                    attempt::take(&self.receiver, connection, &from, offer, &self.shutdown).await;
                }
                first => tokio::select! {
                    () = converse(&self.receiver, connection, &from, first) => {}
                    () = self.shutdown.cancelled() => {}
                },
            },
        }
    }

    /// Preamble, answer, and the first message of a conversation.
    async fn greet(&self, connection: &mut Connection) -> Result<Greeting, PeerError> {
        let preamble = match peer::read_preamble(connection).await {
            Err(PeerError::Wire(WireError::Version { .. })) => {
                peer::answer_version(connection).await?;
                return Ok(Greeting::Turned(Status::Version));
            }
            preamble => preamble?,
        };
        let allowed = self
            .from
            .ip
            .is_none_or(|ip| self.receiver.config.allows_peer(ip));
        let entry = match preamble.purpose {
            _ if !allowed => Err(Status::Peer),
            Purpose::Conversation => Ok(None),
            Purpose::Stream(stream) => {
                let entry = self.receiver.lock().attempts.get(&preamble.token).cloned();
                entry.ok_or(Status::Token).and_then(|entry| {
                    match entry.claim(stream, preamble.epoch) {
                        Status::Ok => Ok(Some((entry, preamble.epoch, stream))),
                        refused => Err(refused),
                    }
                })
            }
        };
        let status = entry.as_ref().err().copied().unwrap_or(Status::Ok);
        peer::answer(connection, &preamble, status).await?;
        Ok(match entry {
            Err(status) => Greeting::Turned(status),
            Ok(Some((entry, epoch, stream))) => Greeting::Stream(entry, epoch, stream),
            Ok(None) => match peer::read_message(connection).await {
                // What the line damaged gets no answer: its sender connects again.
                Err(error @ PeerError::Wire(_)) if !error.is_loss() => Greeting::Illegal(error),
                first => Greeting::Conversation(Box::new(first?)),
            },
        })
    }
}

/// What a caller turned out to want.
enum Greeting {
    Turned(Status),
    Stream(Arc<Entry>, u32, u16),
    Conversation(Box<FromSender>),
    Illegal(PeerError),
}

/// Serves a conversation that offers nothing.
async fn converse(receiver: &Receiver, connection: Connection, from: &str, first: FromSender) {
    match first {
        FromSender::Resume(resume) => {
            let held = receiver.lock().attempts.get(&resume.token).cloned();
            match held.filter(|entry| entry.nonce() == resume.nonce) {
                Some(entry) => entry.resume(connection, resume).await,
                None => {
                    tracing::info!(from, nonce = %resume.nonce, "asked to go on with a transfer that is not held here");
                    let desc = "this receiver does not hold the transfer (any more)";
                    refuse(connection, "not-held", desc).await;
                }
            }
        }
        FromSender::Inquire { nonce, boot_id } => match receiver.owner(nonce, &boot_id) {
            Ok(owner) => {
                tracing::info!(from, %nonce, ?owner, "was asked who owns a transfer's regions");
                let talk = Talk::start(connection, GREETING);
                let _ = talk.say(&FromReceiver::Owner { owner }).await;
                talk.farewell().await;
            }
            // No answer: a wrong one could make two owners. The sender asks again.
            Err(error) => {
                tracing::error!(%nonce, %error, "cannot tell who owns a transfer's regions");
            }
        },
        other => {
            let error = AttemptError::out_of_place(&other);
            tracing::info!(from, %error, "a conversation that began in the middle");
            refuse(connection, error.code(), &error.to_string()).await;
        }
    }
}

/// Ends a conversation that wants what is not here.
async fn refuse(connection: Connection, code: &str, desc: &str) {
    let talk = Talk::start(connection, GREETING);
    let refusal = FromReceiver::Refuse {
        code: code.into(),
        desc: desc.into(),
    };
    let _ = talk.say(&refusal).await;
    talk.farewell().await;
}
