//! Slowing the writers of an attempt down while the streams do not get ahead of them.
//!
//! Whatever ends it, they run as before: dropping it too, and if the sender dies its guardian sees to it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::FreezeConfig;
use crate::freeze::{Freezer, Throttle};
use crate::guardian::Guardian;
use crate::rates::throttle_after;
use crate::wire::Hex128;

use super::error::TransferError;
use super::registry::Registered;
use super::status::Attempt;

/// How long a step has to show in what is measured before the next one.
const STEP_EVERY: Duration = Duration::from_millis(500);

/// What is done about writers that are too fast.
#[derive(Debug)]
pub(super) struct Slowdown {
    attempt: Arc<Attempt>,
    guardian: Arc<Mutex<Guardian>>,
    writers: Throttle,
    /// While they are slowed down: under which nonce that is noted, how much, and since when.
    step: Option<(Hex128, u8, Instant)>,
}

impl Slowdown {
    /// Nothing is slowed down yet; checks that it could be.
    pub(super) fn new(
        attempt: Arc<Attempt>,
        guardian: Arc<Mutex<Guardian>>,
        regions: &[Registered],
    ) -> Result<Self, TransferError> {
        for registered in regions {
            if matches!(
                registered.freeze,
                FreezeConfig::Client | FreezeConfig::Command(_)
            ) {
                return Err(TransferError::CannotThrottle {
                    name: registered.region.name().clone(),
                    freeze: registered.freeze.to_string(),
                });
            }
        }
        let freezers: Vec<Freezer> = regions
            .iter()
            .map(|region| region.freezer.clone())
            .collect();
        Ok(Self {
            attempt,
            guardian,
            writers: Throttle::of(&freezers)?,
            step: None,
        })
    }

    fn guardian(&self) -> MutexGuard<'_, Guardian> {
        self.guardian.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One step more, unless the last one has yet to show; `false` if there is none any more.
    pub(super) fn step(&mut self, nonce: Hex128) -> Result<bool, TransferError> {
        let percent = match self.step {
            Some((_, _, since)) if since.elapsed() < STEP_EVERY => return Ok(true),
            Some((_, percent, _)) => percent,
            None => {
                // Before the first, so that none stays slow whoever dies when.
                let record = self.writers.record()?;
                self.guardian()
                    .note_slowed(nonce, record)
                    .map_err(TransferError::local("note what is to be slowed down"))?;
                0
            }
        };
        let Some(percent) = throttle_after(percent) else {
            return Ok(false);
        };
        self.step = Some((nonce, percent, Instant::now()));
        tracing::info!(id = %self.attempt.id, percent, "the writer is faster than the streams: slowing it down");
        self.writers.set(percent)?;
        self.attempt.throttled(percent);
        Ok(true)
    }

    /// The writers run as before.
    pub(super) fn end(&mut self) {
        if let Some((nonce, ..)) = self.step.take() {
            self.writers.end();
            self.guardian().forget_slowed(nonce);
            self.attempt.throttled(0);
        }
    }
}

impl Drop for Slowdown {
    fn drop(&mut self) {
        self.end();
    }
}
