//! What is not a throughput: downtime, memory, answers, calls of the kernel.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::cases::Destination;
use super::control;
use super::report::Measured;
use super::runs::{Bench, DENSE, PREPARED, gib, ratios};
use super::source::{fill, remove};
use super::traced::{self, Trace};
use super::{GIB, MIB};
use crate::cli::stage::StageError;
use crate::config::units::{Rate, Size};
use crate::workload::TrackerChoice;

/// Memory that a writer registers.
const WRITTEN: &str = "written";
const ISLANDS: &str = "islands";
const PIECE: &str = "piece";
const HUGE_PAGE: u64 = 2 * MIB;
const CLIENTS: usize = 50;

/// What a daemon may have for itself, whatever it moves (design: 32 MiB).
const OWN_BYTES: u64 = 32 * MIB;

impl Bench<'_> {
    pub(super) fn islands(&mut self) -> Result<Vec<Measured>, StageError> {
        const COUNT: u64 = 1024;
        let (each, apart) = (MIB / 4, 64 * MIB);
        let islands: Vec<_> = (0..COUNT).map(|island| (island * apart, each)).collect();
        fill(&self.stage, ISLANDS, COUNT * apart, &islands)?;
        fill(&self.stage, PIECE, COUNT * each, &[(0, COUNT * each)])?;
        let parameters = json!({"streams": 2});
        let (mut blocks, mut memory) = (Vec::new(), Vec::new());
        let (sparse, dense, _) = self.alternate(
            |bench| {
                let moved = bench.transfer(Destination::Cold, ISLANDS, &parameters)?;
                blocks.push(share(moved.arrived_bytes, COUNT * HUGE_PAGE));
                let allowed = OWN_BYTES + COUNT * apart / 4096;
                memory.push(share(moved.own_memory, allowed));
                Ok((moved.sample, String::new()))
            },
            |bench| {
                let moved = bench.transfer(Destination::Cold, PIECE, &parameters)?;
                Ok((moved.sample, String::new()))
            },
        )?;
        remove(&self.stage, &[ISLANDS.to_owned(), PIECE.to_owned()]);
        let times = Measured::of(ratios(&sparse, &dense));
        Ok(vec![times, Measured::of(blocks), Measured::of(memory)])
    }

    pub(super) fn downtime(
        &mut self,
        rate_mib: u64,
        tracker: TrackerChoice,
    ) -> Result<Vec<Measured>, StageError> {
        let (mut downtimes, mut iterations) = (Vec::new(), Vec::new());
        let mut parts: Vec<Value> = Vec::new();
        self.repeat(|bench| {
            let (rate, set) = (Rate(rate_mib * MIB), Size(GIB / 2));
            let stage = &bench.stage;
            let writer = stage.start_writer(WRITTEN, Size(GIB), rate, set, Some(tracker))?;
            let moved = bench.rig.migrate(stage, WRITTEN, &json!({"streams": 2}))?;
            drop(writer);
            let _ = std::fs::remove_file(stage.source());
            let last = moved.last;
            downtimes.push(last["downtime-us"].as_f64().unwrap_or(f64::INFINITY) / 1e3);
            iterations.push(last["ram"]["dirty-sync-count"].as_f64().unwrap_or(0.0));
            parts.push(last["downtime-breakdown-us"].clone());
            Ok(())
        })?;
        let mut downtime = Measured::of(downtimes);
        downtime.note = breakdown(&parts);
        Ok(vec![downtime, Measured::of(iterations)])
    }

    pub(super) fn own_memory(&mut self, tracker: &str) -> Result<Vec<Measured>, StageError> {
        let bytes = self.dense.bytes();
        let fingerprints = if tracker == "scan" { bytes / 400 } else { 0 };
        let allowed = OWN_BYTES + bytes / 4096 + fingerprints;
        let mut values = Vec::new();
        self.repeat(|bench| {
            let regions = [DENSE.to_owned()];
            bench.rig.add(&bench.stage, &regions, tracker)?;
            let moved = bench.rig.migrate(&bench.stage, DENSE, &json!({}))?;
            values.push(share(moved.own_memory, allowed));
            Ok(())
        })?;
        Ok(vec![Measured::of(values)])
    }

    pub(super) fn control(&mut self) -> Result<Vec<Measured>, StageError> {
        let mut values = Vec::new();
        self.repeat(|bench| {
            let regions = [DENSE.to_owned()];
            bench.rig.add(&bench.stage, &regions, "none")?;
            bench.rig.prepare(&bench.stage, DENSE, PREPARED)?;
            let connections = (0..CLIENTS)
                .map(|_| bench.rig.connect(&bench.stage))
                .collect::<Result<Vec<_>, _>>()?;
            let stop = AtomicBool::new(false);
            let Self { stage, rig, .. } = bench;
            let answers = thread::scope(|scope| {
                let polls = scope.spawn(|| control::poll(connections, &stop));
                let transfer = rig.migrate(stage, DENSE, &json!({"streams": 2}));
                stop.store(true, Ordering::Relaxed);
                let answers = polls.join().unwrap_or_else(|_| Ok(Vec::new()));
                transfer?;
                Ok::<_, StageError>(answers?)
            })?;
            values.push(percentile_99(answers).as_secs_f64() * 1e3);
            Ok(())
        })?;
        Ok(vec![Measured::of(values)])
    }

    pub(super) fn traced(&mut self) -> Result<Vec<Measured>, StageError> {
        if !traced::is_installed() {
            let missing = || Measured::elsewhere("strace is not installed");
            return Ok(std::iter::repeat_with(missing).take(3).collect());
        }
        let gib = gib(self.dense.bytes());
        let regions = [DENSE.to_owned()];
        self.rig.add(&self.stage, &regions, "none")?;
        let sender = Trace::count(&self.stage, "trace-sender", &self.rig.sender)?;
        let receiver = Trace::count(&self.stage, "trace-receiver", &self.rig.receiver)?;
        let parameters = json!({"streams": 2, "zero-copy": "off"});
        self.rig.migrate(&self.stage, DENSE, &parameters)?;
        let calls = [sender.calls()?, receiver.calls()?];

        self.rig.add(&self.stage, &regions, "none")?;
        let trace = Trace::received(&self.stage, "trace-notices", &self.rig.sender)?;
        let parameters = json!({"streams": 2, "zero-copy": "msg-zerocopy"});
        let moved = self.rig.migrate(&self.stage, DENSE, &parameters)?;
        let notices = trace.notices()?;
        let lent = moved.last["zero-copy"]["sends"].as_u64().unwrap_or(0);

        let mut measured: Vec<_> = calls
            .into_iter()
            .map(|(calls, frequent)| {
                let mut measured = Measured::of(vec![number(calls) / gib]);
                measured.note = frequent;
                measured
            })
            .collect();
        let mut notices = Measured::of(vec![share(notices * 1000, lent.max(1))]);
        notices.note = format!("{lent} sends were lent");
        measured.push(notices);
        Ok(measured)
    }
}

/// Where the downtime goes, in µs: the median of each part.
fn breakdown(parts: &[Value]) -> String {
    let Some(names) = parts.first().and_then(Value::as_object) else {
        return String::new();
    };
    let median = |name: &str| {
        super::runs::median(parts.iter().map(|part| part[name].as_f64().unwrap_or(0.0)))
    };
    let shown = names.keys().map(|name| (name, median(name)));
    let shown = shown.filter(|(_, us)| *us >= 1.0);
    let shown: Vec<_> = shown.map(|(name, us)| format!("{name} {us:.0}")).collect();
    format!("µs: {}", shown.join(", "))
}

fn percentile_99(mut answers: Vec<Duration>) -> Duration {
    answers.sort();
    answers
        .get(answers.len() * 99 / 100)
        .copied()
        .unwrap_or_default()
}

fn share(bytes: u64, allowed: u64) -> f64 {
    number(bytes) / number(allowed)
}

#[expect(clippy::cast_precision_loss)] // shown to people
fn number(count: u64) -> f64 {
    count as f64
}
