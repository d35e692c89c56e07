//! The receiver daemon: listens, takes attempts in, and owns what was committed.
//!
//! ```text
//!   accept ── conversation ──► attempt: agree → streams → prepare → commit
//!      │                          │                │
//!      └── stream (by token) ─────┴─► a thread ────┴─► Assembly, DestinationFile
//! ```

mod accept;
mod admission;
mod attempt;
mod blob;
mod commands;
mod destination;
mod entry;
mod error;
mod holdings;
mod memory;
mod prepared;
mod questions;
mod readers;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sched::CpuSet;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::affinity;
use crate::config::{ReceiveConfig, ReceiverConfig, load_receiver};
use crate::control::{EventBus, Server};
use crate::daemon::{self, DaemonError};
use crate::history::History;
use crate::journal::{Decision, Journal};
use crate::limits::{ATTEMPTS_REMEMBERED_MAX, RECORDS_MAX};
use crate::name::Name;
use crate::notify::Notifier;
use crate::wire::{BootId, Hex128, Offer, Owner, Token};

use admission::Obligations;
use blob::Blobs;
use entry::Entry;
use holdings::Holdings;
use memory::Observed;
use questions::Questions;

/// Everything the receiver's tasks share.
#[derive(Debug)]
struct Receiver {
    config: ReceiveConfig,
    /// Where the threads of streams run; `None` is anywhere.
    cpus: Option<CpuSet>,
    journal: Journal,
    boot_id: BootId,
    events: EventBus,
    history: History,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Attempts under way, by the token their streams bring.
    attempts: HashMap<Token, Arc<Entry>>,
    /// What came of attempts, as `query-migrate` shows it; the latest news last.
    seen: Vec<(Name, Value)>,
    holdings: Holdings,
    blobs: Blobs,
    questions: Questions,
}

impl Receiver {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What attempts under way may still need.
    fn obligations(&self) -> Obligations {
        let state = self.lock();
        let mut obligations = Obligations {
            attempts: state.attempts.len(),
            prepared: state.holdings.prepared().collect(),
            ..Obligations::default()
        };
        for entry in state.attempts.values() {
            obligations.ids.insert(entry.id().clone());
            obligations.nonces.insert(entry.nonce());
            obligations.names.extend(entry.names().cloned());
            obligations.total_bytes += entry.total_bytes();
            obligations.owed_bytes += entry.owed_bytes();
        }
        obligations
    }

    /// Ends attempts that wait for a sender which has forgotten them, as this offer shows.
    async fn make_way(&self, offer: &Offer) {
        let abandoned: Vec<_> = {
            let state = self.lock();
            let attempts = state.attempts.values();
            attempts
                .filter(|entry| entry.is_abandoned_for(offer))
                .cloned()
                .collect()
        };
        for entry in abandoned {
            entry.give_up();
            entry.ended().await;
        }
    }

    /// Shows `status` for an attempt, and announces it.
    fn report(&self, id: &Name, status: Value) {
        let mut event = json!({"id": id, "status": status["status"], "regions": status["regions"]});
        if let Some(bytes) = status.get("blob-size") {
            event["blob-size"] = bytes.clone();
        }
        let owners = {
            let mut state = self.lock();
            state.seen.retain(|(other, _)| other != id);
            if state.seen.len() >= ATTEMPTS_REMEMBERED_MAX {
                state.seen.remove(0);
            }
            if ["completed", "failed", "cancelled"]
                .map(Some)
                .contains(&status["status"].as_str())
            {
                self.history.add(status.clone());
            }
            state.seen.push((id.clone(), status));
            state.holdings.clients(id)
        };
        // Whoever prepared memory does not miss what becomes of it.
        for owner in &owners {
            let _ = self.events.publish_to(*owner, "MIGRATION", event.clone());
        }
        self.events.publish_to_others(&owners, "MIGRATION", event);
    }

    /// Keeps what the memory of an attempt that has ended turned out to be.
    fn remember(&self, id: &Name, observed: Observed) {
        let mut state = self.lock();
        if let Some((_, shown)) = state.seen.iter_mut().find(|(known, _)| known == id) {
            shown["memory"] = memory::to_json(&observed);
        }
        state.holdings.observed(observed);
    }

