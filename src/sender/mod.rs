//! The sender daemon: knows Regions, and moves them when it is told to.
//!
//! ```text
//!   control socket ─► commands ─► transfer ─► conversation with the receiver
//!                        │           │
//!                     registry     crew ─► a thread per stream
//! ```

mod clients;
mod commands;
mod crew;
mod debt;
mod error;
mod habits;
mod hold;
mod moved;
mod registry;
mod resolve;
mod slowdown;
mod standstill;
mod status;
mod transfer;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{SenderConfig, TransferParameters, load_sender};
use crate::control::{CommandError, EventBus, Server};
use crate::daemon::{self, DaemonError};
use crate::freeze::Stopped;
use crate::guardian::{Asked, Guardian};
use crate::history::History;
use crate::journal::{self, CommitSent, Journal};
use crate::limits::ATTEMPTS_REMEMBERED_MAX;
use crate::name::Name;
use crate::notify::Notifier;
use crate::wire::{BootId, Owner};

use clients::Clients;
use error::TransferError;
use moved::Moved;
use registry::{Claim, Registry, Source};
use status::{Attempt, Status};
use transfer::{Order, Outcome, Transfer};

/// Pause between two looks at what the status line says.
const STATUS_PAUSE: Duration = Duration::from_secs(1);

/// Everything the sender's tasks share.
#[derive(Debug)]
struct Sender {
    parameters: TransferParameters,
    journal: Arc<Journal>,
    guardian: Arc<Mutex<Guardian>>,
    boot_id: BootId,
    /// What receivers know this daemon by: its boot and its journal.
    identity: BootId,
    events: EventBus,
    history: Arc<History>,
    state: Mutex<State>,
    transfers: TaskTracker,
    /// Where they run: a writer that stands still does not wait until clients have their answers.
    event_loop: Handle,
    shutdown: CancellationToken,
}

#[derive(Debug)]
struct State {
    registry: Registry,
    /// Attempts by id, and the order in which they were started.
    attempts: HashMap<Name, Arc<Attempt>>,
    order: Vec<Name>,
}

impl State {
    /// A Region among `names` whose owner an attempt has yet to settle. One that an earlier run of the
    /// daemon left undecided has claimed nothing here, and its Regions may be the receiver's (rule 4).
    fn under_way_with<'a>(&'a self, names: &'a [Name]) -> Option<(&'a Name, &'a Attempt)> {
        let attempts = self.attempts.values();
        attempts
            .filter(|attempt| !attempt.status().is_final())
            .find_map(|attempt| {
                let mut names = names.iter();
                let name = names.find(|name| attempt.regions.contains(name))?;
                Some((name, &**attempt))
            })
    }
}

impl Sender {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The attempt with this id, or the latest.
    fn attempt(&self, id: Option<&Name>) -> Option<Arc<Attempt>> {
        let state = self.lock();
        state
            .attempts
            .get(id.or_else(|| state.order.last())?)
            .cloned()
    }

    /// Makes an attempt known. Its id may be that of one that has ended.
    fn add_attempt(&self, attempt: &Arc<Attempt>) {
        let mut state = self.lock();
        state.order.retain(|id| *id != attempt.id);
        state.order.push(attempt.id.clone());
        if state.order.len() > ATTEMPTS_REMEMBERED_MAX {
            let ended = |id: &Name| {
                state
                    .attempts
                    .get(id)
                    .is_none_or(|attempt| attempt.status().is_final())
            };
            if let Some(oldest) = state.order.iter().position(ended) {
                let id = state.order.remove(oldest);
                state.attempts.remove(&id);
            }
        }
        state
            .attempts
            .insert(attempt.id.clone(), Arc::clone(attempt));
    }

