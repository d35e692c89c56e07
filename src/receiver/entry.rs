//! What the rest of the receiver sees of an attempt, and how connections reach it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::name::Name;
use crate::peer::Connection;
use crate::stream::Destination;
use crate::wire::{BootId, Hex128, Offer, Resume, Status};

use super::destination::DestinationFile;
use super::prepared::Place;

/// A stream's connection, whose preamble is answered.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) epoch: u32,
    pub(super) stream: u16,
    pub(super) connection: Connection,
}

/// A conversation that wants to take the attempt up again.
#[derive(Debug)]
pub(super) struct Resuming {
    pub(super) connection: Connection,
    pub(super) resume: Resume,
}

/// Which streams may connect.
#[derive(Debug)]
struct Claims {
    epoch: u32,
    /// Between two epochs nobody may.
    open: bool,
    claimed: Vec<bool>,
}

/// An attempt under way.
#[derive(Debug)]
pub(super) struct Entry {
    id: Name,
    nonce: Hex128,
    sender: BootId,
    promised_bytes: u64,
    total_bytes: u64,
    destinations: Arc<[Place]>,
    claims: Mutex<Claims>,
    streams: mpsc::Sender<Arrival>,
    resumes: mpsc::Sender<Resuming>,
    given_up: CancellationToken,
    ended: CancellationToken,
}

/// The sender's way back to an attempt.
#[derive(Debug)]
pub(super) struct Return {
    resumes: mpsc::Receiver<Resuming>,
    /// One that came while the conversation before it was thought to be alive.
    came: Option<Resuming>,
}

impl Return {
    /// Waits until it has come, and leaves it for [`Return::next`]. Dropping the future loses nothing.
    pub(super) async fn came(&mut self) {
        self.came = Some(self.next().await);
    }

    /// The next one. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Resuming {
        match self.came.take() {
            Some(resuming) => resuming,
            // The attempt keeps its entry, and so the sending end.
            None => match self.resumes.recv().await {
                Some(resuming) => resuming,
                None => std::future::pending().await,
            },
        }
    }
}

impl Entry {
    /// An attempt whose first epoch is open.
    pub(super) fn new(
        offer: &Offer,
        destinations: Arc<[Place]>,
        promised_bytes: u64,
    ) -> (Self, mpsc::Receiver<Arrival>, Return) {
        let count = usize::from(offer.streams);
        let (streams, arriving) = mpsc::channel(count);
        let (resumes, resuming) = mpsc::channel(1);
        let regions = &offer.regions;
        let entry = Self {
            id: offer.id.clone(),
            nonce: offer.nonce,
            sender: offer.boot_id.clone(),
            promised_bytes,
            total_bytes: regions.iter().map(|region| region.length).sum(),
            destinations,
            claims: Mutex::new(Claims {
                epoch: 0,
                open: true,
                claimed: vec![false; count],
            }),
            streams,
            resumes,
            given_up: CancellationToken::new(),
            ended: CancellationToken::new(),
        };
        let back = Return {
            resumes: resuming,
            came: None,
        };
        (entry, arriving, back)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &Name> {
        self.destinations
            .iter()
            .map(|destination| destination.region().name())
    }

    /// Where its Regions arrive.
    pub(super) fn destinations(&self) -> &Arc<[Place]> {
        &self.destinations
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
        self.promised_bytes.saturating_sub(allocated)
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a stream may connect: each one once in an epoch.
    pub(super) fn claim(&self, stream: u16, epoch: u32) -> Status {
        let mut claims = self.claims();
        if !claims.open || epoch != claims.epoch {
            return Status::Epoch;
        }
        match claims.claimed.get_mut(usize::from(stream)) {
            Some(claimed) if !*claimed => {
                *claimed = true;
                Status::Ok
            }
            _ => Status::Stream,
        }
    }

    /// From now on no stream of the open epoch may connect.
    pub(super) fn close(&self) {
        self.claims().open = false;
    }

    /// Streams of this epoch may connect.
    pub(super) fn open(&self, epoch: u32) {
        let mut claims = self.claims();
        claims.claimed.fill(false);
        (claims.epoch, claims.open) = (epoch, true);
    }

    /// Hands a claimed stream to its attempt, which may have ended meanwhile.
    pub(super) async fn take_in(&self, epoch: u32, stream: u16, connection: Connection) {
        let arrival = Arrival {
            epoch,
            stream,
            connection,
        };
        let _ = self.streams.send(arrival).await;
    }

    /// Hands a new conversation to the attempt. If that has ended meanwhile, the caller finds its
    /// connection closed, and the attempt gone when it comes again.
    pub(super) async fn resume(&self, connection: Connection, resume: Resume) {
        let _ = self.resumes.send(Resuming { connection, resume }).await;
    }

    /// Whether it only waits for its sender, and `offer` shows that this sender has forgotten it: the same
    /// daemon offers something of it anew.
    pub(super) fn is_abandoned_for(&self, offer: &Offer) -> bool {
        let waits = !self.claims().open;
        let same = *self.id() == offer.id
            || self
                .names()
                .any(|name| offer.regions.iter().any(|region| region.name == *name));
        waits && same && self.sender == offer.boot_id
    }

    /// Nobody will come for it any more.
    pub(super) fn give_up(&self) {
        self.given_up.cancel();
    }

    /// Waits until it was given up.
    pub(super) async fn given_up(&self) {
        self.given_up.cancelled().await;
    }

    /// Cancelled when it is no attempt under way any more.
    pub(super) fn end(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// Waits until it is none.
    pub(super) async fn ended(&self) {
        self.ended.cancelled().await;
    }
}
