//! What is known of an attempt.

mod shown;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::TransferParameters;
use crate::control::{ClientId, EventBus};
use crate::endpoint::Endpoint;
use crate::history::History;
use crate::limits::PAGE_BYTES;
use crate::name::Name;
use crate::rates::Rates;
use crate::stats::StreamStats;
use crate::stream::{Fallback, Tell};
use crate::wire::Owner;

use super::clients::{Clients, Said};
use super::hold::Hold;

/// Where an attempt is. Names are QEMU's where it has the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Setup,
    Active,
    Paused,
    Recover,
    PreSwitchover,
    Device,
    Completing,
    Completed,
    Failed,
    Cancelling,
    Cancelled,
    Indeterminate,
}

impl Status {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Recover => "recover",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::Completing => "completing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Indeterminate => "indeterminate",
        }
    }

    /// Whether nothing more will happen.
    pub(super) fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// One Iteration as it went.
#[derive(Debug, Clone, Copy)]
pub(super) struct IterationRow {
    pub(super) pass: u32,
    pub(super) payload_bytes: u64,
    pub(super) pages: u64,
    /// Pages that were owed and not sent, because they are written in every pass.
    pub(super) left_pages: u64,
    pub(super) torn_pages: u64,
    /// What is dirty at its end, as far as that is known.
    pub(super) dirty_bytes: u64,
    pub(super) time: Duration,
    pub(super) flush_time: Duration,
}

/// How the downtime was spent: one after the other, up to `total`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Downtime {
    pub(super) freeze: Duration,
    /// Asking the trackers, and reading what has to be looked at.
    pub(super) scan: Duration,
    /// Sending what was left until all of it was applied, without the waits for its release.
    pub(super) send: Duration,
    /// Waiting for the release of lent memory.
    pub(super) flush: Duration,
    /// Reading once more what is tracked by reading.
    pub(super) check: Duration,
    /// The final blob.
    pub(super) blob: Duration,
    pub(super) prepare: Duration,
    pub(super) commit: Duration,
    pub(super) total: Duration,
}

#[derive(Debug)]
struct State {
    status: Status,
    /// States that were entered and are still to be announced.
    unheard: Vec<Status>,
    /// The commit was recorded: there is no way back by cancelling.
    commit_sent: bool,
    /// The writers are being stopped, or stand still.
    freezing: bool,
    /// How often all connections were lost, and why the last time.
    interruptions: u64,
    interruption: Option<Value>,
    /// Streams that are open, once they were opened.
    streams_open: u16,
    ended: Option<Instant>,
    setup_time: Option<Duration>,
    expected_downtime: Option<Duration>,
    remaining_bytes: u64,
    rates: Rates,
    /// How much of their time writers are kept from running, in percent.
    throttle: u8,
    iterations: Vec<IterationRow>,
    downtime: Option<Downtime>,
    blob_bytes: Option<u64>,
    error: Option<Value>,
}

/// An attempt as the control socket sees it. The transfer writes it, anyone reads it.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) id: Name,
    pub(super) regions: Vec<Name>,
    pub(super) total_bytes: u64,
    pub(super) parameters: TransferParameters,
    pub(super) streams: Vec<Arc<StreamStats>>,
    pub(super) cancel: CancellationToken,
    pub(super) started: Instant,
    /// Whether the operator wants it to stand still.
    pub(super) hold: Hold,
    /// What the operator says about who owns the Regions.
    decision: watch::Sender<Option<Owner>>,
    events: EventBus,
    history: Arc<History>,
    /// Where the final blob is read from.
    final_blob: Mutex<Option<OwnedFd>>,
    /// Writers that stop themselves.
    pub(super) clients: Clients,
    state: Mutex<State>,
    /// Held from taking what is to be announced until it is; never taken behind `state`.
    announcing: Mutex<()>,
}

impl Attempt {
    pub(super) fn new(
        id: Name,
        regions: Vec<Name>,
        total_bytes: u64,
        parameters: TransferParameters,
        events: EventBus,
        history: Arc<History>,
        clients: Clients,
    ) -> Arc<Self> {
        let streams = parameters.streams;
        let attempt = Self {
            id,
            regions,
            total_bytes,
            streams: std::iter::repeat_with(Arc::default)
                .take(streams.into())
                .collect(),
            parameters,
            cancel: CancellationToken::new(),
            hold: Hold::new(),
            started: Instant::now(),
            decision: watch::Sender::new(None),
            events,
            history,
            final_blob: Mutex::new(None),
            clients,
            state: Mutex::new(State {
                status: Status::Setup,
                unheard: vec![Status::Setup],
                commit_sent: false,
                freezing: false,
                interruptions: 0,
                interruption: None,
                streams_open: streams,
                ended: None,
                setup_time: None,
                expected_downtime: None,
                remaining_bytes: total_bytes,
                rates: Rates::default(),
                throttle: 0,
                iterations: Vec::new(),
                downtime: None,
                blob_bytes: None,
                error: None,
            }),
            announcing: Mutex::default(),
        };
        attempt.announce();
        Arc::new(attempt)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_order(&self) -> MutexGuard<'_, ()> {
        let announcing = self.announcing.lock();
        announcing.unwrap_or_else(PoisonError::into_inner)
    }

