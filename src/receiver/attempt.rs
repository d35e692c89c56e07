//! One attempt as the receiver lives it: agree, receive, prepare, commit.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::assembly::Assembly;
use crate::journal::Decision;
use crate::limits::RECOVER_SECONDS_MAX;
use crate::name::Name;
use crate::peer::{Connection, Conversation, PeerError};
use crate::stats::Counter;
use crate::stream::{IncomingSetup, StreamError};
use crate::wire::{FromReceiver, FromSender, Hex128, Offer, StreamTotals, Token};

use super::Receiver;
use super::admission::{self, Refusal};
use super::destination::{self, DestinationFile, Hidden};
use super::entry::{Arrival, Entry, Resuming, Return};
use super::error::AttemptError;
use super::readers::Readers;

/// Bounds on what a sender may ask for as stall timeout.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3600));

/// Longest time that an attempt waits for its sender.
const RECOVERY_MAX: Duration = Duration::from_secs(RECOVER_SECONDS_MAX);

/// When a stream fails, the conversation often knows why; this is how long that may take.
const REASON_WAIT: Duration = Duration::from_millis(500);

type Talk = Conversation<FromReceiver, FromSender>;

/// Each file, and the final name it gets.
type Moves = Vec<(PathBuf, PathBuf)>;

/// Serves a conversation that began with an offer, to the end of the attempt.
pub(super) async fn take(
    receiver: &Arc<Receiver>,
    connection: Connection,
    from: &str,
    offer: Offer,
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
        accepted: None,
    };
    tracing::info!(id = %attempt.id, from, nonce = %attempt.nonce, regions = attempt.regions.len(), "a transfer is offered");
    let ended = attempt.run(&offer).await;
    let accepted = attempt.clean_up().await;
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
    accepted: Option<Accepted>,
}

/// What exists from the acceptance on.
struct Accepted {
    token: Token,
    entry: Arc<Entry>,
    arriving: mpsc::Receiver<Arrival>,
    back: Return,
    setup: Arc<IncomingSetup<DestinationFile>>,
    readers: Readers,
    /// The last epoch that had streams, and how many frames of each were applied in it.
    applied: (u32, Vec<u64>),
    /// From the first time that everything was there.
    hidden: Option<Vec<Hidden>>,
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

    /// From the first stream to the commit, over the connections of one epoch.
    async fn serve(&mut self) -> Result<(), AttemptError> {
        let totals = self.receive().await?;
        let moves = self.prepare(&totals).await?;
        self.talk.say(&FromReceiver::Prepared {}).await?;
        self.commit(moves).await
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
        let readers = Readers::new().map_err(AttemptError::local("make an eventfd"))?;
        let (entry, arriving, back) = Entry::new(offer, Arc::clone(&destinations));
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
                received: Arc::clone(&self.received),
            }),
            readers,
            applied: (0, Vec::new()),
            hidden: None,
        });
        Ok(token)
    }

    /// Lets the streams work, as they come, until the sender says that it is done.
    async fn receive(&mut self) -> Result<Vec<StreamTotals>, AttemptError> {
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
                (stream, end) = accepted.readers.hear() => return Err(failure(stream, end, &mut self.talk).await),
                message = hear(&mut self.talk, &mut accepted.back, &accepted.entry) => match message? {
                    FromSender::Prepare { streams } => return Ok(streams),
                    other => return Err(unexpected(Ok(other))),
                },
            }
        }
    }

    /// Everything is there and intact, and every file has a name to be renamed from. The streams end
    /// first: what is not in place now never will be.
    async fn prepare(&mut self, totals: &[StreamTotals]) -> Result<Moves, AttemptError> {
        let nonce = self.nonce;
        let accepted = accepted(&mut self.accepted);
        accepted.end_epoch().await;
        let setup = Arc::clone(&accepted.setup);
        setup.assembly.verdict(totals)?;
        let named = accepted.hidden.is_some();
        let hide = move || {
            let mut hidden = Vec::new();
            for (index, file) in setup.destinations.iter().enumerate() {
                file.sync()?;
                // An unnamed file can be given a name only once.
                if !named {
                    hidden.push(file.hide(nonce, index)?);
                }
            }
            Ok::<_, io::Error>(hidden)
        };
        // On a disk this writes the Regions out, so it is not for the control plane's thread.
        let hidden = tokio::task::spawn_blocking(hide)
            .await
            .map_err(io::Error::from);
        let hidden = hidden
            .and_then(|hidden| hidden)
            .map_err(AttemptError::local(
                "link the regions into receive.directory",
            ))?;
        let hidden = accepted.hidden.get_or_insert(hidden);
        Ok(hidden.iter().map(Hidden::its_move).collect())
    }

    /// The one step after which the Regions are ours. There is no way back behind the record.
    async fn commit(&mut self, moves: Moves) -> Result<(), AttemptError> {
        let accepted = accepted(&mut self.accepted);
        match hear(&mut self.talk, &mut accepted.back, &accepted.entry).await? {
            FromSender::Commit { nonce } if nonce == self.nonce => {}
            other => return Err(unexpected(Ok(other))),
        }
        let boot_id = self.receiver.boot_id.clone();
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
        let hidden = accepted.hidden.take();
        hidden.into_iter().flatten().for_each(Hidden::keep);
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
        match timeout(self.recovery, self.come_back()).await {
            Ok(resuming) => self.resume(resuming?).await,
            Err(_) => Err(cause),
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

    async fn resume(&mut self, resuming: Resuming) -> Result<(), AttemptError> {
        let accepted = accepted(&mut self.accepted);
        self.talk = Talk::start(resuming.connection, self.patience);
        let asked = resuming.resume;
        let before = &accepted.setup;
        let epoch = before.assembly.epoch() + 1;
        let assembly = Arc::new(before.assembly.succeed(epoch, asked.iteration)?);
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
            received: Arc::clone(&before.received),
        });
        accepted.readers = Readers::new().map_err(AttemptError::local("make an eventfd"))?;
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
        Ok(())
    }

    /// Ends every thread and forgets the attempt; says whether it had been accepted. Files without a
    /// name vanish with their descriptors.
    async fn clean_up(&mut self) -> bool {
        let Some(mut accepted) = self.accepted.take() else {
            return false;
        };
        accepted.end_epoch().await;
        self.receiver.lock().attempts.remove(&accepted.token);
        let entry = Arc::clone(&accepted.entry);
        drop(accepted);
        entry.set_ended();
        true
    }

    fn report(&self, status: &str, error: Option<&AttemptError>) {
        let total: u64 = self.regions.iter().map(|(_, bytes)| bytes).sum();
        let names: Vec<_> = self.regions.iter().map(|(name, _)| name).collect();
        let mut shown = json!({
            "id": self.id,
            "status": status,
            "regions": names,
            "ram": {"total": total, "transferred": self.received.get()},
        });
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

/// The next message; unless the sender has come back on another connection, or nobody will.
async fn hear(
    talk: &mut Talk,
    back: &mut Return,
    entry: &Entry,
) -> Result<FromSender, AttemptError> {
    tokio::select! {
        message = talk.hear() => Ok(message?),
        () = back.came() => Err(AttemptError::Superseded),
        () = entry.given_up() => Err(AttemptError::GivenUp),
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
