//! Nobody's death leaves a writer standing still.
//!
//! Before a sender stops a process, or slows one down, it writes down which; before it sends a commit it writes that down
//! too, and only then takes the first note back. So whoever finds a note without a commit knows that
//! the process has to go on, and that nobody else can own its memory. Three look: the guardian, a child
//! of the sender that outlives it by the moment this takes; `ExecStopPost` of the unit; and the next
//! sender on the same directory.

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};

use crate::freeze::Stopped;
use crate::journal::{self, CommitSent, Journal};
use crate::name::Name;
use crate::wire::{BootId, Hex128};

/// Notes about processes that are to be stopped, beside the journal of commits.
const NOTES: &str = "frozen";

/// Notes about processes that are slowed down.
const SLOWED: &str = "slowed";

/// Notes about attempts whose writers were asked to stop themselves.
const ASKED: &str = "asked";

/// An attempt whose writers stop themselves, and the Regions that are theirs. Nobody can make them go
/// on: they do when their connection ends, or come back and ask the next sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The attempt's id.
    pub id: Name,
    /// Regions of clients; none if no client was asked.
    pub regions: Vec<Name>,
}

/// The same as a note.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct AskedNote {
    nonce: Hex128,
    boot_id: BootId,
    id: Name,
    regions: Vec<Name>,
}

/// What is written down before processes are stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Note {
    nonce: Hex128,
    boot_id: BootId,
    stopped: Vec<Stopped>,
}

/// Keeps the notes of a sender, and a guardian that reads them should the sender die.
#[derive(Debug)]
pub struct Guardian {
    runtime_directory: PathBuf,
    notes: Journal,
    slowed: Journal,
    asked: Journal,
    boot_id: BootId,
    child: Option<Child>,
}

impl Guardian {
    /// Takes care of the sender with this runtime directory: lets go on what an earlier one left
    /// stopped, and starts the child that will do so for this one.
    pub fn start(runtime_directory: &Path) -> io::Result<Self> {
        release(runtime_directory)?;
        let mut guardian = Self {
            runtime_directory: runtime_directory.to_owned(),
            notes: Journal::open(&runtime_directory.join(NOTES))?,
            slowed: Journal::open(&runtime_directory.join(SLOWED))?,
            asked: Journal::open(&runtime_directory.join(ASKED))?,
            boot_id: journal::boot_id()?,
            child: None,
        };
        guardian.watch()?;
        Ok(guardian)
    }

    /// Sees to it that the child lives.
    fn watch(&mut self) -> io::Result<()> {
        if let Some(child) = &mut self.child
            && child.try_wait()?.is_none()
        {
            return Ok(());
        }
        // Its standard input is the other end of a pipe that only we hold: it ends when we do.
        let child = Command::new(std::env::current_exe()?)
            .arg("guardian")
            .arg(&self.runtime_directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()?;
        self.child = Some(child);
        Ok(())
    }

    /// Attempts that an earlier sender left without a commit while writers stood still by themselves.
    /// They are told of once.
    pub fn given_up(&mut self) -> io::Result<Vec<Asked>> {
        let commits = Journal::at(&self.runtime_directory);
        let mut given_up = Vec::new();
        for note in self.asked.all::<AskedNote>()? {
            let committed = commits.find::<CommitSent>(note.nonce)?.is_some();
            if !committed && note.boot_id == self.boot_id {
                given_up.push(Asked {
                    id: note.id,
                    regions: note.regions,
                });
            }
            self.asked.remove(note.nonce)?;
        }
        Ok(given_up)
    }

    /// Writes down what is about to be stopped for an attempt, and who is asked to stop; nothing if that is nobody.
    pub fn note(&mut self, nonce: Hex128, stopped: Vec<Stopped>, asked: Asked) -> io::Result<()> {
        if stopped.is_empty() && asked.regions.is_empty() {
            return Ok(());
        }
        self.watch()?;
        if !asked.regions.is_empty() {
            let note = AskedNote {
                nonce,
                boot_id: self.boot_id.clone(),
                id: asked.id,
                regions: asked.regions,
            };
            self.asked.decide(nonce, note)?;
        }
        let note = Note {
            nonce,
            boot_id: self.boot_id.clone(),
            stopped,
        };
        self.notes.decide(nonce, note).map(|_| ())
    }

    /// Takes the note back: the processes go on, or the commit is recorded.
    pub fn forget(&self, nonce: Hex128) {
        remove(&self.notes, nonce);
        remove(&self.asked, nonce);
    }

    /// Writes down what is about to be slowed down for an attempt.
    pub fn note_slowed(&mut self, nonce: Hex128, slowed: Vec<Stopped>) -> io::Result<()> {
        self.watch()?;
        let note = Note {
            nonce,
            boot_id: self.boot_id.clone(),
            stopped: slowed,
        };
        self.slowed.decide(nonce, note).map(|_| ())
    }

    /// Takes that note back: they run as before.
    pub fn forget_slowed(&self, nonce: Hex128) {
        remove(&self.slowed, nonce);
    }
}

/// Removes a note, if there is one.
fn remove(notes: &Journal, nonce: Hex128) {
    if let Err(error) = notes.remove(nonce)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%nonce, %error, "cannot remove the note about a stopped writer");
    }
}

/// Lets every process go on as before that a sender which has died had stopped or slowed down, unless it
/// may have handed the memory over. What cannot be started again keeps its note.
pub fn release(runtime_directory: &Path) -> io::Result<()> {
    let commits = Journal::at(runtime_directory);
    let released =
        [NOTES, SLOWED].map(|notes| release_noted(&runtime_directory.join(notes), &commits));
    released.into_iter().collect()
}

