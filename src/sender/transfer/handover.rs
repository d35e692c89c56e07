//! From the freeze to the commit: the writer stands still, and then the memory has another owner.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::dirty::Tracker;
use crate::freeze::{Freezer, Stopped};
use crate::journal::CommitSent;
use crate::limits::PAGE_BYTES;
use crate::stream::Pass;
use crate::wire::{FromReceiver, FromSender, VERSION_PREPARE_AHEAD};

use super::super::clients::Said;
use super::super::crew::REASON_WAIT;
use super::super::error::TransferError;
use super::super::status::Status;
use super::blob::Blob;
use super::{Outcome, Talk, Transfer, Writer, under_way, unexpected};

/// How long the receiver takes to commit if nothing is in its way. Who listens to us is told only then how far we
/// are: woken up now, they might take the CPU that the receiver needs.
const AT_ONCE: Duration = Duration::from_millis(5);

impl Transfer {
    /// Stops the writers, waits until they are seen to stand still, and asks the trackers.
    pub(super) async fn freeze(&mut self) -> Result<(), TransferError> {
        let freezers: Vec<Freezer> = self
            .order
            .regions
            .iter()
            .map(|registered| registered.freezer.clone())
            .collect();
        let takes_time = !self.debt.answers_at_once() || freezers.iter().any(Freezer::is_some);
        let look = self.debt.harvest_frozen(self.is_prepared());
        let (journal, draft) = (
            Arc::clone(&self.order.journal),
            self.commit_record(Vec::new()),
        );
        let propose = move |stopped| journal.propose(CommitSent { stopped, ..draft });
        let limit = self.parameters.freeze_timeout;
        let frozen = self
            .standstill
            .freeze(freezers, limit, takes_time, propose, look);
        let proposal;
        (self.downtime.freeze, proposal) = frozen.await?;
        self.proposal = Some(proposal);
        self.asked_last = true;
        Ok(())
    }

    /// The last Iteration, again for what arrives damaged: nothing writes now, so what does not match
    /// its checksum was changed on the way.
    pub(super) async fn settle(&mut self) -> Result<(), TransferError> {
        let asked = self.standstill.elapsed() - self.downtime.freeze;
        let (mut least, mut progress) = (u64::MAX, Instant::now());
        // What is found by reading is not known before it is read.
        let mut unread = self.scans();
        if unread || self.debt.pages() > 0 {
            self.attempt.announce();
        }
        while unread || self.debt.pages() > 0 {
            self.iterate(Writer::StandsStill).await?;
            unread = false;
            let owed = self.debt.pages();
            // Half of it, not one page: a peer must not be able to keep the writer frozen page by page.
            if owed <= least / 2 {
                (least, progress) = (owed, Instant::now());
            } else if progress.elapsed() > self.parameters.stall_timeout {
                return Err(TransferError::Corrupt {
                    bytes: owed * PAGE_BYTES,
                });
            }
        }
        // What the streams spent reading and flushing is theirs, and they overlap: it is all cut to the
        // time that has passed.
        let passes = self.standstill.elapsed() - self.downtime.freeze - asked;
        let read = self.downtime.scan.min(passes);
        self.downtime.scan = asked + read;
        self.downtime.flush = self.downtime.flush.min(passes - read);
        self.downtime.send = passes - read - self.downtime.flush;
        Ok(())
    }

    /// Whether writes to some Region are found by reading it.
    pub(super) fn scans(&self) -> bool {
        let mut trackers = self.debt.sources().iter().map(|(_, tracker)| tracker);
        trackers.any(Tracker::is_scan)
    }

    /// Reads once more what is tracked by reading: what was frozen must not have written.
    pub(super) async fn check_frozen(&mut self) -> Result<(), TransferError> {
        let started = Instant::now();
        for (region, _) in self.debt.sources().iter() {
            region.check_length()?;
        }
        if self.scans() {
            let (plan, _) = self
                .debt
                .plan(
                    self.iteration,
                    false,
                    None,
                    self.parameters.packet_size,
                    self.crew.len(),
                )
                .await?;
            let (reports, _) = self.pass(plan, Pass::Check).await?;
            let pages = reports.iter().map(|report| report.pages).sum();
            if pages > 0 {
                return Err(TransferError::NotFrozen { pages });
            }
        }
        self.downtime.check = started.elapsed();
        Ok(())
    }

    /// Whether the receiver has said that it has all that was ever sent, and would honour a commit.
    fn is_prepared(&self) -> bool {
        self.prepared_after == Some(self.iteration) && self.blob.is_none()
    }

    /// Whether to have the receiver prepare before the writers are stopped: nothing is left, and maybe
    /// nothing will be.
    pub(super) fn can_prepare_ahead(&self) -> bool {
        self.version >= VERSION_PREPARE_AHEAD
            && !self.is_prepared()
            && !self.scans()
            && self.debt.pages() == 0
    }

    /// Has the receiver prepare while the writers run, so that they need not stand still for that. What
    /// they write from now on is found by the look after the freeze: then it is sent, and the receiver is
    /// asked again.
    pub(super) async fn prepare_ahead(&mut self) -> Result<(), TransferError> {
        let started = Instant::now();
        let (question, patience) = (self.question(), self.patience());
        ask_receiver(under_way(&mut self.talk)?, question, patience).await?;
        self.prepared_after = Some(self.iteration);
        // It may have taken its time, and to stop the writers now may not be wise any more.
        let marked = self.debt.harvest().await?;
        self.learn(0, Duration::ZERO, 0, marked, started.elapsed());
        Ok(())
    }

