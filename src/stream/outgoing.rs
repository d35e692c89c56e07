//! The sending end: where a packet is sent.

mod acks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::channel::{
    Channel, Engine, Flush, Opened, Shutdown, WriteFlags, within_host, writev_all,
};
use crate::dirty::Tracker;
use crate::iteration::{Look, Piece, Plan};
use crate::region::{Region, Span};
use crate::stats::StreamStats;
use crate::wire::{
    Algorithm, DataHeader, Header, MarkHeader, StreamTotals, TornTable, WireError, crc32c,
};

use super::StreamError;
use super::inspect::Inspector;
use super::lending::{Change, Fallback, FirstSends, Lending, Tell};
use super::owed::{InFlight, Owed, merged};
use super::pace::Pace;
use super::packing::Packing;
use super::window::{Unacknowledged, Window};

/// The path of a stream that does not lend.
const PLAIN: &str = "plain";

/// What to do with a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Send it.
    Send,
    /// Send it while nobody writes: what arrives now stays.
    SendFinal,
    /// Only find out whether anything in it has changed.
    Check,
}

/// One Iteration for one stream.
#[derive(Debug, Clone)]
pub struct Job {
    /// What to look at; shared by the streams, who take pieces from it.
    pub plan: Arc<Plan>,
    /// What for.
    pub pass: Pass,
    /// Streams that take part in it.
    pub streams: u16,
}

/// What a stream says when its part of a job is done: everything it sent is released and applied.
#[derive(Debug, Default)]
pub struct Report {
    /// The stream.
    pub stream: u16,
    /// Pages sent, or in a check found changed.
    pub pages: u64,
    /// Pages that were owed unless the receiver has them, and compared.
    pub compared: u64,
    /// Those of them that it has.
    pub unchanged: u64,
    /// Payload bytes sent.
    pub payload_bytes: u64,
    /// Bytes of memory read to be sent or compared.
    pub read_bytes: u64,
    /// Time spent reading them.
    pub read_time: Duration,
    /// Time spent sending, until everything was released and applied.
    pub send_time: Duration,
    /// The part of it spent waiting for the release of lent memory.
    pub flush_time: Duration,
    /// What the stream has carried since it opened.
    pub totals: StreamTotals,
}

/// What the streams of an attempt share.
#[derive(Debug, Clone)]
pub struct StreamSetup {
    /// The sources and their trackers, in the order of the offer.
    pub regions: Arc<[(Arc<Region>, Tracker)]>,
    /// What the receiver does not have. Streams pay it, and add what they find changed.
    pub owed: Arc<Owed>,
    /// Whether payload carries checksums.
    pub integrity: bool,
    /// What payload may be compressed with, where that pays; nothing: it is not.
    pub compression: &'static [Algorithm],
    /// Bound on bytes sent but not acknowledged.
    pub window: u64,
    /// The bandwidth cap.
    pub pace: Arc<Pace>,
    /// Whether the kernel copies what is lent on their way.
    pub first_sends: Arc<FirstSends>,
    /// Longest time without progress.
    pub stall_timeout: Duration,
    /// Ends every wait.
    pub wake: crate::sys::wake::Wake,
    /// The connections' epoch.
    pub epoch: u32,
}

/// How much of a packet is lent, in bytes, to see whether the kernel copies it, where that is to be expected: a
/// send that is copied after all takes half as long again.
const TRIED_BYTES: usize = 64 << 10;

/// One stream of the sender. Runs on a thread of its own.
#[derive(Debug)]
pub struct OutgoingStream {
    index: u16,
    channel: Box<dyn Channel>,
    setup: StreamSetup,
    lending: Lending,
    engine: Option<Engine>,
    /// Why the engine is not what was asked for.
    note: String,
    /// The connection does not leave this host.
    within_host: bool,
    /// Takes a share of the pages, and is not one more than is of use.
    carries: bool,
    tell: Tell,
    stats: Arc<StreamStats>,
    inspector: Inspector,
    packing: Packing,
    piece: Piece,
    frame: Vec<u8>,
    torn_table: TornTable,
    totals: StreamTotals,
    window: Window,
}

