//! Making a writer stop, and go on again.
//!
//! Frozen means *observed* frozen: a signal that was sent is not yet a process that has stopped. A
//! [`Frozen`] that is dropped thaws, so that no path before the commit can leave a writer standing.

mod cgroup;
mod command;
mod cpu_max;
mod process;
mod throttle;

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use cgroup::Cgroup;
pub use command::Commands;
pub use process::Process;
pub use throttle::Throttle;

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
    /// There is no such control group, it is none, we are in it, or we may not freeze it.
    #[error("cannot freeze the control group {}: {source}", path.display())]
    Cgroup {
        /// The group.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody is in it.
    #[error(
        "the control group {} has no process: what writes the region is not in it, or has ended",
        path.display()
    )]
    CgroupEmpty {
        /// The group.
        path: PathBuf,
    },
    /// It stood still and runs again, and not by our doing.
    #[error("the control group {} was frozen, and somebody else let it go on", path.display())]
    CgroupContinued {
        /// The group.
        path: PathBuf,
    },
    /// It did not stop in time.
    #[error(
        "the control group {} did not freeze within {seconds} s (freeze-timeout): a process in it may wait for storage",
        path.display()
    )]
    CgroupTimedOut {
        /// The group.
        path: PathBuf,
        /// How long we waited.
        seconds: f32,
    },
    /// How much processor time it may use cannot be seen or set.
    #[error(
        "cannot slow the control group {} down: {source}: the cpu controller has to be enabled for it (cgroup.subtree_control of the group above), and its cpu.max writable",
        path.display()
    )]
    CpuMax {
        /// The group.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nobody would stop and continue processes in turn.
    #[error("cannot start the thread that slows processes down: {0}")]
    ThrottleThread(io::Error),
    /// It could not be run.
    #[error("cannot run the freeze command `{command}`: {source}")]
    Command {
        /// With its arguments.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("the freeze command `{command}` failed ({status}): {stderr}")]
    CommandFailed {
        /// With its arguments.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of what it said.
        stderr: String,
    },
    /// It did not end in time.
    #[error(
        "the freeze command `{command}` did not end within {seconds} s (freeze-timeout) and was killed: {stderr}"
    )]
    CommandTimedOut {
        /// With its arguments.
        command: String,
        /// How long we waited.
        seconds: f32,
        /// The end of what it said.
        stderr: String,
    },
}

impl FreezeError {
    /// The stable code under which this error is reported.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Process { .. }
            | Self::Unseen { .. }
            | Self::Cgroup { .. }
            | Self::Command { .. } => "freeze-refused",
            Self::CpuMax { .. } | Self::ThrottleThread(_) => "cannot-throttle",
            Self::CommandFailed { .. } => "freeze-failed",
            Self::Continued { .. } | Self::CgroupContinued { .. } => "not-frozen",
            Self::Ended { .. } | Self::CgroupEmpty { .. } => "writer-gone",
            Self::TimedOut { .. } | Self::CgroupTimedOut { .. } | Self::CommandTimedOut { .. } => {
                "freeze-timeout"
            }
        }
    }
}

/// A way to stop the writer of a Region.
#[derive(Debug, Clone)]
pub enum Freezer {
    /// Nothing writes, or the writer stops itself.
    None,
    /// SIGSTOP.
    Pid(Arc<Process>),
    /// `cgroup.freeze`.
    Cgroup(Arc<Cgroup>),
    /// Commands of the operator.
    Command(Arc<Commands>),
}

