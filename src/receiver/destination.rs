//! Files that Regions arrive in.
//!
//! Until the sender has everything prepared, a file has no name at all (`O_TMPFILE`): whatever happens
//! to the receiver, the kernel gives the memory back. Between *prepared* and the commit it has a hidden
//! name, so that a receiver that dies there can roll its commit record forward; and only the commit
//! gives it the final one (rule 5).

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{
    AT_FDCWD, AtFlags, FallocateFlags, Flock, FlockArg, OFlag, RenameFlags, fallocate, renameat2,
};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::linkat;

use crate::limits::{HUGE_PAGE_BYTES, HUGE_PAGE_PAGES, PAGE_BYTES, PAGE_LEN};
use crate::name::Name;
use crate::pages::{PageRange, dense_areas};
use crate::region::{Access, Mapping, Region, RegionError};
use crate::stream::Destination;
use crate::sys;
use crate::wire::Hex128;

/// What hidden names begin with. A Region's name cannot begin with a dot.
const HIDDEN: &str = ".memferry-";

/// A Region's memory at the destination.
#[derive(Debug)]
pub(super) struct DestinationFile {
    region: Region,
    /// A second mapping, which asks for huge pages where the first one does not: what is allocated
    /// through it comes in huge pages, everything else page by page.
    huge: Option<Arc<Mapping>>,
    final_path: PathBuf,
}

impl DestinationFile {
    /// An unnamed file of `bytes` bytes, all of it a hole, that is to become `directory/name`.
    pub(super) fn create(
        directory: &Path,
        name: Name,
        bytes: u64,
        huge_pages: bool,
    ) -> Result<Self, RegionError> {
        let final_path = directory.join(name.as_str());
        let origin = final_path.display().to_string();
        let file = match unnamed(directory, bytes) {
            Ok(file) => file,
            Err(source) => return Err(RegionError::Open { origin, source }),
        };
        let region = Region::new(name, origin, file, Access::Write)?;
        let huge = huge_pages.then(|| asking_for_huge_pages(region.file(), bytes));
        let huge = huge.transpose().map_err(|source| RegionError::Map {
            origin: region.origin().to_owned(),
            bytes,
            source,
        })?;
        Ok(Self {
            region,
            huge,
            final_path,
        })
    }

    /// Has its memory come from this NUMA node as long as that has some. Not from it alone: the kernel would
    /// rather kill a process than go elsewhere. To be called before anything is allocated.
    pub(super) fn prefer_node(&self, node: u32) -> io::Result<()> {
        sys::numa::prefer(self.region.mapping(), node)
    }

    /// The mapping that has the huge pages, if there are some.
    pub(super) fn in_huge_pages(&self) -> &Arc<Mapping> {
        self.huge.as_ref().unwrap_or_else(|| self.region.mapping())
    }

    /// Where it will be once it is committed.
    pub(super) fn final_path(&self) -> &Path {
        &self.final_path
    }

    /// Bytes of memory it holds by now.
    pub(super) fn allocated_bytes(&self) -> u64 {
        self.region.allocated_bytes().unwrap_or(0)
    }

    /// Whether it outlives its host, as far as anybody can tell.
    pub(super) fn is_on_disk(&self) -> bool {
        let in_memory = [TMPFS_MAGIC, FsType(HUGETLBFS_MAGIC.0)];
        fstatfs(self.region.file()).map_or(true, |fs| !in_memory.contains(&fs.filesystem_type()))
    }

    /// On a disk: writes its content there.
    pub(super) fn sync(&self) -> io::Result<()> {
        if self.is_on_disk() {
            self.region.file().sync_all()?;
        }
        Ok(())
    }

