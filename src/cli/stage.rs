//! What `demo` and `bench` play on: a directory of its own with everything in it, and real processes of
//! this very program that end with it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::statvfs::statvfs;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::exit::Exit;
use super::interrupts::Interrupts;
use crate::client::{ClientError, Connection};
use crate::config::units::{Rate, Size};
use crate::sys::process::PidFd;
use crate::workload::TrackerChoice;

/// How long a process of ours may take to be ready, apart from filling its memory.
pub(super) const START_DEADLINE: Duration = Duration::from_secs(20);
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// Why it did not come to an end.
#[derive(Debug, thiserror::Error)]
pub(super) enum StageError {
    #[error("interrupted")]
    Interrupted,
    #[error("{needed} are needed in {}, which has {free} free: choose a smaller --size", .directory.display())]
    Room {
        needed: Size,
        free: Size,
        directory: PathBuf,
    },
    #[error("cannot {doing}: {source}")]
    Local { doing: String, source: io::Error },
    #[error("the {who} did not start:\n{log}")]
    Start { who: &'static str, log: String },
    #[error(transparent)]
    Client(#[from] ClientError),
}

impl StageError {
    pub(super) fn exit(&self) -> Exit {
        match self {
            Self::Interrupted => Exit::Cancelled,
            Self::Room { .. } => Exit::Resources,
            Self::Client(error) => Exit::of_error(error),
            Self::Local { .. } | Self::Start { .. } => Exit::Other,
        }
    }
}

/// An error of this machine, while `doing` something.
pub(super) fn local(doing: impl Into<String>) -> impl FnOnce(io::Error) -> StageError {
    let doing = doing.into();
    move |source| StageError::Local { doing, source }
}

/// The directory everything happens in. Removed at the end.
#[derive(Debug)]
pub(super) struct Stage<'a> {
    directory: TempDir,
    interrupts: Option<&'a Interrupts>,
}

impl<'a> Stage<'a> {
    /// A directory in `parent`, which has to have room for `needed`.
    pub(super) fn set(
        parent: &Path,
        needed: Size,
        interrupts: Option<&'a Interrupts>,
    ) -> Result<Self, StageError> {
        let look = local(format!("look at {}", parent.display()));
        let room = statvfs(parent).map_err(|errno| look(errno.into()))?;
        let free = room.blocks_available().saturating_mul(room.fragment_size());
        // A tmpfs mounted without a size limit has no blocks at all.
        if room.blocks() > 0 && free < needed.0 {
            return Err(StageError::Room {
                needed,
                free: Size(free),
                directory: parent.to_owned(),
            });
        }
        let directory = tempfile::Builder::new()
            .prefix("memferry-")
            .tempdir_in(parent)
            .map_err(local(format!("make a directory in {}", parent.display())))?;
        Ok(Self {
            directory,
            interrupts,
        })
    }

    /// Of a file in it.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where a writer keeps its memory.
    pub(super) fn source(&self) -> PathBuf {
        self.path("source")
    }

    /// Where a Region arrives.
    pub(super) fn destination(&self, region: &str) -> PathBuf {
        self.path("arrived").join(region)
    }

    /// What a receiver of ours is told.
    pub(super) fn receiver_config(&self) -> String {
        let directory = self.path("arrived");
        format!(
            "[receive]\nlisten = [\"tcp:127.0.0.1:0\"]\ndirectory = {directory:?}\n{}",
            self.common_config("receiver")
        )
    }

    /// What a sender of ours is told.
    pub(super) fn sender_config(&self) -> String {
        self.common_config("sender")
    }

    fn common_config(&self, who: &str) -> String {
        let (socket, state) = (self.socket(who), self.path(&format!("{who}.state")));
        let runtime = self.path(&format!("{who}.run"));
        format!(
            "[control]\nsocket = {socket:?}\n[state]\ndirectory = {state:?}\nruntime-directory = {runtime:?}\n"
        )
    }

    /// Starts a daemon of this very program.
    pub(super) fn start(&self, who: &'static str, config: &str) -> Result<Process, StageError> {
        let path = self.path(&format!("{who}.toml"));
        fs::write(&path, config).map_err(local(format!("write {}", path.display())))?;
        let mut command = self.own_command(who)?;
        command.arg(who).arg("--config").arg(path);
        Self::spawn(who, command)
    }

    /// Starts what [`command`](Self::command) or its like prepared.
    pub(super) fn spawn(who: &'static str, mut command: Command) -> Result<Process, StageError> {
        let child = command.spawn().map_err(local(format!("start {who}")))?;
        Ok(Process(child, who))
    }