impl Freezer {
    /// Whether there is something to stop.
    #[must_use]
    pub fn is_some(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// Whether it is for us to stop, and then to let go on: not if it stands still already.
    fn is_ours(&self) -> Result<bool, FreezeError> {
        match self {
            Self::None => Ok(false),
            Self::Pid(process) => Ok(process.running_thread()?.is_some()),
            Self::Cgroup(cgroup) => cgroup.is_ours(),
            Self::Command(_) => Ok(true),
        }
    }

    /// Stops it. Blocks for up to `timeout`.
    fn stop(&self, timeout: Duration) -> Result<(), FreezeError> {
        match self {
            Self::None => Ok(()),
            Self::Pid(process) => process.stop(timeout),
            Self::Cgroup(cgroup) => cgroup.stop(timeout),
            Self::Command(commands) => commands.stop(timeout),
        }
    }

    /// Waits until it stands still, which is not our doing.
    fn stands(&self, timeout: Duration) -> Result<(), FreezeError> {
        match self {
            Self::None | Self::Command(_) => Ok(()),
            Self::Pid(process) => process.check(),
            Self::Cgroup(cgroup) => cgroup.wait_until_frozen(timeout),
        }
    }

    fn thaw(&self) -> Result<(), FreezeError> {
        match self {
            Self::None => Ok(()),
            Self::Pid(process) => process.thaw(),
            Self::Cgroup(cgroup) => cgroup.thaw(),
            Self::Command(commands) => commands.thaw(),
        }
    }

    /// That it stands still, as far as that can be seen.
    fn check(&self) -> Result<(), FreezeError> {
        match self {
            Self::None | Self::Command(_) => Ok(()),
            Self::Pid(process) => process.check(),
            Self::Cgroup(cgroup) => cgroup.check(),
        }
    }

    fn record(&self) -> Option<Stopped> {
        match self {
            Self::None => None,
            Self::Pid(process) => Some(process.record()),
            Self::Cgroup(cgroup) => Some(cgroup.record()),
            Self::Command(commands) => Some(commands.record()),
        }
    }

    /// Whether stopping one is stopping the other.
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Pid(one), Self::Pid(other)) => one.pid() == other.pid(),
            (Self::Cgroup(one), Self::Cgroup(other)) => one.is(other),
            (Self::Command(one), Self::Command(other)) => one == other,
            _ => false,
        }
    }
}

/// A writer that is stopped or slowed down, as the journal remembers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "kind",
    deny_unknown_fields,
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum Stopped {
    /// A process.
    Pid {
        /// Its number.
        pid: i32,
        /// When it started, in clock ticks since boot.
        start_time: Option<u64>,
    },
    /// A control group.
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// The directory's number.
        inode: u64,
    },
    /// A control group that may use less processor time than before.
    Slowed {
        /// Its directory.
        path: PathBuf,
        /// The directory's number.
        inode: u64,
        /// What its `cpu.max` said.
        cpu_max: String,
    },
    /// Whatever these commands are about.
    Command {
        /// Lets it go on.
        thaw: Vec<String>,
        /// Run once the memory has another owner.
        done: Vec<String>,
    },
}

impl Stopped {
    /// Lets it go on as before, if it is still the same; one that has ended needs nothing. Blocks.
    pub fn thaw(&self) -> Result<(), FreezeError> {
        match self {
            Self::Pid { pid, start_time } => process::thaw_recorded(*pid, *start_time),
            Self::Cgroup { path, inode } => cgroup::thaw_recorded(path, *inode),
            Self::Slowed {
                path,
                inode,
                cpu_max,
            } => cpu_max::restore_recorded(path, *inode, cpu_max),
            Self::Command { thaw, .. } => command::thaw_recorded(thaw),
        }
    }

    /// Whether there is something to be done once the memory has another owner.
    #[must_use]
    pub fn has_an_end(&self) -> bool {
        matches!(self, Self::Command { done, .. } if !done.is_empty())
    }

    /// The memory has another owner: runs what is to be done then. Blocks.
    pub fn finish(&self) -> Result<(), FreezeError> {
        match self {
            Self::Pid { .. } | Self::Cgroup { .. } | Self::Slowed { .. } => Ok(()),
            Self::Command { done, .. } => command::done(done),
        }
    }
}

/// The writers of Regions as they were found: each once, and whether it is ours to stop.
#[derive(Debug, Default)]
pub struct Writers(Vec<(Freezer, bool)>);

impl Writers {
    /// Looks at all of them.
    pub fn of(freezers: &[Freezer]) -> Result<Self, FreezeError> {
        let mut writers: Vec<(Freezer, bool)> = Vec::new();
        for freezer in freezers {
            if !writers.iter().any(|(other, _)| other.is(freezer)) {
                writers.push((freezer.clone(), freezer.is_ours()?));
            }
        }
        Ok(Self(writers))
    }

    /// What the journal has to remember of those that are ours, so that a restarted sender can thaw.
    #[must_use]
    pub fn record(&self) -> Vec<Stopped> {
        self.ours().filter_map(Freezer::record).collect()
    }

