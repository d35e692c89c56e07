//! What happens when a connection of the attempt is lost: all of them are replaced, and the transfer
//! goes on with what is still owed.
//!
//! There is one way, whichever connection it was and on whichever side it was noticed. Nothing is sent
//! again before our own sockets are reset, what was lent is back, and the receiver has said that nothing
//! reads the old connections any more (rules 1 and 2).

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep_until, timeout_at};

use crate::stream::InFlight;
use crate::wire::{FromReceiver, FromSender, Hex128, Resume, StreamTotals};

use super::super::error::TransferError;
use super::super::standstill::Standstill;
use super::super::status::Status;
use super::{Transfer, unexpected};

/// Pauses between two tries to connect: none before the first, then from the one to the other.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What a receiver answers that does not have the attempt (any more).
const NOT_HELD: &str = "not-held";

/// Packets that were not acknowledged when their stream ended, by stream.
type Left = Vec<(u16, Vec<InFlight>)>;

/// Since when there was no progress. A line that lets every connection come up and lets nothing through
/// must not be tried for ever.
#[derive(Debug)]
pub(super) struct Clock {
    stuck_since: Option<Instant>,
    /// Bytes applied at the last loss.
    applied: u64,
    connected: Instant,
    /// The first loss since the writers stand still: they do not wait for one repair after the other.
    frozen_lost: Option<Instant>,
    /// The receiver was late with its *prepared*. Once is forgiven: what it had to write out is written then. The
    /// writers stand still for it each time, so not twice.
    was_late: bool,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self {
            stuck_since: None,
            applied: 0,
            connected: Instant::now(),
            frozen_lost: None,
            was_late: false,
        }
    }

    /// Whatever was is of no interest: somebody made it wait.
    pub(super) fn reset(&mut self) {
        self.stuck_since = None;
    }

    /// A connection was lost `now`; since when nothing has gone on. A connection that lived for
    /// `healthy` counts as progress: there may have been nothing to send.
    fn lost(&mut self, now: Instant, applied: u64, healthy: Duration) -> Instant {
        let moved = applied != self.applied || now - self.connected > healthy;
        self.applied = applied;
        if moved {
            self.stuck_since = None;
        }
        *self.stuck_since.get_or_insert(now)
    }
}