    fn question(&self) -> FromSender {
        FromSender::Prepare {
            streams: self.totals.clone(),
            blob: self.blob.as_ref().map(Blob::account),
        }
    }

    /// How long *prepared* may take. Heartbeats are no progress, and the writers may stand still meanwhile.
    /// If the receiver waits for somebody, it gives up first and says why.
    fn patience(&self) -> Duration {
        self.parameters.stall_timeout + REASON_WAIT
    }

    /// The receiver counts the same as we do, and has everything.
    pub(super) async fn prepare(&mut self) -> Result<(), TransferError> {
        let started = Instant::now();
        self.attempt.enter_unheard(Status::Completing);
        if !self.is_prepared() || !self.attempt.clients.is_empty() {
            self.attempt.announce();
        }
        let (prepared, question, patience) = (self.is_prepared(), self.question(), self.patience());
        let talk = under_way(&mut self.talk)?;
        // Every tracker is asked once more, unless there was no Iteration since, and whether it saw everything.
        // Begun first: it takes longest.
        let look = async {
            match self.asked_last {
                true if prepared => Ok(0),
                true => self.debt.check_sight().await,
                false => self.debt.harvest().await,
            }
        };
        let answer = async {
            match prepared {
                true => Ok(()),
                false => ask_receiver(talk, question, patience).await,
            }
        };
        // Writers that stopped themselves promise to stay so, which from the commit on only the receiver's
        // word may change.
        let promise = self
            .standstill
            .all_say(Said::HandsOver, self.parameters.freeze_timeout);
        let (written, answer, promised) = tokio::join!(biased; look, answer, promise);
        promised?;
        match written? {
            0 => {}
            pages => return Err(TransferError::NotFrozen { pages }),
        }
        answer?;
        // The last look before the point of no return: at the receiver, which may have said *prepared* long ago and be
        // gone since, and at the writers.
        if let Some(said) = under_way(&mut self.talk)?.heard() {
            return Err(unexpected(said?));
        }
        self.standstill.check()?;
        self.downtime.prepare = started.elapsed();
        Ok(())
    }

    /// The point of no return: from here on only the receiver can say who owns the Regions, and the
    /// writers stay stopped whatever becomes of this process.
    pub(super) fn record_commit(&mut self) -> Result<CommitSent, TransferError> {
        if !self.attempt.begin_commit() {
            return Err(TransferError::Cancelled);
        }
        let record = self.commit_record(self.standstill.record());
        // Connections may have been replaced since.
        let proposal = match self.proposal.take() {
            Some(proposal) if *proposal.record() == record => Ok(proposal),
            _ => self.order.journal.propose(record),
        };
        let written = proposal.and_then(|draft| draft.decide(&self.order.journal, self.nonce));
        let record = written.map_err(TransferError::local("record the commit"))?;
        self.standstill.keep();
        Ok(record)
    }

    fn commit_record(&self, stopped: Vec<Stopped>) -> CommitSent {
        CommitSent {
            nonce: self.nonce,
            id: self.attempt.id.clone(),
            uri: self.reached.to_string(),
            boot_id: self.order.boot_id.clone(),
            receiver_boot_id: self.receiver_boot_id.clone(),
            regions: self.attempt.regions.clone(),
            stopped,
        }
    }

    pub(super) async fn commit(mut self, record: CommitSent) -> Outcome {
        let started = Instant::now();
        let nonce = self.nonce;
        let answer = async {
            let talk = under_way(&mut self.talk)?;
            talk.say(&FromSender::Commit { nonce }).await?;
            match timeout(AT_ONCE, talk.hear()).await {
                Ok(answer) => answer,
                Err(_) => {
                    self.attempt.announce();
                    talk.hear().await
                }
            }
        };
        let answer = answer.await;
        let now = Instant::now();
        self.standstill.forget();
        // Everything that was lent was released before the last mark was acknowledged.
        let _ = self.crew.finish().await;
        match answer {
            Ok(FromReceiver::Committed {}) => {
                self.downtime.commit = now - started;
                self.downtime.total = now - self.standstill.since();
                self.attempt.set_downtime(self.downtime);
                Outcome::Committed(Box::new(record))
            }
            // Even a refusal is not taken at its word here: the inquiry makes it one for ever.
            answer => {
                tracing::warn!(id = %self.attempt.id, ?answer, "the commit was sent, and its answer did not come");
                Outcome::Indeterminate(Box::new(record))
            }
        }
    }
}

/// Asks the receiver whether everything is there, and waits for its yes.
async fn ask_receiver(
    talk: &mut Talk,
    question: FromSender,
    patience: Duration,
) -> Result<(), TransferError> {
    talk.say(&question).await?;
    match timeout(patience, talk.hear()).await {
        Ok(message) => match message? {
            FromReceiver::Prepared {} => Ok(()),
            other => Err(unexpected(other)),
        },
        Err(_) => Err(TransferError::NotPrepared {
            seconds: patience.as_secs_f32(),
        }),
    }
}