    /// Some time has passed: those that somebody else has stopped meanwhile are not ours any more.
    pub fn look_again(&mut self) -> Result<(), FreezeError> {
        for (writer, ours) in &mut self.0 {
            *ours = *ours && writer.is_ours()?;
        }
        Ok(())
    }

    fn ours(&self) -> impl Iterator<Item = &Freezer> {
        let ours = self.0.iter().filter(|(_, ours)| *ours);
        ours.map(|(writer, _)| writer)
    }

    /// Stops those that are ours, and waits until all are seen to stand still. On an error those that were stopped
    /// go on. Blocks for up to `timeout` for each writer.
    pub fn freeze(self, timeout: Duration) -> Result<Frozen, FreezeError> {
        let mut frozen = Frozen::default();
        for (writer, ours) in self.0 {
            match ours {
                true => writer.stop(timeout)?,
                false => writer.stands(timeout)?,
            }
            frozen.0.0.push((writer, ours));
        }
        Ok(frozen)
    }
}

/// Writers that stand still. Dropping it lets those go on that we have stopped.
#[derive(Debug, Default)]
pub struct Frozen(Writers);

impl Frozen {
    /// That everything that was frozen still is.
    pub fn check(&self) -> Result<(), FreezeError> {
        let mut writers = self.0.0.iter();
        writers.try_for_each(|(writer, _)| writer.check())
    }

    /// What the journal has to remember, so that a restarted sender can thaw.
    #[must_use]
    pub fn record(&self) -> Vec<Stopped> {
        self.0.record()
    }

