//! Which faults there are, at which moments, and what may come of them: what `docs/reliability.md` promises,
//! as a table.

use std::fmt;
use std::str::FromStr;

use super::common::relay::{Frame, Kind, Side};

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9.
    Kill(Process),
    /// SIGSTOP, and SIGCONT soon after.
    Stop(Process),
    /// SIGSTOP, and SIGCONT only once the other side has noticed. Nobody notices a writer's but the sender that asks
    /// it to stop.
    Hang(Process),
    /// Somebody continues the writer that we have stopped.
    ContinueWriter,
    /// The connection of one stream is reset.
    ResetStream,
    ResetStreams,
    ResetConversation,
    ResetAll,
    /// A frame breaks off, and with it its connection.
    Truncate,
    /// A frame is late, by less than the stall timeout.
    Delay,
    Duplicate,
    /// A bit of a header, of a message or of an acknowledgement arrives wrong.
    FlipFrame,
    /// A bit of a page arrives wrong.
    FlipPayload,
    /// The same in each of the next [`FLIPS`] packets.
    FlipMany,
    /// In every packet from now on.
    FlipAlways,
    /// Nothing gets through for less than the stall timeout.
    PauseShort,
    PauseLong,
    /// The same, made in the network itself.
    PartitionShort,
    PartitionLong,
    /// The same, made by a firewall.
    DropShort,
    DropLong,
    /// The receiver is heard and does not read.
    Deaf,
    /// The sender may lock next to no memory any more.
    Memlock,
    /// The destination's file system is full.
    Full,
    /// The source gets shorter.
    ShrinkSource,
    /// The client that ordered the transfer is killed.
    KillClient,
    /// The time of day jumps, forwards at the sender and backwards at the receiver.
    ClockJump,
}

impl Fault {
    /// Whether making it takes namespaces and capabilities.
    pub(crate) fn needs_lab(self) -> bool {
        matches!(
            self,
            Self::PartitionShort
                | Self::PartitionLong
                | Self::DropShort
                | Self::DropLong
                | Self::Full
                | Self::Memlock
        )
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Process {
    Sender,
    Receiver,
    Writer,
}

pub(crate) const FAULTS: &[(Fault, &str)] = &[
    (Fault::Kill(Process::Sender), "kill-sender"),
    (Fault::Kill(Process::Receiver), "kill-receiver"),
    (Fault::Kill(Process::Writer), "kill-writer"),
    (Fault::Stop(Process::Sender), "stop-sender"),
    (Fault::Stop(Process::Receiver), "stop-receiver"),
    (Fault::Stop(Process::Writer), "stop-writer"),
    (Fault::Hang(Process::Sender), "hang-sender"),
    (Fault::Hang(Process::Receiver), "hang-receiver"),
    (Fault::Hang(Process::Writer), "hang-writer"),
    (Fault::ContinueWriter, "continue-writer"),
    (Fault::ResetStream, "reset-stream"),
    (Fault::ResetStreams, "reset-streams"),
    (Fault::ResetConversation, "reset-conversation"),
    (Fault::ResetAll, "reset-all"),
    (Fault::Truncate, "truncate"),
    (Fault::Delay, "delay"),
    (Fault::Duplicate, "duplicate"),
    (Fault::FlipFrame, "flip-frame"),
    (Fault::FlipPayload, "flip-payload"),
    (Fault::FlipMany, "flip-many"),
    (Fault::FlipAlways, "flip-always"),
    (Fault::PauseShort, "pause-short"),
    (Fault::PauseLong, "pause-long"),
    (Fault::PartitionShort, "partition-short"),
    (Fault::PartitionLong, "partition-long"),
    (Fault::DropShort, "drop-short"),
    (Fault::DropLong, "drop-long"),
    (Fault::Deaf, "deaf-receiver"),
    (Fault::Memlock, "memlock"),
    (Fault::Full, "full"),
    (Fault::ShrinkSource, "shrink-source"),
    (Fault::KillClient, "kill-client"),
    (Fault::ClockJump, "clock-jump"),
];

/// When it is done: while this frame is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// The first stream's preamble.
    Handshake,
    /// The third packet.
    First,
    /// The first packet of the second Iteration; without one, the packet in the middle of the first.
    Middle,
    /// The first packet after the freeze.
    Frozen,
    /// `prepare`.
    Prepare,
    /// `prepared`.
    Prepared,
    /// `commit`: it is recorded that it was sent.
    Commit,
    /// `committed`: the receiver owns the Regions, and the sender does not know.
    Committed,
    /// Both sides know.
    After,
}

pub(crate) const PHASES: &[(Phase, &str)] = &[
    (Phase::Handshake, "handshake"),
    (Phase::First, "first"),
    (Phase::Middle, "middle"),
    (Phase::Frozen, "frozen"),
    (Phase::Prepare, "prepare"),
    (Phase::Prepared, "prepared"),
    (Phase::Commit, "commit"),
    (Phase::Committed, "committed"),
    (Phase::After, "after"),
];

/// Bits flipped by [`Fault::FlipMany`], each in another block: all packets of the first Iteration but few.
pub(crate) const FLIPS: u64 = 60;

/// Pages under one checksum: so many are torn by a flipped bit.
pub(crate) const BLOCK_PAGES: u64 = 16;

/// Iterations of a live Region before its freeze.
pub(crate) const LIVE_ITERATIONS: u32 = 2;

/// Pages of a Region in one packet, and packets in its first Iteration.
pub(crate) const PACKET_BYTES: u64 = 64 << 10;
pub(crate) const REGION_BYTES: u64 = 4 << 20;

impl Phase {
    /// Accepts the frame of this phase. Never called for [`Phase::After`].
    pub(crate) fn frame(self, tracker: Tracking) -> impl FnMut(&Frame) -> bool + Send + 'static {
        let mut packets = 0;
        // Where a writer wrote nothing for once, the receiver prepares before the freeze, which is another moment.
        let mut is_last = tracker.is_quiet() || tracker == Tracking::Scan;
        move |frame: &Frame| {
            let message = |name: &str| matches!(&frame.kind, Kind::Message(kind) if kind == name);
            let packet =
                |wanted| matches!(frame.kind, Kind::Packet { iteration } if iteration == wanted);
            packets += u64::from(packet(1));
            is_last |= packet(LIVE_ITERATIONS + 1);
            match self {
                Self::Handshake => {
                    frame.kind == Kind::Preamble
                        && frame.stream == Some(0)
                        && frame.from == Side::Sender
                }
                Self::First => packets == 3 && packet(1),
                Self::Middle if tracker.is_quiet() => {
                    packets == REGION_BYTES / PACKET_BYTES / 2 && packet(1)
                }
                Self::Middle => packet(2),
                Self::Frozen => packet(LIVE_ITERATIONS + 1),
                Self::Prepare => is_last && message("prepare"),
                Self::Prepared => is_last && message("prepared"),
                Self::Commit => message("commit"),
                Self::Committed => message("committed"),
                Self::After => false,
            }
        }
    }
}

