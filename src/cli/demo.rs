//! `memferry demo`: the whole job on this host, with real processes, and a comparison at the end.
//!
//! Everything it makes is in one directory under /dev/shm, and every process dies with it, so nothing
//! is left behind whichever way it ends.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::args::{DemoArgs, ProgressMode};
use super::exit::Exit;
use super::interrupts::Interrupts;
use super::migrate::Watch;
use super::output::{line, note};
use super::stage::{START_DEADLINE, Stage, StageError, local};
use super::status::print_summary;
use crate::client::Connection;
use crate::config::units::Size;
use crate::workload::newest_stamp;

/// Memory that files can be made in, on every Linux.
const SHM: &str = "/dev/shm";
const REGION: &str = "demo";
pub(super) fn run(args: &DemoArgs) -> Exit {
    // A terminal that is closed is an interrupt too: what is in /dev/shm must not stay.
    let interrupts = Interrupts::new(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    show(args, interrupts.as_ref()).unwrap_or_else(|error| {
        note(format_args!("memferry: {error}"));
        error.exit()
    })
}

fn show(args: &DemoArgs, interrupts: Option<&Interrupts>) -> Result<Exit, StageError> {
    let needed = Size(args.size.0.saturating_mul(2));
    let stage = Stage::set(Path::new(SHM), needed, interrupts)?;
    let receiver = stage.start("receiver", &stage.receiver_config())?;
    let mut arrivals = receiver.connect(&stage)?;
    let listening = arrivals.execute("query-status", json!({}))?;
    let sender = stage.start("sender", &stage.sender_config())?;
    let mut control = sender.connect(&stage)?;
    note(format_args!("filling {} and starting to write", args.size));
    // It registers its memory with the sender by itself, to be tracked and frozen.
    let _writer = stage.start_writer(
        REGION,
        args.size,
        args.dirty_rate,
        args.working_set.min(args.size),
        args.tracker,
    )?;
    let order = json!({
        "uri": listening["listen"][0],
        "id": REGION,
        "streams": args.streams,
        "zero-copy": args.zero_copy,
    });
    control.execute("migrate", order)?;
    let mut watch = Watch::new(
        control,
        Some(REGION.to_owned()),
        ProgressMode::Auto,
        interrupts,
        "cancelling; press Ctrl-C again to end everything at once",
    );
    let Some(mut last) = watch.until_ended()? else {
        return Err(StageError::Interrupted);
    };
    let identical = if last["status"] == "completed" {
        note("comparing every byte of the destination with the frozen source");
        let demo = Demo(stage);
        let identical = demo.compare()?;
        last["identical"] = json!(identical);
        last["gib-per-second"] = gib_per_second(args.size.0, &last["total-time"]);
        last["writer-gap-us"] = demo.writer_gap(&mut arrivals, args.size.0)?;
        Some(identical)
    } else {
        None
    };
    report(&last, identical, args.json);
    Ok(match identical {
        Some(false) => Exit::Verification,
        _ => Exit::of_transfer(&last),
    })
}

fn report(last: &Value, identical: Option<bool>, as_json: bool) {
    if as_json {
        line(last);
        return;
    }
    print_summary(last);
    match identical {
        Some(true) => line("identical"),
        Some(false) => line("DIFFERENT: the destination is not what the source was"),
        None => {}
    }
}

fn gib_per_second(bytes: u64, total_ms: &Value) -> Value {
    #[expect(clippy::cast_precision_loss)] // shown to people
    let gib = bytes as f64 / f64::from(1 << 30);
    match total_ms.as_f64() {
        Some(ms) if ms > 0.0 => json!(gib / (ms / 1000.0)),
        _ => Value::Null,
    }
}

/// The processes and files of one demo.
struct Demo<'a>(Stage<'a>);

impl Demo<'_> {
    /// Whether both files have the same bytes.
    fn compare(&self) -> Result<bool, StageError> {
        let open =
            |path: &Path| File::open(path).map_err(local(format!("open {}", path.display())));
        let (source, destination) = (open(&self.0.source())?, open(&self.0.destination(REGION))?);
        let read = local("compare");
        let length = |file: &File| file.metadata().map(|meta| meta.len());
        let total = match (length(&source), length(&destination)) {
            (Ok(a), Ok(b)) if a == b => a,
            (Ok(_), Ok(_)) => return Ok(false),
            (Err(error), _) | (_, Err(error)) => return Err(read(error)),
        };
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let mut offset = 0;
        while offset < total {
            self.0.check_interrupted()?;
            let step = usize::try_from((total - offset).min(1 << 20)).expect("at most a MiB");
            source
                .read_exact_at(&mut a[..step], offset)
                .map_err(local("read the source"))?;
            destination
                .read_exact_at(&mut b[..step], offset)
                .map_err(local("read the destination"))?;
            if a[..step] != b[..step] {
                return Ok(false);
            }
            offset += step as u64;
        }
        Ok(true)
    }

    /// From the writer's last stamp to the receiver's commit, in µs: the downtime as its victim saw it.
    fn writer_gap(&self, arrivals: &mut Connection, bytes: u64) -> Result<Value, StageError> {
        let source = File::open(self.0.source()).map_err(local("open the source"))?;
        let last_write = newest_stamp(&source, bytes).map_err(local("read the source"))?;
        while let Some(event) = arrivals.next_event(START_DEADLINE)? {
            if event.data["status"] == "completed" {
                let committed_us = u64::try_from(event.at.as_micros()).unwrap_or(u64::MAX);
                let gap = last_write.map(|stamp| committed_us.saturating_sub(stamp.time_ns / 1000));
                return Ok(json!(gap));
            }
        }
        Ok(Value::Null)
    }
}
