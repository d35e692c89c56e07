//! What is measured, and how good it must be. Nothing but the table.

use super::statistics::Target;
use crate::workload::TrackerChoice;

/// What is measured in one go, for one row or several.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) how: How,
    pub(super) figures: &'static [Figure],
}

/// A row.
#[derive(Debug)]
pub(super) struct Figure {
    pub(super) name: &'static str,
    pub(super) what: &'static str,
    pub(super) unit: &'static str,
    /// What is asked of it; `None` where it is only good to know.
    pub(super) target: Option<Target>,
}

/// How a case comes about.
#[derive(Debug, Clone, Copy)]
pub(super) enum How {
    /// The throughput of one side as a multiple of the other's.
    Compare(Destination, Party, Party),
    /// As `Compare` with QEMU and cold memory, where the directory gives huge pages, or where not.
    Mount {
        huge: bool,
    },
    /// 64 GiB that hold 256 MiB in islands, beside 256 MiB in one piece.
    Islands,
    /// Downtime of memory that a writer registers and writes at this many MiB/s, with this tracker.
    Downtime {
        rate_mib: u64,
        tracker: TrackerChoice,
    },
    /// Memory of the daemons themselves, with this tracker.
    OwnMemory(&'static str),
    /// Answers of the control socket at full rate.
    Control,
    /// Throughput by the number of streams, Regions or transfers.
    Streams,
    Regions,
    Attempts,
    /// System calls and notices, under a tracer.
    Traced,
    Iperf,
    /// Not from here; how else.
    Elsewhere(&'static str),
}

/// What the destination's memory is before the time begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Destination {
    /// Not there.
    Cold,
    /// There, with content, and announced to the receiver.
    Prepared,
}

/// One side of a comparison, moving the same memory.
#[derive(Debug, Clone, Copy)]
pub(super) enum Party {
    Raw {
        streams: usize,
    },
    Ours {
        streams: usize,
        integrity: &'static str,
        zero_copy: &'static str,
    },
    /// multifd with two channels; `populated`: its page tables are filled before it begins, as ours are.
    Qemu {
        populated: bool,
    },
}

const fn ours(streams: usize, integrity: &'static str, zero_copy: &'static str) -> Party {
    Party::Ours {
        streams,
        integrity,
        zero_copy,
    }
}

const PLAIN: Party = ours(2, "off", "off");
const CHECKED: Party = ours(2, "crc32c", "off");
const RAW: Party = Party::Raw { streams: 2 };
pub(super) const MOUNT_PARTIES: (Party, Party) = (PLAIN, Party::Qemu { populated: false });

const fn figure(
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    target: Target,
) -> Figure {
    Figure {
        name,
        what,
        unit,
        target: Some(target),
    }
}

const fn good_to_know(name: &'static str, what: &'static str, unit: &'static str) -> Figure {
    Figure {
        name,
        what,
        unit,
        target: None,
    }
}

macro_rules! case {
    ($name:literal, $how:expr, [$($figure:expr),+ $(,)?]) => {
        Case { name: $name, how: $how, figures: const { &[$($figure),+] } }
    };
    // One row of the same name.
    ($name:literal, $how:expr, $what:literal, $unit:literal, $target:expr) => {
        case!($name, $how, [figure($name, $what, $unit, $target)])
    };
}

use Destination::{Cold, Prepared};
use Target::{AtLeast, AtMost, Same};

/// All of them, in the order of the design's table.
#[rustfmt::skip]
pub(super) const CASES: &[Case] = &[
    case!("same", How::Compare(Cold, RAW, RAW), "the raw loop beside itself: whether two identical programs pass here", "×", Same),
    case!("same-ours", How::Compare(Prepared, CHECKED, CHECKED), "memferry beside itself", "×", Same),
    case!("prepared", How::Compare(Prepared, PLAIN, RAW), "memory that is there, 2 streams, integrity off, beside the raw loop", "×", AtLeast(0.95)),
    case!("prepared-checked", How::Compare(Prepared, CHECKED, RAW), "the same with integrity on", "×", AtLeast(0.8)),
    case!("prepared-qemu", How::Compare(Prepared, PLAIN, Party::Qemu { populated: false }), "memory that is there, integrity off, beside QEMU multifd", "×", AtLeast(2.5)),
    case!("prepared-qemu-populated", How::Compare(Prepared, PLAIN, Party::Qemu { populated: true }), [
        good_to_know("prepared-qemu-populated", "the same with QEMU's page tables filled before it begins (prealloc=on)", "×"),
    ]),
    case!("cold", How::Compare(Cold, PLAIN, RAW), "cold memory, integrity off, beside the raw loop", "×", AtLeast(0.9)),
    case!("cold-checked", How::Compare(Cold, CHECKED, RAW), "the same with integrity on", "×", AtLeast(0.8)),
    case!("cold-qemu", How::Mount { huge: false }, "cold memory, integrity off, beside QEMU multifd", "×", AtLeast(2.0)),
    case!("cold-qemu-raw", How::Compare(Cold, RAW, Party::Qemu { populated: false }), [
        good_to_know("cold-qemu-raw", "the raw loop in its place: what making the memory leaves to be gained", "×"),
    ]),
    case!("cold-qemu-huge", How::Mount { huge: true }, "the same on a mount that gives huge pages", "×", AtLeast(4.0)),
    case!("zero-copy", How::Compare(Prepared, ours(2, "crc32c", "auto"), CHECKED), "zero-copy = auto where the kernel copies, beside off", "×", AtLeast(0.95)),
    case!("zero-copy-msg", How::Compare(Prepared, ours(2, "crc32c", "msg-zerocopy"), CHECKED), "the same, msg-zerocopy", "×", AtLeast(0.95)),
    case!("zero-copy-uring", How::Compare(Prepared, ours(2, "crc32c", "io-uring"), CHECKED), "the same, io-uring", "×", AtLeast(0.95)),
    case!("zero-copy-fixed", How::Compare(Prepared, ours(2, "crc32c", "io-uring-fixed"), CHECKED), "the same, io-uring-fixed", "×", AtLeast(0.95)),
    case!("lab", How::Elsewhere("tests/lab/run, in a machine where nothing is copied; docs/lab.md"), [
        figure("lab-copied", "zero-copy sends that were copied after all", "", AtMost(0.0)),
        figure("lab-cpu", "sender CPU as a share of that of plain sends", "×", AtMost(0.17)),
        figure("lab-cpu-fixed", "the same, io-uring-fixed and huge pages", "×", AtMost(0.05)),
    ]),
    case!("islands", How::Islands, [
        figure("islands", "64 GiB with 256 MiB in 1024 islands: its time as a multiple of that of 256 MiB in one piece", "×", AtMost(1.3)),
        figure("islands-blocks", "what arrived: its memory as a multiple of the source's, rounded up to huge pages", "×", AtMost(1.0)),
        figure("islands-memory", "anonymous memory of the larger daemon, as a multiple of 32 MiB + 1/4096 of 64 GiB", "×", AtMost(1.0)),
    ]),
    case!("load", How::Downtime { rate_mib: 200, tracker: TrackerChoice::Pagemap }, [
        figure("load-downtime", "downtime of 1 GiB of which 512 MiB are written in a loop at 200 MiB/s", "ms", AtMost(4.0)),
        figure("load-iterations", "iterations of that", "", AtMost(8.0)),
    ]),
    case!("load-bitmap", How::Downtime { rate_mib: 200, tracker: TrackerChoice::Bitmap }, [
        figure("load-bitmap-downtime", "the same with the tracker bitmap", "ms", AtMost(4.0)),
        figure("load-bitmap-iterations", "iterations of that", "", AtMost(8.0)),
    ]),
    case!("idle", How::Downtime { rate_mib: 0, tracker: TrackerChoice::Pagemap }, [
        figure("idle-downtime", "downtime of 1 GiB that has a writer and is not written", "ms", AtMost(1.0)),
        good_to_know("idle-iterations", "iterations of that", ""),
    ]),
    case!("control", How::Control, "99 of 100 answers to 50 clients that poll 10 times a second during transfers", "ms", AtMost(5.0)),
    case!("own-memory", How::OwnMemory("none"), "anonymous memory of the larger daemon, as a multiple of 32 MiB + 1/4096 of the region", "×", AtMost(1.0)),
    case!("own-memory-scan", How::OwnMemory("scan"), "the same with the tracker scan, which may have 1/400 more", "×", AtMost(1.0)),
    case!("streams", How::Streams, "1 to 64 streams: the slowest count above the best one, as a multiple of the best", "×", AtLeast(0.8)),
    case!("one-stream", How::Compare(Prepared, ours(1, "off", "off"), Party::Raw { streams: 1 }), "1 stream, integrity off, beside the raw loop with one", "×", AtLeast(0.9)),
    case!("regions", How::Regions, "the same memory in 1 to 1000 regions: the slowest as a multiple of the best", "×", AtLeast(0.8)),
    case!("attempts", How::Attempts, "the same memory in 1 to 64 transfers at once: the slowest as a multiple of the best", "×", AtLeast(0.8)),
    case!("attempts-raw", How::Compare(Prepared, Party::Raw { streams: 128 }, RAW), [
        good_to_know("attempts-raw", "the raw loop with as many connections as 64 transfers, beside itself with 2, which have no memory to make", "×"),
    ]),
    case!("faults", How::Elsewhere("cargo test --release --test faults, which prints the times"), [
        figure("dead-peer", "how long until a dead peer is noticed", "s", AtMost(1.0)),
        figure("hung-peer", "a hung peer or silent partition, as a multiple of stall-timeout", "×", AtMost(1.0)),
        figure("stalled-cpu", "CPU while stalled", "%", AtMost(1.0)),
    ]),
    case!("traced", How::Traced, [
        good_to_know("sender-calls", "system calls of the sender per GiB, as strace counts them in a run of its own", ""),
        good_to_know("receiver-calls", "the same of the receiver", ""),
        good_to_know("notices", "error queue messages per 1000 sends that were lent (msg-zerocopy)", ""),
    ]),
    case!("iperf3", How::Iperf, [
        good_to_know("iperf3", "iperf3 over loopback with 2 streams", "GiB/s"),
    ]),
];
