//! A writer for demonstrations and tests: stamps the pages of a working set at a given rate.
//!
//! It knows nothing of memferry: it can be stopped and continued like any process, and what it wrote
//! can be judged from the pages alone ([`newest_stamp`], [`first_torn_page`]).

mod pacer;
mod stamp;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;

pub use pacer::Pacer;
pub use stamp::{STAMPED_BYTES, Stamp, first_torn_page, newest_stamp};

use crate::client::{ClientError, Connection, Tracked};
use crate::config::units::Size;
use crate::name::Name;
use crate::region::{Access, Mapping};

/// Pages filled between two looks at the signals: 256 MiB.
const FILL_PAGES: u64 = 65536;

/// What to write, and how fast.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Length of the memory, in bytes: a multiple of 4096, not 0.
    pub size: u64,
    /// Bytes per second; 0 fills the memory once and then waits.
    pub dirty_rate: u64,
    /// Bytes at the start of the memory that are written again and again: a multiple of 4096, not more
    /// than `size`. 0 is allowed when nothing is written.
    pub working_set: u64,
    /// The file that is the memory; an anonymous memfd if there is none. A file that exists has this
    /// size already, or is empty.
    pub path: Option<PathBuf>,
    /// Runs with different seeds write different content.
    pub seed: u64,
    /// The sender that is told of the memory once it is filled.
    pub register: Option<Registration>,
}

/// Where and as what to register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The sender's control socket.
    pub socket: PathBuf,
    /// The Region's name.
    pub name: Name,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Pages written after the filling.
    pub writes: u64,
    /// Sequence number of the last of them; 0 if there was none.
    pub last_sequence: u64,
}

/// Why a workload cannot run.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// Options that make no sense together.
    #[error("{0}")]
    Options(String),
    /// The sender could not be told.
    #[error(transparent)]
    Register(#[from] ClientError),
    /// The memory could not be had, or not be written.
    #[error("{what}: {source}")]
    Memory {
        /// What was tried, with the file.
        what: String,
        /// The cause.
        source: io::Error,
    },
}

/// How a pause ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// The time is over.
    Over,
    /// The process was stopped and goes on.
    Continued,
    /// It is time to end.
    Stop,
}

/// Runs until SIGTERM or SIGINT, and says so in two lines of JSON on `out`; that nobody reads them is no
/// reason to end.
///
/// To be called on the first thread before there are others: the signals are blocked in it, and threads
/// that exist already would still take them.
pub fn run_until_signal(options: &Options, out: &mut impl Write) -> Result<Summary, WorkloadError> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |errno: nix::Error| WorkloadError::Memory {
            what,
            source: errno.into(),
        }
    };
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    // Continues a stopped process even while blocked, and then tells us that it did.
    signals.add(Signal::SIGCONT);
    signals
        .thread_block()
        .map_err(failed("cannot block signals"))?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(failed("cannot open a signalfd"))?;
    run(options, out, |time| wait(&signals, time))
}

/// Sleeps for `time`, or less if a signal comes.
fn wait(signals: &SignalFd, time: Duration) -> Pause {
    let mut fds = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    // An interrupted sleep is a short one, which does no harm.
    let _ = ppoll(&mut fds, Some(TimeSpec::from_duration(time)), None);
    let mut pause = Pause::Over;
    while let Ok(Some(signal)) = signals.read_signal() {
        if i32::try_from(signal.ssi_signo) != Ok(Signal::SIGCONT as i32) {
            return Pause::Stop;
        }
        pause = Pause::Continued;
    }
    pause
}

/// Fills the memory, then writes until `pause` says to stop. `pause` sleeps for the time it is given.
pub fn run(
    options: &Options,
    out: &mut impl Write,
    mut pause: impl FnMut(Duration) -> Pause,
) -> Result<Summary, WorkloadError> {
    options.check()?;
    let mut writer = Writer::open(options)?;
    for page in 0..options.size / STAMPED_BYTES as u64 {
        writer.write(page, 0)?;
        // Filling hundreds of GiB takes minutes, in which it must be possible to end it.
        if (page + 1).is_multiple_of(FILL_PAGES) && pause(Duration::ZERO) == Pause::Stop {
            return Ok(stopped(out, 0));
        }
    }
    // Kept until the end: who writes and how that is seen are one thing.
    let _tracked = match &options.register {
        Some(register) => register.add(&writer)?,
        None => None,
    };
    say(
        out,
        &serde_json::json!({
            "event": "ready",
            "pid": std::process::id(),
            "path": writer.path,
            "bytes": options.size,
        }),
    );
    let pages = options.working_set / STAMPED_BYTES as u64;
    let mut pacer = Pacer::new(options.dirty_rate, Instant::now());
    let mut sequence = 0;
    loop {
        match pause(pacer.pause()) {
            Pause::Over => {}
            Pause::Continued => pacer.continued(Instant::now()),
            Pause::Stop => break,
        }
        for _ in 0..pacer.due(Instant::now()) {
            sequence += 1;
            writer.write((sequence - 1) % pages, sequence)?;
        }
    }
    Ok(stopped(out, sequence))
}

