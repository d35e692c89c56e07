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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::suite::patience;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_command_that_cannot_start_is_an_error_with_its_name() {
        let error = CommandChannel::spawn(&["/nonexistent/program"], patience()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(
            error.to_string().contains("/nonexistent/program"),
            "{error}"
        );
        let none: [&str; 0] = [];
        let error = CommandChannel::spawn(&none, patience()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_end_of_its_input_ends_a_command_and_its_status_is_known() {
        let argv = ["sh", "-c", "cat; exit 3"];
        let mut channel = CommandChannel::spawn(&argv, patience()).unwrap();
        let status = channel.finish(Duration::from_secs(60)).unwrap().unwrap();
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn a_command_that_does_not_end_is_killed_and_leaves_no_zombie() {
        let mut channel = CommandChannel::spawn(&["sleep", "1000"], patience()).unwrap();
        assert_eq!(channel.finish(Duration::ZERO).unwrap(), None);
        end(&mut channel.child, Duration::ZERO, "sleep");
        let status = channel.child.try_wait().unwrap().unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }
}
