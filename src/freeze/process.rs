//! Stopping a process by SIGSTOP, through a descriptor of it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{FreezeError, Stopped};
use crate::sys::process::PidFd;
use crate::sys::sched::Punctual;

/// First and longest pause between two looks at a process that is being stopped. It is in user space as a rule
/// and stops within some 20 us; but it may need our CPU for that, and so we sleep: a thread that yields is as
/// often as not chosen again.
const LOOK_PAUSES: (Duration, Duration) = (Duration::from_micros(5), Duration::from_millis(2));

/// How much a look at a process's first thread tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Glance {
    Runs,
    Stopped,
    /// All threads have to be looked at.
    Unclear,
}

/// A process that writes, held by a descriptor so that its number cannot come to mean another one.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: PidFd,
    /// When it started, in clock ticks since boot.
    start_time: Option<u64>,
}

impl Process {
    /// The process that has the number `pid` now; checks that we may signal it.
    pub fn open(pid: i32) -> Result<Self, FreezeError> {
        let refused = |source| FreezeError::Process { pid, source };
        let pidfd = PidFd::open(pid).map_err(refused)?;
        let start_time = start_time(pid);
        // Asked last: if the process lives, the time was its own.
        pidfd.signal(0).map_err(refused)?;
        Ok(Self {
            pid,
            pidfd,
            start_time,
        })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn signal(&self, signal: i32) -> Result<(), FreezeError> {
        match self.pidfd.signal(signal) {
            Ok(()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(FreezeError::Ended { pid: self.pid })
            }
            Err(source) => Err(FreezeError::Process {
                pid: self.pid,
                source,
            }),
        }
    }

    /// A thread that is not stopped, with its state; `None` once all are. What cannot be looked at
    /// does not count as stopped: it is an error.
    pub(super) fn running_thread(&self) -> Result<Option<(i32, char)>, FreezeError> {
        let unseen = |source| FreezeError::Unseen {
            pid: self.pid,
            source,
        };
        let threads = match fs::read_dir(format!("/proc/{}/task", self.pid)) {
            Err(error) if has_gone(&error) && self.pidfd.has_ended() => {
                return Err(FreezeError::Ended { pid: self.pid });
            }
            threads => threads.map_err(unseen)?,
        };
        let mut running = None;
        for entry in threads {
            let entry = entry.map_err(unseen)?;
            let state = match stat(&entry.path()) {
                Ok((state, _)) => state,
                // A thread that has just ended runs no more.
                Err(error) if has_gone(&error) => continue,
                Err(error) => return Err(unseen(error)),
            };
            // A thread that has ended (Z, X) writes nothing any more; the others must be stopped.
            if !matches!(state, Some('T' | 'Z' | 'X')) {
                let thread = entry
                    .file_name()
                    .to_string_lossy()
                    .parse()
                    .unwrap_or(self.pid);
                running = Some((thread, state.unwrap_or('?')));
            }
        }
        // Asked last: if the process lives, the directory that was read was its own.
        if self.pidfd.has_ended() {
            return Err(FreezeError::Ended { pid: self.pid });
        }
        Ok(running)
    }

    /// What one look at its first thread tells of all of them.
    fn glance(&self) -> Glance {
        match self.first_thread() {
            // It cannot have started another one since.
            Ok((Some('T'), Some(1))) if !self.pidfd.has_ended() => Glance::Stopped,
            Ok((Some('T' | 'Z' | 'X'), _)) | Err(_) => Glance::Unclear,
            // A signal stops all threads or none.
            Ok(_) => Glance::Runs,
        }
    }

    /// The state of the first thread, and how many there are.
    fn first_thread(&self) -> io::Result<(Option<char>, Option<u32>)> {
        stat(Path::new(&format!("/proc/{}", self.pid)))
    }

    /// Stops it.
    pub(super) fn stop(&self, timeout: Duration) -> Result<(), FreezeError> {
        self.signal(libc::SIGSTOP)?;
        let stopped = self.wait_until_stopped(timeout);
        if stopped.is_err() {
            let _ = self.signal(libc::SIGCONT);
        }
        stopped
    }

    fn wait_until_stopped(&self, timeout: Duration) -> Result<(), FreezeError> {
        let started = Instant::now();
        let mut pause = LOOK_PAUSES.0;
        let _punctual = Punctual::begin();
        loop {
            let glance = self.glance();
            if glance == Glance::Stopped {
                return Ok(());
            }
            let late = started.elapsed() >= timeout;
            if late || glance == Glance::Unclear {
                match self.running_thread()? {
                    None => return Ok(()),
                    Some((thread, state)) if late => {
                        return Err(FreezeError::TimedOut {
                            pid: self.pid,
                            seconds: timeout.as_secs_f32(),
                            thread,
                            state,
                        });
                    }
                    Some(_) => {}
                }
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LOOK_PAUSES.1);
        }
    }

    /// That it still stands still. All its threads were seen to; what lets one of them go on lets all go on, and
    /// so a look at the first one tells.
    pub(super) fn check(&self) -> Result<(), FreezeError> {
        let first = self.first_thread();
        // Asked last: if the process lives, that was its own.
        if matches!(first, Ok((Some('T'), _))) && !self.pidfd.has_ended() {
            return Ok(());
        }
        match self.running_thread()? {
            None => Ok(()),
            Some((thread, state)) => Err(FreezeError::Continued {
                pid: self.pid,
                thread,
                state,
            }),
        }
    }

    /// Lets it go on; one that has ended needs nothing.
    pub(super) fn thaw(&self) -> Result<(), FreezeError> {
        match self.signal(libc::SIGCONT) {
            Err(FreezeError::Ended { .. }) => Ok(()),
            sent => sent,
        }
    }

    pub(super) fn record(&self) -> Stopped {
        Stopped::Pid {
            pid: self.pid,
            start_time: self.start_time,
        }
    }
}

/// Whether a file under /proc is not there because what it tells of has ended.
fn has_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The state letter of the process or thread with this directory, and how many threads the process has. One read
/// is enough, a line has some 350 bytes, and a writer stands still meanwhile.
fn stat(directory: &Path) -> io::Result<(Option<char>, Option<u32>)> {
    let mut line = [0; 1024];
    let read = File::open(directory.join("stat"))?.read(&mut line)?;
    let line = String::from_utf8_lossy(&line[..read]);
    let state = field(&line, STATE).and_then(|state| state.chars().next());
    let threads = field(&line, THREADS).and_then(|threads| threads.parse().ok());
    Ok((state, threads))
}

/// Fields of a `/proc/…/stat` line, counted as in proc_pid_stat(5).
const STATE: usize = 3;
const THREADS: usize = 20;
const START_TIME: usize = 22;

/// A field behind the name, which may itself contain anything, even `)`.
fn field(stat: &str, number: usize) -> Option<&str> {
    stat.rsplit_once(") ")?.1.split(' ').nth(number - STATE)
}

/// When a process started, in clock ticks since boot.
fn start_time(pid: i32) -> Option<u64> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    field(&line, START_TIME)?.parse().ok()
}

/// Lets a process of the journal go on, if the number still means the same one.
pub(super) fn thaw_recorded(pid: i32, recorded: Option<u64>) -> Result<(), FreezeError> {
    let process = match Process::open(pid) {
        Err(FreezeError::Process { source, .. }) if has_gone(&source) => return Ok(()),
        process => process?,
    };
    if start_time(pid) == recorded {
        process.thaw()
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_cannot_pretend_a_state() {
        assert_eq!(field("12 (a) T (b) S 1 1", STATE), Some("S"));
    }
}
