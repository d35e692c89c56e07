//! Durable records of who owns an attempt's memory.
//!
//! Durable means: outlives the daemon (rule 4). The directory lies under `/run`, whose memory dies
//! with the host as the Regions themselves do, so nothing here waits for a disk. Every record carries
//! the boot it was written on; on another boot it is worth nothing.
//!
//! The first decision about a nonce stands: a record is moved into place without replacing anything,
//! and a second one for the same nonce finds the first instead. That is what makes "committed" and "refused for ever" exclude
//! each other, whatever connection or process asks.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::freeze::Stopped;
use crate::name::Name;
use crate::wire::{BlobAccount, BootId, Hex128};

/// What names of drafts begin with.
const DRAFT: &str = ".draft-";

/// What names of final blobs end with.
const BLOB: &str = "blob";

/// The file with the journal's identity.
const IDENTITY: &str = "identity";

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
    pub stopped: Vec<Stopped>,
}

/// What a receiver has decided about a nonce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "decision",
    deny_unknown_fields,
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum Decision {
    /// The Regions are ours.
    Committed {
        /// Our boot.
        boot_id: BootId,
        /// The attempt's id.
        id: Name,
        /// Each file, and the final name it gets.
        moves: Vec<(PathBuf, PathBuf)>,
        /// The final blob beside this record, if there was one.
        blob: Option<(PathBuf, BlobAccount)>,
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
    /// Opens the directory; makes it if it is missing, and removes drafts that a killed daemon left.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
        let journal = Self {
            directory: directory.to_owned(),
        };
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(DRAFT))
            {
                fs::remove_file(path)?;
            }
        }
        // Finds out now, and not at the first commit, whether we may write here.
        journal.draft()?;
        Ok(journal)
    }

    /// The records of a directory that is there already, to be looked at: makes and changes nothing.
    #[must_use]
    pub fn at(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
        }
    }

    /// What tells this journal from any other on the same boot: a receiver that was given another
    /// directory knows nothing of what was committed here, and must not pretend to.
    fn identity(&self) -> io::Result<Hex128> {
        let path = self.directory.join(IDENTITY);
        match fs::read_to_string(&path) {
            Ok(text) => Hex128::try_from(text).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let identity = Hex128::random()?;
                fs::write(&path, identity.to_string())?;
                Ok(identity)
            }
            Err(error) => Err(error),
        }
    }

    /// What a question about a record here must name: the boot, and this journal.
    pub fn boot_id(&self) -> io::Result<BootId> {
        let BootId(boot) = boot_id()?;
        Ok(BootId(format!("{boot}/{}", self.identity()?).into()))
    }

    /// How many records there are.
    pub fn records(&self) -> io::Result<usize> {
        fs::read_dir(&self.directory).map(Iterator::count)
    }

    fn path(&self, nonce: Hex128) -> PathBuf {
        self.directory.join(format!("{nonce}.json"))
    }

    /// A file that is nothing yet: one that is left goes at the next start.
    pub fn draft(&self) -> io::Result<NamedTempFile> {
        tempfile::Builder::new()
            .prefix(DRAFT)
            .tempfile_in(&self.directory)
    }

    /// Where the final blob of a nonce is kept.
    #[must_use]
    pub fn blob_path(&self, nonce: Hex128) -> PathBuf {
        self.directory.join(format!("{nonce}.{BLOB}"))
    }

    /// Removes the blobs that are not among `kept`.
    pub fn remove_blobs_except(&self, kept: &[PathBuf]) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == BLOB) && !kept.contains(&path)
            {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Records `record` for `nonce`, unless there is one already: then that one is returned instead.
    pub fn decide<T: Serialize + DeserializeOwned>(
        &self,
        nonce: Hex128,
        record: T,
    ) -> io::Result<T> {
        self.propose(record)?.decide(self, nonce)
    }

    /// Writes a record that is nothing yet, so that to decide takes no more than to name it.
    pub fn propose<T: Serialize>(&self, record: T) -> io::Result<Proposal<T>> {
        // A draft has a name of its own, so that no draft is ever the record itself under another name.
        let mut draft = self.draft()?;
        draft.write_all(&serde_json::to_vec(&record)?)?;
        Ok(Proposal { draft, record })
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

/// A record that was written and decides nothing.
#[derive(Debug)]
pub struct Proposal<T> {
    draft: NamedTempFile,
    record: T,
}

impl<T: DeserializeOwned> Proposal<T> {
    /// What it would record.
    pub fn record(&self) -> &T {
        &self.record
    }

    /// Makes it the record of `nonce` in the `journal` it was written for, unless there is one already: then that
    /// one is returned instead.
    pub fn decide(self, journal: &Journal, nonce: Hex128) -> io::Result<T> {
        match self.draft.persist_noclobber(journal.path(nonce)) {
            Ok(_) => Ok(self.record),
            Err(failed) if failed.error.kind() == io::ErrorKind::AlreadyExists => journal
                .find(nonce)?
                .ok_or_else(|| io::ErrorKind::NotFound.into()),
            Err(failed) => Err(failed.error),
        }
    }
}

/// The boot this host is on.
pub fn boot_id() -> io::Result<BootId> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BootId(text.trim().into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Decision {
        Decision::Refused {
            boot_id: BootId("b".into()),
        }
    }

    fn committed() -> Decision {
        Decision::Committed {
            boot_id: BootId("b".into()),
            id: Name::new("a").unwrap(),
            moves: vec![("a".into(), "b".into())],
            blob: None,
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
    fn a_draft_of_a_killed_daemon_decides_nothing_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let draft = directory.path().join(format!("{DRAFT}x"));
        fs::write(&draft, "{half").unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        assert!(!draft.exists());
        assert_eq!(journal.all::<Decision>().unwrap(), []);
        assert_eq!(
            journal.decide(Hex128([1; 16]), refused()).unwrap(),
            refused()
        );
    }

    #[test]
    fn a_journal_keeps_its_identity_and_no_two_share_one() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let identity = |path| Journal::open(path).unwrap().identity().unwrap();
        assert_eq!(identity(one.path()), identity(one.path()));
        assert_ne!(identity(one.path()), identity(two.path()));
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