    /// Who owns the Regions of an attempt. Without a commit record the answer is "not this receiver",
    /// and it is made true for ever before it is given (rule 4).
    fn owner(&self, nonce: Hex128, asked_boot: &BootId) -> std::io::Result<Owner> {
        if *asked_boot != self.boot_id {
            return Ok(Owner::Unknown);
        }
        let known = self.journal.find::<Decision>(nonce)?.is_some();
        if !known && self.journal.records()? >= RECORDS_MAX {
            return Err(std::io::Error::other(
                "the journal is full of promises about unknown transfers",
            ));
        }
        let refused = Decision::Refused {
            boot_id: self.boot_id.clone(),
        };
        let decided = self.journal.decide(nonce, refused)?;
        if matches!(decided, Decision::Refused { .. }) {
            // It can never be committed now. Who asks has forgotten the rest of it, too.
            let state = self.lock();
            let held = state.attempts.values().find(|entry| entry.nonce() == nonce);
            held.inspect(|entry| entry.give_up());
        }
        Ok(match decided {
            Decision::Committed { boot_id, .. } if boot_id == self.boot_id => Owner::Destination,
            Decision::Committed { .. } => Owner::Unknown,
            Decision::Refused { .. } => Owner::Source,
        })
    }

    /// Finishes what a receiver that died had committed, and removes what it had not.
    fn recover(&self) -> std::io::Result<()> {
        let (mut committed, mut blobs) = (Vec::new(), Vec::new());
        for record in self.journal.all::<Decision>()? {
            let Decision::Committed {
                id, moves, blob, ..
            } = record
            else {
                continue;
            };
            destination::roll_forward(&moves);
            let mut state = self.lock();
            for (from, to) in moves {
                // What its owner has removed since is nobody's any more.
                if let Ok(meta) = std::fs::metadata(&to)
                    && let Some(name) = to.file_name().and_then(|name| name.to_str())
                    && let Ok(name) = Name::new(name)
                {
                    state.holdings.committed_file(name, to, meta.len());
                }
                committed.push(from);
            }
            blobs.extend(blob.map(|(path, account)| (id, path, account)));
        }
        let kept: Vec<_> = blobs.iter().map(|(_, path, _)| path.clone()).collect();
        self.journal.remove_blobs_except(&kept)?;
        self.lock().blobs.recover(blobs);
        destination::remove_abandoned(&self.config.directory, &committed)
    }
}

/// Runs the receiver daemon until SIGTERM, SIGINT or `quit`.
pub fn run(path: &Path) -> Result<(), DaemonError> {
    let (config, warnings) = load_receiver(path)?;
    daemon::start_log(path, &config.log, &warnings)?;
    daemon::block_on(serve(config))
}

async fn serve(config: ReceiverConfig) -> Result<(), DaemonError> {
    let shutdown = CancellationToken::new();
    let directory = config.receive.directory.clone();
    std::fs::create_dir_all(&directory).map_err(DaemonError::setup(format!(
        "make receive.directory {}",
        directory.display()
    )))?;
    let numa_node = config.receive.check_numa_node();
    numa_node.map_err(DaemonError::setup("take memory from receive.numa-node"))?;
    let cpus = affinity::chosen(&config.receive.cpus)
        .map_err(io::Error::other)
        .map_err(DaemonError::setup("run streams on receive.cpus"))?;
    let runtime = &config.state.runtime_directory;
    let journal = Journal::open(runtime).map_err(DaemonError::setup(format!(
        "keep records in state.runtime-directory {}",
        runtime.display()
    )))?;
    let receiver = Arc::new(Receiver {
        boot_id: journal.boot_id().map_err(DaemonError::setup(
            "read the boot id and the journal's identity",
        ))?,
        config: config.receive,
        cpus,
        journal,
        events: EventBus::new(),
        history: History::open(&config.state.directory, "receiver"),
        state: Mutex::default(),
    });
    receiver.recover().map_err(DaemonError::setup(format!(
        "finish earlier transfers in {}",
        directory.display()
    )))?;
    let listeners = accept::Listeners::bind(&receiver.config.listen).await?;
    let control = Server::bind(&config.control.socket, daemon::access(&config.control))
        .map_err(DaemonError::setup("serve the control socket"))?;
    daemon::stop_on_signals(shutdown.clone())?;
    let commands = Arc::new(commands::ReceiverCommands::new(
        Arc::clone(&receiver),
        listeners.addresses(),
        shutdown.clone(),
    ));
    let control = tokio::spawn(control.serve(commands, receiver.events.clone(), shutdown.clone()));

    let mut notifier = Notifier::new();
    let listening = listeners.addresses().join(", ");
    tracing::info!(listening, directory = %directory.display(), socket = %config.control.socket.display(), "ready");
    notifier.ready(&format!("Listening on {listening}"));
    listeners.serve(&receiver, shutdown).await;
    notifier.stopping("Stopping");
    receiver.events.publish("SHUTDOWN", json!({}));
    let _ = control.await;
    Ok(())
}