impl Registration {
    /// Hands the memory over as a descriptor, with this process as its writer. From here on the kernel
    /// keeps account of what is written; where it cannot, the sender has to find out by reading.
    fn add(&self, writer: &Writer) -> Result<Option<Tracked>, ClientError> {
        const FDNAME: &str = "workload";
        let freeze = serde_json::json!({"kind": "pid", "pid": std::process::id()});
        let mut connection = Connection::connect(&self.socket)?;
        let memory = writer.file.as_fd();
        match Tracked::new(&writer.mapping) {
            Ok(tracked) => {
                connection.register(&self.name, memory, &tracked, freeze)?;
                Ok(Some(tracked))
            }
            Err(error) => {
                let note = format!(
                    "memferry: the kernel cannot track what is written here ({error}): the sender will scan for it"
                );
                // That nobody reads it is no reason to end.
                let _ = writeln!(io::stderr().lock(), "{note}");
                connection.send_fd(FDNAME, memory)?;
                let region = serde_json::json!({
                    "name": self.name,
                    "fdname": FDNAME,
                    "tracker": {"kind": "scan"},
                    "freeze": freeze,
                });
                connection.execute("region-add", region).map(|_| None)
            }
        }
    }
}

/// Says that it ends, after `sequence` writes.
fn stopped(out: &mut impl Write, sequence: u64) -> Summary {
    let line =
        serde_json::json!({"event": "stopped", "writes": sequence, "last-sequence": sequence});
    say(out, &line);
    Summary {
        writes: sequence,
        last_sequence: sequence,
    }
}

/// One line; a reader that has gone away is not missed.
fn say(out: &mut impl Write, line: &serde_json::Value) {
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

impl Options {
    fn check(&self) -> Result<(), WorkloadError> {
        let whole = |bytes: u64| bytes.is_multiple_of(STAMPED_BYTES as u64);
        let refuse = |text: String| Err(WorkloadError::Options(text));
        if self.size == 0 || !whole(self.size) {
            return refuse(format!(
                "size {} is not a multiple of {STAMPED_BYTES} bytes, or 0",
                Size(self.size)
            ));
        }
        if !whole(self.working_set) || self.working_set > self.size {
            return refuse(format!(
                "working set {} is not a multiple of {STAMPED_BYTES} bytes up to the size ({})",
                Size(self.working_set),
                Size(self.size)
            ));
        }
        if self.dirty_rate > 0 && self.working_set == 0 {
            return refuse("a dirty rate needs a working set".to_owned());
        }
        Ok(())
    }
}

/// The memory, mapped as any program maps its own.
#[derive(Debug)]
struct Writer {
    mapping: Arc<Mapping>,
    path: String,
    seed: u64,
    /// Stays open, so that the path of an anonymous memfd under /proc works.
    file: File,
}

impl Writer {
    fn open(options: &Options) -> Result<Self, WorkloadError> {
        let name = match &options.path {
            Some(path) => path.display().to_string(),
            None => "a memfd".to_owned(),
        };
        let failed = |what: &str| {
            let what = format!("cannot {what} {name}");
            move |source| WorkloadError::Memory { what, source }
        };
        let file = match &options.path {
            Some(path) => OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(failed("open"))?,
            None => memfd_create("memferry-workload", MFdFlags::MFD_CLOEXEC)
                .map(File::from)
                .map_err(|errno| failed("create")(errno.into()))?,
        };
        let length = file.metadata().map_err(failed("look at"))?.len();
        if length != 0 && length != options.size {
            // Somebody's file: it is not ours to cut or to grow.
            return Err(WorkloadError::Options(format!(
                "{name} exists and has {length} bytes, not {}",
                options.size
            )));
        }
        // Asks for all of the memory now: a full file system is an error here and a SIGBUS later.
        let bytes = libc::off_t::try_from(options.size)
            .map_err(|error| failed("allocate")(io::Error::other(error)))?;
        fallocate(&file, FallocateFlags::empty(), 0, bytes)
            .map_err(|errno| failed("allocate")(errno.into()))?;
        let length = usize::try_from(options.size)
            .map_err(|error| failed("map")(io::Error::other(error)))?;
        let mapping = Mapping::new(&file, length, Access::Write).map_err(failed("map"))?;
        let path = match &options.path {
            Some(_) => name,
            None => format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()),
        };
        Ok(Self {
            mapping,
            path,
            seed: options.seed,
            file,
        })
    }

    /// Stamps `page` as write number `sequence`.
    fn write(&mut self, page: u64, sequence: u64) -> Result<(), WorkloadError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let time_ns = now.ok().and_then(|now| u64::try_from(now.as_nanos()).ok());
        let stamp = Stamp {
            page,
            sequence,
            time_ns: time_ns.unwrap_or(0),
            seed: self.seed,
        };
        let mut bytes = [0; STAMPED_BYTES];
        stamp.write(&mut bytes);
        usize::try_from(page)
            .ok()
            .and_then(|page| {
                self.mapping
                    .span_mut(page.checked_mul(STAMPED_BYTES)?, STAMPED_BYTES)
            })
            .map(|mut span| span.fill_from(&bytes))
            .ok_or_else(|| WorkloadError::Options(format!("page {page} is outside the memory")))
    }
}

#[cfg(test)]
mod tests;