    /// Starts a writer that registers its memory with the sender, and waits until that is filled.
    pub(super) fn start_writer(
        &self,
        region: &str,
        size: Size,
        dirty_rate: Rate,
        working_set: Size,
        tracker: Option<TrackerChoice>,
    ) -> Result<Process, StageError> {
        const WHO: &str = "writer";
        let mut command = self.own_command(WHO)?;
        command
            .arg("workload")
            .args(["--size", &size.to_string()])
            .args(["--dirty-rate", &dirty_rate.to_string()])
            .args(["--working-set", &working_set.to_string(), "--path"])
            .arg(self.source())
            .arg("--register")
            .arg(self.socket("sender"))
            .args(["--name", region])
            .stdout(Stdio::piped());
        if let Some(tracker) = tracker.and_then(|tracker| tracker.to_possible_value()) {
            command.args(["--tracker", tracker.get_name()]);
        }
        let mut writer = Self::spawn(WHO, command)?;
        let mut output = writer.0.stdout.take().ok_or_else(|| StageError::Start {
            who: WHO,
            log: String::new(),
        })?;
        // Its first line says that the memory is filled. Only then is there something to move.
        let mut said = Vec::new();
        while !said.contains(&b'\n') {
            let mut fds = vec![PollFd::new(output.as_fd(), PollFlags::POLLIN)];
            fds.extend(
                self.interrupts
                    .map(|interrupts| PollFd::new(interrupts.as_fd(), PollFlags::POLLIN)),
            );
            let _ = poll(&mut fds, PollTimeout::NONE);
            self.check_interrupted()?;
            let mut bytes = [0; 1024];
            match output.read(&mut bytes) {
                Ok(0) => {
                    return Err(StageError::Start {
                        who: WHO,
                        log: self.log(WHO),
                    });
                }
                Ok(n) => said.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(local("read from the writer")(error)),
            }
        }
        Ok(writer)
    }

    /// This program.
    fn own_command(&self, who: &str) -> Result<Command, StageError> {
        let program = std::env::current_exe().map_err(local("find this program"))?;
        self.command(who, &program)
    }

    /// A program whose complaints go to a log, in a process group of its own: Ctrl-C is ours to handle, in
    /// order.
    pub(super) fn command(&self, who: &str, program: &Path) -> Result<Command, StageError> {
        let log = self.path(&format!("{who}.log"));
        let log = File::create(&log).map_err(local(format!("write {}", log.display())))?;
        let mut command = Command::new(program);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        crate::sys::process::die_with_parent(&mut command);
        Ok(command)
    }

    /// Where a process of that name serves its control socket.
    pub(super) fn socket(&self, who: &str) -> PathBuf {
        self.path(&format!("{who}.sock"))
    }

    pub(super) fn log(&self, who: &str) -> String {
        fs::read_to_string(self.path(&format!("{who}.log"))).unwrap_or_default()
    }

    /// Fails once somebody wants it to end.
    pub(super) fn check_interrupted(&self) -> Result<(), StageError> {
        match self.interrupts {
            Some(interrupts) if interrupts.take() => Err(StageError::Interrupted),
            _ => Ok(()),
        }
    }
}

/// A process that ends with this value.
#[derive(Debug)]
pub(super) struct Process(Child, &'static str);

impl Process {
    /// Waits until the daemon serves its control socket.
    pub(super) fn connect(&self, stage: &Stage<'_>) -> Result<Connection, StageError> {
        let socket = stage.socket(self.1);
        let started = Instant::now();
        loop {
            stage.check_interrupted()?;
            match Connection::connect(&socket) {
                Ok(connection) => return Ok(connection),
                Err(_) if started.elapsed() < START_DEADLINE && !self.has_ended() => {
                    std::thread::sleep(LOOK_PAUSE);
                }
                Err(_) => {
                    return Err(StageError::Start {
                        who: self.1,
                        log: stage.log(self.1),
                    });
                }
            }
        }
    }

    /// Its number.
    pub(super) fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap_or(i32::MAX)
    }

    /// What it has used of the processors so far, ended threads included.
    pub(super) fn cpu_time(&self) -> Result<Duration, StageError> {
        let clock = clock_getcpuclockid(Pid::from_raw(self.pid()));
        let time = clock.and_then(clock_gettime);
        time.map(Duration::from)
            .map_err(|errno| local(format!("ask for the CPU time of {}", self.1))(errno.into()))
    }

    /// Asks it to end, and waits until it has.
    pub(super) fn quit(mut self) -> Result<(), StageError> {
        // What ends this program is blocked in it, to be read instead, and so in its children.
        let doing = || local(format!("end {}", self.1));
        let pidfd = PidFd::open(self.pid()).map_err(doing())?;
        pidfd.signal(Signal::SIGQUIT as i32).map_err(doing())?;
        if !pidfd.ends_within(START_DEADLINE) {
            return Err(doing()(io::ErrorKind::TimedOut.into()));
        }
        let _ = self.0.wait();
        Ok(())
    }

    fn has_ended(&self) -> bool {
        PidFd::open(self.pid()).map_or(true, |pidfd| pidfd.has_ended())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL also ends a process that is stopped, as the writer is after the hand-over.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