    /// Gives it a hidden name. Works once: the kernel links an unnamed file only as long as it never had
    /// a name.
    pub(super) fn hide(&self, nonce: Hex128, index: usize) -> io::Result<Hidden> {
        let file = self.region.file();
        let lock = Flock::lock(file.try_clone()?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        let path = self
            .final_path
            .with_file_name(format!("{HIDDEN}{nonce}-{index}"));
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(
            AT_FDCWD,
            unnamed.as_str(),
            AT_FDCWD,
            &path,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?;
        if self.is_on_disk() {
            sync_directory(&path)?;
        }
        Ok(Hidden {
            path,
            final_path: self.final_path.clone(),
            remove: true,
            _lock: lock,
        })
    }
}

impl Destination for DestinationFile {
    fn region(&self) -> &Region {
        &self.region
    }

    fn populate(&self, ranges: &[PageRange]) {
        if let Some(huge) = &self.huge {
            // Only what is mostly data: a hole stays one, and an island costs what it holds.
            for page in dense_areas(ranges, HUGE_PAGE_PAGES) {
                let first = usize::try_from(page * PAGE_BYTES);
                if let Some(span) = first.ok().and_then(|first| huge.span(first, PAGE_LEN)) {
                    // One touch makes all of it; where there is none left, only what is needed.
                    let _ = sys::file::populate(&span, Access::Write);
                }
            }
        }
        // In the tables of the mapping that payload is placed through.
        ranges.iter().for_each(|range| self.region.populate(*range));
    }

    fn clear(&self, range: PageRange) -> io::Result<()> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |n: u64| i64::try_from(n).map_err(|_| Errno::EINVAL);
        let bytes = range.bytes(self.region.bytes());
        Ok(fallocate(
            self.region.file(),
            punch,
            signed(range.offset())?,
            signed(bytes)?,
        )?)
    }
}

/// A file without a name, all of it a hole.
fn unnamed(directory: &Path, bytes: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_TMPFILE.bits())
        .mode(0o600)
        .open(directory)?;
    file.set_len(bytes)?;
    Ok(file)
}

fn asking_for_huge_pages(file: &File, bytes: u64) -> io::Result<Arc<Mapping>> {
    let len = usize::try_from(bytes).map_err(|_| Errno::EFBIG)?;
    let mapping = Mapping::new(file, len, Access::Write)?;
    sys::file::advise_huge_pages(&mapping);
    Ok(mapping)
}

/// Whether files in `directory` get huge pages when they ask for them. Found out by a trial: a kernel may
/// lack them, a tmpfs has to be mounted for them, and there may be none left.
pub(super) fn gives_huge_pages(directory: &Path) -> bool {
    let given = || {
        let file = unnamed(directory, HUGE_PAGE_BYTES)?;
        let mapping = asking_for_huge_pages(&file, HUGE_PAGE_BYTES)?;
        // One page is touched; as much is allocated as one page is large.
        let page = mapping.whole().take(PAGE_LEN);
        sys::file::populate(&page, Access::Write)?;
        Ok::<_, io::Error>(file.metadata()?.blocks() * 512 >= HUGE_PAGE_BYTES)
    };
    given().unwrap_or(false)
}

/// A file under its hidden name; removed when dropped, unless it was kept. The lock tells a receiver
/// that starts on the same directory that somebody still holds it.
#[derive(Debug)]
pub(super) struct Hidden {
    path: PathBuf,
    final_path: PathBuf,
    remove: bool,
    _lock: Flock<File>,
}

impl Hidden {
    /// What a commit record says about it.
    pub(super) fn its_move(&self) -> (PathBuf, PathBuf) {
        (self.path.clone(), self.final_path.clone())
    }

    /// A commit record names it now: it must not go away.
    pub(super) fn keep(mut self) {
        self.remove = false;
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if self.remove
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::error!(path = %self.path.display(), %error, "cannot remove a discarded region");
        }
    }
}

