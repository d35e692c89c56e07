//! One attempt as the receiver lives it: agree, receive, prepare, commit.

mod handover;

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
use crate::wire::{
    BlobAccount, FromReceiver, FromSender, Hex128, Offer, OfferedRegion, Status, StreamTotals,
    Token,
};

use super::Receiver;
use super::accept::GREETING;
use super::admission::{self, Refusal};
use super::blob::ArrivingBlob;
use super::destination::DestinationFile;
use super::error::AttemptError;
use super::prepared::{Place, PreparedMemory};

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
    destinations: Arc<[Place]>,
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
            .filter_map(Place::file)
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
        admitted: false,
        accepted: false,
        crew: None,
        blob: None,
        blob_bytes: None,
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
    /// Whether the offer was found good: it may have claimed prepared memory.
    admitted: bool,
    accepted: bool,
    crew: Option<Crew>,
    blob: Option<ArrivingBlob>,
    /// Length of the blob that was committed.
    blob_bytes: Option<u64>,
}

/// What exists from the acceptance on.
struct Crew {
    token: Token,
    setup: Arc<IncomingSetup<Place>>,
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
        let (totals, blob) = self.receive().await?;
        let ready = self.prepare(&totals, blob).await?;
        self.talk.say(&FromReceiver::Prepared {}).await?;
        self.commit(ready).await
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
        self.admitted = true;
        let places = offer.regions.iter().map(|region| self.place(region));
        let destinations: Arc<[_]> = places.collect::<Result<_, _>>()?;
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
                .zip(destinations.iter())
                .filter(|(_, place)| place.file().is_some())
                .map(|(region, _)| region.data_bytes.min(region.length))
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

    /// Where a Region is to arrive: memory that was prepared for it, or a new file.
    fn place(&self, offered: &OfferedRegion) -> Result<Place, AttemptError> {
        let claimed = self.receiver.lock().holdings.claim(&offered.name, &self.id);
        if let Some(region) = claimed {
            region.check_length()?;
            let memory =
                PreparedMemory::new(region).map_err(AttemptError::local("open /dev/zero"))?;
            return Ok(Place::Prepared(memory));
        }
        let config = &self.receiver.config;
        let (name, bytes) = (offered.name.clone(), offered.length);
        let file = DestinationFile::create(&config.directory, name, bytes, config.huge_pages)?;
        Ok(Place::New(file))
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
    async fn receive(&mut self) -> Result<(Vec<StreamTotals>, Option<BlobAccount>), AttemptError> {
        let crew = self.crew.as_mut().expect("an accepted attempt has a crew");
        loop {
            tokio::select! {
                message = self.talk.hear() => match message? {
                    FromSender::Prepare { streams, blob } => return Ok((streams, blob)),
                    FromSender::Blob(piece) => {
                        if self.blob.is_none() {
                            let made = ArrivingBlob::new(&self.receiver.journal);
                            self.blob = Some(made.map_err(AttemptError::local("keep the final blob"))?);
                        }
                        self.blob.as_mut().map_or(Ok(()), |blob| blob.add(&piece))?;
                    }
                    other => return Err(unexpected(Ok(other))),
                },
                Some((stream, end)) = crew.ends.recv() => return Err(failure(stream, end, &mut self.talk).await),
            }
        }
    }

    /// Ends every thread and forgets the attempt. Files without a name vanish with their descriptors.
    async fn clean_up(&mut self) {
        if let Some(mut crew) = self.crew.take() {
            crew.end_streams().await;
            self.receiver.lock().attempts.remove(&crew.token);
        }
        if self.admitted {
            self.receiver.lock().holdings.ended(&self.id, false);
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
        if let Some(bytes) = self.blob_bytes {
            shown["blob-size"] = bytes.into();
        }
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
