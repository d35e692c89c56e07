//! One attempt as the receiver lives it: agree, receive, prepare, commit.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::assembly::Assembly;
use crate::channel::{Patience, SocketChannel};
use crate::journal::Decision;
use crate::name::Name;
use crate::peer::{self, Connection, Conversation, PeerError};
use crate::stats::Counter;
use crate::stream::{IncomingSetup, IncomingStream, StreamError};
use crate::sys::wake::Wake;
use crate::wire::{FromReceiver, FromSender, Hex128, Offer, Status, StreamTotals, Token};

use super::Receiver;
use super::accept::GREETING;
use super::admission::{self, Refusal};
use super::destination::{self, DestinationFile, Hidden};
use super::error::AttemptError;

/// Bounds on what a sender may ask for as stall timeout.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3600));

/// When a stream fails, the conversation often knows why; this is how long that may take.
const REASON_WAIT: Duration = Duration::from_millis(500);

type Talk = Conversation<FromReceiver, FromSender>;
type StreamEnd = (u16, Result<(), StreamError>);

/// What the rest of the receiver sees of an attempt under way.
#[derive(Debug)]
pub(super) struct Entry {
    id: Name,
    nonce: Hex128,
    epoch: u32,
    data_bytes: u64,
    total_bytes: u64,
    destinations: Arc<[DestinationFile]>,
    claimed: Vec<AtomicBool>,
    streams: mpsc::Sender<(u16, Connection)>,
}

impl Entry {
    pub(super) fn names(&self) -> impl Iterator<Item = &Name> {
        use crate::stream::Destination;
        self.destinations
            .iter()
            .map(|destination| destination.region().name())
    }

    pub(super) fn id(&self) -> &Name {
        &self.id
    }

    pub(super) fn nonce(&self) -> Hex128 {
        self.nonce
    }

    /// Length of its Regions together.
    pub(super) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes it may still allocate.
    pub(super) fn owed_bytes(&self) -> u64 {
        let allocated: u64 = self
            .destinations
            .iter()
            .map(DestinationFile::allocated_bytes)
            .sum();
        self.data_bytes.saturating_sub(allocated)
    }

    /// Whether a stream may connect: each one once, in this epoch.
    pub(super) fn claim(&self, stream: u16, epoch: u32) -> Status {
        if epoch != self.epoch {
            return Status::Epoch;
        }
        match self.claimed.get(usize::from(stream)) {
            Some(claimed) if !claimed.swap(true, Ordering::Relaxed) => Status::Ok,
            _ => Status::Stream,
        }
    }

    /// Hands a claimed stream to its attempt, which may have ended meanwhile.
    pub(super) async fn take_in(&self, stream: u16, connection: Connection) {
        let _ = self.streams.send((stream, connection)).await;
    }
}

/// Serves a conversation, whatever it turns out to be about.
pub(super) async fn converse(
    receiver: &Arc<Receiver>,
    connection: Connection,
    from: &str,
    first: FromSender,
) {
    match first {
        FromSender::Offer(offer) => take(receiver, connection, from, offer).await,
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
        }
    }
}

async fn take(receiver: &Arc<Receiver>, connection: Connection, from: &str, offer: Offer) {
    let patience = Duration::from_millis(offer.stall_timeout_ms).clamp(PATIENCE.0, PATIENCE.1);
    let mut attempt = Attempt {
        receiver: Arc::clone(receiver),
        talk: Talk::start(connection, patience),
        patience,
        id: offer.id.clone(),
        nonce: offer.nonce,
        regions: offer
            .regions
            .iter()
            .map(|region| (region.name.clone(), region.length))
            .collect(),
        received: Arc::default(),
        accepted: false,
        crew: None,
    };
    tracing::info!(id = %attempt.id, from, nonce = %attempt.nonce, regions = attempt.regions.len(), "a transfer is offered");
    let ended = attempt.run(&offer).await;
    attempt.clean_up().await;
    if let Err(error) = ended {
        tracing::warn!(id = %attempt.id, code = error.code(), %error, "the transfer failed; nothing of it is kept");
        let refusal = FromReceiver::Refuse {
            code: error.code().into(),
            desc: error.to_string().into(),
        };
        let _ = attempt.talk.say(&refusal).await;
        // An offer that was not accepted leaves no trace: anybody can make any number of them.
        if attempt.accepted {
            let status = if error.code() == "cancelled" {
                "cancelled"
            } else {
                "failed"
            };
            let error =
                json!({"class": "GenericError", "desc": error.to_string(), "x-code": error.code()});
            attempt.report(status, Some(error));
        }
    }
    attempt.talk.farewell().await;
}