/// How the sender knows what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tracking {
    /// Nothing writes.
    None,
    Scan,
    Pagemap,
    /// The same, of a writer that is there and writes nothing: the receiver prepares while it runs.
    Quiet,
    /// Its writer says what it wrote, and stops itself when it is asked to.
    Bitmap,
}

pub(crate) const TRACKINGS: &[(Tracking, &str)] = &[
    (Tracking::None, "none"),
    (Tracking::Scan, "scan"),
    (Tracking::Pagemap, "pagemap"),
    (Tracking::Quiet, "quiet"),
    (Tracking::Bitmap, "bitmap"),
];

impl Tracking {
    /// Whether nothing is written, so that one Iteration is all there is, and the receiver prepares before the
    /// freeze.
    pub(crate) fn is_quiet(self) -> bool {
        matches!(self, Self::None | Self::Quiet)
    }
}

pub(crate) const STREAMS: &[u16] = &[1, 4];

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The destination owns the Region, and every byte is there.
    Identical,
    /// Nothing happened: the source owns it, complete, its writer runs, and nothing is at the destination.
    Failed,
    /// It was not known who owns it, and then the source.
    ResolvedSource,
    /// It was not known who owns it, and then the destination, where every byte is.
    ResolvedDestination,
}

use Outcome::{Failed, Identical, ResolvedDestination, ResolvedSource};

/// One fault at one moment of one kind of transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) fault: Fault,
    pub(crate) phase: Phase,
    pub(crate) streams: u16,
    pub(crate) tracking: Tracking,
}

/// The whole matrix.
pub(crate) fn cells() -> impl Iterator<Item = Cell> {
    let all = FAULTS.iter().flat_map(|&(fault, _)| {
        PHASES.iter().flat_map(move |&(phase, _)| {
            STREAMS.iter().flat_map(move |&streams| {
                TRACKINGS.iter().map(move |&(tracking, _)| Cell {
                    fault,
                    phase,
                    streams,
                    tracking,
                })
            })
        })
    });
    all.filter(Cell::exists)
}

