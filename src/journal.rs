//! Durable records of who owns an attempt's memory.
//!
//! Durable means: outlives the daemon (rule 4). The directory lies under `/run`, whose memory dies
//! with the host as the Regions themselves do, so nothing here waits for a disk. Every record carries
//! the boot it was written on; on another boot it is worth nothing.
//!
//! The first decision about a nonce stands: a record is linked into place, and a second one for the
//! same nonce finds the first instead. That is what makes "committed" and "refused for ever" exclude
//! each other, whatever connection or process asks.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::freeze::StoppedProcess;
use crate::name::Name;
use crate::wire::{BootId, Hex128};

/// What a sender writes before it sends the commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CommitSent {
    /// The attempt.
    pub nonce: Hex128,
    /// The attempt's id.
    pub id: Name,
    /// Where the receiver is.
    pub uri: String,
    /// Our boot.
    pub boot_id: BootId,
    /// The receiver's boot when the attempt was agreed.
    pub receiver_boot_id: BootId,
    /// What is moved.
    pub regions: Vec<Name>,
    /// Who stands still until it is known who owns the memory.
    pub stopped: Vec<StoppedProcess>,
}

/// What a receiver has decided about a nonce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "decision", deny_unknown_fields, rename_all = "kebab-case")]
pub enum Decision {
    /// The Regions are ours.
    Committed {
        /// Our boot.
        boot_id: BootId,
        /// Each file, and the final name it gets.
        moves: Vec<(PathBuf, PathBuf)>,
    },
    /// They are not, and never will be.
    Refused {
        /// Our boot.
        boot_id: BootId,
    },
}

/// A directory of records, one file a nonce.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
}

impl Journal {
    /// Opens the directory; makes it if it is missing.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let journal = Self {
            directory: directory.to_owned(),
        };
        // Finds out now, and not at the first commit, whether we may write here.
        let probe = journal.directory.join(".probe");
        fs::write(&probe, "")?;
        fs::remove_file(&probe)?;
        Ok(journal)
    }

    fn path(&self, nonce: Hex128) -> PathBuf {
        self.directory.join(format!("{nonce}.json"))
    }

    /// Records `record` for `nonce`, unless there is one already: then that one is returned instead.
    pub fn decide<T: Serialize + DeserializeOwned>(
        &self,
        nonce: Hex128,
        record: T,
    ) -> io::Result<T> {
        let draft = self.directory.join(format!("{nonce}.draft"));
        // A draft that a killed daemon left behind says nothing; only a linked record does.
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(&serde_json::to_vec(&record)?)?;
        let linked = fs::hard_link(&draft, self.path(nonce));
        fs::remove_file(&draft)?;
        match linked {
            Ok(()) => Ok(record),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => self
                .find(nonce)?
                .ok_or_else(|| io::ErrorKind::NotFound.into()),
            Err(error) => Err(error),
        }
    }

    /// The record of a nonce, if there is one.
    pub fn find<T: DeserializeOwned>(&self, nonce: Hex128) -> io::Result<Option<T>> {
        match fs::read(self.path(nonce)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All records. One that cannot be read is an error: it may say who owns a machine's memory.
    pub fn all<T: DeserializeOwned>(&self) -> io::Result<Vec<T>> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                let record = serde_json::from_slice(&fs::read(&path)?).map_err(|error| {
                    io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{}: {error}", path.display()),
                    )
                })?;
                records.push(record);
            }
        }
        Ok(records)
    }

    /// Forgets a nonce: its question is answered for good.
    pub fn remove(&self, nonce: Hex128) -> io::Result<()> {
        fs::remove_file(self.path(nonce))
    }
}

/// The boot this host is on.
pub fn boot_id() -> io::Result<BootId> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BootId(text.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Decision {
        Decision::Refused {
            boot_id: BootId("b".to_owned()),
        }
    }

    fn committed() -> Decision {
        Decision::Committed {
            boot_id: BootId("b".to_owned()),
            moves: vec![("a".into(), "b".into())],
        }
    }

    #[test]
    fn the_first_decision_stands() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(&directory.path().join("new/journal")).unwrap();
        let (one, two) = (Hex128([1; 16]), Hex128([2; 16]));
        assert_eq!(journal.find::<Decision>(one).unwrap(), None);
        assert_eq!(journal.decide(one, refused()).unwrap(), refused());
        assert_eq!(journal.decide(one, committed()).unwrap(), refused());
        assert_eq!(journal.decide(two, committed()).unwrap(), committed());
        assert_eq!(journal.decide(two, refused()).unwrap(), committed());
        assert_eq!(journal.all::<Decision>().unwrap().len(), 2);
        journal.remove(one).unwrap();
        assert_eq!(journal.all::<Decision>().unwrap(), [committed()]);
    }

    #[test]
    fn a_draft_of_a_killed_daemon_decides_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let nonce = Hex128([1; 16]);
        fs::write(directory.path().join(format!("{nonce}.draft")), "{half").unwrap();
        assert_eq!(journal.all::<Decision>().unwrap(), []);
        assert_eq!(journal.decide(nonce, refused()).unwrap(), refused());
    }

    #[test]
    fn an_unreadable_record_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        fs::write(directory.path().join("x.json"), "{half").unwrap();
        assert!(
            journal
                .all::<Decision>()
                .unwrap_err()
                .to_string()
                .contains("x.json")
        );
    }
}