fn release_noted(notes: &Path, commits: &Journal) -> io::Result<()> {
    if !notes.exists() {
        return Ok(());
    }
    let notes = Journal::at(notes);
    let boot_id = journal::boot_id()?;
    let mut failed = None;
    for note in notes.all::<Note>()? {
        let committed = commits.find::<CommitSent>(note.nonce)?.is_some();
        let ours = !committed && note.boot_id == boot_id;
        let mut all = true;
        for writer in note.stopped.iter().filter(|_| ours) {
            match writer.thaw() {
                Ok(()) => {
                    tracing::warn!(nonce = %note.nonce, ?writer, "its sender died: the writer goes on");
                }
                // The others go on all the same.
                Err(error) => {
                    all = false;
                    failed = Some(io::Error::other(error));
                }
            }
        }
        if !all {
            continue;
        }
        if let Err(error) = notes.remove(note.nonce)
            // Whoever else looks at the same time may have removed it.
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
    }
    failed.map_or(Ok(()), Err)
}

/// What the child does: waits until the sender has died, and looks.
pub fn keep_watch(runtime_directory: &Path) -> io::Result<()> {
    // A stop of the whole service asks every process of it to end. The sender does, in order; this one
    // follows it.
    let mut asked = SigSet::empty();
    asked.add(Signal::SIGTERM);
    asked.add(Signal::SIGINT);
    asked.add(Signal::SIGHUP);
    asked.thread_block()?;
    io::stdin().lock().read_to_end(&mut Vec::new())?;
    release(runtime_directory)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::freeze::{Freezer, Process, Writers};
    use crate::name::Name;

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            Self(Command::new("sleep").arg("600").spawn().unwrap())
        }

        fn freezer(&self) -> Freezer {
            Freezer::Pid(Arc::new(Process::open(self.0.id().cast_signed()).unwrap()))
        }

        /// Stops it, and says what a note says about it.
        fn stop(&self) -> Vec<Stopped> {
            let writers = Writers::of(&[self.freezer()]).unwrap();
            let record = writers.record();
            writers.freeze(Duration::from_secs(20)).unwrap().keep();
            record
        }

        fn runs(&self) -> bool {
            !Writers::of(&[self.freezer()]).unwrap().record().is_empty()
        }

        fn comes_to_run(&self) -> bool {
            let started = Instant::now();
            while !self.runs() && started.elapsed() < Duration::from_secs(20) {
                std::thread::yield_now();
            }
            self.runs()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn notes(directory: &Path) -> Journal {
        Journal::open(&directory.join(NOTES)).unwrap()
    }

    fn note(directory: &Path, stopped: Vec<Stopped>) -> Hex128 {
        let nonce = Hex128([1; 16]);
        let boot_id = journal::boot_id().unwrap();
        notes(directory)
            .decide(
                nonce,
                Note {
                    nonce,
                    boot_id,
                    stopped,
                },
            )
            .unwrap();
        nonce
    }

    #[test]
    fn what_a_dead_sender_stopped_goes_on() {
        let (directory, sleeper) = (tempfile::tempdir().unwrap(), Sleeper::start());
        note(directory.path(), sleeper.stop());
        release(directory.path()).unwrap();
        assert!(sleeper.comes_to_run());
        assert_eq!(notes(directory.path()).all::<Note>().unwrap(), []);
        release(directory.path()).unwrap();
    }

    #[test]
    fn what_a_dead_sender_slowed_down_runs_as_before() {
        let (directory, sleeper) = (tempfile::tempdir().unwrap(), Sleeper::start());
        let slowed = Journal::open(&directory.path().join(SLOWED)).unwrap();
        let (nonce, stopped) = (Hex128([1; 16]), sleeper.stop());
        let boot_id = journal::boot_id().unwrap();
        let note = Note {
            nonce,
            boot_id,
            stopped,
        };
        slowed.decide(nonce, note).unwrap();
        release(directory.path()).unwrap();
        assert!(sleeper.comes_to_run());
        assert_eq!(slowed.all::<Note>().unwrap(), []);
    }

    #[test]
    fn what_may_have_been_handed_over_stays_stopped() {
        let (directory, sleeper) = (tempfile::tempdir().unwrap(), Sleeper::start());
        let stopped = sleeper.stop();
        let nonce = note(directory.path(), stopped.clone());
        let boot_id = journal::boot_id().unwrap();
        let commit = CommitSent {
            nonce,
            id: Name::new("a").unwrap(),
            uri: "tcp:h:1".to_owned(),
            boot_id: boot_id.clone(),
            receiver_boot_id: boot_id,
            regions: Vec::new(),
            stopped,
        };
        Journal::open(directory.path())
            .unwrap()
            .decide(nonce, commit)
            .unwrap();
        release(directory.path()).unwrap();
        assert!(!sleeper.runs());
    }

    #[test]
    fn a_note_of_another_boot_means_nobody() {
        let (directory, sleeper) = (tempfile::tempdir().unwrap(), Sleeper::start());
        let (nonce, stopped) = (Hex128([1; 16]), sleeper.stop());
        let boot_id = BootId("another".into());
        notes(directory.path())
            .decide(
                nonce,
                Note {
                    nonce,
                    boot_id,
                    stopped,
                },
            )
            .unwrap();
        release(directory.path()).unwrap();
        assert!(!sleeper.runs());
        assert_eq!(notes(directory.path()).all::<Note>().unwrap(), []);
    }
}
