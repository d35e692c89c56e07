//! A command as a transport: we write its standard input and read its standard output.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{Channel, Features, FileChannel, Patience, Shutdown, WriteFlags};
use crate::region::{Span, SpanMut};

/// How long a command may take to end once its pipes are closed, before it is killed.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Longest pause between two looks whether it has ended.
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// A [`Channel`] through a child process. Its standard error is ours.
///
/// Dropping it closes the pipes, gives the command two seconds to end, then kills it; it never stays
/// as a zombie. What the command started in turn is its own to end.
#[derive(Debug)]
pub struct CommandChannel {
    pipes: FileChannel,
    child: Child,
    name: String,
}

impl CommandChannel {
    /// Starts `argv[0]`, found through `PATH`, with the rest as its arguments; no shell is involved.
    ///
    /// `InvalidInput` for an empty `argv`; otherwise why it could not be started.
    pub fn spawn(argv: &[impl AsRef<OsStr>], patience: Patience) -> io::Result<Self> {
        let Some((program, arguments)) = argv.split_first() else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a command needs at least the program's name",
            ));
        };
        let name = program.as_ref().to_string_lossy().into_owned();
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| {
                io::Error::new(error.kind(), format!("cannot start {name}: {error}"))
            })?;
        let pipes = match (child.stdout.take(), child.stdin.take()) {
            (Some(from), Some(to)) => FileChannel::both(from.into(), to.into(), patience),
            _ => Err(io::Error::other("the command has no pipes")),
        };
        match pipes {
            Ok(pipes) => Ok(Self { pipes, child, name }),
            Err(error) => {
                end(&mut child, Duration::ZERO, &name);
                Err(error)
            }
        }
    }

    /// Closes both pipes and waits up to `timeout` for the command to end by itself. `None` if it has
    /// not; it is then killed when the channel is dropped.
    pub fn finish(&mut self, timeout: Duration) -> io::Result<Option<ExitStatus>> {
        self.pipes.shutdown(Shutdown::Reset)?;
        wait(&mut self.child, timeout)
    }
}

/// Waits for `child`. There is no portable wait with a deadline, and a handful of looks per command is
/// nothing.
fn wait(child: &mut Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = super::wait::after(timeout);
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Ends `child` for sure: a killed process is reaped at once.
fn end(child: &mut Child, timeout: Duration, name: &str) {
    if matches!(wait(child, timeout), Ok(Some(_))) {
        return;
    }
    tracing::warn!(
        command = name,
        "the command did not end by itself and is killed"
    );
    // Both fail only for a process that was reaped, and the handle is ours alone.
    let _ = child.kill();
    let _ = child.wait();
}

impl Channel for CommandChannel {
    fn features(&self) -> Features {
        self.pipes.features()
    }

    fn writev(
        &mut self,
        iov: &[Span<'_>],
        fds: &[BorrowedFd<'_>],
        flags: WriteFlags,
    ) -> io::Result<usize> {
        self.pipes.writev(iov, fds, flags)
    }

    fn readv(&mut self, iov: &[SpanMut<'_>], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.pipes.readv(iov, fds)
    }

    fn wait_readable(&mut self, timeout: Duration) -> io::Result<bool> {
        self.pipes.wait_readable(timeout)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        self.pipes.shutdown(how)
    }
}

impl Drop for CommandChannel {
    fn drop(&mut self) {
        // Closing descriptors cannot fail here, and the command must see its input end.
        let _ = self.pipes.shutdown(Shutdown::Reset);
        end(&mut self.child, END_PATIENCE, &self.name);
    }
}