struct Attempt {
    receiver: Arc<Receiver>,
    talk: Talk,
    patience: Duration,
    id: Name,
    nonce: Hex128,
    regions: Vec<(Name, u64)>,
    received: Arc<Counter>,
    accepted: bool,
    crew: Option<Crew>,
}

/// What exists from the acceptance on.
struct Crew {
    token: Token,
    setup: Arc<IncomingSetup<DestinationFile>>,
    arriving: mpsc::Receiver<(u16, Connection)>,
    wake: Wake,
    threads: Vec<thread::JoinHandle<()>>,
    ends: mpsc::UnboundedReceiver<StreamEnd>,
    report_end: mpsc::UnboundedSender<StreamEnd>,
}

impl Attempt {
    async fn run(&mut self, offer: &Offer) -> Result<(), AttemptError> {
        let token = self.agree(offer)?;
        let boot_id = self.receiver.boot_id.clone();
        self.talk
            .say(&FromReceiver::Accept {
                token,
                epoch: 0,
                boot_id,
            })
            .await?;
        if offer.dry_run {
            return Ok(());
        }
        self.accepted = true;
        self.report("setup", None);
        self.gather_streams(offer.streams).await?;
        self.report("active", None);
        let totals = self.receive().await?;
        let hidden = self.prepare(&totals).await?;
        self.talk.say(&FromReceiver::Prepared {}).await?;
        self.commit(hidden).await
    }

    /// Checks the offer and makes what it needs. Nothing of it is visible in the directory.
    fn agree(&mut self, offer: &Offer) -> Result<Token, AttemptError> {
        let config = &self.receiver.config;
        let free = admission::free_bytes(&config.directory)
            .map_err(AttemptError::local("look for free memory"))?;
        admission::admit(offer, config, &self.receiver.obligations(), free)?;
        let decided = self.receiver.journal.find::<Decision>(offer.nonce);
        if decided
            .map_err(AttemptError::local("read the journal"))?
            .is_some()
        {
            return Err(Refusal::new(
                "refused",
                "this attempt was decided before; start a new one",
            )
            .into());
        }
        let token = Token::random().map_err(AttemptError::local("make a token"))?;
        if offer.dry_run {
            return Ok(token);
        }
        let create = |region: &crate::wire::OfferedRegion| {
            DestinationFile::create(
                &config.directory,
                region.name.clone(),
                region.length,
                config.huge_pages,
            )
        };
        let destinations: Arc<[_]> = offer.regions.iter().map(create).collect::<Result<_, _>>()?;
        let assembly = Assembly::new(0, offer.streams, self.regions.iter().cloned());
        let (streams, arriving) = mpsc::channel(offer.streams.into());
        let (report_end, ends) = mpsc::unbounded_channel();
        let wake = Wake::new().map_err(AttemptError::local("make an eventfd"))?;
        let entry = Entry {
            id: self.id.clone(),
            nonce: self.nonce,
            total_bytes: self.regions.iter().map(|(_, bytes)| bytes).sum(),
            epoch: 0,
            data_bytes: offer
                .regions
                .iter()
                .map(|region| region.data_bytes.min(region.length))
                .sum(),
            destinations: Arc::clone(&destinations),
            claimed: std::iter::repeat_with(AtomicBool::default)
                .take(offer.streams.into())
                .collect(),
            streams,
        };
        self.receiver.lock().attempts.insert(token, Arc::new(entry));
        self.crew = Some(Crew {
            token,
            setup: Arc::new(IncomingSetup {
                assembly: Arc::new(assembly),
                destinations,
                integrity: offer.integrity,
                received: Arc::clone(&self.received),
            }),
            arriving,
            wake,
            threads: Vec::new(),
            ends,
            report_end,
        });
        Ok(token)
    }

