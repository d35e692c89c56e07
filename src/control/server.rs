//! The listening socket: who may connect, and that there is one daemon per path.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::session::{self, Shared};
use super::{CommandError, Commands, EventBus, code, encode};
use crate::sys::scm;

/// How long a client may leave an answer unread before its connection is closed.
const REPLY_DEADLINE: Duration = Duration::from_secs(10);

/// How long the end of the server waits for commands that have begun and for last answers.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Pause after a failed accept. Out of descriptors the next try would fail at once, and so on.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long another daemon may take to start on the same directory, and how often we look.
const START_WAIT: (Duration, Duration) = (Duration::from_secs(2), Duration::from_millis(5));

/// Locks a directory, waiting for a moment if somebody else has.
fn lock(directory: &Path) -> io::Result<Flock<File>> {
    let started = std::time::Instant::now();
    loop {
        match Flock::lock(File::open(directory)?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) if started.elapsed() < START_WAIT.0 => {
                std::thread::sleep(START_WAIT.1);
            }
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

/// Who may use a control socket. The file's mode is asked first, by the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Users. Empty: the one this process runs as, and root.
    pub uids: Vec<u32>,
    /// Groups, beside the users; membership counts, not only the primary group.
    pub gids: Vec<u32>,
}

impl Access {
    /// Whether a process with these credentials may come in.
    fn allows(&self, uid: u32, groups: &[u32]) -> bool {
        let by_user = if self.uids.is_empty() {
            uid == 0 || uid == nix::unistd::geteuid().as_raw()
        } else {
            self.uids.contains(&uid)
        };
        by_user || groups.iter().any(|gid| self.gids.contains(gid))
    }
}

/// A control socket that listens. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Server {
    listener: StdListener,
    access: Access,
    reply_deadline: Duration,
    file: SocketFile,
}

impl Server {
    /// Listens on `path`, creating its directory if need be. The file has mode 0660. What a daemon that
    /// died left there is replaced; a daemon that lives is not.
    pub fn bind(path: &Path, access: Access) -> io::Result<Self> {
        let named =
            |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(directory).map_err(named)?;
        // Two daemons that start at once must not both find the file stale and replace it. Not waiting
        // for long: whoever can read the directory can hold its lock for ever.
        let _one_at_a_time = lock(directory).map_err(|error| match error.raw_os_error() {
            Some(libc::EWOULDBLOCK) => io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("another daemon is just starting on {}", path.display()),
            ),
            _ => named(error),
        })?;
        remove_stale(path)?;
        let listener = StdListener::bind(path).map_err(named)?;
        let file = SocketFile::new(path).map_err(named)?;
        fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(named)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            access,
            reply_deadline: REPLY_DEADLINE,
            file,
        })
    }

    #[cfg(test)]
    pub(super) fn set_reply_deadline(&mut self, deadline: Duration) {
        self.reply_deadline = deadline;
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Serves every client until `shutdown`. Then commands that have begun end, their answers and the
    /// last events go out, and the file is removed.
    pub async fn serve<C: Commands>(
        self,
        commands: Arc<C>,
        events: EventBus,
        shutdown: CancellationToken,
    ) {
        let listener = match UnixListener::from_std(self.listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "control socket cannot be watched");
                return;
            }
        };
        let shared = Arc::new(Shared {
            commands,
            events,
            shutdown: shutdown.clone(),
            reply_deadline: self.reply_deadline,
        });
        let mut sessions = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(_ended) = sessions.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        if admit(&stream, &self.access) {
                            sessions.spawn(session::run(stream, shared.clone()));
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "control socket cannot accept");
                        tokio::select! {
                            () = tokio::time::sleep(ACCEPT_PAUSE) => {}
                            () = shutdown.cancelled() => break,
                        }
                    }
                },
            }
        }
        drop(listener);
        drop(self.file);
        let ended = async { while sessions.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_DEADLINE, ended).await.is_err() {
            tracing::warn!("control clients did not take their last answers in time");
        }
    }
}

/// Tells a client that may not come in why, as far as that goes without waiting.
fn admit(stream: &UnixStream, access: &Access) -> bool {
    let (uid, groups) = match credentials(stream) {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(%error, "control client without credentials refused");
            return false;
        }
    };
    if access.allows(uid, &groups) {
        return true;
    }
    tracing::warn!(
        uid,
        "control client refused: its user is not in control.allow-uids"
    );
    // A fresh connection has room for one line.
    let _ = stream.try_write(&refusal(uid));
    false
}

fn refusal(uid: u32) -> encode::Line {
    let desc = format!("uid {uid} may not use this control socket: add it to control.allow-uids");
    encode::answer(None, Err(CommandError::new(code::ACCESS_DENIED, desc)))
}

fn credentials(stream: &UnixStream) -> io::Result<(u32, Vec<u32>)> {
    let peer = stream.peer_cred()?;
    let mut groups = scm::peer_groups(stream.as_fd())?;
    groups.push(peer.gid());
    Ok((peer.uid(), groups))
}

/// Clears the way for `bind`, unless somebody listens there or it is not a socket.
fn remove_stale(path: &Path) -> io::Result<()> {
    let in_use = |what: &str| {
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("{what} {}", path.display()),
        ))
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            let text = format!("{}: {error}", path.display());
            return Err(io::Error::new(error.kind(), text));
        }
        Ok(found) if !found.file_type().is_socket() => {
            return in_use("there is something other than a socket at");
        }
        Ok(_) => {}
    }
    match StdStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => in_use("another daemon listens on"),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!(
                "cannot tell whether a daemon listens on {}: {error}",
                path.display()
            ),
        )),
    }
}

/// The socket's file: removed at the end, unless another daemon has put its own there since.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let identity = identity(&path)?;
        Ok(Self { path, identity })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // Nothing to do about a failure at the end: the next start finds it stale.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_is_ours_and_roots_unless_the_lists_say_otherwise() {
        let own = nix::unistd::geteuid().as_raw();
        let other = own + 1000;
        let default = Access::default();
        assert!(default.allows(own, &[]) && default.allows(0, &[]));
        assert!(!default.allows(other, &[own, 0]));
        let listed = Access {
            uids: vec![other],
            gids: Vec::new(),
        };
        assert!(listed.allows(other, &[]) && !listed.allows(other + 1, &[]));
        let group = Access {
            uids: Vec::new(),
            gids: vec![77],
        };
        assert!(group.allows(other, &[5, 77]) && !group.allows(other, &[5]));
        assert!(group.allows(own, &[]));
    }
}
