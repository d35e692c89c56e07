//! Memory that was handed over, written down so that no later run of the daemon moves it again.
//!
//! A file is known by its device, inode and time of birth, on this boot: a path may come to mean other
//! memory, and a number another file. `region-del` takes the note back: whoever adds the file again
//! after that means it.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::region::Region;
use crate::wire::BootId;

/// The notes' directory, beside the journal of commits.
const NOTES: &str = "moved";

/// Which attempt handed a file over. It is kept as the text of a symbolic link that leads nowhere: that is there
/// with its text or not at all, in one step, and there is one for each of what may be thousands of Regions.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Note {
    boot_id: BootId,
    /// Nanoseconds since 1970, where the file system knows.
    born: Option<u64>,
    attempt: Name,
}

/// All notes of a sender.
#[derive(Debug)]
pub(super) struct Moved {
    directory: PathBuf,
    boot_id: BootId,
}

impl Moved {
    /// The notes in a runtime directory; those of another boot go.
    pub(super) fn open(runtime_directory: &Path, boot_id: BootId) -> io::Result<Self> {
        let directory = runtime_directory.join(NOTES);
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if !read(&path).is_some_and(|note| note.boot_id == boot_id) {
                fs::remove_file(path)?;
            }
        }
        Ok(Self { directory, boot_id })
    }

    /// The attempt that handed this memory over.
    pub(super) fn find(&self, region: &Region) -> Option<Name> {
        let (path, born) = self.identity(region).ok()?;
        let note = read(&path)?;
        (note.born == born).then_some(note.attempt)
    }

    /// Writes down that this memory has another owner.
    pub(super) fn add(&self, region: &Region, attempt: &Name) {
        if let Err(error) = self.write(region, attempt) {
            tracing::error!(region = %region.name(), %error, "cannot write down that the region was handed over: after a restart it could be moved again");
        }
    }

    /// Takes that back.
    pub(super) fn forget(&self, region: &Region) {
        if let Ok((path, _)) = self.identity(region) {
            let _ = fs::remove_file(path);
        }
    }

    fn write(&self, region: &Region, attempt: &Name) -> io::Result<()> {
        let (path, born) = self.identity(region)?;
        let note = Note {
            boot_id: self.boot_id.clone(),
            born,
            attempt: attempt.clone(),
        };
        let note = serde_json::to_string(&note)?;
        match symlink(&note, &path) {
            // About another file that had this number, or about this one.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_file(&path)?;
                symlink(&note, &path)
            }
            written => written,
        }
    }

    /// Where the note about a file is, and when the file was made.
    fn identity(&self, region: &Region) -> io::Result<(PathBuf, Option<u64>)> {
        let meta = region.file().metadata()?;
        let born = meta.created().ok();
        let born = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        let born = born.and_then(|born| u64::try_from(born.as_nanos()).ok());
        let name = format!("{:x}-{:x}", meta.dev(), meta.ino());
        Ok((self.directory.join(name), born))
    }
}

fn read(path: &Path) -> Option<Note> {
    serde_json::from_str(fs::read_link(path).ok()?.to_str()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(path: &Path) -> Region {
        Region::open(Name::new("r").unwrap(), path).unwrap()
    }

    #[test]
    fn a_note_is_about_a_file_and_not_about_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let (file, boot) = (directory.path().join("ram"), BootId("b".into()));
        fs::write(&file, [1; 4096]).unwrap();
        let moved = Moved::open(directory.path(), boot.clone()).unwrap();
        let (first, attempt) = (region(&file), Name::new("a").unwrap());
        assert_eq!(moved.find(&first), None);
        moved.add(&first, &attempt);
        fs::rename(&file, directory.path().join("elsewhere")).unwrap();
        fs::write(&file, [1; 4096]).unwrap();
        assert_eq!(moved.find(&region(&file)), None);
        let again = Moved::open(directory.path(), boot).unwrap();
        let elsewhere = region(&directory.path().join("elsewhere"));
        assert_eq!(again.find(&elsewhere), Some(attempt));
        again.forget(&elsewhere);
        assert_eq!(again.find(&elsewhere), None);
        moved.add(&first, &Name::new("a").unwrap());
        moved.add(&first, &Name::new("b").unwrap());
        assert_eq!(moved.find(&first), Some(Name::new("b").unwrap()));
        let later = Moved::open(directory.path(), BootId("c".into())).unwrap();
        assert_eq!(later.find(&first), None);
    }
}