    fn crew(&mut self) -> &mut Crew {
        self.crew.as_mut().expect("an accepted attempt has a crew")
    }

    /// Starts a thread for every stream as it arrives, until all have.
    async fn gather_streams(&mut self, streams: u16) -> Result<(), AttemptError> {
        let patience = self.patience;
        while self.crew().threads.len() < usize::from(streams) {
            let crew = self.crew.as_mut().expect("an accepted attempt has a crew");
            tokio::select! {
                Some((stream, connection)) = crew.arriving.recv() => {
                    crew.start(stream, connection, patience).map_err(AttemptError::local("start a stream"))?;
                }
                message = self.talk.hear() => return Err(unexpected(message)),
                Some((stream, end)) = crew.ends.recv() => return Err(failure(stream, end, &mut self.talk).await),
                // Each arrival is progress.
                () = tokio::time::sleep(patience) => {
                    let arrived = crew.threads.len();
                    return Err(AttemptError::StreamsMissing { arrived, streams, seconds: patience.as_secs_f32() });
                }
            }
        }
        Ok(())
    }

    /// Lets the streams work until the sender says that it is done.
    async fn receive(&mut self) -> Result<Vec<StreamTotals>, AttemptError> {
        let crew = self.crew.as_mut().expect("an accepted attempt has a crew");
        tokio::select! {
            message = self.talk.hear() => match message? {
                FromSender::Prepare { streams } => Ok(streams),
                other => Err(unexpected(Ok(other))),
            },
            Some((stream, end)) = crew.ends.recv() => Err(failure(stream, end, &mut self.talk).await),
        }
    }

    /// Everything is there and intact, and every file has a name to be renamed from. The streams end
    /// first: what is not in place now never will be.
    async fn prepare(&mut self, totals: &[StreamTotals]) -> Result<Vec<Hidden>, AttemptError> {
        let nonce = self.nonce;
        let setup = Arc::clone(&self.crew().setup);
        self.crew().end_streams().await;
        setup.assembly.verdict(totals)?;
        let hide = move || {
            let files = setup.destinations.iter().enumerate();
            files
                .map(|(index, file)| file.hide(nonce, index))
                .collect::<io::Result<Vec<_>>>()
        };
        // On a disk this writes the Regions out, so it is not for the control plane's thread.
        let hidden = tokio::task::spawn_blocking(hide)
            .await
            .map_err(io::Error::from);
        hidden
            .and_then(|hidden| hidden)
            .map_err(AttemptError::local(
                "link the regions into receive.directory",
            ))
    }

