//! One attempt as the receiver lives it: agree, receive, prepare, commit.

mod handover;
mod heard;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::assembly::Assembly;
use crate::config::HugePages;
use crate::control::ClientId;
use crate::daemon::let_go_of;
use crate::journal::Decision;
use crate::limits::RECOVER_SECONDS_MAX;
use crate::name::Name;
use crate::peer::{Connection, Conversation};
use crate::stats::Counter;
use crate::stream::{IncomingSetup, StreamError};
use crate::wire::{FromReceiver, FromSender, Hex128, Offer, OfferedRegion, Token};

use super::Receiver;
use super::admission::{self, Refusal};
use super::blob::ArrivingBlob;
use super::destination::{DestinationFile, Hidden, gives_huge_pages};
use super::entry::{Arrival, Entry, Resuming, Return};
use super::error::AttemptError;
use super::prepared::{Place, PreparedMemory};
use super::readers::Readers;
use handover::Ready;
use heard::{aborted, failure, hear, unexpected};

/// Bounds on what a sender may ask for as stall timeout.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3600));

/// Longest time that an attempt waits for its sender.
const RECOVERY_MAX: Duration = Duration::from_secs(RECOVER_SECONDS_MAX);

/// When a stream fails, the conversation often knows why; this is how long that may take.
const REASON_WAIT: Duration = Duration::from_millis(500);

type Talk = Conversation<FromReceiver, FromSender>;

/// Serves a conversation that began with an offer, to the end of the attempt. After `shutdown` the sender is told
/// nothing: it sees its connections end, and comes back in case the receiver does.
pub(super) async fn take(
    receiver: &Arc<Receiver>,
    connection: Connection,
    from: &str,
    offer: Offer,
    shutdown: &CancellationToken,
) {
    let patience = Duration::from_millis(offer.stall_timeout_ms).clamp(PATIENCE.0, PATIENCE.1);
    // The sender may notice a loss later than we do, by as much as its patience.
    let recovery = match offer.recover_timeout_ms {
        0 => Duration::ZERO,
        asked => Duration::from_millis(asked).min(RECOVERY_MAX) + patience,
    };
    if !offer.dry_run {
        receiver.make_way(&offer).await;
    }
    let mut attempt = Attempt {
        receiver: Arc::clone(receiver),
        talk: Talk::start(connection, patience),
        patience,
        recovery,
        id: offer.id.clone(),
        nonce: offer.nonce,
        regions: offer
            .regions
            .iter()
            .map(|region| (region.name.clone(), region.length))
            .collect(),
        received: Arc::default(),
        huge_pages: false,
        admitted: false,
        accepted: None,
        blob: None,
        blob_bytes: None,
    };
    tracing::info!(id = %attempt.id, from, nonce = %attempt.nonce, regions = attempt.regions.len(), "a transfer is offered");
    let ended = shutdown.run_until_cancelled(attempt.run(&offer)).await;
    let accepted = attempt.clean_up().await;
    let Some(ended) = ended else {
        return tracing::info!(id = %attempt.id, "stopped; what was not committed is not kept");
    };
    if let Err(error) = ended {
        tracing::warn!(id = %attempt.id, code = error.code(), %error, "the transfer failed; nothing of it is kept");
        let refusal = FromReceiver::Refuse {
            code: error.code().into(),
            desc: error.to_string().into(),
        };
        let _ = attempt.talk.say(&refusal).await;
        // An offer that was not accepted leaves no trace: anybody can make any number of them.
        if accepted {
            let status = if error.code() == "cancelled" {
                "cancelled"
            } else {
                "failed"
            };
            attempt.report(status, Some(&error));
        }
    }
    attempt.talk.farewell().await;
}

struct Attempt {
    receiver: Arc<Receiver>,
    talk: Talk,
    patience: Duration,
    /// How long it waits for its sender; 0: not at all.
    recovery: Duration,
    id: Name,
    nonce: Hex128,
    regions: Vec<(Name, u64)>,
    received: Arc<Counter>,
    /// Whether what is dense arrives in huge pages.
    huge_pages: bool,
    /// Whether the offer was found good: it may have claimed prepared memory.
    admitted: bool,
    accepted: Option<Accepted>,
    /// What has arrived of it over this conversation.
    blob: Option<ArrivingBlob>,
    /// Length of the blob that was committed.
    blob_bytes: Option<u64>,
}