    /// Runs an attempt whose Regions are claimed, to its end.
    async fn carry_out(self: Arc<Self>, attempt: Arc<Attempt>, claim: Claim, order: Order) {
        let driven = match Transfer::new(Arc::clone(&attempt), order) {
            Ok(transfer) => transfer.drive().await,
            Err(error) => Err(error),
        };
        match driven {
            Ok(Outcome::Committed(record)) => {
                self.lock().registry.release(&claim, true);
                self.handed_over(&attempt, &record).await;
            }
            Ok(Outcome::Indeterminate(record)) => {
                // Without an answer the claim stands until the daemon ends.
                if let Some(owner) = resolve::resolve(&attempt, &record, &self.shutdown).await {
                    let moved = owner != Owner::Source;
                    self.lock().registry.release(&claim, moved);
                    self.settle(&attempt, &record, owner).await;
                }
            }
            Err(error) => {
                self.lock().registry.release(&claim, false);
                attempt.fail(&error);
            }
        }
    }

    /// It is known who owns the Regions, and the registry knows it.
    async fn settle(&self, attempt: &Attempt, record: &CommitSent, owner: Owner) {
        if owner != Owner::Source {
            return self.handed_over(attempt, record).await;
        }
        self.forget(record);
        attempt.fail(&TransferError::Refused {
            code: "not-owner".to_owned(),
            desc: "the receiver does not own the regions: the writer goes on here".to_owned(),
        });
    }

    /// The receiver owns the Regions. Who sees that finds everything done; only what the operator wants to be
    /// done then takes its time.
    async fn handed_over(&self, attempt: &Attempt, record: &CommitSent) {
        let has_an_end = record.stopped.iter().any(Stopped::has_an_end);
        if !has_an_end {
            self.forget(record);
        }
        attempt.enter(Status::Completed);
        if has_an_end {
            resolve::finish(record).await;
            self.forget(record);
        }
    }

    fn forget(&self, record: &CommitSent) {
        if let Err(error) = self.journal.remove(record.nonce) {
            tracing::warn!(id = %record.id, %error, "cannot remove the record of a decided transfer");
        }
    }

    /// Goes on asking about commits that an earlier run of the daemon sent.
    fn take_up_undecided(self: &Arc<Self>) -> std::io::Result<()> {
        for record in resolve::undecided(&self.journal, &self.boot_id)? {
            let attempt = self.of_the_past(record.id.clone(), record.regions.clone());
            attempt.begin_commit();
            self.add_attempt(&attempt);
            let sender = Arc::clone(self);
            let settle = async move {
                let resolved = resolve::resolve(&attempt, &record, &sender.shutdown).await;
                let Some(owner) = resolved else { return };
                if owner != Owner::Source {
                    let mut state = sender.lock();
                    state.registry.set_moved(&attempt.regions, &attempt.id);
                }
                sender.settle(&attempt, &record, owner).await;
            };
            self.transfers.spawn_on(settle, &self.event_loop);
        }
        Ok(())
    }

    /// An attempt of an earlier run of the daemon.
    fn of_the_past(&self, id: Name, regions: Vec<Name>) -> Arc<Attempt> {
        let (events, history) = (self.events.clone(), self.history.clone());
        let (parameters, clients) = (self.parameters.clone(), Clients::default());
        Attempt::new(id, regions, 0, parameters, events, history, clients)
    }

    /// Has an answer for clients that stand still and come to ask what became of their attempt.
    fn take_up_given_up(&self, given_up: Vec<Asked>) {
        for Asked { id, regions } in given_up {
            let attempt = self.of_the_past(id, regions);
            attempt.fail(&TransferError::SenderDied);
            self.add_attempt(&attempt);
        }
    }

    /// Ends attempts that can still be ended, and waits for all of them.
    async fn stop(&self) {
        let attempts: Vec<_> = self.lock().attempts.values().cloned().collect();
        for attempt in attempts {
            if !attempt.status().is_final() {
                attempt.request_cancel();
            }
        }
        self.transfers.close();
        self.transfers.wait().await;
    }