    /// The one step after which the Regions are ours. There is no way back behind the record.
    async fn commit(&mut self, hidden: Vec<Hidden>) -> Result<(), AttemptError> {
        match self.talk.hear().await? {
            FromSender::Commit { nonce } if nonce == self.nonce => {}
            other => return Err(unexpected(Ok(other))),
        }
        let boot_id = self.receiver.boot_id.clone();
        let moves: Vec<_> = hidden.iter().map(Hidden::its_move).collect();
        let record = Decision::Committed {
            boot_id,
            moves: moves.clone(),
        };
        let decided = self.receiver.journal.decide(self.nonce, record);
        match decided.map_err(AttemptError::local("write the commit record"))? {
            Decision::Committed { moves: decided, .. } if decided == moves => {}
            Decision::Committed { .. } | Decision::Refused { .. } => {
                let desc = "this attempt was decided before, and not in favour of this receiver";
                return Err(Refusal::new("refused", desc).into());
            }
        }
        hidden.into_iter().for_each(Hidden::keep);
        destination::roll_forward(&moves);
        self.receiver
            .lock()
            .committed
            .extend(self.regions.iter().cloned());
        // If this is lost the sender asks again, and the record answers.
        let told = self.talk.say(&FromReceiver::Committed {}).await;
        tracing::info!(id = %self.id, told = told.is_ok(), "committed: the regions are owned here now");
        self.report("completed", None);
        // The sender hangs up when it has heard. Unmapping the memory here takes milliseconds per GiB,
        // and on few cores they would be part of its downtime.
        let _ = timeout(REASON_WAIT, self.talk.hear()).await;
        Ok(())
    }

    /// Ends every thread and forgets the attempt. Files without a name vanish with their descriptors.
    async fn clean_up(&mut self) {
        if let Some(mut crew) = self.crew.take() {
            crew.end_streams().await;
            self.receiver.lock().attempts.remove(&crew.token);
        }
    }

    fn report(&self, status: &str, error: Option<Value>) {
        let total: u64 = self.regions.iter().map(|(_, bytes)| bytes).sum();
        let names: Vec<_> = self.regions.iter().map(|(name, _)| name).collect();
        let mut shown = json!({
            "id": self.id,
            "status": status,
            "regions": names,
            "ram": {"total": total, "transferred": self.received.get()},
        });
        if let Some(error) = error {
            shown["error"] = error;
        }
        self.receiver.report(&self.id, shown);
    }
}

impl Crew {
    /// Wakes the streams' threads and waits until they have ended.
    async fn end_streams(&mut self) {
        self.wake.wake();
        let threads = std::mem::take(&mut self.threads);
        let join = move || {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a stream's thread panicked");
                }
            }
        };
        let _ = tokio::task::spawn_blocking(join).await;
    }

    fn start(
        &mut self,
        stream: u16,
        connection: Connection,
        stall_timeout: Duration,
    ) -> io::Result<()> {
        let patience = Patience {
            stall_timeout,
            wake: self.wake.clone(),
        };
        let channel =
            SocketChannel::new(peer::into_descriptor(connection)?, patience.clone(), false)?;
        let mut incoming = IncomingStream::new(stream, Box::new(channel), &patience, &self.setup);
        let report_end = self.report_end.clone();
        let run = move || {
            // The attempt may be over, and then nobody wants to know.
            let _ = report_end.send((stream, incoming.run()));
        };
        self.threads.push(
            thread::Builder::new()
                .name(format!("mf-recv-{stream}"))
                .spawn(run)?,
        );
        Ok(())
    }
}

/// What a message means that is not the one that was due.
fn unexpected(message: Result<FromSender, PeerError>) -> AttemptError {
    match message {
        Ok(FromSender::Abort { code, desc }) => aborted(&code, &desc),
        Ok(other) => AttemptError::out_of_place(&other),
        Err(error) => error.into(),
    }
}

/// Why a stream ended. If its connection did, the sender may just be telling us; an error of our own is
/// news to the sender, who waits for it.
async fn failure(stream: u16, end: Result<(), StreamError>, talk: &mut Talk) -> AttemptError {
    match end {
        Ok(()) | Err(StreamError::Lost { .. }) => {}
        Err(error) => return error.into(),
    }
    match timeout(REASON_WAIT, talk.hear()).await {
        Ok(Ok(FromSender::Abort { code, desc })) => aborted(&code, &desc),
        _ => match end {
            Ok(()) => AttemptError::StreamEnded(stream),
            Err(error) => error.into(),
        },
    }
}

fn aborted(code: &impl ToString, desc: &impl ToString) -> AttemptError {
    AttemptError::Aborted {
        code: code.to_string(),
        desc: desc.to_string(),
    }
}
