//! Descriptors a client passed on its connection.
//!
//! They arrive beside the bytes, without a name. `getfd` gives the oldest one a name, and a command
//! that refers to that name takes it. A connection's descriptors end with it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{CommandError, code};
use crate::limits::{CONTROL_FDS_MAX, NAME_BYTES_MAX};

/// The descriptors of one control connection. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct FdTable(Arc<Mutex<Fds>>);

#[derive(Debug, Default)]
struct Fds {
    unnamed: VecDeque<OwnedFd>,
    named: HashMap<String, OwnedFd>,
}

impl FdTable {
    /// Takes the descriptor that `getfd` stored under `name`.
    #[must_use]
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        self.lock().named.remove(name)
    }

    /// Keeps what arrived; false when that would be too many, and then none of it is kept.
    pub(super) fn arrived(&self, fds: Vec<OwnedFd>) -> bool {
        let mut table = self.lock();
        let fits = table.unnamed.len() + table.named.len() + fds.len() <= CONTROL_FDS_MAX;
        if fits {
            table.unnamed.extend(fds);
        }
        fits
    }

    /// `getfd`: names the oldest unnamed descriptor. Another one of that name is closed.
    pub(super) fn name_oldest(&self, name: String) -> Result<(), CommandError> {
        let mut table = self.lock();
        let fd = table.unnamed.pop_front().ok_or_else(|| {
            CommandError::new(
                code::NO_DESCRIPTOR,
                "No file descriptor supplied via SCM_RIGHTS",
            )
        })?;
        // As QEMU does: a digit would make the name a descriptor number in some of its commands.
        if name.is_empty()
            || name.len() > NAME_BYTES_MAX
            || name.starts_with(|c: char| c.is_ascii_digit())
        {
            return Err(CommandError::new(
                code::INVALID_ARGUMENT,
                format!(
                    "Parameter 'fdname' expects a name of 1 to {NAME_BYTES_MAX} bytes not starting with a digit"
                ),
            ));
        }
        table.named.insert(name, fd);
        Ok(())
    }

    /// `closefd`.
    pub(super) fn close(&self, name: &str) -> Result<(), CommandError> {
        match self.take(name) {
            Some(_closed) => Ok(()),
            None => Err(CommandError::new(
                code::NO_DESCRIPTOR,
                format!("File descriptor named '{name}' not found"),
            )),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Fds> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn fd() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn names_go_to_the_oldest_first_and_a_second_take_finds_nothing() {
        let table = FdTable::default();
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd.as_fd()).unwrap().st_ino;
        let (a, b) = (OwnedFd::from(a), OwnedFd::from(b));
        let (first, second) = (inode(&a), inode(&b));
        assert!(table.arrived(vec![a, b]));
        table.name_oldest("x".into()).unwrap();
        table.name_oldest("y".into()).unwrap();
        assert_eq!(inode(&table.take("y").unwrap()), second);
        assert_eq!(inode(&table.take("x").unwrap()), first);
        assert!(table.take("x").is_none());
        let error = table.name_oldest("z".into()).unwrap_err();
        assert_eq!(error.desc, "No file descriptor supplied via SCM_RIGHTS");
    }

    #[test]
    fn more_than_the_limit_is_refused_whole() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        // The usual soft limit is the very number of descriptors this needs.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        let table = FdTable::default();
        let null = fd();
        let many =
            |n: usize| -> Vec<OwnedFd> { (0..n).map(|_| null.try_clone().unwrap()).collect() };
        assert!(table.arrived(many(100)));
        let held = table.lock().unnamed.len();
        assert!(!table.arrived(many(CONTROL_FDS_MAX - 99)));
        assert_eq!(table.lock().unnamed.len(), held);
    }
}
