//! The workload's place at a sender: how its writes are found, and how it is stopped.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::WorkloadError;
use super::memory::Memory;
use crate::client::{ClientError, Connection, Event, Marks, Tracked, Tracking};
use crate::name::Name;

/// Where and as what to register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The sender's control socket.
    pub socket: PathBuf,
    /// The Region's name.
    pub name: Name,
    /// How writes are found; if it is not said, by the kernel where it can, otherwise by reading.
    pub tracker: Option<TrackerChoice>,
}

/// How the writes of a workload are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrackerChoice {
    /// The sender reads all of the memory in every pass; it stops this process by a signal.
    Scan,
    /// The kernel keeps account; the sender stops this process by a signal.
    Pagemap,
    /// Each write is marked in a bitmap; this process stops by itself when the sender asks for it.
    Bitmap,
}

impl Registration {
    /// Hands the memory over as a descriptor, with this process as its writer.
    pub(super) fn add(&self, memory: &Memory) -> Result<Registered, WorkloadError> {
        let unable = |source| WorkloadError::Memory {
            what: "cannot have what is written here tracked".to_owned(),
            source,
        };
        let tracked = || Tracked::new(&memory.mapping).map(Tracking::Pagemap);
        let tracking = match self.tracker {
            Some(TrackerChoice::Scan) => Tracking::Scan,
            Some(TrackerChoice::Pagemap) => tracked().map_err(unable)?,
            Some(TrackerChoice::Bitmap) => {
                let bytes = memory.mapping.len() as u64;
                Tracking::Bitmap(Marks::new(bytes).map_err(unable)?)
            }
            None => tracked().unwrap_or_else(|error| {
                note(&format!("the kernel cannot track what is written here ({error}): the sender will scan for it"));
                Tracking::Scan
            }),
        };
        let freeze = match tracking {
            // A signal could come between a write and its mark.
            Tracking::Bitmap(_) => json!({"kind": "client"}),
            Tracking::Scan | Tracking::Pagemap(_) => {
                json!({"kind": "pid", "pid": std::process::id()})
            }
        };
        let mut control = Connection::connect(&self.socket)?;
        control.register(&self.name, memory.file.as_fd(), &tracking, freeze)?;
        let control = matches!(tracking, Tracking::Bitmap(_)).then_some(control);
        Ok(Registered {
            tracking,
            control,
            frozen_for: None,
        })
    }
}

/// Kept until the end: who writes and how that is seen are one thing.
#[derive(Debug)]
pub(super) struct Registered {
    tracking: Tracking,
    /// Where the sender asks to stand still, if it asks.
    control: Option<Connection>,
    /// The attempt for which nothing is written.
    frozen_for: Option<Value>,
}

impl Registered {
    /// `page` was written.
    pub(super) fn written(&self, page: u64) {
        if let Tracking::Bitmap(marks) = &self.tracking {
            marks.mark(page);
        }
    }

    /// Where to wait for what the sender asks.
    pub(super) fn asks(&self) -> Option<BorrowedFd<'_>> {
        self.control.as_ref().map(AsFd::as_fd)
    }

    /// Whether nothing may be written now.
    pub(super) fn stands_still(&self) -> bool {
        self.frozen_for.is_some()
    }

    /// Does what the sender asks. Called between two writes, so every write so far is marked.
    pub(super) fn answer(&mut self) {
        while let Some(control) = &mut self.control {
            let done = match control.next_event(Duration::ZERO) {
                Ok(Some(event)) => obey(control, &mut self.frozen_for, &event),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            match done {
                Ok(()) => {}
                // It refuses: the attempt has ended meanwhile, and says so by an event.
                Err(ClientError::Command { .. }) => {}
                Err(error) => {
                    let now = if self.frozen_for.is_some() {
                        "this writer stands still until somebody ends it"
                    } else {
                        "this writer goes on, and no transfer of it can be completed"
                    };
                    note(&format!("{error}; {now}"));
                    self.control = None;
                }
            }
        }
    }
}

/// Stands still when that is asked, and goes on when the attempt has ended without a new owner.
fn obey(
    control: &mut Connection,
    frozen_for: &mut Option<Value>,
    event: &Event,
) -> Result<(), ClientError> {
    if event.name != "MIGRATION" {
        return Ok(());
    }
    let id = &event.data["id"];
    match event.data["status"].as_str() {
        Some("pre-switchover") => {
            *frozen_for = Some(id.clone());
            let order = json!({"id": id, "state": "pre-switchover"});
            control.execute("migrate-continue", order)?;
        }
        Some("failed" | "cancelled") if frozen_for.as_ref() == Some(id) => *frozen_for = None,
        _ => {}
    }
    Ok(())
}

/// A line for whoever started it; that nobody reads it is no reason to end.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "memferry: {text}");
}
