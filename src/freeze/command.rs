//! Stopping a writer by commands of its operator.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{FreezeError, Stopped};
use crate::sys::process::{PidFd, die_with_parent};

/// How long thawing, and what is done in the end, may take. Nothing waits for it but its own end.
const AFTERWARDS: Duration = Duration::from_secs(60);

/// Bytes of standard error that an error shows.
const TAIL_BYTES: u64 = 400;

/// What is run for a writer: programs with their arguments, without a shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commands {
    /// Stops it; exit code 0 says that it stands still.
    pub freeze: Vec<String>,
    /// Lets it go on. Also run when `freeze` failed or was never run.
    pub thaw: Vec<String>,
    /// Run once the memory has another owner; empty for nothing.
    pub done: Vec<String>,
}

impl Commands {
    pub(super) fn stop(&self, timeout: Duration) -> Result<(), FreezeError> {
        let stopped = run(&self.freeze, timeout, Life::Ours);
        if stopped.is_err() {
            // How far it came is not known.
            if let Err(error) = self.thaw() {
                tracing::error!(%error, "the writer could not be started again");
            }
        }
        stopped
    }

    pub(super) fn thaw(&self) -> Result<(), FreezeError> {
        thaw_recorded(&self.thaw)
    }

    pub(super) fn record(&self) -> Stopped {
        Stopped::Command {
            thaw: self.thaw.clone(),
            done: self.done.clone(),
        }
    }
}

/// Runs what lets a writer of the journal go on.
pub(super) fn thaw_recorded(thaw: &[String]) -> Result<(), FreezeError> {
    run(thaw, AFTERWARDS, Life::ItsOwn)
}

/// Runs what is to be done in the end.
pub(super) fn done(done: &[String]) -> Result<(), FreezeError> {
    run(done, AFTERWARDS, Life::ItsOwn)
}

/// Whether a command may outlive us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Ours,
    ItsOwn,
}

/// Runs a command to its end in a process group of its own; what takes longer than `timeout` is killed
/// with all its children.
fn run(argv: &[String], timeout: Duration, life: Life) -> Result<(), FreezeError> {
    let shown = argv.join(" ");
    let refused = |source| FreezeError::Command {
        command: shown.clone(),
        source,
    };
    let Some((program, arguments)) = argv.split_first() else {
        return Err(refused(io::ErrorKind::InvalidInput.into()));
    };
    // A file, because a pipe would be held open by whatever the command leaves running.
    let stderr = tempfile::tempfile().map_err(refused)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr.try_clone().map_err(refused)?)
        .process_group(0);
    if life == Life::Ours {
        die_with_parent(&mut command);
    }
    let mut child = command.spawn().map_err(refused)?;
    match wait(&mut child, timeout).map_err(refused)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(FreezeError::CommandFailed {
            command: shown,
            status,
            stderr: tail(stderr),
        }),
        None => Err(FreezeError::CommandTimedOut {
            command: shown,
            seconds: timeout.as_secs_f32(),
            stderr: tail(stderr),
        }),
    }
}

/// How it ended; `None` if it had to be killed.
fn wait(child: &mut Child, timeout: Duration) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    let in_time = PidFd::open(pid).map(|process| process.ends_within(timeout));
    if !matches!(in_time, Ok(true)) {
        // Not reaped yet, so the number is still its own.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let status = child.wait()?;
    in_time.map(|in_time| in_time.then_some(status))
}

fn tail(mut stderr: File) -> String {
    let mut bytes = Vec::new();
    let length = stderr.metadata().map_or(0, |meta| meta.len());
    let start = SeekFrom::Start(length.saturating_sub(TAIL_BYTES));
    let _ = stderr
        .seek(start)
        .and_then(|_| stderr.take(TAIL_BYTES).read_to_end(&mut bytes));
    match String::from_utf8_lossy(&bytes).trim() {
        "" => "it said nothing".to_owned(),
        text => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn shell(text: &str) -> Vec<String> {
        ["sh", "-c", text].map(str::to_owned).to_vec()
    }

    fn commands(directory: &std::path::Path, freeze: &str) -> Commands {
        Commands {
            freeze: shell(freeze),
            thaw: shell(&format!("echo >> {}/thawed", directory.display())),
            done: Vec::new(),
        }
    }

    #[test]
    fn a_command_that_fails_tells_how_and_is_undone() {
        let directory = tempfile::tempdir().unwrap();
        let commands = commands(directory.path(), "echo no such machine >&2; exit 3");
        let error = commands.stop(Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.code(), "freeze-failed");
        let text = error.to_string();
        assert!(
            text.contains("exit status: 3") && text.contains("no such machine"),
            "{text}"
        );
        assert!(directory.path().join("thawed").exists());
        let missing = Commands {
            freeze: vec!["/nonexistent/program".to_owned()],
            ..commands
        };
        let error = missing.stop(Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.code(), "freeze-refused");
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_its_children_and_undone() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let hang = format!("sleep 600 & echo $! > {}; wait", pid.display());
        let commands = commands(directory.path(), &hang);
        let started = Instant::now();
        let error = commands.stop(Duration::from_millis(500)).unwrap_err();
        assert_eq!(error.code(), "freeze-timeout");
        assert!(started.elapsed() < Duration::from_secs(60));
        assert!(directory.path().join("thawed").exists());
        let child: i32 = std::fs::read_to_string(pid)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        // Killed; reaped by whoever inherits it.
        if let Ok(child) = PidFd::open(child) {
            assert!(child.ends_within(Duration::from_secs(60)));
        }
    }

    #[test]
    fn what_is_done_in_the_end_is_run_where_there_is_something() {
        let directory = tempfile::tempdir().unwrap();
        let commands = commands(directory.path(), "true");
        commands.stop(Duration::from_secs(60)).unwrap();
        assert!(!directory.path().join("thawed").exists());
        done(&commands.thaw).unwrap();
        assert!(directory.path().join("thawed").exists());
    }
}
