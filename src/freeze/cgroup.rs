//! Freezing a control group (version 2), with whatever processes are in it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use super::{FreezeError, Stopped};

/// A control group of writers, held open so that its path cannot come to mean another one.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Tells it from another one that is made at the same path later.
    inode: u64,
    freeze: File,
    events: File,
}

/// What `cgroup.events` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Events {
    populated: bool,
    frozen: bool,
}

impl Cgroup {
    /// The group at `path`; checks that we may freeze it, and that we are not in it ourselves.
    pub fn open(path: &Path) -> Result<Self, FreezeError> {
        let refused = |source| FreezeError::Cgroup {
            path: path.to_owned(),
            source,
        };
        let directory = File::open(path).map_err(refused)?;
        let magic = fstatfs(&directory).map_err(|errno| refused(errno.into()))?;
        if magic.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(refused(io::Error::other(
                "it is no control group of version 2",
            )));
        }
        let open = |name: &str, write| {
            let file = File::options()
                .read(true)
                .write(write)
                .open(path.join(name));
            file.map_err(|error| refused(io::Error::new(error.kind(), format!("{name}: {error}"))))
        };
        let cgroup = Self {
            inode: directory.metadata().map_err(refused)?.ino(),
            freeze: open("cgroup.freeze", true)?,
            events: open("cgroup.events", false)?,
            path: path.to_owned(),
        };
        cgroup.check_without_us()?;
        Ok(cgroup)
    }

    /// That we would not freeze ourselves, and then nobody could go on.
    fn check_without_us(&self) -> Result<(), FreezeError> {
        match has_process(&self.path, std::process::id()) {
            Ok(false) => Ok(()),
            Ok(true) => Err(self.refused(io::Error::other("this sender is in it itself"))),
            Err(error) => Err(self.refused(error)),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Whether it is for us to freeze: one that somebody else has frozen, or is freezing, is not ours to thaw.
    pub(super) fn is_ours(&self) -> Result<bool, FreezeError> {
        self.check_without_us()?;
        Ok(!self.is_asked_to_freeze()? && !self.events()?.frozen)
    }

    /// Freezes it.
    pub(super) fn stop(&self, timeout: Duration) -> Result<(), FreezeError> {
        self.write("1")?;
        let stopped = self.wait_until_frozen(timeout);
        if stopped.is_err() {
            let _ = self.write("0");
        }
        stopped
    }

    /// Waits until all in it stand still.
    pub(super) fn wait_until_frozen(&self, timeout: Duration) -> Result<(), FreezeError> {
        let deadline = Instant::now() + timeout;
        loop {
            // Reading is what takes note of a change; `poll` then waits for the next one.
            let events = self.events()?;
            if !events.populated {
                return Err(FreezeError::CgroupEmpty {
                    path: self.path.clone(),
                });
            }
            if events.frozen {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(FreezeError::CgroupTimedOut {
                    path: self.path.clone(),
                    seconds: timeout.as_secs_f32(),
                });
            }
            let mut fds = [PollFd::new(self.events.as_fd(), PollFlags::POLLPRI)];
            // Rounded up: a rest below a millisecond must not become a spin.
            let left = PollTimeout::try_from(left + Duration::from_millis(1));
            let _ = poll(&mut fds, left.unwrap_or(PollTimeout::MAX));
        }
    }

    /// That it is still frozen.
    pub(super) fn check(&self) -> Result<(), FreezeError> {
        if self.events()?.frozen {
            return Ok(());
        }
        Err(FreezeError::CgroupContinued {
            path: self.path.clone(),
        })
    }

    /// Lets it go on; one that has been removed needs nothing.
    pub(super) fn thaw(&self) -> Result<(), FreezeError> {
        match self.write("0") {
            Err(FreezeError::Cgroup { source, .. })
                if source.raw_os_error() == Some(libc::ENODEV) =>
            {
                Ok(())
            }
            written => written,
        }
    }

    pub(super) fn record(&self) -> Stopped {
        Stopped::Cgroup {
            path: self.path.clone(),
            inode: self.inode,
        }
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        self.inode == other.inode
    }

    fn write(&self, value: &str) -> Result<(), FreezeError> {
        let mut file = &self.freeze;
        file.write_all(value.as_bytes())
            .map_err(|error| self.refused(error))
    }

    fn is_asked_to_freeze(&self) -> Result<bool, FreezeError> {
        Ok(self.read(&self.freeze)?.trim() == "1")
    }

    fn events(&self) -> Result<Events, FreezeError> {
        let text = self.read(&self.events)?;
        let is_set = |wanted: &str| text.lines().any(|line| line == wanted);
        Ok(Events {
            populated: is_set("populated 1"),
            frozen: is_set("frozen 1"),
        })
    }

    fn read(&self, mut file: &File) -> Result<String, FreezeError> {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.read_to_string(&mut text))
            .map_err(|error| self.refused(error))?;
        Ok(text)
    }

    fn refused(&self, source: io::Error) -> FreezeError {
        FreezeError::Cgroup {
            path: self.path.clone(),
            source,
        }
    }
}

/// Whether a process is in a group or in one below it.
pub(super) fn has_process(path: &Path, pid: u32) -> io::Result<bool> {
    let own = fs::read_to_string(path.join("cgroup.procs"))?;
    if own.lines().any(|line| line.parse() == Ok(pid)) {
        return Ok(true);
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match has_process(&entry.path(), pid) {
                // One that was removed meanwhile has nobody in it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Ok(false) => {}
                found => return found,
            }
        }
    }
    Ok(false)
}

/// Lets a group of the journal go on, if the path still means the same one.
pub(super) fn thaw_recorded(path: &Path, inode: u64) -> Result<(), FreezeError> {
    match fs::metadata(path) {
        Ok(found) if found.ino() == inode => Cgroup::open(path)?.thaw(),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(FreezeError::Cgroup {
            path: path.to_owned(),
            source,
        }),
    }
}
