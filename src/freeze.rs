//! Making a writer stop, and go on again.
//!
//! Frozen means *observed* frozen: a signal that was sent is not yet a process that has stopped. A
//! [`Frozen`] that is dropped thaws, so that no path before the commit can leave a writer standing.

use std::fs;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::sys::process::PidFd;

/// First and longest pause between two looks at a process that is being stopped.
const LOOK_PAUSES: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));

/// Why a writer could not be stopped.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// There is no such process, or we may not signal it.
    #[error("cannot freeze process {pid}: {source}")]
    Process {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// The process has ended.
    #[error("process {pid}, which writes the region, has ended")]
    Ended {
        /// The process.
        pid: i32,
    },
    /// Whether it has stopped cannot be seen.
    #[error(
        "cannot see whether process {pid} has stopped: {source}: /proc must show it to the sender"
    )]
    Unseen {
        /// The process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// It stood still and runs again, and not by our doing.
    #[error(
        "process {pid} was frozen, and somebody else let it go on: its thread {thread} is in state {state}"
    )]
    Continued {
        /// The process.
        pid: i32,
        /// A thread that runs.
        thread: i32,
        /// What it does, as in proc_pid_stat(5).
        state: char,
    },
    /// It did not stop in time.
    #[error(
        "process {pid} did not stop within {seconds} s (freeze-timeout): thread {thread} is in state {state}"
    )]
    TimedOut {
        /// The process.
        pid: i32,
        /// How long we waited.
        seconds: f32,
        /// A thread that goes on.
        thread: i32,
        /// What it does, as in proc_pid_stat(5).
        state: char,
    },
}

impl FreezeError {
    /// The stable code under which this error is reported.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Process { .. } | Self::Unseen { .. } => "freeze-refused",
            Self::Continued { .. } => "not-frozen",
            Self::Ended { .. } => "writer-gone",
            Self::TimedOut { .. } => "freeze-timeout",
        }
    }
}

/// A way to stop the writer of a Region.
#[derive(Debug, Clone)]
pub enum Freezer {
    /// Nothing writes.
    None,
    /// SIGSTOP.
    Pid(Arc<Process>),
}

/// A process that writes, held by a descriptor so that its number cannot come to mean another one.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: PidFd,
}

