//! The writers of an attempt, from the moment before they are stopped to the end of that.
//!
//! Dropping it thaws. Only [`Standstill::keep`] does not: behind the commit record.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, spawn_blocking};

use crate::freeze::{FreezeError, Freezer, Frozen, StoppedProcess};
use crate::guardian::Guardian;
use crate::wire::Hex128;

use super::error::TransferError;

/// What is frozen, or just being frozen.
#[derive(Debug)]
pub(super) struct Standstill {
    nonce: Hex128,
    guardian: Arc<Mutex<Guardian>>,
    freezing: Option<JoinHandle<Result<Frozen, FreezeError>>>,
    frozen: Frozen,
    /// The writers were seen to stand still, and not let go since.
    stands: bool,
    since: Instant,
}

impl Standstill {
    /// Nothing is frozen yet.
    pub(super) fn new(nonce: Hex128, guardian: Arc<Mutex<Guardian>>) -> Self {
        let (frozen, since) = (Frozen::default(), Instant::now());
        Self {
            nonce,
            guardian,
            freezing: None,
            frozen,
            stands: false,
            since,
        }
    }

    /// Whether the writers stand still.
    pub(super) fn is_frozen(&self) -> bool {
        self.stands
    }

    fn guardian(&self) -> MutexGuard<'_, Guardian> {
        self.guardian.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the writers, and waits until they are seen to stand still.
    pub(super) async fn freeze(
        &mut self,
        freezers: Vec<Freezer>,
        timeout: Duration,
    ) -> Result<(), TransferError> {
        // Before the first is stopped, so that none is left stopped whoever dies when.
        self.guardian()
            .note(self.nonce, Frozen::record_of(&freezers)?)
            .map_err(TransferError::local("note what is to be frozen"))?;
        self.since = Instant::now();
        // Kept, so that a cancel that comes just now waits for the end of it and thaws.
        let freezing = spawn_blocking(move || Frozen::freeze(&freezers, timeout));
        let frozen = self.freezing.insert(freezing).await;
        self.freezing = None;
        self.frozen = frozen.map_err(|error| TransferError::local("freeze")(error.into()))??;
        self.stands = true;
        Ok(())
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
    pub(super) fn record(&self) -> Vec<StoppedProcess> {
        self.frozen.record()
    }

    /// The commit is recorded: from here on nobody thaws before the receiver has spoken.
    pub(super) fn keep(&mut self) {
        std::mem::take(&mut self.frozen).keep();
        self.guardian().forget(self.nonce);
    }

    /// Lets the writers go on.
    pub(super) async fn thaw(&mut self) {
        self.stands = false;
        drop(std::mem::take(&mut self.frozen));
        if let Some(freezing) = self.freezing.take() {
            drop(freezing.await);
        }
        self.guardian().forget(self.nonce);
    }
}
