//! Iterations while the writer runs: what is left, whether that is little enough, and one pass over it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{FreezeConfig, WhenNotConverging};
use crate::dirty::Tracker;
use crate::iteration::{Next, Plan, State};
use crate::limits::PAGE_BYTES;
use crate::rates::Verdict;
use crate::region::RegionError;
use crate::stream::{Pass, Report};

use super::super::error::TransferError;
use super::super::status::{IterationRow, per_second};
use super::{Transfer, Writer, reason, under_way, unexpected};

impl Transfer {
    /// Whether so little is left that the writer can be stopped for it. One that is too fast is slowed
    /// down, if the operator wants it so.
    pub(super) fn converged(&mut self) -> Result<bool, TransferError> {
        if !self.caught_up {
            return Ok(false);
        }
        let mut inspect_bytes = 0;
        for (region, tracker) in self.debt.sources().iter() {
            inspect_bytes +=
                tracker.inspect_bytes(region)? + tracker.comparable_pages() * PAGE_BYTES;
        }
        let state = State {
            iterations: self.passes,
            remaining_bytes: self.remaining_bytes()?,
            remaining_bytes_before: self.remaining_before,
            inspect_bytes,
            bytes_per_second: whole(self.rates.sent.get().unwrap_or(0.0)),
            inspect_bytes_per_second: self.inspect_bytes_per_second,
            round_trip: self.round_trip,
        };
        self.attempt.expect(state.expected_downtime());
        match state.next(
            self.parameters.downtime_limit,
            self.parameters.max_iterations,
        ) {
            Next::Freeze => Ok(true),
            Next::Iterate => {
                if self.rates.verdict() == Some(Verdict::NotConverging) {
                    self.slow_down()?;
                }
                Ok(false)
            }
            Next::NotConverging
                if self.parameters.when_not_converging == WhenNotConverging::Fail =>
            {
                Err(TransferError::NotConverging {
                    iterations: self.passes,
                    remaining: state.remaining_bytes,
                })
            }
            // Its steps come to an end, and then it stands still for most of its time anyway.
            Next::NotConverging if self.slow_down()? => Ok(false),
            Next::NotConverging => {
                tracing::warn!(id = %self.attempt.id, remaining = state.remaining_bytes, "max-iterations reached: freezing with more left than the downtime limit allows");
                Ok(true)
            }
        }
    }

    /// Slows the writers down by one step; `false` if they may not be, or there is none any more.
    fn slow_down(&mut self) -> Result<bool, TransferError> {
        match &mut self.slowdown {
            Some(slowdown) => slowdown.step(self.nonce),
            None => Ok(false),
        }
    }

    /// Lets the writers run as fast as they can.
    pub(super) fn at_full_speed(&mut self) {
        if let Some(slowdown) = &mut self.slowdown {
            slowdown.end();
        }
    }

    /// What is still to be sent, as far as anyone can know: the debt, but of what is to be compared only
    /// the share that had changed before; and for Regions whose writes are found by reading, as much as
    /// the last Iteration found.
    fn remaining_bytes(&self) -> Result<u64, RegionError> {
        let trackers = self.debt.sources().iter().map(|(_, tracker)| tracker);
        let compared: u64 = trackers.map(Tracker::comparable_pages).sum();
        let unchanged = whole(float(compared) * (1.0 - self.changed_share));
        let pages = self.debt.pages().saturating_sub(unchanged) + self.changed_pages;
        let mut bytes = pages * PAGE_BYTES;
        if self.passes == 1 {
            // The first pass sent everything and so could find nothing: all of it may have changed.
            for ((region, tracker), registered) in
                self.debt.sources().iter().zip(&self.order.regions)
            {
                if registered.freeze != FreezeConfig::None {
                    bytes += tracker.inspect_bytes(region)?;
                }
            }
        }
        Ok(bytes)
    }