impl Process {
    /// The process that has the number `pid` now; checks that we may signal it.
    pub fn open(pid: i32) -> Result<Self, FreezeError> {
        let refused = |source| FreezeError::Process { pid, source };
        let pidfd = PidFd::open(pid).map_err(refused)?;
        pidfd.signal(0).map_err(refused)?;
        Ok(Self { pid, pidfd })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    fn signal(&self, signal: i32) -> Result<(), FreezeError> {
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
    fn running_thread(&self) -> Result<Option<(i32, char)>, FreezeError> {
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
            let stat = match fs::read_to_string(entry.path().join("stat")) {
                Ok(stat) => stat,
                // A thread that has just ended runs no more.
                Err(error) if has_gone(&error) => continue,
                Err(error) => return Err(unseen(error)),
            };
            let state = thread_state(&stat);
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

    /// Stops it; says whether it ran before.
    fn stop(&self, timeout: Duration) -> Result<bool, FreezeError> {
        if self.running_thread()?.is_none() {
            return Ok(false);
        }
        self.signal(libc::SIGSTOP)?;
        let stopped = self.wait_until_stopped(timeout);
        if stopped.is_err() {
            let _ = self.signal(libc::SIGCONT);
        }
        stopped.map(|()| true)
    }

    fn wait_until_stopped(&self, timeout: Duration) -> Result<(), FreezeError> {
        let started = Instant::now();
        let mut pause = LOOK_PAUSES.0;
        while let Some((thread, state)) = self.running_thread()? {
            if started.elapsed() >= timeout {
                let seconds = timeout.as_secs_f32();
                return Err(FreezeError::TimedOut {
                    pid: self.pid,
                    seconds,
                    thread,
                    state,
                });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(LOOK_PAUSES.1);
        }
        Ok(())
    }

    fn record(&self) -> StoppedProcess {
        StoppedProcess {
            pid: self.pid,
            start_time: self.start_time(),
        }
    }

    fn start_time(&self) -> Option<u64> {
        start_time(self.pid)
    }
}

/// Whether a file under /proc is not there because what it tells of has ended.
fn has_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// The state letter of a `/proc/…/stat` line: the name before it may contain anything, even `)`.
fn thread_state(stat: &str) -> Option<char> {
    stat.rsplit_once(") ")?.1.chars().next()
}

/// When a process started, in clock ticks since boot: field 22 of proc_pid_stat(5).
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The state after the name is field 3.
    stat.rsplit_once(") ")?
        .1
        .split(' ')
        .nth(22 - 3)?
        .parse()
        .ok()
}

/// A stopped process as the journal remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct StoppedProcess {
    pid: i32,
    start_time: Option<u64>,
}

impl StoppedProcess {
    /// Lets it go on, if the number still means the same process; one that has ended needs nothing.
    pub fn thaw(&self) -> Result<(), FreezeError> {
        let process = match Process::open(self.pid) {
            Err(FreezeError::Process { source, .. }) if has_gone(&source) => return Ok(()),
            process => process?,
        };
        if process.start_time() != self.start_time {
            return Ok(());
        }
        match process.signal(libc::SIGCONT) {
            Err(FreezeError::Ended { .. }) => Ok(()),
            sent => sent,
        }
    }
}

/// Writers that stand still because of us. Dropping it lets them go on.
#[derive(Debug, Default)]
pub struct Frozen {
    /// Each process once, and whether it was us who stopped it.
    processes: Vec<(Arc<Process>, bool)>,
}

impl Frozen {
    /// Stops the writers of all Regions and waits until they are seen to stand still. On an error
    /// those that were stopped go on. Blocks for up to `timeout` for each process.
    pub fn freeze(freezers: &[Freezer], timeout: Duration) -> Result<Self, FreezeError> {
        let mut frozen = Self::default();
        for freezer in freezers {
            let Freezer::Pid(process) = freezer else {
                continue;
            };
            if frozen
                .processes
                .iter()
                .any(|(other, _)| other.pid == process.pid)
            {
                continue;
            }
            // One that stood still before us is not ours to start again.
            let ours = process.stop(timeout)?;
            frozen.processes.push((Arc::clone(process), ours));
        }
        Ok(frozen)
    }

    /// What the journal would have to remember if these were stopped now: the processes that run.
    pub fn record_of(freezers: &[Freezer]) -> Result<Vec<StoppedProcess>, FreezeError> {
        let mut running = Vec::new();
        for freezer in freezers {
            if let Freezer::Pid(process) = freezer
                && process.running_thread()?.is_some()
            {
                running.push(process.record());
            }
        }
        Ok(running)
    }

    /// That everything that was frozen still is.
    pub fn check(&self) -> Result<(), FreezeError> {
        for (process, _) in &self.processes {
            if let Some((thread, state)) = process.running_thread()? {
                return Err(FreezeError::Continued {
                    pid: process.pid,
                    thread,
                    state,
                });
            }
        }
        Ok(())
    }

    /// What the journal has to remember, so that a restarted sender can thaw.
    #[must_use]
    pub fn record(&self) -> Vec<StoppedProcess> {
        let ours = self.processes.iter().filter(|(_, ours)| *ours);
        ours.map(|(process, _)| process.record()).collect()
    }

    /// Leaves the writers stopped for good: the memory has another owner now.
    pub fn keep(mut self) {
        self.processes.clear();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for (process, _) in self.processes.iter().filter(|(_, ours)| *ours) {
            if let Err(error) = process.signal(libc::SIGCONT) {
                tracing::error!(pid = process.pid, %error, "the writer could not be started again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    struct Sleeper(Child);

    impl Sleeper {
        fn start() -> Self {
            let child = Command::new("sleep")
                .arg("600")
                .stdout(Stdio::null())
                .spawn();
            Self(child.unwrap())
        }

        fn process(&self) -> Arc<Process> {
            Arc::new(Process::open(self.0.id().cast_signed()).unwrap())
        }

        fn is_stopped(&self) -> bool {
            self.process().running_thread().unwrap().is_none()
        }

        /// SIGCONT takes effect at once for the sender; only the state in /proc lags a little.
        fn runs_again(&self) -> bool {
            let started = Instant::now();
            while self.is_stopped() && started.elapsed() < TIMEOUT {
                thread::yield_now();
            }
            !self.is_stopped()
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn frozen_is_observed_and_dropping_it_thaws() {
        let sleeper = Sleeper::start();
        let freezer = Freezer::Pid(sleeper.process());
        let frozen = Frozen::freeze(&[freezer.clone(), Freezer::None, freezer], TIMEOUT).unwrap();
        assert!(sleeper.is_stopped());
        assert_eq!(
            frozen.record().len(),
            1,
            "one process, however many regions"
        );
        drop(frozen);
        assert!(sleeper.runs_again());
    }

    #[test]
    fn a_writer_that_stood_still_before_stays_so() {
        let sleeper = Sleeper::start();
        Frozen::freeze(&[Freezer::Pid(sleeper.process())], TIMEOUT)
            .unwrap()
            .keep();
        drop(Frozen::freeze(&[Freezer::Pid(sleeper.process())], TIMEOUT).unwrap());
        assert!(sleeper.is_stopped());
    }

    #[test]
    fn the_journals_record_thaws_the_same_process_only() {
        let sleeper = Sleeper::start();
        let frozen = Frozen::freeze(&[Freezer::Pid(sleeper.process())], TIMEOUT).unwrap();
        let record = frozen.record().remove(0);
        frozen.keep();
        let other = StoppedProcess {
            start_time: Some(1),
            ..record.clone()
        };
        other.thaw().unwrap();
        assert!(
            sleeper.is_stopped(),
            "another process under that number is left alone"
        );
        record.thaw().unwrap();
        assert!(sleeper.runs_again());
    }

    #[test]
    fn an_ended_writer_is_an_error_and_not_a_frozen_one() {
        let mut sleeper = Sleeper::start();
        let process = sleeper.process();
        sleeper.0.kill().unwrap();
        sleeper.0.wait().unwrap();
        let error = Frozen::freeze(&[Freezer::Pid(process)], TIMEOUT).unwrap_err();
        assert_eq!(error.code(), "writer-gone");
        assert_eq!(
            Process::open(i32::MAX).unwrap_err().code(),
            "freeze-refused"
        );
    }

    #[test]
    fn a_writer_that_somebody_else_continues_is_noticed() {
        let sleeper = Sleeper::start();
        let frozen = Frozen::freeze(&[Freezer::Pid(sleeper.process())], TIMEOUT).unwrap();
        frozen.check().unwrap();
        sleeper.process().signal(libc::SIGCONT).unwrap();
        assert!(sleeper.runs_again());
        assert_eq!(frozen.check().unwrap_err().code(), "not-frozen");
    }

    #[test]
    fn a_process_name_cannot_pretend_a_state() {
        assert_eq!(thread_state("12 (a) T (b) S 1 1"), Some('S'));
    }
}
