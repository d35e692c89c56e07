//! The writers of an attempt, from the moment before they are stopped to the end of that.
//!
//! Dropping it thaws. Only [`Standstill::keep`] does not: behind the commit record.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

use crate::freeze::{FreezeError, Freezer, Frozen, Stopped, Writers};
use crate::guardian::{Asked, Guardian};
use crate::journal::{CommitSent, Proposal};
use crate::wire::Hex128;

use super::clients::Said;
use super::debt::Looked;
use super::error::TransferError;
use super::status::{Attempt, Status};

/// The writers as they stand still.
#[derive(Debug)]
struct Found {
    frozen: Frozen,
    /// Just before the first was stopped, and once all stood still.
    since: Instant,
    at: Instant,
    /// What they had written.
    seen: Looked,
    proposal: Proposal<CommitSent>,
}

/// What is frozen, or just being frozen.
#[derive(Debug)]
pub(super) struct Standstill {
    nonce: Hex128,
    attempt: Arc<Attempt>,
    guardian: Arc<Mutex<Guardian>>,
    /// Whether clients were asked to stop, and have not been told to go on.
    asked: bool,
    freezing: Option<JoinHandle<Result<Found, TransferError>>>,
    thawing: Option<JoinHandle<()>>,
    frozen: Frozen,
    /// The writers were seen to stand still, and not let go since.
    stands: bool,
    since: Instant,
}

impl Standstill {
    /// Nothing is frozen yet.
    pub(super) fn new(
        nonce: Hex128,
        attempt: Arc<Attempt>,
        guardian: Arc<Mutex<Guardian>>,
    ) -> Self {
        let (frozen, since) = (Frozen::default(), Instant::now());
        Self {
            nonce,
            attempt,
            guardian,
            asked: false,
            freezing: None,
            thawing: None,
            frozen,
            stands: false,
            since,
        }
    }

    /// Whether the writers stand still.
    pub(super) fn is_frozen(&self) -> bool {
        self.stands
    }

    /// Stops the writers, waits until they are seen to stand still, and looks what they have written: on
    /// the same thread, for every hand-over to another one costs as much as a freeze. Gives how long the
    /// freeze took, and a draft of the commit record for those that were stopped.
    ///
    /// Who is to be stopped is noted before the first one is, so that none is left stopped whoever dies when. Unless it
    /// `takes_time`, nobody has to be stopped and the look is a short one.
    pub(super) async fn freeze(
        &mut self,
        freezers: Vec<Freezer>,
        limit: Duration,
        takes_time: bool,
        propose: impl FnOnce(Vec<Stopped>) -> io::Result<Proposal<CommitSent>> + Send + 'static,
        look: impl FnOnce() -> Looked + Send + 'static,
    ) -> Result<(Duration, Proposal<CommitSent>), TransferError> {
        let attempt = Arc::clone(&self.attempt);
        let asked = Asked {
            id: attempt.id.clone(),
            regions: attempt.clients.regions(),
        };
        self.asked = !attempt.clients.is_empty();
        let (guardian, nonce) = (Arc::clone(&self.guardian), self.nonce);
        let begin = move || {
            let writers = Writers::of(&freezers)?;
            let noted = lock(&guardian).note(nonce, writers.record(), asked);
            noted.map_err(TransferError::local("note what is to be frozen"))?;
            let proposal = propose(writers.record());
            let proposal = proposal.map_err(TransferError::local("draft the commit record"))?;
            Ok::<_, TransferError>((writers, proposal, Instant::now()))
        };
        let stop = move |(writers, proposal, since): (Writers, _, _)| {
            Ok(Found {
                frozen: writers.freeze(limit)?,
                since,
                at: Instant::now(),
                seen: look(),
                proposal,
            })
        };
        let freeze: Box<dyn FnOnce() -> _ + Send> = if self.asked {
            let (mut writers, proposal, since) = begin()?;
            self.since = since;
            attempt.clients.forget();
            attempt.enter(Status::PreSwitchover);
            self.all_say(Said::StandsStill, limit).await?;
            Box::new(move || {
                writers.look_again()?;
                stop((writers, proposal, since))
            })
        } else {
            // Nobody has to be stopped before the thread is there.
            Box::new(move || stop(begin()?))
        };
        let found = if takes_time {
            // Kept, so that a cancel that comes just now waits for the end of it and thaws.
            let freezing = self.freezing.insert(spawn_blocking(freeze));
            let found = freezing.await;
            self.freezing = None;
            found.map_err(|error| TransferError::local("freeze")(error.into()))??
        } else {
            freeze()?
        };
        (self.frozen, self.since) = (found.frozen, found.since);
        self.stands = true;
        attempt.enter_unheard(Status::Device);
        found.seen?;
        Ok((found.at - found.since, found.proposal))
    }

    /// Waits until every writer that stops itself has said so much.
    pub(super) async fn all_say(&self, wanted: Said, limit: Duration) -> Result<(), TransferError> {
        let clients = &self.attempt.clients;
        let said = timeout(limit, clients.all_say(wanted)).await;
        said.unwrap_or_else(|_| {
            Err(TransferError::ClientSilent {
                regions: clients.waiting_for(wanted),
                question: match wanted {
                    Said::StandsStill => Status::PreSwitchover.as_str(),
                    Said::HandsOver => Status::Completing.as_str(),
                },
                seconds: limit.as_secs_f32(),
            })
        })
    }

    /// Time since just before the freeze.
    pub(super) fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// When it was just before the freeze.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// That everything that was frozen still is.
    pub(super) fn check(&self) -> Result<(), FreezeError> {
        self.frozen.check()
    }

    /// Whom a commit record has to name.
    pub(super) fn record(&self) -> Vec<Stopped> {
        self.frozen.record()
    }

    /// The commit is recorded: from here on nobody thaws before the receiver has spoken. What the guardian
    /// has noted means nothing any more, and can be forgotten when there is time.
    pub(super) fn keep(&mut self) {
        std::mem::take(&mut self.frozen).keep();
        self.asked = false;
    }

    /// Forgets what the guardian has noted.
    pub(super) fn forget(&self) {
        lock(&self.guardian).forget(self.nonce);
    }

    /// Lets the writers go on.
    pub(super) async fn thaw(&mut self) {
        self.stands = false;
        self.release_clients();
        let frozen = std::mem::take(&mut self.frozen);
        // It may have to wait for a command; kept, so that a cancel that comes just now waits for it too.
        let thawing = self
            .thawing
            .get_or_insert_with(|| spawn_blocking(move || drop(frozen)));
        let _ = thawing.await;
        self.thawing = None;
        if let Some(freezing) = self.freezing.take() {
            drop(freezing.await);
        }
        self.forget();
    }

    fn release_clients(&mut self) {
        if std::mem::take(&mut self.asked) {
            self.attempt.release_clients();
        }
    }
}

fn lock(guardian: &Mutex<Guardian>) -> MutexGuard<'_, Guardian> {
    guardian.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Standstill {
    fn drop(&mut self) {
        self.release_clients();
    }
}
