//! Random transfers with random faults at random moments. A run follows from its seed, but for what two
//! processes make of the same moment.

use std::time::Duration;

use serde_json::json;

use super::common::random::Random;
use super::common::relay::{Frame, Kind};
use super::matrix::{FAULTS, Fault, Outcome, Process, TRACKINGS, Tracking};
use super::scene::{Measured, Scene, Setup};

/// What came of a run.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) outcome: Outcome,
    pub(crate) measured: Measured,
    /// The faults that met a frame.
    pub(crate) struck: Vec<Fault>,
}

/// When a fault comes.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// With a frame of any kind, counted from the fault before.
    Frame(u64),
    /// With a message of the hand-over: few frames, and all that ownership hangs on.
    Message(&'static str),
}

/// Whether a fault may come at any moment, and be followed by others.
fn is_for_any_moment(fault: Fault, tracking: Tracking) -> bool {
    match fault {
        // Continuing a writer behind the commit makes two owners, and stopping one for good hides a thaw: no
        // sender can help it.
        Fault::ContinueWriter => false,
        Fault::Stop(Process::Writer) | Fault::Hang(Process::Writer) => tracking == Tracking::Bitmap,
        Fault::Kill(Process::Writer) => tracking != Tracking::None,
        _ => true,
    }
}

/// Plays the run of a seed.
pub(crate) fn play(seed: u64) -> Run {
    let mut random = Random::new(seed);
    let (tracking, _) = random.one_of(TRACKINGS);
    let faults: Vec<Fault> = FAULTS
        .iter()
        .map(|&(fault, _)| fault)
        .filter(|&fault| is_for_any_moment(fault, tracking))
        .filter(|fault| super::lab::is_inside() || !fault.needs_lab())
        .collect();
    let count = 1 + random.below(3);
    let faults: Vec<Fault> = (0..count).map(|_| random.one_of(&faults)).collect();
    let pages = 256 + random.below(1280);
    let parameters = json!({
        "streams": 1 + random.below(8),
        "downtime-limit": random.one_of(&["1us", "1ms", "300ms"]),
        "max-iterations": 1 + random.below(4),
        "zero-copy": random.one_of(&["auto", "msg-zerocopy", "io-uring", "off"]),
    });
    // Whether the faults come early or anywhere: a transfer has some hundred frames.
    let reach = random.one_of(&[10, 100, 400]);
    let moments: Vec<Moment> = faults
        .iter()
        .map(|_| match random.below(2) {
            0 => Moment::Frame(random.below(reach)),
            _ => Moment::Message(random.one_of(&["prepare", "prepared", "commit", "committed"])),
        })
        .collect();

    let mut scene = Scene::new(Setup {
        tracking,
        bytes: pages * 4096,
        parameters,
        faults: faults.clone(),
    });
    let mut struck = Vec::new();
    for (order, (&fault, &moment)) in faults.iter().zip(&moments).enumerate() {
        let mut frames = 0;
        let wanted = move |frame: &Frame| {
            frames += 1;
            match moment {
                // What would have nothing to flip waits for what has.
                Moment::Frame(_) if fault == Fault::FlipPayload && frame.payload == 0 => false,
                Moment::Frame(number) => frames > number,
                Moment::Message(name) => frame.kind == Kind::Message(name.to_owned()),
            }
        };
        if order == 0 {
            scene.begin(wanted);
        } else {
            scene.hold_next(wanted);
        }
        let Some(frame) = scene.wait_held() else {
            break;
        };
        let fault = match fault {
            Fault::FlipPayload if frame.payload == 0 => Fault::FlipFrame,
            fault => fault,
        };
        scene.strike(fault, Some(&frame));
        struck.push(fault);
    }
    Run {
        outcome: scene.conclude(),
        measured: scene.measured.clone(),
        struck,
    }
}

/// `30s`, `30m` or `2h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time: 30s, 30m, 2h");
    let (number, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(wrong()),
    };
    Ok(Duration::from_secs(number * seconds))
}