    /// One line for `systemctl status`.
    fn status_line(&self) -> String {
        let attempts: Vec<_> = self.lock().attempts.values().cloned().collect();
        let under_way: Vec<_> = attempts
            .iter()
            .filter(|attempt| !attempt.status().is_final())
            .collect();
        match under_way.as_slice() {
            [] => "Idle".to_owned(),
            [one] => format!("Transfer {}: {}", one.id, one.status().as_str()),
            many => format!("{} transfers under way", many.len()),
        }
    }
}

/// Runs the sender daemon until SIGTERM, SIGINT or `quit`.
pub fn run(path: &Path) -> Result<(), DaemonError> {
    let (config, warnings) = load_sender(path)?;
    daemon::start_log(path, &config.log, &warnings)?;
    daemon::block_on(serve(config))
}

async fn serve(config: SenderConfig) -> Result<(), DaemonError> {
    let (shutdown, transfers_ended) = (CancellationToken::new(), CancellationToken::new());
    let runtime = &config.state.runtime_directory;
    let failed = DaemonError::setup(format!(
        "keep records in state.runtime-directory {}",
        runtime.display()
    ));
    let journal = Journal::open(runtime).map_err(failed)?;
    let mut guardian = Guardian::start(runtime)
        .map_err(DaemonError::setup("start the guardian of stopped writers"))?;
    let given_up = guardian
        .given_up()
        .map_err(DaemonError::setup("read the notes about stopped writers"))?;
    let boot_id = journal::boot_id().map_err(DaemonError::setup("read the boot id"))?;
    let moved = Moved::open(runtime, boot_id.clone()).map_err(DaemonError::setup(
        "read what was handed over in state.runtime-directory",
    ))?;
    let state = State {
        registry: Registry::new(moved),
        attempts: HashMap::new(),
        order: Vec::new(),
    };
    let sender = Arc::new(Sender {
        guardian: Arc::new(Mutex::new(guardian)),
        parameters: config.transfer,
        identity: journal.boot_id().map_err(DaemonError::setup(
            "read the boot id and the journal's identity",
        ))?,
        journal: Arc::new(journal),
        boot_id,
        events: EventBus::new(),
        history: Arc::new(History::open(&config.state.directory, "sender")),
        state: Mutex::new(state),
        transfers: TaskTracker::new(),
        event_loop: daemon::start_event_loop("mf-transfers", transfers_ended.clone())
            .map_err(DaemonError::setup("start the event loop of transfers"))?,
        shutdown: shutdown.clone(),
    });
    sender.take_up_given_up(given_up);
    sender
        .take_up_undecided()
        .map_err(DaemonError::setup("read the journal"))?;
    for region in config.regions {
        let (name, memory) = (region.name.clone(), Source::Path(&region.path));
        let added = sender
            .lock()
            .registry
            .add(name, memory, region.tracker, region.freeze, None);
        // A Region that is not there yet must not keep the others from being served.
        if let Err(CommandError { desc, .. }) = added {
            tracing::warn!(region = %region.name, "not added: {desc}");
        }
    }
    let control = Server::bind(&config.control.socket, daemon::access(&config.control))
        .map_err(DaemonError::setup("serve the control socket"))?;
    daemon::stop_on_signals(shutdown.clone())?;
    let commands = Arc::new(commands::SenderCommands::new(Arc::clone(&sender)));
    let control = tokio::spawn(control.serve(commands, sender.events.clone(), shutdown.clone()));

    let mut notifier = Notifier::new();
    tracing::info!(socket = %config.control.socket.display(), "ready");
    notifier.ready("Idle");
    loop {
        tokio::select! {
            () = tokio::time::sleep(STATUS_PAUSE) => {
                notifier.status(Instant::now(), &sender.status_line());
            }
            () = shutdown.cancelled() => break,
        }
    }
    notifier.stopping("Stopping");
    sender.stop().await;
    transfers_ended.cancel();
    sender.events.publish("SHUTDOWN", json!({}));
    let _ = control.await;
    Ok(())
}
