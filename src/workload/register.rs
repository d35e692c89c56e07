//! The workload's place at a sender: how its writes are found, and how it is stopped.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::json;

use super::WorkloadError;
use super::memory::Memory;
use crate::client::{Connection, Marks, Order, Stoppable, Tracked, Tracking};
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
        let asked = matches!(tracking, Tracking::Bitmap(_)).then(|| Stoppable::new(control));
        Ok(Registered { tracking, asked })
    }
}

/// Kept until the end: who writes and how that is seen are one thing.
#[derive(Debug)]
pub(super) struct Registered {
    tracking: Tracking,
    /// Where the sender asks to stand still, if it asks.
    asked: Option<Stoppable>,
}

impl Registered {
    /// `page` was written.
    pub(super) fn written(&self, page: u64) {
        if let Tracking::Bitmap(marks) = &self.tracking {
            marks.mark(page);
        }
    }

    /// Readable when the sender asks for something.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.asked.as_ref()?.descriptor()
    }

    /// Does what the sender asks for; whether it may be written now. Called between two writes, so every
    /// write so far is marked.
    pub(super) fn may_write(&mut self) -> bool {
        let Some(asked) = &mut self.asked else {
            return true;
        };
        match asked.attend(Duration::ZERO) {
            Ok(order) => order == Order::Write,
            Err(error) => {
                note(&format!(
                    "{error}; this writer goes on, and has to be started again to be moved"
                ));
                self.asked = None;
                true
            }
        }
    }
}

/// A line for whoever started it; that nobody reads it is no reason to end.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "memferry: {text}");
}
