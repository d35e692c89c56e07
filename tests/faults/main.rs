//! The fault matrix: every fault at every moment of a transfer, and what must hold afterwards. What it promises
//! and how it is run is in `docs/reliability.md`.
//!
//! ```text
//! cargo test --test faults                      the part that every run of the tests can afford
//! cargo test --test faults -- --all             all of it
//! cargo test --test faults -- --cell NAME       one cell, or one run of the soak
//! cargo test --test faults -- --soak 30m        random faults for so long; --seed N begins elsewhere
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test program with an output of its own; also the helpers of a test end it by a panic"
)]

#[path = "../common/mod.rs"]
mod common;
mod lab;
mod matrix;
mod observe;
mod report;
mod scene;

use std::env;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;

use matrix::{Cell, LIVE_ITERATIONS, Phase, REGION_BYTES};
use report::{Report, Verdict};
use scene::{Scene, Setup};

/// Scenes at a time. Most of their time is waiting.
const JOBS: usize = 6;

/// How often a scene may miss its moment: a writer that wrote nothing between two passes leaves no packet.
const TRIES: usize = 3;

struct Arguments {
    all: bool,
    cells: Vec<Cell>,
    jobs: usize,
    filter: Option<String>,
}

impl Arguments {
    /// What was typed. Options of the usual test harness are taken and change nothing.
    fn read() -> Result<Self, String> {
        let mut read = Self {
            all: false,
            cells: Vec::new(),
            jobs: JOBS,
            filter: None,
        };
        let mut arguments = env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--all" => read.all = true,
                "--cell" => read.cells.push(value()?.parse()?),
                "--jobs" => read.jobs = value()?.parse().map_err(|_| "--jobs N".to_owned())?,
                "--skip" | "--test-threads" | "--format" | "--color" => drop(value()?),
                flag if flag.starts_with('-') => {}
                filter => read.filter = Some(filter.to_owned()),
            }
        }
        Ok(read)
    }

    fn chosen(&self) -> Vec<Cell> {
        let mut cells = match (self.all, self.cells.is_empty()) {
            (_, false) => self.cells.clone(),
            (true, true) => matrix::cells().collect(),
            (false, true) => matrix::short(),
        };
        if let Some(filter) = &self.filter {
            cells.retain(|cell| cell.to_string().contains(filter));
        }
        cells
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::read() {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}");
            return ExitCode::from(2);
        }
    };
    lab::enter();
    let cells = arguments.chosen();
    let report = Mutex::new(Report::new());
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..arguments.jobs.min(cells.len()) {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let verdict = judge(*cell);
                    report.lock().unwrap().add(*cell, verdict);
                }
            });
        }
    });
    let report = report.into_inner().unwrap();
    report.print();
    if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Plays a cell until its moment comes, and compares what came of it.
fn judge(cell: Cell) -> Verdict {
    if cell.needs_lab() && !lab::is_inside() {
        return Verdict::Skipped;
    }
    for _ in 0..TRIES {
        match panic::catch_unwind(AssertUnwindSafe(|| play(cell))) {
            Ok(Some(verdict)) => return verdict,
            Ok(None) => {}
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&s| s.to_owned()));
                return Verdict::Wrong(text.unwrap_or_default());
            }
        }
    }
    Verdict::Wrong("its moment never came".to_owned())
}

/// `None`: its moment did not come.
fn play(cell: Cell) -> Option<Verdict> {
    let mut parameters = json!({
        "streams": cell.streams,
        // Never little enough: so a live Region always has as many Iterations before its freeze.
        "downtime-limit": "1us",
        "max-iterations": LIVE_ITERATIONS,
    });
    if cell.fault == matrix::Fault::Memlock {
        parameters["zero-copy"] = json!("msg-zerocopy");
    }
    let mut scene = Scene::new(Setup {
        tracking: cell.tracking,
        bytes: REGION_BYTES,
        parameters,
        faults: vec![cell.fault],
    });
    scene.begin(cell.phase.frame(cell.tracking));
    let frame = scene.wait_held();
    let status = scene.status();
    if cell.phase != Phase::After {
        frame.as_ref()?;
    }
    assert_eq!(status.as_deref(), Some(cell.phase.status()), "{frame:?}");
    if cell.tracking != matrix::Tracking::None {
        assert_eq!(scene.writer_stands_still(), cell.phase.is_frozen());
    }
    scene.strike(cell.fault, frame.as_ref());
    let outcome = scene.conclude();
    let allowed = cell.allowed();
    assert!(
        allowed.contains(&outcome),
        "it ended {outcome:?}, and may end {allowed:?}"
    );
    if cell.fault == matrix::Fault::FlipPayload {
        assert!(scene.measured.torn > 0, "a flipped bit was not counted");
    }
    Some(Verdict::As(outcome, scene.measured.clone()))
}

/// The longest of two times.
fn longest(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    a.max(b)
}