impl OutgoingStream {
    /// A stream over the channel that was opened; its preamble has been answered.
    #[must_use]
    pub fn new(
        index: u16,
        opened: Opened,
        setup: StreamSetup,
        stats: Arc<StreamStats>,
        tell: Tell,
    ) -> Self {
        let Opened {
            channel,
            engine,
            note,
            within_host,
        } = opened;
        stats.set_path(engine.map_or(PLAIN, Engine::as_str), note.clone());
        Self {
            index,
            channel,
            inspector: Inspector::new(setup.integrity),
            window: Window::new(setup.window),
            packing: Packing::new(setup.compression),
            lending: Lending::new(engine.is_some(), Arc::clone(&setup.first_sends)),
            setup,
            engine,
            note,
            within_host,
            carries: !within_host || usize::from(index) < within_host::useful_streams(),
            tell,
            stats,
            piece: Piece::default(),
            frame: Vec::new(),
            torn_table: TornTable::default(),
            totals: StreamTotals::default(),
        }
    }

    /// Takes its share of a job. When this returns `Ok`, nothing of ours is lent any more and all of
    /// it is applied at the receiver.
    pub fn run(&mut self, job: &Job) -> Result<Report, StreamError> {
        let mut report = Report {
            stream: self.index,
            ..Report::default()
        };
        while self.carries && job.plan.next(&mut self.piece) {
            if self.setup.wake.is_awake() {
                return Err(StreamError::Ended);
            }
            let (region, tracker) = &self.setup.regions[self.piece.region as usize];
            let started = Instant::now();
            let keep = job.pass != Pass::Check && self.packing.begin(started);
            self.inspector.keep(keep);
            self.inspector
                .inspect(region, tracker.fingerprints(), &self.piece)?;
            report.read_time += started.elapsed();
            report.read_bytes += self.inspector.read_bytes;
            let extents = &self.inspector.table.extents;
            let pages: u64 = extents.iter().map(|e| e.range.count).sum();
            if pages > 0 && tracker.fingerprints().is_some() {
                // The fingerprints know the new content from here on, and the receiver does not.
                let found = extents.iter().map(|extent| extent.range);
                self.setup.owed.add(self.piece.region, found);
            }
            report.pages += pages;
            report.compared += self.piece.pages(Look::Compare);
            report.unchanged += self.settle_unchanged();
            if pages > 0 && job.pass != Pass::Check {
                let started = Instant::now();
                report.payload_bytes += self.send(job)?;
                report.send_time += started.elapsed();
            }
        }
        if job.pass != Pass::Check {
            let started = Instant::now();
            self.send_mark(job.plan.iteration(), job.streams)?;
            let flushing = Instant::now();
            self.flush()?;
            report.flush_time = flushing.elapsed();
            while !self.window.is_empty() {
                self.read_ack()?;
            }
            report.send_time += started.elapsed();
        }
        report.totals = self.totals;
        Ok(report)
    }

    /// Throws away what is queued and collects what is lent, so that the memory can be reused; gives what
    /// was not acknowledged. After this the stream is dead. `Err`: some memory did not come back; the
    /// channel keeps it mapped.
    pub fn abandon(mut self) -> std::io::Result<Vec<InFlight>> {
        self.channel.shutdown(Shutdown::Reset)?;
        // After our own reset a flush speaks about the memory alone.
        self.channel.flush()?;
        let in_flight = |packet: Unacknowledged| {
            let (region, runs) = packet.pages?;
            Some(InFlight {
                sequence: packet.sequence,
                region,
                runs,
            })
        };
        Ok(self.window.into_packets().filter_map(in_flight).collect())
    }

    /// What was written since the receiver got it, and is still the same, is paid.
    fn settle_unchanged(&self) -> u64 {
        let unchanged = &self.inspector.unchanged;
        if unchanged.is_empty() {
            return 0;
        }
        self.setup.owed.pay(self.piece.region, unchanged, &[]);
        let pages = unchanged.iter().map(|run| run.count).sum();
        self.stats.unchanged_pages.add(pages);
        pages
    }