    /// Announces what was entered, in that order whoever does: a client that is told to stop after it was told to go
    /// on stands still for ever.
    pub(super) fn announce(&self) {
        let _in_order = self.in_order();
        let unheard = std::mem::take(&mut self.lock().unheard);
        for status in unheard {
            tracing::info!(id = %self.id, status = status.as_str(), "transfer");
            self.clients.announce(&self.events, &self.id, status);
        }
    }

    /// Tells writers that stopped themselves that they may go on, whatever becomes of the attempt.
    pub(super) fn release_clients(&self) {
        let _in_order = self.in_order();
        self.clients.release(&self.events, &self.id);
    }

    /// A client says that its writer stands still, or that it will stay so; `false` if that was not
    /// asked, or is not any more.
    pub(super) fn answered(&self, from: ClientId, said: Said) -> bool {
        // Held over both, so that no answer to a question of the past counts.
        let state = self.lock();
        let asked = match said {
            Said::StandsStill => Status::PreSwitchover,
            Said::HandsOver => Status::Completing,
        };
        state.status == asked && self.clients.answered(from, said)
    }

    pub(super) fn status(&self) -> Status {
        self.lock().status
    }

    /// Enters a state and announces it.
    pub(super) fn enter(&self, status: Status) {
        self.enter_unheard(status);
        self.announce();
    }

    /// Enters a state that is announced later: to wake up who listens takes up to 100 us, and a writer stands
    /// still.
    pub(super) fn enter_unheard(&self, status: Status) {
        {
            let mut state = self.lock();
            // A cancel that was accepted stays visible until the attempt has ended.
            if state.status == status || (state.status == Status::Cancelling && !status.is_final())
            {
                return;
            }
            state.status = status;
            state.unheard.push(status);
            if status == Status::Active {
                state
                    .setup_time
                    .get_or_insert_with(|| self.started.elapsed());
            }
            if status.is_final() {
                state.ended = Some(Instant::now());
            }
            if status == Status::Completed {
                state.remaining_bytes = 0;
            }
            if status.is_final() {
                // Under the lock: who sees the end finds it in the history too.
                self.history.add(self.shown(&state));
            }
        }
    }

    /// Ends the attempt without a hand-over.
    pub(super) fn fail(&self, error: &super::error::TransferError) {
        let cancelled = matches!(error, super::error::TransferError::Cancelled);
        if !cancelled {
            self.set_error(error);
        }
        self.enter(if cancelled {
            Status::Cancelled
        } else {
            Status::Failed
        });
    }

    pub(super) fn set_error(&self, error: &super::error::TransferError) {
        tracing::warn!(id = %self.id, code = error.code(), %error, "transfer");
        self.lock().error = Some(error.to_json());
    }

    /// Asks the transfer to end; `false` if it is too late for that: the commit is on its way.
    pub(super) fn request_cancel(&self) -> bool {
        {
            let mut state = self.lock();
            if state.commit_sent {
                return false;
            }
            if state.status.is_final() || state.status == Status::Cancelling {
                return true;
            }
            state.status = Status::Cancelling;
            state.unheard.push(Status::Cancelling);
            self.cancel.cancel();
        }
        self.announce();
        true
    }

    /// All connections are lost, for this reason.
    pub(super) fn interrupted(&self, error: &super::error::TransferError) {
        tracing::warn!(id = %self.id, code = error.code(), %error, "interrupted");
        {
            let mut state = self.lock();
            state.interruptions += 1;
            state.interruption = Some(error.to_json());
        }
        self.enter(Status::Paused);
    }

    /// So many streams are open now; fewer or more than before is news.
    pub(super) fn streams_opened(&self, streams: u16) {
        let before = std::mem::replace(&mut self.lock().streams_open, streams);
        if streams != before {
            let asked = self.parameters.streams;
            let data = json!({"id": self.id, "streams": streams, "requested": asked});
            self.events.publish("STREAM_CHANGED", data);
        }
    }