    /// One pass over what is owed or may have been written. When it ends, everything that was lent is
    /// released and everything that was sent is applied, on every stream.
    pub(super) async fn iterate(&mut self, writer: Writer) -> Result<(), TransferError> {
        let mut shrinking = true;
        if self.passes > 0 {
            let remaining = self.remaining_bytes()?;
            shrinking = remaining <= self.remaining_before / 2;
            self.remaining_before = remaining;
        }
        // Where every pass is half as long as the one before, even what is written often may stand still in the
        // next one. What is found or skipped by comparing is not known to be written at all.
        let leave =
            self.passes > 1 && !shrinking && !self.parameters.skip_unchanged && !self.scans();
        let leave = (writer == Writer::Runs).then_some(leave);
        self.iteration += 1;
        self.asked_last = false;
        let started = Instant::now();
        let (plan, left) = self
            .debt
            .plan(
                self.iteration,
                self.passes == 0,
                leave,
                self.parameters.packet_size,
                self.crew.len(),
            )
            .await?;
        let planned = plan.owed_pages();
        let pass = match writer {
            Writer::Runs => Pass::Send,
            Writer::StandsStill => Pass::SendFinal,
        };
        let (reports, all) = self.pass(plan, pass).await?;
        self.caught_up = all;
        self.passes += u32::from(all);

        let time = started.elapsed();
        let sum = |count: fn(&Report) -> u64| reports.iter().map(count).sum::<u64>();
        let (pages, compared) = (sum(|report| report.pages), sum(|report| report.compared));
        let unchanged = sum(|report| report.unchanged);
        self.changed_pages = (pages + unchanged).saturating_sub(planned);
        if compared > 0 {
            self.changed_share = 1.0 - float(unchanged) / float(compared);
        }
        // Streams read side by side, so these rates add up; and what they take for reading says nothing
        // about the link.
        let read = reports
            .iter()
            .map(|report| rate(report.read_bytes, report.read_time));
        self.inspect_bytes_per_second = read.sum();
        for report in &reports {
            self.totals[usize::from(report.stream)] = report.totals;
        }
        // What a whole Iteration was to send and leaves arrived torn.
        let torn_pages = self.debt.pages().saturating_sub(left);
        let longest =
            |time: fn(&Report) -> Duration| reports.iter().map(time).max().unwrap_or_default();
        let flush_time = longest(|report| report.flush_time);
        match writer {
            Writer::Runs => {
                let marked = self.debt.harvest().await?;
                // Not their rates added up: with little to send, or a bandwidth limit, one stream waits
                // for the other.
                let sending = longest(|report| report.send_time);
                let payload = reports.iter().map(|report| report.payload_bytes).sum();
                self.learn(rate(payload, sending), sending, torn_pages, marked, time);
            }
            Writer::StandsStill => {
                self.downtime.scan += longest(|report| report.read_time);
                self.downtime.flush += flush_time;
            }
        }
        let row = IterationRow {
            pass: self.passes,
            payload_bytes: reports.iter().map(|report| report.payload_bytes).sum(),
            pages,
            left_pages: left,
            torn_pages,
            dirty_bytes: self.remaining_bytes()?,
            time,
            flush_time,
        };
        self.attempt.iteration_ended(row, self.rates);
        Ok(())
    }

    /// What an Iteration of this length tells of the rates: payload went out at `sent` bytes per second
    /// for `sending`, so many pages arrived torn, and trackers that know by themselves have named `marked`
    /// pages since they were asked before.
    pub(super) fn learn(
        &mut self,
        sent: u64,
        sending: Duration,
        torn: u64,
        marked: u64,
        time: Duration,
    ) {
        if sent > 0 {
            self.rates.sent.add(float(sent), sending);
        }
        let before = std::mem::replace(&mut self.asked, Instant::now());
        let since = self.asked - before;
        // What is found by reading was written since the Iteration before had read it: on average the
        // mean of the two ago. It shows as changed, or as torn if that happened while it was sent.
        let read = (self.time_before + time) / 2;
        self.time_before = time;
        let found = match self.scans() {
            // The first one finds nothing, whatever was written.
            true if self.passes < 2 => return,
            true => self.changed_pages + torn,
            false => 0,
        };
        if self.caught_up {
            // What is written with what it holds is not to be sent.
            let marked = float(per_second(marked, since)) * self.changed_share;
            let pages = marked + float(rate(found, read));
            self.rates.written.add(pages * float(PAGE_BYTES), since);
        }
    }

    /// Has every stream do its part of a plan; also says whether all of it was done, which an operator
    /// who wants a pause may prevent.
    pub(super) async fn pass(
        &mut self,
        plan: Arc<Plan>,
        pass: Pass,
    ) -> Result<(Vec<Report>, bool), TransferError> {
        let talk = under_way(&mut self.talk)?;
        self.crew.begin(&plan, pass);
        let streams = usize::from(self.crew.len());
        let mut reports = Vec::with_capacity(streams);
        let mut whole = true;
        while reports.len() < streams {
            tokio::select! {
                report = self.crew.hear() => match report {
                    Ok(report) => reports.push(report),
                    Err(error) => return Err(reason(error, talk).await),
                },
                message = talk.hear() => return Err(unexpected(message?)),
                () = self.attempt.hold.wait(true), if whole && !self.standstill.is_frozen() => {
                    plan.end();
                    whole = false;
                }
            }
        }
        Ok((reports, whole))
    }
}

/// A rate over what a stream did, 0 if it did nothing.
fn rate(bytes: u64, time: Duration) -> u64 {
    if bytes == 0 {
        0
    } else {
        per_second(bytes, time)
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // an estimate, and never negative
fn whole(number: f64) -> u64 {
    number as u64
}

#[expect(clippy::cast_precision_loss)] // an estimate
fn float(rate: u64) -> f64 {
    rate as f64
}