    /// Sends the packet the inspector holds; gives its payload bytes.
    fn send(&mut self, job: &Job) -> Result<u64, StreamError> {
        let iteration = job.plan.iteration();
        let region_index = self.piece.region;
        let region = Arc::clone(&self.setup.regions[region_index as usize].0);
        let table = &self.inspector.table;
        let count = |n: usize| u32::try_from(n).expect("limits keep packets small");
        let (extents, checksums) = (count(table.extents.len()), count(table.checksums.len()));
        let payload: u64 = table.data().map(|range| range.bytes(region.bytes())).sum();
        let data_pages: u64 = table.data().map(|range| range.count).sum();
        let pages: u64 = table.extents.iter().map(|extent| extent.range.count).sum();
        let runs = merged(table.extents.iter().map(|extent| extent.range));
        let memory_bytes = table
            .extents
            .iter()
            .map(|e| e.range.bytes(region.bytes()))
            .sum();

        let packed = self.packing.pack(&self.inspector.payload);
        self.frame.clear();
        self.frame.resize(crate::wire::HEADER_BYTES, 0);
        table.encode(&mut self.frame);
        let header = DataHeader {
            epoch: self.setup.epoch,
            iteration,
            sequence: self.totals.packets + 1,
            region: region_index,
            extents,
            blocks: checksums,
            payload: u32::try_from(payload).expect("a packet's payload is limited"),
            packed,
            table_crc: crc32c(&self.frame[crate::wire::HEADER_BYTES..]),
        };
        let wire_bytes = self.frame.len() as u64 + u64::from(header.payload_on_wire());
        self.frame[..crate::wire::HEADER_BYTES].copy_from_slice(&Header::Data(header).encode());

        let blocks = u64::from(checksums);
        self.wait_for_window(wire_bytes, blocks)?;
        let wait = self.setup.pace.take(wire_bytes, Instant::now());
        if !wait.is_zero() && self.setup.wake.wait(wait) {
            return Err(StreamError::Ended);
        }

        let flags = match packed {
            // A copy in a buffer that is used again for the next packet.
            Some(_) => WriteFlags::NONE,
            None => self.flags(job.pass, region_index),
        };
        let frame = Span::of_slice(&self.frame);
        let payload_spans = || self.inspector.table.data().map(|range| region.span(range));
        // The frame's buffer is used again for the next packet, so it is always copied; where all is, it
        // goes in one call, and wakes the receiver once.
        let sent = if packed.is_some() {
            let spans = [frame, Span::of_slice(self.packing.bytes())];
            writev_all(&mut *self.channel, &spans, flags)
        } else if flags == WriteFlags::NONE || payload == 0 {
            let spans: Vec<_> = std::iter::once(frame).chain(payload_spans()).collect();
            writev_all(&mut *self.channel, &spans, WriteFlags::NONE)
        } else {
            let mut spans: Vec<_> = payload_spans().collect();
            let first = spans[0];
            let tried = (self.within_host && self.lending.tries()).then(|| first.take(TRIED_BYTES));
            spans[0] = tried.map_or(first, |tried| first.skip(tried.len()));
            let (channel, more) = (&mut *self.channel, WriteFlags::MORE);
            let rest_flags = if tried.is_some() {
                WriteFlags::NONE
            } else {
                flags
            };
            writev_all(channel, &[frame], more)
                .and_then(|()| writev_all(channel, tried.as_slice(), flags))
                .and_then(|()| writev_all(channel, &spans, rest_flags))
        };
        if let Err(error) = sent {
            // EFAULT is how the kernel says that the file no longer reaches this far, or that a page is unreadable.
            self.inspector.check_readable(&region)?;
            return Err(self.io_error("the receiver takes no data", error));
        }
        self.totals.packets += 1;
        self.totals.bytes += payload;
        self.stats.transferred.add(wire_bytes);
        self.stats.normal_pages.add(data_pages);
        self.stats.normal_bytes.add(payload);
        self.stats.duplicate_pages.add(pages - data_pages);
        if let Some(packed) = packed {
            self.stats.compressed_pages.add(data_pages);
            self.stats.compressed_from.add(payload);
            self.stats.compressed_to.add(packed.bytes.into());
        }
        self.window.sent(Unacknowledged {
            sequence: self.totals.packets,
            iteration,
            pages: Some((region_index, runs)),
            blocks,
            wire_bytes,
            memory_bytes,
            carried: Some(self.packing.sent(payload, packed)),
        });
        Ok(payload)
    }