    /// Bytes that were acknowledged as in place and intact, those that came again included.
    pub(super) fn applied_bytes(&self) -> u64 {
        let settled = self.sum(|s| s.settled_bytes.get());
        settled.saturating_sub(self.sum(|s| s.torn_pages.get()) * PAGE_BYTES)
    }

    /// The operator wants a pause; `false` if it is no time for that.
    pub(super) fn request_pause(&self) -> bool {
        let state = self.lock();
        let possible = match state.status {
            Status::Setup | Status::Active | Status::Paused | Status::Recover => !state.freezing,
            _ => false,
        };
        if possible {
            self.hold.set();
        }
        possible
    }

    /// The operator wants to go on, at another address maybe; `false` if it does not stand still.
    pub(super) fn request_recover(&self, endpoint: Option<Endpoint>) -> bool {
        let state = self.lock();
        let held = self.hold.release();
        let stands = matches!(state.status, Status::Paused | Status::Recover);
        if held || stands {
            self.hold.go_on(endpoint);
        }
        held || stands
    }

    /// The writers are about to be stopped; `false` if a pause was wanted first. One lock decides which.
    pub(super) fn begin_freeze(&self) -> bool {
        let mut state = self.lock();
        state.freezing = !self.hold.is_set();
        state.freezing
    }

    /// The writers go on.
    pub(super) fn thawed(&self) {
        self.lock().freezing = false;
    }

    /// The operator says who owns the Regions; `false` if that is no question now.
    pub(super) fn decide(&self, owner: Owner) -> bool {
        let open = self.status() == Status::Indeterminate;
        if open {
            self.decision.send_replace(Some(owner));
        }
        open
    }

    /// Waits until the operator has said who owns the Regions.
    pub(super) async fn decided(&self) -> Owner {
        let mut decision = self.decision.subscribe();
        let decided = decision.wait_for(Option::is_some).await;
        // `self` holds the sending end, so it is there as long as anybody waits.
        decided
            .ok()
            .and_then(|owner| *owner)
            .unwrap_or(Owner::Unknown)
    }

    /// The commit is about to be recorded; `false` if a cancel came first. One lock decides which.
    pub(super) fn begin_commit(&self) -> bool {
        let mut state = self.lock();
        state.commit_sent = !self.cancel.is_cancelled();
        state.commit_sent
    }

    pub(super) fn iteration_ended(&self, row: IterationRow, rates: Rates) {
        let mut state = self.lock();
        state.iterations.push(row);
        state.remaining_bytes = row.dirty_bytes;
        state.rates = rates;
        drop(state);
        self.events
            .publish("MIGRATION_PASS", json!({"id": self.id, "pass": row.pass}));
    }

    /// What a stream does with a fallback: an event, and a line in the log.
    pub(super) fn tell(&self) -> Tell {
        let (id, events) = (self.id.clone(), self.events.clone());
        Tell(Box::new(move |fallback| {
            let Fallback {
                stream,
                from,
                to,
                reason,
            } = fallback;
            tracing::info!(%id, stream, from, to, reason, "zero copy fell back");
            events.publish(
                "ZEROCOPY_FALLBACK",
                json!({"id": id, "stream": stream, "from": from, "to": to, "reason": reason}),
            );
        }))
    }

    /// The writers are kept from running for so much of their time, in percent.
    pub(super) fn throttled(&self, percent: u8) {
        self.lock().throttle = percent;
    }

    pub(super) fn expect(&self, downtime: Duration) {
        self.lock().expected_downtime = Some(downtime);
    }

    /// Names the descriptor that the final blob is read from; `false` if there is one already.
    pub(super) fn give_final_blob(&self, fd: OwnedFd) -> bool {
        let mut blob = self.lock_final_blob();
        let first = blob.is_none();
        blob.get_or_insert(fd);
        first
    }

    pub(super) fn take_final_blob(&self) -> Option<OwnedFd> {
        self.lock_final_blob().take()
    }

    fn lock_final_blob(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.final_blob
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_blob_bytes(&self, bytes: u64) {
        self.lock().blob_bytes = Some(bytes);
    }

    pub(super) fn set_downtime(&self, downtime: Downtime) {
        self.lock().downtime = Some(downtime);
    }

    fn sum(&self, counter: impl Fn(&StreamStats) -> u64) -> u64 {
        self.streams.iter().map(|stream| counter(stream)).sum()
    }
}

/// A count per second. An interval too short to measure counts as a microsecond.
pub(super) fn per_second(count: u64, time: Duration) -> u64 {
    let rate = u128::from(count) * 1_000_000 / time.as_micros().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}