impl Transfer {
    /// Replaces every connection, for `cause`. Tries until nothing has gone on for the recover timeout.
    pub(super) async fn recover(&mut self, cause: TransferError) -> Result<(), TransferError> {
        let limit = self.parameters.recover_timeout;
        let late = matches!(cause, TransferError::NotPrepared { .. });
        if limit.is_zero() || (late && std::mem::replace(&mut self.clock.was_late, true)) {
            return Err(cause);
        }
        let now = Instant::now();
        let healthy = limit + self.parameters.stall_timeout;
        let applied = self.attempt.applied_bytes();
        let mut deadline = self.clock.lost(now, applied, healthy) + limit;
        let thaw_at = match self.standstill.is_frozen() {
            true => *self.clock.frozen_lost.get_or_insert(now) + self.parameters.freeze_timeout,
            false => now,
        };
        self.at_full_speed();
        self.attempt.interrupted(&cause);
        self.talk = None;
        let left = self.crew.abandon().await;
        let mut left = left.map_err(TransferError::local(
            "get the memory back that was lent to a lost connection",
        ))?;
        self.crew = self
            .crew
            .successor()
            .map_err(TransferError::local("make an eventfd"))?;
        (self.caught_up, self.asked_last, self.prepared_after) = (false, false, None);

        let mut pause = Duration::ZERO;
        let mut why = None;
        loop {
            if self.attempt.hold.is_set() {
                self.attempt.hold.wait(false).await;
                deadline = Instant::now() + limit;
            }
            if let Some(endpoint) = self.attempt.hold.take_endpoint() {
                self.order.endpoint = endpoint;
            }
            let frozen = self.standstill.is_frozen();
            let until = if frozen {
                deadline.min(thaw_at)
            } else {
                deadline
            };
            match timeout_at(until.into(), self.reconnect(&mut left)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) if !error.is_interruption() => return Err(error),
                Ok(Err(error)) => {
                    tracing::info!(id = %self.attempt.id, %error, "not connected again yet");
                    why = Some(error);
                }
                Err(_) => {}
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(TransferError::not_recovered(cause, limit, why));
            }
            if frozen && now >= thaw_at {
                self.thaw().await;
            }
            self.attempt.enter(Status::Paused);
            tokio::select! {
                () = sleep_until((now + pause).min(deadline).into()) => {
                    pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
                }
                () = self.attempt.hold.asked_to_go_on() => pause = Duration::ZERO,
            }
        }
        self.clock.connected = Instant::now();
        let frozen = self.standstill.is_frozen();
        self.attempt.enter(if frozen {
            Status::Device
        } else {
            Status::Active
        });
        Ok(())
    }

    /// Stays at a barrier as long as the operator wants it to. A connection that is lost meanwhile is
    /// replaced when it is to go on.
    pub(super) async fn hold(&mut self) -> Result<(), TransferError> {
        if !self.attempt.hold.is_set() {
            return Ok(());
        }
        self.at_full_speed();
        self.attempt.enter(Status::Paused);
        self.caught_up = false;
        let said = {
            let talk = super::under_way(&mut self.talk)?;
            tokio::select! {
                () = self.attempt.hold.wait(false) => None,
                said = talk.hear() => Some(said),
            }
        };
        self.clock.reset();
        let error = match said {
            // To another address it goes as after a loss.
            None => match self.attempt.hold.take_endpoint() {
                None => {
                    self.attempt.enter(Status::Active);
                    return Ok(());
                }
                Some(endpoint) => {
                    self.order.endpoint = endpoint;
                    TransferError::Interrupted {
                        code: "connection-lost".into(),
                        desc: "the operator has named another address".into(),
                    }
                }
            },
            Some(said) => said.map_or_else(TransferError::from, unexpected),
        };
        Err(error)
    }

    /// The writers go on: what the standstill was for did not come about.
    async fn thaw(&mut self) {
        self.standstill.thaw().await;
        self.spend_blob();
        self.clock.frozen_lost = None;
        self.attempt.thawed();
    }

    /// One try.
    async fn reconnect(&mut self, left: &mut Left) -> Result<(), TransferError> {
        let resume = Resume {
            nonce: self.nonce,
            token: self.token,
            epoch: self.epoch,
            iteration: self.iteration + 1,
        };
        let talk = self.call().await?;
        talk.say(&FromSender::Resume(resume)).await?;
        match talk.hear().await? {
            FromReceiver::Resumed {
                epoch,
                applied,
                missing,
            } => {
                self.debt.owed().settle(left, &applied, &missing);
                left.clear();
                self.epoch = epoch;
                self.totals.fill(StreamTotals::default());
            }
            FromReceiver::Refuse { code, .. } if code.as_str() == NOT_HELD => {
                left.clear();
                self.begin_again().await?;
            }
            other => return Err(unexpected(other)),
        }
        self.attempt.enter(Status::Recover);
        self.open_streams().await
    }

    /// The receiver has nothing of the attempt any more: under the same id a new one begins, which owes
    /// every page. The nonce before it was never committed, and is not used again.
    async fn begin_again(&mut self) -> Result<(), TransferError> {
        tracing::warn!(id = %self.attempt.id, nonce = %self.nonce, "the receiver does not hold this transfer any more: beginning again");
        self.thaw().await;
        self.nonce = Hex128::random().map_err(TransferError::local("make a nonce"))?;
        self.standstill = Standstill::new(
            self.nonce,
            Arc::clone(&self.attempt),
            Arc::clone(&self.order.guardian),
        );
        self.debt.owed().fill();
        (self.iteration, self.passes, self.changed_pages) = (0, 0, 0);
        self.agree(false).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_progress_sets_the_clock_back() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut clock = Clock::new();
        let mut lost = |after: u32, bytes, connected: u32| {
            clock.connected = start + second * connected;
            let since = clock.lost(start + second * after, bytes, second * 40);
            (since - start).as_secs()
        };
        assert_eq!(lost(1, 100, 0), 1);
        assert_eq!(lost(5, 100, 2), 1, "nothing went on");
        assert_eq!(lost(9, 101, 6), 9);
        assert_eq!(lost(60, 101, 10), 60, "connected all the time");
        assert_eq!(lost(61, 101, 61), 60);
    }
}
