//! Who writes a live Region, and whether it does.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::super::common::memory::{MIB, PAGE};
use super::super::common::{DEADLINE, Daemon, Stage, Writer};
use super::super::matrix::Tracking;
use super::ID;

/// What it writes in a second.
const RATE: &str = "8MiB/s";

/// A writer that may write does so at least once while it pauses this often.
const PAUSES: u64 = 20;

/// The writer of a live Region.
pub(super) struct Live {
    writer: Writer,
    /// One that stops itself is no stopped process: only its account of what it wrote says that it does not write.
    account: Option<PathBuf>,
}

impl Live {
    /// Starts what writes `bytes` at `source`; `None`: nobody does.
    pub(super) fn start(
        tracking: Tracking,
        source: &Path,
        bytes: u64,
        sender: &Daemon,
        stage: &Stage,
    ) -> Option<Self> {
        // It must not touch what may be cut off.
        let working_set = MIB.min(bytes / 2 / PAGE * PAGE);
        let socket = sender.socket();
        let with = |more: &[&str]| Writer::with(source, bytes, RATE, working_set, more);
        let (writer, account) = match tracking {
            Tracking::None => return None,
            Tracking::Scan => (with(&[]), None),
            Tracking::Pagemap | Tracking::Quiet => {
                let rate = match tracking {
                    Tracking::Quiet => "0",
                    _ => RATE,
                };
                let writer = Writer::register(source, bytes, rate, working_set, socket);
                (writer, None)
            }
            Tracking::Bitmap => {
                let account = stage.path("account");
                let more = ["--register", socket.to_str().unwrap(), "--name", ID];
                let marks = ["--tracker", "bitmap", "--account"];
                let more = [&more[..], &marks, &[account.to_str().unwrap()]].concat();
                (with(&more), Some(account))
            }
        };
        Some(Self { writer, account })
    }

    pub(super) fn pid(&self) -> i32 {
        self.writer.pid()
    }

    pub(super) fn signal(&self, signal: Signal) {
        self.writer.signal(signal);
    }

    /// Whether it stops when it is asked to, and not by a signal.
    pub(super) fn stops_itself(&self) -> bool {
        self.account.is_some()
    }

    /// Whether it writes nothing. One that stops itself has been awake for a while and has not used it.
    pub(super) fn stands_still(&self) -> bool {
        let Some(account) = &self.account else {
            return self.writer.is_stopped();
        };
        let before = fs::read(account).unwrap();
        let enough = self.pauses() + PAUSES;
        let deadline = Instant::now() + DEADLINE;
        while self.pauses() < enough && !self.writer.is_stopped() {
            assert!(Instant::now() < deadline, "the writer sleeps");
            thread::sleep(Duration::from_millis(1));
        }
        fs::read(account).unwrap() == before
    }

    /// That it writes, soon.
    pub(super) fn assert_runs(&self) {
        if self.account.is_none() {
            return self.writer.assert_runs();
        }
        let deadline = Instant::now() + DEADLINE;
        while self.stands_still() {
            assert!(Instant::now() < deadline, "the writer stands still");
        }
    }

    /// How often it has gone to sleep by itself.
    fn pauses(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    }
}