/// A part of the matrix that every run of the tests can afford: each fault before the commit, each phase, and
/// around the commit those faults that decide about ownership; streams and trackers taken in turn.
pub(crate) fn short() -> Vec<Cell> {
    let mut turn = 0;
    let mut chosen = Vec::new();
    for (row, &(fault, _)) in FAULTS.iter().enumerate() {
        let slow = matches!(
            fault,
            Fault::Hang(_)
                | Fault::PauseLong
                | Fault::PartitionLong
                | Fault::DropLong
                | Fault::Deaf
                | Fault::FlipAlways
        );
        let early = [Phase::First, Phase::Middle, Phase::Frozen, Phase::Handshake][row % 4];
        let late = [
            Phase::Commit,
            Phase::Committed,
            Phase::Prepare,
            Phase::Prepared,
        ][row % 4];
        let phases: &[Phase] = if slow { &[early] } else { &[early, late] };
        for &phase in phases {
            let mut place: Vec<Cell> = cells().filter(|cell| cell.fault == fault).collect();
            if place.iter().any(|cell| cell.phase == phase) {
                place.retain(|cell| cell.phase == phase);
            }
            // The next combination that exists there.
            chosen.push(place[turn % place.len()]);
            turn += 1;
        }
    }
    chosen
}

impl Cell {
    /// What `query-migrate` says at its moment.
    pub(crate) fn status(&self) -> &'static str {
        match self.phase {
            Phase::Handshake => "setup",
            Phase::First | Phase::Middle => "active",
            Phase::Frozen => "device",
            Phase::Prepare | Phase::Prepared if self.tracking.is_quiet() => "active",
            Phase::Prepare | Phase::Prepared | Phase::Commit | Phase::Committed => "completing",
            Phase::After => "completed",
        }
    }

    /// Whether a live Region's writer stands still then.
    pub(crate) fn is_frozen(&self) -> bool {
        match self.phase {
            Phase::Prepare | Phase::Prepared => !self.tracking.is_quiet(),
            phase => phase >= Phase::Frozen,
        }
    }

    /// Whether the fault means anything there.
    pub(crate) fn exists(&self) -> bool {
        let live = self.tracking != Tracking::None;
        let stops_itself = self.tracking == Tracking::Bitmap;
        let at_phase = match self.phase {
            // Nothing is left to be sent after the freeze of what nobody writes.
            Phase::Frozen => !self.tracking.is_quiet(),
            _ => true,
        };
        let frame = self.phase != Phase::After;
        let means = match self.fault {
            Fault::Kill(Process::Writer) | Fault::Stop(Process::Writer) => live,
            Fault::Hang(Process::Writer) => stops_itself,
            Fault::ContinueWriter => {
                live && !stops_itself
                    && self.is_frozen()
                    && matches!(self.phase, Phase::Frozen | Phase::Prepare | Phase::Prepared)
            }
            Fault::Truncate | Fault::Delay | Fault::Duplicate | Fault::FlipFrame => frame,
            Fault::FlipPayload => {
                matches!(self.phase, Phase::First | Phase::Middle | Phase::Frozen)
            }
            // Early enough that so many follow.
            Fault::FlipMany => self.phase == Phase::Handshake,
            Fault::FlipAlways => {
                matches!(self.phase, Phase::Handshake | Phase::First | Phase::Frozen)
            }
            _ => true,
        };
        at_phase && means
    }

    /// The codes with which it may fail.
    pub(crate) fn codes(&self) -> &'static [&'static str] {
        match self.fault {
            // A process that is being killed runs once more.
            Fault::Kill(Process::Writer) => &["writer-gone", "not-frozen"],
            Fault::Hang(Process::Writer) => &["freeze-timeout"],
            Fault::ContinueWriter => &["not-frozen"],
            Fault::FlipAlways => &["corrupt"],
            Fault::Full => &["no-space"],
            Fault::ShrinkSource => &["region-resized"],
            _ => &[],
        }
    }

    /// What may come of it. Before the commit a lost connection is replaced, and the transfer goes on.
    pub(crate) fn allowed(&self) -> &'static [Outcome] {
        if self.phase == Phase::After {
            return &[Identical];
        }
        match self.fault {
            Fault::Stop(_)
            | Fault::Delay
            | Fault::FlipPayload
            | Fault::FlipMany
            | Fault::PauseShort
            | Fault::PartitionShort
            | Fault::DropShort
            | Fault::Memlock
            | Fault::KillClient
            | Fault::ClockJump => &[Identical],
            Fault::ContinueWriter | Fault::FlipAlways => &[Failed],
            Fault::Kill(Process::Writer) | Fault::Hang(Process::Writer) => match self.phase {
                Phase::Commit | Phase::Committed => &[Identical],
                // One that stops itself may have promised to stay so, which is all that is asked of it.
                Phase::Prepare | Phase::Prepared if self.tracking == Tracking::Bitmap => {
                    &[Failed, Identical]
                }
                _ => &[Failed],
            },
            Fault::Kill(Process::Sender) => match self.phase {
                Phase::Commit => &[ResolvedSource, ResolvedDestination],
                Phase::Committed => &[ResolvedDestination],
                _ => &[Failed],
            },
            // What was held is passed on: `prepared` and `committed` outlive who said them.
            Fault::Kill(Process::Receiver) => match self.phase {
                // Whether the sender hears of the end before it records the commit is chance.
                Phase::Prepared => &[Failed, Identical, ResolvedSource],
                Phase::Committed => &[Identical],
                _ => self.lost(&[ResolvedSource]),
            },
            Fault::Hang(Process::Receiver) => match self.phase {
                // Its kernel took it off the line before it stopped: it may go on to find it there.
                Phase::Prepared => &[Failed, Identical, ResolvedSource, ResolvedDestination],
                _ => self.lost(&[Identical, ResolvedSource, ResolvedDestination]),
            },
            Fault::Hang(Process::Sender) => match self.phase {
                // It goes on to find `prepared` there, and the receiver has given up.
                Phase::Prepare | Phase::Prepared => &[Failed, Identical, ResolvedSource],
                _ => self.lost(&[Identical, ResolvedDestination]),
            },
            // From `prepared` on the streams have done their work.
            Fault::ResetStream | Fault::ResetStreams => &[Identical],
            Fault::ResetConversation | Fault::ResetAll | Fault::Truncate | Fault::FlipFrame => {
                self.lost(&[ResolvedSource])
            }
            Fault::Duplicate => match self.phase {
                // The second answer is not due any more; the receiver may have heard the commit behind it.
                Phase::Prepare => &[Failed, ResolvedSource, ResolvedDestination],
                Phase::Prepared => &[Failed, Identical, ResolvedSource, ResolvedDestination],
                Phase::Commit | Phase::Committed => &[Identical],
                // A frame in a place where it must not be ends the attempt.
                _ => &[Failed],
            },
            Fault::PauseLong | Fault::PartitionLong | Fault::DropLong | Fault::Deaf => {
                match self.phase {
                    Phase::Prepared => &[Failed, Identical, ResolvedSource, ResolvedDestination],
                    _ => self.lost(&[Identical, ResolvedSource, ResolvedDestination]),
                }
            }
            Fault::Full => match self.phase {
                Phase::Handshake | Phase::First => &[Failed],
                Phase::Middle | Phase::Frozen => &[Failed, Identical],
                // Everything is there already.
                _ => &[Identical],
            },
            Fault::ShrinkSource => match self.phase {
                Phase::Handshake | Phase::First | Phase::Middle | Phase::Frozen => &[Failed],
                Phase::Prepare | Phase::Prepared => &[Failed, Identical],
                _ => &[Identical],
            },
        }
    }

    /// Lost before the commit: replaced, though a writer that stands still does not wait for it beyond
    /// freeze-timeout. Lost with the answer to the commit: the destination's. Lost with the commit itself: as
    /// `commit` says.
    fn lost(&self, commit: &'static [Outcome]) -> &'static [Outcome] {
        match self.phase {
            Phase::Commit => commit,
            Phase::Committed => &[Identical, ResolvedDestination],
            _ if self.is_frozen() => &[Failed, Identical],
            _ => &[Identical],
        }
    }
}

pub(crate) fn name_of<T: PartialEq + Copy>(table: &[(T, &'static str)], wanted: T) -> &'static str {
    table
        .iter()
        .find(|(value, _)| *value == wanted)
        .map_or("?", |(_, name)| name)
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fault, phase) = (name_of(FAULTS, self.fault), name_of(PHASES, self.phase));
        let tracking = name_of(TRACKINGS, self.tracking);
        write!(f, "{fault}/{phase}/{}/{tracking}", self.streams)
    }
}

impl FromStr for Cell {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        cells()
            .find(|cell| cell.to_string() == name)
            .ok_or_else(|| format!("there is no cell {name:?}"))
    }
}