    /// How the next packet's payload leaves.
    fn flags(&mut self, pass: Pass, region: u32) -> WriteFlags {
        let change = self.lending.step(self.channel.released(), Instant::now());
        let engine = self.engine.map_or(PLAIN, Engine::as_str);
        match change {
            Some(Change::FellBack) => {
                let reason = self.channel.zero_copy_trouble(true).unwrap_or_default();
                let told = format!("{reason}; plain sends are faster then");
                self.stats.set_path(PLAIN, joined(&self.note, &told));
                self.stats.fallbacks.add(1);
                (self.tell.0)(&Fallback {
                    stream: self.index,
                    from: engine,
                    to: PLAIN,
                    reason,
                });
            }
            Some(Change::Recovered) => self.stats.set_path(engine, self.note.clone()),
            None => {}
        }
        if !self.lending.lends() {
            return WriteFlags::NONE;
        }
        if !self.lending.works() {
            // Registering pins the whole Region: for nothing, if the kernel copies.
            return WriteFlags::ZERO_COPY;
        }
        // Registered pages go stale where a hole is punched. A stale page arrives torn and is owed again,
        // so at the last it has to come from the file itself.
        let (_, tracker) = &self.setup.regions[region as usize];
        if matches!(tracker, Tracker::None) || (self.setup.integrity && pass == Pass::Send) {
            return WriteFlags::ZERO_COPY.with(WriteFlags::REGISTERED);
        }
        WriteFlags::ZERO_COPY
    }

    fn send_mark(&mut self, iteration: u32, streams: u16) -> Result<(), StreamError> {
        self.totals.packets += 1;
        let mark = MarkHeader {
            epoch: self.setup.epoch,
            iteration,
            sequence: self.totals.packets,
            bytes: self.totals.bytes,
            streams,
        };
        let bytes = Header::Mark(mark).encode();
        writev_all(
            &mut *self.channel,
            &[Span::of_slice(&bytes)],
            WriteFlags::NONE,
        )
        .map_err(|error| self.io_error("the receiver takes no data", error))?;
        self.stats.transferred.add(bytes.len() as u64);
        self.window.sent(Unacknowledged {
            sequence: self.totals.packets,
            iteration,
            pages: None,
            blocks: 0,
            wire_bytes: bytes.len() as u64,
            memory_bytes: 0,
            carried: None,
        });
        Ok(())
    }

    /// Released: the kernel reads none of our pages any more.
    fn flush(&mut self) -> Result<(), StreamError> {
        let flush = self.channel.flush().map_err(|error| {
            self.io_error("the kernel still holds memory that was lent to it", error)
        })?;
        self.count(flush);
        Ok(())
    }

    fn count(&mut self, flush: Flush) {
        self.stats.zero_copy_sends.add(flush.sends);
        self.stats.zero_copy_copied.add(flush.copied);
        if flush.all_copied() {
            self.stats.missed_zero_copy.add(1);
        }
        // Why sends are copied, or why they are small, is told as soon as it is known.
        if let (true, Some(engine)) = (self.lending.lends(), self.engine)
            && let Some(trouble) = self.channel.zero_copy_trouble(flush.all_copied())
        {
            self.stats
                .set_path(engine.as_str(), joined(&self.note, &trouble));
        }
    }

    fn wire_error(&self, source: WireError) -> StreamError {
        StreamError::Wire {
            stream: self.index,
            source,
        }
    }

    fn io_error(&self, waiting: &'static str, error: std::io::Error) -> StreamError {
        StreamError::from_io(
            self.index,
            waiting,
            self.setup.stall_timeout,
            &*self.channel,
            error,
        )
    }
}

/// Two reasons as one.
fn joined(note: &str, reason: &str) -> String {
    match (note, reason) {
        ("", reason) => reason.to_owned(),
        (note, reason) => format!("{note}; {reason}"),
    }
}
