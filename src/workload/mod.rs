//! A writer for demonstrations and tests: stamps the pages of a working set at a given rate.
//!
//! It knows nothing of memferry: it can be stopped and continued like any process, and what it wrote
//! can be judged from the pages and from the account it keeps ([`verify`]).

mod account;
mod check;
mod memory;
mod pacer;
mod pattern;
mod register;
mod stamp;

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;

use account::Keeper;
use memory::Memory;
use register::Registered;

pub use account::{Account, Newest};
pub use check::{Difference, Differences, newest_stamp, verify};
pub use pacer::Pacer;
pub use pattern::{Choice, Pattern, Put};
pub use register::{Registration, TrackerChoice};
pub use stamp::{Content, STAMPED_BYTES, Stamp};

use crate::client::ClientError;
use crate::config::units::Size;

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
    /// Which page is written when.
    pub pattern: Pattern,
    /// Whether the memory is to be in huge pages; what was obtained is said, and is no error.
    pub huge_pages: bool,
    /// A file for the account of what was written, by which a copy can be judged ([`verify`]).
    pub account: Option<PathBuf>,
    /// Runs with different seeds write different content.
    pub seed: u64,
    /// The sender that is told of the memory once it is filled.
    pub register: Option<Registration>,
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
    run(options, out, |time, asks| wait(&signals, time, asks))
}

/// Sleeps for `time`, or less if a signal comes or the sender asks for something.
fn wait(signals: &SignalFd, time: Duration, asks: Option<BorrowedFd<'_>>) -> Pause {
    let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    fds.extend(asks.map(|asks| PollFd::new(asks, PollFlags::POLLIN)));
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

/// Fills the memory, then writes until `pause` says to stop. `pause` sleeps for the time it is given, or
/// until the descriptor can be read.
pub fn run(
    options: &Options,
    out: &mut impl Write,
    mut pause: impl FnMut(Duration, Option<BorrowedFd<'_>>) -> Pause,
) -> Result<Summary, WorkloadError> {
    options.check()?;
    let mut writer = Writer::open(options)?;
    let filled_from = match options.pattern.is_filled_before() {
        true => 0,
        false => options.working_set / STAMPED_BYTES as u64,
    };
    for page in filled_from..options.size / STAMPED_BYTES as u64 {
        writer.write(page, Newest::Stamp(0))?;
        // Filling hundreds of GiB takes minutes, in which it must be possible to end it.
        if (page + 1).is_multiple_of(FILL_PAGES) && pause(Duration::ZERO, None) == Pause::Stop {
            return Ok(stopped(out, 0));
        }
    }
    let mut ready = serde_json::json!({
        "event": "ready",
        "pid": std::process::id(),
        "path": writer.memory.path,
        "bytes": options.size,
    });
    if options.huge_pages {
        let huge = writer.memory.huge_bytes().unwrap_or(0);
        if huge < options.size {
            register::note(&memory::huge_pages_missing(options, huge));
        }
        ready["huge-bytes"] = huge.into();
    }
    if let Some(registration) = &options.register {
        writer.registered = Some(registration.add(&writer.memory)?);
    }
    say(out, &ready);
    let pages = options.working_set / STAMPED_BYTES as u64;
    let mut pacer = Pacer::new(options.dirty_rate, Instant::now());
    let mut sequence = 0;
    loop {
        let asks = writer.registered.as_ref().and_then(Registered::descriptor);
        match pause(pacer.pause(), asks) {
            Pause::Over => {}
            Pause::Continued => pacer.continued(Instant::now()),
            Pause::Stop => break,
        }
        if let Some(registered) = &mut writer.registered
            && !registered.may_write()
        {
            pacer.continued(Instant::now());
            continue;
        }
        for _ in 0..pacer.due(Instant::now()) {
            sequence += 1;
            let choice = options.pattern.choose(sequence, pages, options.seed);
            match choice.put {
                Put::Stamp => writer.write(choice.page, Newest::Stamp(sequence))?,
                Put::Zeros => writer.write(choice.page, Newest::Zeros(sequence))?,
                Put::Same => writer.write_same(choice.page)?,
            }
        }
    }
    Ok(stopped(out, sequence))
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
        if self.huge_pages && !self.size.is_multiple_of(memory::HUGE_PAGE_BYTES) {
            return refuse(format!(
                "size {} is not a multiple of a huge page, {}",
                Size(self.size),
                Size(memory::HUGE_PAGE_BYTES)
            ));
        }
        if self.dirty_rate > 0 && self.working_set == 0 {
            return refuse("a dirty rate needs a working set".to_owned());
        }
        Ok(())
    }
}

/// The memory, the account of what was written to it, and who is told.
#[derive(Debug)]
struct Writer {
    memory: Memory,
    seed: u64,
    account: Option<Keeper>,
    registered: Option<Registered>,
}

impl Writer {
    fn open(options: &Options) -> Result<Self, WorkloadError> {
        let memory = Memory::open(options)?;
        let pages = options.size / STAMPED_BYTES as u64;
        let account = options.account.as_ref().map(|path| {
            Keeper::create(path, pages, options.seed).map_err(|source| WorkloadError::Memory {
                what: format!("cannot keep an account in {}", path.display()),
                source,
            })
        });
        Ok(Self {
            memory,
            seed: options.seed,
            account: account.transpose()?,
            registered: None,
        })
    }

    /// Writes to a page what it holds. The account need not know.
    fn write_same(&self, page: u64) -> Result<(), WorkloadError> {
        self.memory.write(page, &self.memory.read(page)?)?;
        if let Some(registered) = &self.registered {
            registered.written(page);
        }
        Ok(())
    }

    /// Writes a page, and says so to whoever wants to know.
    fn write(&self, page: u64, newest: Newest) -> Result<(), WorkloadError> {
        let mut bytes = [0; STAMPED_BYTES];
        if let Newest::Stamp(sequence) = newest {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let time_ns = now.ok().and_then(|now| u64::try_from(now.as_nanos()).ok());
            let stamp = Stamp {
                page,
                sequence,
                time_ns: time_ns.unwrap_or(0),
                seed: self.seed,
            };
            stamp.write(&mut bytes);
        }
        if let Some(account) = &self.account {
            account.begin(page);
        }
        self.memory.write(page, &bytes)?;
        if let Some(registered) = &self.registered {
            registered.written(page);
        }
        if let Some(account) = &self.account {
            account.finish(page, newest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
