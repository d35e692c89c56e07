//! `memferry bench`: how fast this machine moves memory, beside how fast it can.
//!
//! Absolute numbers move a lot from run to run, so every row compares two sides that take turns, over the
//! same kind of memory, and what is shown is the median ratio and the interval it lies in.

mod cases;
mod control;
mod raw_loop;
mod report;
mod rig;
mod statistics;

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::args::BenchArgs;
use super::exit::Exit;
use super::interrupts::Interrupts;
use super::output::note;
use super::stage::StageError;
use cases::{Bench, CASES};

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
    let mut bench = Bench::new(args, interrupts)?;
    let mut rows = Vec::new();
    for case in CASES {
        if args.cases.is_empty() || args.cases.iter().any(|wanted| wanted == case.name) {
            note(format_args!("{}: {}", case.name, case.what));
            rows.push(bench.measure(case)?);
        }
    }
    report::print(&machine(args), &rows, args.json);
    Ok(Exit::Done)
}

/// Where it was measured: a figure without that says nothing.
fn machine(args: &BenchArgs) -> Value {
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
        "size": args.size.to_string(),
        "directory": args.directory,
    })
}