    /// Leaves the writers stopped for good: the memory has another owner now.
    pub fn keep(mut self) {
        self.0.0.clear();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for writer in self.0.ours() {
            if let Err(error) = writer.thaw() {
                tracing::error!(?writer, %error, "the writer could not be started again");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::thread;
    use std::time::Instant;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn freeze(freezers: &[Freezer]) -> Result<Frozen, FreezeError> {
        Writers::of(freezers)?.freeze(TIMEOUT)
    }

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
        let frozen = freeze(&[freezer.clone(), Freezer::None, freezer]).unwrap();
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
        freeze(&[Freezer::Pid(sleeper.process())]).unwrap().keep();
        drop(freeze(&[Freezer::Pid(sleeper.process())]).unwrap());
        assert!(sleeper.is_stopped());
    }

    #[test]
    fn a_writer_that_somebody_else_stops_before_us_stays_so() {
        let sleeper = Sleeper::start();
        let mut writers = Writers::of(&[Freezer::Pid(sleeper.process())]).unwrap();
        assert_eq!(writers.record().len(), 1);
        let theirs = freeze(&[Freezer::Pid(sleeper.process())]).unwrap();
        writers.look_again().unwrap();
        drop(writers.freeze(TIMEOUT).unwrap());
        assert!(sleeper.is_stopped());
        drop(theirs);
        assert!(sleeper.runs_again());
    }

    #[test]
    fn the_journals_record_thaws_the_same_process_only() {
        let sleeper = Sleeper::start();
        let frozen = freeze(&[Freezer::Pid(sleeper.process())]).unwrap();
        let record = frozen.record().remove(0);
        frozen.keep();
        let other = Stopped::Pid {
            pid: sleeper.process().pid(),
            start_time: Some(1),
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
        let error = freeze(&[Freezer::Pid(process)]).unwrap_err();
        assert_eq!(error.code(), "writer-gone");
        assert_eq!(
            Process::open(i32::MAX).unwrap_err().code(),
            "freeze-refused"
        );
    }

    #[test]
    fn a_writer_that_somebody_else_continues_is_noticed() {
        let sleeper = Sleeper::start();
        let frozen = freeze(&[Freezer::Pid(sleeper.process())]).unwrap();
        frozen.check().unwrap();
        sleeper.process().signal(libc::SIGCONT).unwrap();
        assert!(sleeper.runs_again());
        assert_eq!(frozen.check().unwrap_err().code(), "not-frozen");
    }

    /// A control group of this test, where the machine lets us make one.
    struct Group(PathBuf);

    impl Group {
        fn new(name: &str) -> Option<Self> {
            let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
            let mut mounts = mounts
                .lines()
                .map(|line| line.split(' ').collect::<Vec<_>>());
            let mount = mounts.find(|mount| mount[2] == "cgroup2")?;
            let name = format!("mf-test-{name}-{}", std::process::id());
            let path = PathBuf::from(mount[1]).join(name);
            std::fs::create_dir(&path).ok()?;
            path.join("cgroup.freeze").exists().then_some(Self(path))
        }

        fn take(&self, sleeper: &Sleeper) {
            std::fs::write(self.0.join("cgroup.procs"), sleeper.0.id().to_string()).unwrap();
        }

        fn freezer(&self) -> Freezer {
            Freezer::Cgroup(Arc::new(Cgroup::open(&self.0).unwrap()))
        }

        fn file(&self, name: &str) -> String {
            std::fs::read_to_string(self.0.join(name)).unwrap()
        }

        /// Waits until its events say so.
        fn comes_to_be(&self, wanted: &str) {
            let started = Instant::now();
            while !self.file("cgroup.events").contains(wanted) {
                assert!(started.elapsed() < TIMEOUT, "not {wanted}");
                thread::yield_now();
            }
        }
    }

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = std::fs::write(self.0.join("cgroup.freeze"), "0");
            let started = Instant::now();
            while std::fs::remove_dir(&self.0).is_err() && started.elapsed() < TIMEOUT {
                thread::yield_now();
            }
        }
    }

    #[test]
    fn a_control_group_is_seen_frozen_and_goes_on_when_dropped() {
        let Some(group) = Group::new("frozen") else {
            return;
        };
        let sleeper = Sleeper::start();
        group.take(&sleeper);
        let frozen = freeze(&[group.freezer(), group.freezer()]).unwrap();
        assert!(group.file("cgroup.events").contains("frozen 1"));
        frozen.check().unwrap();
        assert_eq!(frozen.record().len(), 1, "one group, however many regions");
        drop(frozen);
        group.comes_to_be("frozen 0");

        let record = Writers::of(&[group.freezer()]).unwrap().record().remove(0);
        freeze(&[group.freezer()]).unwrap().keep();
        let other = Stopped::Cgroup {
            path: group.0.clone(),
            inode: 1,
        };
        other.thaw().unwrap();
        assert!(group.file("cgroup.events").contains("frozen 1"));
        record.thaw().unwrap();
        group.comes_to_be("frozen 0");

        let frozen = freeze(&[group.freezer()]).unwrap();
        std::fs::write(group.0.join("cgroup.freeze"), "0").unwrap();
        group.comes_to_be("frozen 0");
        assert_eq!(frozen.check().unwrap_err().code(), "not-frozen");
        drop((frozen, sleeper));
        group.comes_to_be("populated 0");
        let error = freeze(&[group.freezer()]).unwrap_err();
        assert_eq!(error.code(), "writer-gone");
        assert_eq!(group.file("cgroup.freeze").trim(), "0");
    }

    #[test]
    fn a_control_group_that_was_frozen_before_stays_so() {
        let Some(group) = Group::new("before") else {
            return;
        };
        let sleeper = Sleeper::start();
        group.take(&sleeper);
        std::fs::write(group.0.join("cgroup.freeze"), "1").unwrap();
        drop(freeze(&[group.freezer()]).unwrap());
        assert!(group.file("cgroup.events").contains("frozen 1"));
    }

    #[test]
    fn what_is_no_control_group_or_holds_us_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path().to_owned(), "/nonexistent/group".into()] {
            let error = Cgroup::open(&path).unwrap_err();
            assert_eq!(error.code(), "freeze-refused", "{error}");
        }
        let Some(group) = Group::new("us") else {
            return;
        };
        let child = group.0.join("child");
        std::fs::create_dir(&child).unwrap();
        // Not this process, which other tests share: a child that finds itself there.
        assert!(!super::cgroup::has_process(&group.0, std::process::id()).unwrap());
        let sleeper = Sleeper::start();
        std::fs::write(child.join("cgroup.procs"), sleeper.0.id().to_string()).unwrap();
        assert!(super::cgroup::has_process(&group.0, sleeper.0.id()).unwrap());
        drop(sleeper);
        let started = Instant::now();
        while std::fs::remove_dir(&child).is_err() && started.elapsed() < TIMEOUT {
            thread::yield_now();
        }
    }
}
