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
mod soak;
mod watchdog;

use std::env;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use matrix::{BLOCK_PAGES, Cell, FLIPS, Fault, LIVE_ITERATIONS, Phase, REGION_BYTES, Tracking};
use report::{Report, Verdict};
use scene::{Scene, Setup};
use watchdog::Watchdog;

/// Scenes at a time. Most of their time is waiting.
const JOBS: usize = 6;

/// How often a cell may miss its moment (a writer that wrote nothing between two passes leaves no packet), or be
/// spoilt by a machine that stood still.
const TRIES: usize = 4;

/// One thing to play.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    Cell(Cell),
    /// A run of the soak, by its seed.
    Random(u64),
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cell(cell) => cell.fmt(f),
            Self::Random(seed) => write!(f, "random/{seed}"),
        }
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name.strip_prefix("random/") {
            Some(seed) => seed
                .parse()
                .map(Self::Random)
                .map_err(|_| format!("{seed:?} is no seed")),
            None => name.parse().map(Self::Cell),
        }
    }
}

struct Arguments {
    all: bool,
    cases: Vec<Case>,
    soak: Option<Duration>,
    seed: u64,
    jobs: usize,
    filter: Option<String>,
}

impl Arguments {
    /// What was typed. Options of the usual test harness are taken and change nothing.
    fn read() -> Result<Self, String> {
        let mut read = Self {
            all: false,
            cases: Vec::new(),
            soak: None,
            seed: 1,
            jobs: JOBS,
            filter: None,
        };
        let mut arguments = env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || {
                arguments
                    .next()
                    .ok_or_else(|| format!("{argument} needs a value"))
            };
            let number = |text: String| text.parse().map_err(|_| format!("{text:?} is no number"));
            match argument.as_str() {
                "--all" => read.all = true,
                "--cell" => read.cases.push(value()?.parse()?),
                "--soak" => read.soak = Some(soak::duration(&value()?)?),
                "--seed" => read.seed = number(value()?)?,
                "--jobs" => {
                    read.jobs = value()?.parse().map_err(|_| "--jobs N".to_owned())?;
                }
                "--skip" | "--test-threads" | "--format" | "--color" => drop(value()?),
                flag if flag.starts_with('-') => {}
                filter => read.filter = Some(filter.to_owned()),
            }
        }
        Ok(read)
    }

    /// What is to be played, one after the other.
    fn cases(&self) -> Box<dyn Iterator<Item = Case> + Send> {
        if let Some(time) = self.soak {
            let end = Instant::now() + time;
            let seeds = (self.seed..).take_while(move |_| Instant::now() < end);
            return Box::new(seeds.map(Case::Random));
        }
        let mut cases = match (self.all, self.cases.is_empty()) {
            (_, false) => self.cases.clone(),
            (true, true) => matrix::cells().map(Case::Cell).collect(),
            (false, true) => matrix::short().into_iter().map(Case::Cell).collect(),
        };
        if let Some(filter) = &self.filter {
            cases.retain(|case| case.to_string().contains(filter));
        }
        Box::new(cases.into_iter())
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
    let cases = Mutex::new(arguments.cases());
    let report = Mutex::new(Report::new());
    let watchdog = Watchdog::start();
    thread::scope(|scope| {
        for _ in 0..arguments.jobs {
            scope.spawn(|| {
                loop {
                    let Some(case) = cases.lock().unwrap().next() else {
                        return;
                    };
                    let verdict = judge(case, &watchdog);
                    report.lock().unwrap().add(case, verdict);
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

/// Plays a case until its moment comes, and compares what came of it.
fn judge(case: Case, watchdog: &Watchdog) -> Verdict {
    if let Case::Cell(cell) = case
        && cell.fault.needs_lab()
        && !lab::is_inside()
    {
        return Verdict::Skipped;
    }
    let mut wrong = "its moment never came".to_owned();
    for _ in 0..TRIES {
        let began = Instant::now();
        let played = panic::catch_unwind(AssertUnwindSafe(|| match case {
            Case::Cell(cell) => play(cell),
            Case::Random(seed) => Some(Verdict::Ran(soak::play(seed))),
        }));
        match played {
            Ok(Some(verdict)) => return verdict,
            Ok(None) => {}
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|&s| s.to_owned()));
                wrong = text.unwrap_or_default();
                if !watchdog.was_disturbed(began) {
                    return Verdict::Wrong(wrong);
                }
                eprintln!("AGAIN {case}: this machine stood still; {wrong}");
            }
        }
    }
    Verdict::Wrong(wrong)
}

/// `None`: its moment did not come.
fn play(cell: Cell) -> Option<Verdict> {
    let mut parameters = json!({
        "streams": cell.streams,
        // Never little enough: so a live Region always has as many Iterations before its freeze.
        "downtime-limit": "1us",
        "max-iterations": LIVE_ITERATIONS,
    });
    if cell.fault == Fault::Memlock {
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
    assert_eq!(status.as_deref(), Some(cell.status()), "{frame:?}");
    if cell.tracking != Tracking::None {
        assert_eq!(scene.writer_stands_still(), cell.is_frozen());
    }
    scene.strike(cell.fault, frame.as_ref());
    let outcome = scene.conclude();
    let allowed = cell.allowed();
    assert!(
        allowed.contains(&outcome),
        "it ended {outcome:?}, and may end {allowed:?}"
    );
    let (code, codes) = (&scene.measured.code, cell.codes());
    if let Some(code) = code.as_deref().filter(|_| !codes.is_empty()) {
        assert!(
            codes.contains(&code),
            "it failed with {code}, not {codes:?}"
        );
    }
    let torn = scene.measured.torn;
    match (cell.fault, cell.tracking) {
        (Fault::FlipMany, tracking) if tracking.is_quiet() => assert_eq!(torn, FLIPS * BLOCK_PAGES),
        // Pages that were written on their way are torn, too.
        (Fault::FlipMany, _) => assert!(torn >= FLIPS * BLOCK_PAGES, "{torn} pages torn"),
        (Fault::FlipPayload, _) => assert!(torn > 0, "a flipped bit was not counted"),
        _ => {}
    }
    Some(Verdict::As(outcome, scene.measured.clone()))
}
