//! `memferry bench`: how fast this machine moves memory, beside how fast it can.
//!
//! Absolute numbers move a lot from run to run, so every row compares two sides that take turns, over the
//! same kind of memory, and what is shown is the median ratio and the interval it lies in.

mod cases;
mod control;
mod growth;
mod iperf;
mod live;
mod plot;
mod qemu;
mod raw_loop;
mod report;
mod rig;
mod runs;
mod source;
mod statistics;
mod traced;

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::args::BenchArgs;
use super::doctor::mount_of;
use super::exit::Exit;
use super::interrupts::Interrupts;
use super::output::note;
use super::stage::{StageError, local};
use crate::config::units::Size;
use cases::CASES;
use report::Row;
use runs::{Bench, Pace, Setting};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Everything, in less than a quarter of an hour on two processors that have nothing else to do.
const FULL: Pace = Pace {
    runs: 9,
    runs_min: 6,
    time: Duration::from_secs(20),
};
/// In two minutes.
const QUICK: Pace = Pace {
    runs: 6,
    runs_min: 3,
    time: Duration::from_secs(2),
};
const QUICK_SIZE: Size = Size(256 * MIB);

/// One run of one side.
#[derive(Debug, Clone, Copy)]
struct Sample {
    time: Duration,
    sender_cpu: Duration,
    receiver_cpu: Duration,
}

pub(super) fn run(args: &BenchArgs) -> Exit {
    if let Some(unknown) = args
        .cases
        .iter()
        .find(|wanted| CASES.iter().all(|case| case.name != *wanted))
    {
        let names: Vec<_> = CASES.iter().map(|case| case.name).collect();
        note(format_args!(
            "memferry: there is no case {unknown:?}; there are {}",
            names.join(", ")
        ));
        return Exit::Usage;
    }
    let interrupts = Interrupts::new(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    measure(args, interrupts.as_ref()).unwrap_or_else(|error| {
        note(format_args!("memferry: {error}"));
        error.exit()
    })
}

fn measure(args: &BenchArgs, interrupts: Option<&Interrupts>) -> Result<Exit, StageError> {
    let setting = setting(args);
    let mut bench = Bench::new(&setting, interrupts)?;
    let machine = machine(&setting, bench.qemu_version());
    let mut rows: Vec<Row> = Vec::new();
    for case in CASES {
        if args.cases.is_empty() || args.cases.iter().any(|wanted| wanted == case.name) {
            note(format_args!("{}: {}", case.name, case.figures[0].what));
            let measured = bench.measure(case)?;
            let figures = case.figures.iter().zip(measured);
            rows.extend(figures.map(|(figure, measured)| Row { figure, measured }));
        }
    }
    if let Some(path) = &args.svg {
        let doing = local(format!("write {}", path.display()));
        std::fs::write(path, plot::draw(&machine, &rows)).map_err(doing)?;
    }
    report::print(&machine, &rows, args.json);
    Ok(Exit::Done)
}

fn setting(args: &BenchArgs) -> Setting<'_> {
    let pace = if args.quick { QUICK } else { FULL };
    let pace = args.runs.map_or(pace, |runs| Pace {
        runs,
        runs_min: runs,
        ..pace
    });
    let default_size = if args.quick { QUICK_SIZE } else { Size(GIB) };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let real = args.directory.canonicalize();
    let mount = real.ok().and_then(|real| mount_of(&real, &mounts));
    Setting {
        directory: &args.directory,
        size: args.size.unwrap_or(default_size),
        pace,
        huge: mount.is_some_and(|mount| mount.huge.is_some_and(|huge| huge != "never")),
    }
}

/// Where it was measured: a figure without that says nothing.
fn machine(setting: &Setting<'_>, qemu: Option<&str>) -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cpu = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let load = read("/proc/loadavg");
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cpu": cpu,
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "load": load.split(' ').next().unwrap_or_default(),
        "qemu": qemu,
        "size": setting.size.to_string(),
        "directory": setting.directory,
        "pages": if setting.huge { "huge" } else { "4KiB" },
    })
}
