//! The final blob: read once the writers stand still, and sent before *prepare*.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::unistd::{Whence, lseek};

use crate::channel::{Channel, FileChannel, Patience};
use crate::limits::{BLOB_BYTES_MAX, BLOB_PIECE_BYTES_MAX};
use crate::region::SpanMut;
use crate::sys::wake::Wake;
use crate::wire::{BlobAccount, FromSender};

use super::super::error::TransferError;
use super::{Transfer, under_way};

/// What was read. Kept, since a lost conversation needs it again.
#[derive(Debug)]
pub(super) struct Blob {
    bytes: Vec<u8>,
    from: OwnedFd,
}

impl Blob {
    /// What *prepare* says about it.
    pub(super) fn account(&self) -> BlobAccount {
        BlobAccount::of(&self.bytes)
    }
}

/// A blob that was read before the writers went on; unless they leave another one, it is read anew.
#[derive(Debug)]
pub(super) struct Spent(OwnedFd);

impl Transfer {
    /// Sends the blob that the writers left behind, if they did.
    pub(super) async fn send_blob(&mut self) -> Result<(), TransferError> {
        let started = Instant::now();
        if self.blob.is_none() {
            self.blob = self.read_blob().await?;
        }
        let Some(Blob { bytes, .. }) = &self.blob else {
            return Ok(());
        };
        let talk = under_way(&mut self.talk)?;
        // An empty blob is one all the same.
        let pieces = bytes.chunks(BLOB_PIECE_BYTES_MAX).map(<[u8]>::to_vec);
        for piece in pieces.chain(bytes.is_empty().then(Vec::new)) {
            talk.say(&FromSender::Blob(piece)).await?;
        }
        self.attempt.set_blob_bytes(bytes.len() as u64);
        self.downtime.blob = started.elapsed();
        Ok(())
    }

    async fn read_blob(&mut self) -> Result<Option<Blob>, TransferError> {
        let spent = self.spent_blob.take();
        let given = self.attempt.take_final_blob();
        let again = given.is_none();
        let Some(fd) = given.or_else(|| spent.map(|Spent(fd)| fd)) else {
            return Ok(None);
        };
        // Whoever writes it may wait for that.
        self.attempt.announce();
        let patience = self.parameters.freeze_timeout;
        let read = move || {
            if again && lseek(&fd, 0, Whence::SeekSet).is_err() {
                // The first reading has emptied it.
                let source = std::io::ErrorKind::NotSeekable.into();
                return Err(TransferError::BlobUnread { source });
            }
            Ok(Blob {
                bytes: read(&fd, patience)?,
                from: fd,
            })
        };
        let blob = tokio::task::spawn_blocking(read).await;
        let blob = blob.map_err(std::io::Error::from);
        blob.map_err(TransferError::local("read the final blob"))?
            .map(Some)
    }

    /// The writers go on: what they had left behind is old.
    pub(super) fn spend_blob(&mut self) {
        if let Some(blob) = self.blob.take() {
            self.spent_blob = Some(Spent(blob.from));
        }
    }
}

/// All of a file, from its start, or what comes out of a pipe until its end.
fn read(fd: &OwnedFd, patience: Duration) -> Result<Vec<u8>, TransferError> {
    let unread = |source| TransferError::BlobUnread { source };
    // The position is where its writer has left it; a pipe has none.
    let _ = lseek(fd, 0, Whence::SeekSet);
    let wake = Wake::new().map_err(unread)?;
    let started = Instant::now();
    let waiting = Patience {
        stall_timeout: patience,
        wake,
    };
    let mut from =
        FileChannel::reading(fd.try_clone().map_err(unread)?, waiting).map_err(unread)?;
    let mut blob = Vec::new();
    let mut piece = vec![0; BLOB_PIECE_BYTES_MAX];
    loop {
        let got = from.readv(&[SpanMut::of_slice(&mut piece)], &mut Vec::new());
        let got = got.map_err(unread)?;
        blob.extend_from_slice(&piece[..got]);
        if got == 0 {
            return Ok(blob);
        }
        if blob.len() as u64 > BLOB_BYTES_MAX {
            return Err(TransferError::BlobTooLarge);
        }
        if started.elapsed() > patience {
            return Err(unread(std::io::ErrorKind::TimedOut.into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_file_is_read_from_its_start_and_a_pipe_to_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 300_000]).unwrap();
        assert_eq!(read(&file.into(), PATIENCE).unwrap(), [7; 300_000]);
        let (near, far) = nix::unistd::pipe().unwrap();
        let writer = std::thread::spawn(move || File::from(far).write_all(&[8; 300_000]).unwrap());
        assert_eq!(read(&near, PATIENCE).unwrap(), [8; 300_000]);
        writer.join().unwrap();
    }

    #[test]
    fn a_pipe_that_stays_open_and_a_blob_without_end_are_errors() {
        let (near, _far) = nix::unistd::pipe().unwrap();
        let error = read(&near, Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.code(), "blob-read");
        let zeros = File::open("/dev/zero").unwrap();
        let error = read(&zeros.into(), PATIENCE).unwrap_err();
        assert_eq!(error.code(), "too-large");
    }
}
