//! The final blob of an attempt: a machine's device state, delivered with *committed*.
//!
//! It arrives in a draft beside the journal's records, gets the name of its nonce before *prepared*,
//! and belongs to the commit record from then on: a file that no such record names is removed at the
//! next start. It is handed out as often as it is asked for, until it is deleted.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::control::CommandError;
use crate::journal::Journal;
use crate::limits::BLOB_BYTES_MAX;
use crate::name::Name;
use crate::wire::{BlobAccount, BlobSum, Hex128};

use super::error::AttemptError;

/// A blob on its way.
#[derive(Debug)]
pub(super) struct ArrivingBlob {
    draft: NamedTempFile,
    sum: BlobSum,
}

impl ArrivingBlob {
    pub(super) fn new(journal: &Journal) -> io::Result<Self> {
        Ok(Self {
            draft: journal.draft()?,
            sum: BlobSum::default(),
        })
    }

    /// Adds the next piece.
    pub(super) fn add(&mut self, piece: &[u8]) -> Result<(), AttemptError> {
        let bytes = self.sum.account().bytes + piece.len() as u64;
        if bytes > BLOB_BYTES_MAX {
            return Err(AttemptError::BlobTooLarge { bytes });
        }
        self.sum.add(piece);
        let written = self.draft.write_all(piece);
        written.map_err(AttemptError::local("write the final blob"))
    }

    pub(super) fn account(&self) -> BlobAccount {
        self.sum.account()
    }

    /// Gives it the name under which a commit record finds it.
    pub(super) fn keep(self, journal: &Journal, nonce: Hex128) -> io::Result<KeptBlob> {
        let path = journal.blob_path(nonce);
        self.draft
            .persist_noclobber(&path)
            .map_err(|failed| failed.error)?;
        Ok(KeptBlob {
            path,
            account: self.sum.account(),
            remove: true,
        })
    }
}

/// A blob under its name; removed when dropped, unless a commit record names it.
#[derive(Debug)]
pub(super) struct KeptBlob {
    path: PathBuf,
    account: BlobAccount,
    remove: bool,
}

impl KeptBlob {
    pub(super) fn account(&self) -> BlobAccount {
        self.account
    }

    /// What a commit record says about it.
    pub(super) fn its_record(&self) -> (PathBuf, BlobAccount) {
        (self.path.clone(), self.account)
    }
}

impl Drop for KeptBlob {
    fn drop(&mut self) {
        if self.remove
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a discarded blob");
        }
    }
}

/// Blobs of committed attempts, the latest last.
#[derive(Debug, Default)]
pub(super) struct Blobs(Vec<(Name, PathBuf, BlobAccount)>);

impl Blobs {
    /// A commit record names it now.
    pub(super) fn add(&mut self, attempt: Name, mut blob: KeptBlob) {
        blob.remove = false;
        self.0.push((attempt, blob.path.clone(), blob.account));
    }

    /// Those that an earlier run of the daemon committed, unless they were deleted since.
    pub(super) fn recover(&mut self, committed: Vec<(Name, PathBuf, BlobAccount)>) {
        let age = |path: &PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).ok();
        self.0 = committed;
        self.0.retain(|(_, path, _)| path.exists());
        self.0.sort_by_key(|(_, path, _)| age(path));
    }

    /// Hands out the blob of an attempt.
    pub(super) fn take(&self, attempt: &Name) -> Result<(Value, OwnedFd), CommandError> {
        let (_, path, account) = self.find(attempt).map(|index| &self.0[index])?;
        let file = File::open(path).map_err(failed)?;
        Ok((json!({"id": attempt, "size": account.bytes}), file.into()))
    }

    /// Deletes the blob of an attempt; descriptors that were handed out stay good.
    pub(super) fn delete(&mut self, attempt: &Name) -> Result<(), CommandError> {
        let index = self.find(attempt)?;
        fs::remove_file(&self.0[index].1).map_err(failed)?;
        self.0.remove(index);
        Ok(())
    }

    fn find(&self, attempt: &Name) -> Result<usize, CommandError> {
        let found = self.0.iter().rposition(|(id, _, _)| id == attempt);
        found.ok_or_else(|| {
            CommandError::new(
                "no-blob",
                format!("There is no blob of a transfer with id '{attempt}'"),
            )
        })
    }
}

fn failed(error: io::Error) -> CommandError {
    CommandError::new("receiver-failed", format!("the final blob: {error}"))
}