/// Gives committed files their final names; those that have them already are left alone. Never
/// replaces a file: one whose name is taken keeps its hidden one, and somebody has to look.
pub(super) fn roll_forward(moves: &[(PathBuf, PathBuf)]) {
    for (from, to) in moves {
        let renamed = renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE);
        let done = match renamed {
            Ok(()) => sync_directory(to),
            // Gone from its hidden name: it was moved before, and is its owner's since.
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        };
        if let Err(error) = done {
            let (from, to) = (from.display(), to.display());
            tracing::error!(%from, %to, %error, "committed, but the region did not get its final name");
        }
    }
}

/// Makes a change of a name outlive a power loss.
fn sync_directory(path: &Path) -> io::Result<()> {
    path.parent()
        .map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

/// Removes hidden files that no commit record names and nobody holds: their receiver died between
/// *prepared* and the commit, and without a record they are not ours.
pub(super) fn remove_abandoned(directory: &Path, committed: &[PathBuf]) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(HIDDEN));
        if !hidden || committed.contains(&path) {
            continue;
        }
        let held = Flock::lock(File::open(&path)?, FlockArg::LockExclusiveNonblock).is_err();
        if !held {
            tracing::info!(path = %path.display(), "removing a region that was never committed");
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(directory: &Path, name: &str) -> DestinationFile {
        let name = Name::new(name).unwrap();
        DestinationFile::create(directory, name, 3 * 4096, false).unwrap()
    }

    fn listing(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn nothing_is_visible_before_the_commit_and_all_of_it_after() {
        let directory = tempfile::tempdir().unwrap();
        let destination = file(directory.path(), "vm1");
        destination
            .region()
            .file()
            .write_all_at(b"content", 0)
            .unwrap();
        assert_eq!(listing(directory.path()), [""; 0]);
        let hidden = destination.hide(Hex128([7; 16]), 0).unwrap();
        assert_eq!(
            listing(directory.path()),
            [format!(".memferry-{}-0", "07".repeat(16))]
        );
        let moves = [hidden.its_move()];
        hidden.keep();
        roll_forward(&moves);
        roll_forward(&moves);
        assert_eq!(listing(directory.path()), ["vm1"]);
        assert!(
            fs::read(directory.path().join("vm1"))
                .unwrap()
                .starts_with(b"content")
        );
    }

    #[test]
    fn a_commit_never_replaces_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let hidden = file(directory.path(), "vm1")
            .hide(Hex128([7; 16]), 0)
            .unwrap();
        fs::write(directory.path().join("vm1"), "somebody else's").unwrap();
        roll_forward(&[hidden.its_move()]);
        assert_eq!(
            fs::read(directory.path().join("vm1")).unwrap(),
            b"somebody else's"
        );
        drop(hidden);
        assert_eq!(listing(directory.path()), ["vm1"]);
    }

    #[test]
    fn only_what_nobody_holds_or_committed_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let held = file(directory.path(), "held")
            .hide(Hex128([1; 16]), 0)
            .unwrap();
        let committed = directory.path().join(".memferry-committed");
        fs::write(&committed, "").unwrap();
        fs::write(directory.path().join(".memferry-left"), "").unwrap();
        fs::write(directory.path().join("other"), "").unwrap();
        remove_abandoned(directory.path(), std::slice::from_ref(&committed)).unwrap();
        let mut left = listing(directory.path());
        left.sort();
        let held_name = held
            .path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        assert_eq!(
            left,
            [
                held_name,
                ".memferry-committed".to_owned(),
                "other".to_owned()
            ]
        );
    }

    #[test]
    fn a_cleared_range_reads_as_zeros_and_gives_its_memory_back() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let destination = file(directory.path(), "vm1");
        destination
            .region()
            .file()
            .write_all_at(&[1; 3 * 4096], 0)
            .unwrap();
        let range = PageRange { first: 1, count: 1 };
        destination.clear(range).unwrap();
        assert_eq!(
            destination.region().read(range, &mut [9; 4096]).unwrap(),
            [0; 4096]
        );
        assert_eq!(destination.allocated_bytes(), 2 * 4096);
    }
}