/// What exists from the acceptance on.
struct Accepted {
    token: Token,
    entry: Arc<Entry>,
    arriving: mpsc::Receiver<Arrival>,
    back: Return,
    setup: Arc<IncomingSetup<Place>>,
    readers: Readers,
    /// The last epoch that had streams, and how many frames of each were applied in it.
    applied: (u32, Vec<u64>),
    /// From the first time that everything was there.
    hidden: Option<Vec<Hidden>>,
    /// Clients that wanted to be asked and have agreed.
    confirmed: Vec<ClientId>,
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
        self.report("setup", None);
        loop {
            match self.serve().await {
                Err(error) if error.is_interruption() && !self.recovery.is_zero() => {
                    self.suspend(error).await?;
                }
                ended => return ended,
            }
        }
    }

    /// Checks the offer and makes what it needs. Nothing of it is visible in the directory.
    fn agree(&mut self, offer: &Offer) -> Result<Token, AttemptError> {
        let config = &self.receiver.config;
        let free = admission::free_bytes(&config.directory)
            .map_err(AttemptError::local("look for free memory"))?;
        let room = admission::admit(offer, config, &self.receiver.obligations(), free)?;
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
        self.huge_pages = config.huge_pages == HugePages::Auto
            && room.fits_huge_pages()
            && gives_huge_pages(&config.directory);
        let promised_bytes = match self.huge_pages {
            true => room.huge_bytes,
            false => room.needed_bytes,
        };
        let places = offer.regions.iter().map(|region| self.place(region));
        let destinations: Arc<[_]> = places.collect::<Result<_, _>>()?;
        let assembly = Assembly::new(0, offer.streams, self.regions.iter().cloned());
        let readers =
            Readers::new(self.receiver.cpus).map_err(AttemptError::local("make an eventfd"))?;
        let (entry, arriving, back) = Entry::new(offer, Arc::clone(&destinations), promised_bytes);
        let entry = Arc::new(entry);
        let mut state = self.receiver.lock();
        state.attempts.insert(token, Arc::clone(&entry));
        self.accepted = Some(Accepted {
            token,
            entry,
            arriving,
            back,
            setup: Arc::new(IncomingSetup {
                assembly: Arc::new(assembly),
                destinations,
                integrity: offer.integrity,
                compression: offer.compression,
                received: Arc::clone(&self.received),
            }),
            readers,
            applied: (0, Vec::new()),
            hidden: None,
            confirmed: Vec::new(),
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
        let file = DestinationFile::create(&config.directory, name, bytes, self.huge_pages)?;
        if let Some(node) = config.numa_node {
            file.prefer_node(node)
                .map_err(AttemptError::local("take memory from receive.numa-node"))?;
        }
        Ok(Place::New(file))
    }

    /// From the first stream to the commit, over the connections of one epoch: lets the streams work, as they
    /// come, and does what the sender asks for.
    async fn serve(&mut self) -> Result<(), AttemptError> {
        let mut ready = None;
        loop {
            let accepted = accepted(&mut self.accepted);
            tokio::select! {
                Some(arrival) = accepted.arriving.recv() => {
                    let first = accepted.readers.len() == 0;
                    accepted.start(arrival, self.patience).map_err(AttemptError::local("start a stream"))?;
                    if first {
                        self.report("active", None);
                    }
                }
                (stream, end) = accepted.readers.hear() => {
                    // Its sender never used it, or has sent all that it had: it does without, or notices itself.
                    let lost = matches!(end, Ok(()) | Err(StreamError::Lost { .. }));
                    let assembly = &accepted.setup.assembly;
                    let done = ready.as_ref().is_some_and(|ready: &Ready| assembly.is_still(&ready.totals));
                    let needed = !done && !assembly.is_unused(stream);
                    if !lost || needed {
                        return Err(failure(stream, end, &mut self.talk).await);
                    }
                    tracing::info!(id = %self.id, stream, "a stream that is not needed is gone");
                }
                message = hear(&mut self.talk, &mut accepted.back, &accepted.entry) => match message? {
                    FromSender::Prepare { streams, blob } => {
                        ready = Some(self.prepare(streams, blob).await?);
                        self.talk.say(&FromReceiver::Prepared {}).await?;
                    }
                    FromSender::Commit { nonce } if nonce == self.nonce => match ready {
                        Some(ready) => return self.commit(ready).await,
                        None => return Err(unexpected(Ok(FromSender::Commit { nonce }))),
                    },
                    FromSender::Blob(piece) => {
                        ready = None;
                        if self.blob.is_none() {
                            let made = ArrivingBlob::new(&self.receiver.journal);
                            self.blob = Some(made.map_err(AttemptError::local("keep the final blob"))?);
                        }
                        self.blob.as_mut().map_or(Ok(()), |blob| blob.add(&piece))?;
                    }
                    other => return Err(unexpected(Ok(other))),
                },
            }
        }
    }

    /// A connection was lost: ends the streams, and waits for the sender to come back. When this returns
    /// `Ok`, nothing reads an old connection, and streams of the next epoch may connect.
    async fn suspend(&mut self, cause: AttemptError) -> Result<(), AttemptError> {
        tracing::warn!(id = %self.id, code = cause.code(), error = %cause, "interrupted");
        accepted(&mut self.accepted).entry.close();
        // The sender may hear it or not; if it does, it knows sooner and better.
        let interrupted = FromReceiver::Interrupted {
            code: cause.code().into(),
            desc: cause.to_string().into(),
        };
        let _ = timeout(REASON_WAIT, self.talk.say(&interrupted)).await;
        accepted(&mut self.accepted).end_epoch().await;
        self.report("paused", Some(&cause));
        let deadline = Instant::now() + self.recovery;
        loop {
            let Ok(resuming) = timeout_at(deadline, self.come_back()).await else {
                return Err(cause);
            };
            if self.resume(resuming?).await? {
                return Ok(());
            }
        }
    }

    /// Waits for the sender's next conversation. The old one is not believed any more; but the sender may
    /// have said there that it gives up.
    async fn come_back(&mut self) -> Result<Resuming, AttemptError> {
        let accepted = accepted(&mut self.accepted);
        let mut listening = true;
        loop {
            tokio::select! {
                resuming = accepted.back.next() => return Ok(resuming),
                () = accepted.entry.given_up() => return Err(AttemptError::GivenUp),
                // One that slipped through while the epoch was closed.
                Some(late) = accepted.arriving.recv() => drop(late),
                said = self.talk.hear(), if listening => match said {
                    Ok(FromSender::Abort { code, desc }) => return Err(aborted(&code, &desc)),
                    Ok(_) => {}
                    Err(_) => listening = false,
                },
            }
        }
    }

    /// Opens the next epoch; `false`: the conversation comes from the past.
    async fn resume(&mut self, resuming: Resuming) -> Result<bool, AttemptError> {
        let accepted = accepted(&mut self.accepted);
        self.talk = Talk::start(resuming.connection, self.patience);
        // It comes again, from its beginning.
        self.blob = None;
        let asked = resuming.resume;
        let before = &accepted.setup;
        let epoch = before.assembly.epoch() + 1;
        let assembly = match before.assembly.succeed(epoch, asked.iteration) {
            Ok(assembly) => Arc::new(assembly),
            Err(stale) => {
                let refusal = FromReceiver::Refuse {
                    code: "protocol".into(),
                    desc: stale.to_string().into(),
                };
                let _ = self.talk.say(&refusal).await;
                return Ok(false);
            }
        };
        let applied = match &accepted.applied {
            (epoch, applied) if *epoch == asked.epoch => applied.clone(),
            _ => Vec::new(),
        };
        let looked = Arc::clone(&assembly);
        let missing = tokio::task::spawn_blocking(move || looked.missing()).await;
        let missing = missing
            .map_err(|error| AttemptError::local("look for what is missing")(error.into()))?;
        accepted.setup = Arc::new(IncomingSetup {
            assembly,
            destinations: Arc::clone(&before.destinations),
            integrity: before.integrity,
            compression: before.compression,
            received: Arc::clone(&before.received),
        });
        accepted.readers =
            Readers::new(self.receiver.cpus).map_err(AttemptError::local("make an eventfd"))?;
        accepted.entry.open(epoch);
        tracing::info!(id = %self.id, epoch, "resumed");
        // If this is lost, so is the conversation, and that shows when it is listened to.
        let _ = self
            .talk
            .say(&FromReceiver::Resumed {
                epoch,
                applied,
                missing,
            })
            .await;
        Ok(true)
    }

    /// Ends every thread and forgets the attempt; says whether it had been accepted. Files without a
    /// name vanish with their descriptors.
    async fn clean_up(&mut self) -> bool {
        let mut accepted = self.accepted.take();
        if let Some(accepted) = &mut accepted {
            accepted.end_epoch().await;
        }
        if self.admitted {
            self.receiver.lock().holdings.ended(&self.id, false);
        }
        let Some(accepted) = accepted else {
            return false;
        };
        let entry = self.receiver.lock().attempts.remove(&accepted.token);
        let ended = accepted.entry.end();
        let_go_of((accepted, entry)).await;
        ended.cancel();
        true
    }

    fn report(&self, status: &str, error: Option<&AttemptError>) {
        let total: u64 = self.regions.iter().map(|(_, bytes)| bytes).sum();
        let names: Vec<_> = self.regions.iter().map(|(name, _)| name).collect();
        let mut shown = json!({
            "id": self.id,
            "status": status,
            "regions": names,
            "huge-pages": self.huge_pages,
            "ram": {"total": total, "transferred": self.received.get()},
        });
        if let Some(bytes) = self.blob_bytes {
            shown["blob-size"] = bytes.into();
        }
        if let Some(error) = error {
            shown["error"] =
                json!({"class": "GenericError", "desc": error.to_string(), "x-code": error.code()});
        }
        self.receiver.report(&self.id, shown);
    }
}

fn accepted(accepted: &mut Option<Accepted>) -> &mut Accepted {
    accepted.as_mut().expect("the offer was accepted")
}

impl Accepted {
    /// Starts the thread of a stream, unless its epoch is over.
    fn start(&mut self, arrival: Arrival, patience: Duration) -> io::Result<()> {
        if arrival.epoch != self.setup.assembly.epoch() {
            return Ok(());
        }
        let (stream, connection) = (arrival.stream, arrival.connection);
        self.readers
            .start(stream, connection, patience, &self.setup)
    }

    /// Ends the streams, and keeps what is known of them.
    async fn end_epoch(&mut self) {
        let had_streams = self.readers.len() > 0;
        self.readers.end().await;
        if had_streams {
            let assembly = &self.setup.assembly;
            self.applied = (assembly.epoch(), assembly.frames_applied());
        }
    }
}
