//! The receiving end: where a packet is placed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use crate::assembly::{Assembly, Incoming};
use crate::channel::{Channel, Patience, WriteFlags, read_exact_into, writev_all};
use crate::limits::BLOCK_LEN;
use crate::pages::PageRange;
use crate::region::{Region, Span, SpanMut};
use crate::stats::Counter;
use crate::sys::{self, wake::Wake};
use crate::wire::{
    Ack, DataHeader, Extent, ExtentKind, HEADER_BYTES, Header, MarkHeader, Packed, Table,
    TornTable, WireError, blocks,
};

use super::StreamError;
use super::checksum::checksum;
use super::codec::Decoder;

/// Memory that a Region arrives in.
pub trait Destination: Send + Sync + std::fmt::Debug {
    /// The memory, mapped for writing.
    fn region(&self) -> &Region;

    /// Makes memory for payload that comes for the first time, at once instead of a fault per page. Best
    /// effort: whoever touches the pages meets the same error, and knows what it means.
    fn populate(&self, ranges: &[PageRange]) {
        ranges
            .iter()
            .for_each(|range| self.region().populate(*range));
    }

    /// Makes `range` read as zeros, giving its memory back where that is possible. For memory that
    /// is blank, called only for ranges that had payload placed in them.
    fn clear(&self, range: PageRange) -> io::Result<()>;

    /// Whether it reads as zeros wherever nothing was placed; otherwise every zero is cleared.
    fn is_blank(&self) -> bool {
        true
    }
}

/// What the streams of an attempt share.
#[derive(Debug)]
pub struct IncomingSetup<D> {
    /// The account of what has arrived.
    pub assembly: Arc<Assembly>,
    /// Where it goes, in the order of the offer.
    pub destinations: Arc<[D]>,
    /// Whether payload carries checksums.
    pub integrity: bool,
    /// Whether payload may come compressed.
    pub compression: bool,
    /// Counts payload bytes.
    pub received: Arc<Counter>,
}

/// One stream of the receiver. Runs on a thread of its own.
#[derive(Debug)]
pub struct IncomingStream<D> {
    index: u16,
    channel: Box<dyn Channel>,
    assembly: Arc<Assembly>,
    destinations: Arc<[D]>,
    integrity: bool,
    compression: bool,
    stall_timeout: Duration,
    received: Arc<Counter>,
    wake: Wake,
    table: Table,
    table_bytes: Vec<u8>,
    torn: TornTable,
    buffer: Box<[u8]>,
    decoder: Decoder,
    /// Ranges of a packet that come for the first time.
    fresh: Vec<PageRange>,
}

impl<D: Destination> IncomingStream<D> {
    /// A stream over `channel`, whose preamble has been answered and which ends its waits by the
    /// `patience`.
    #[must_use]
    pub fn new(
        index: u16,
        channel: Box<dyn Channel>,
        patience: &Patience,
        setup: &IncomingSetup<D>,
    ) -> Self {
        Self {
            index,
            channel,
            assembly: Arc::clone(&setup.assembly),
            destinations: Arc::clone(&setup.destinations),
            integrity: setup.integrity,
            compression: setup.compression,
            stall_timeout: patience.stall_timeout,
            received: Arc::clone(&setup.received),
            wake: patience.wake.clone(),
            table: Table::default(),
            table_bytes: Vec::new(),
            torn: TornTable::default(),
            buffer: vec![0; BLOCK_LEN].into_boxed_slice(),
            decoder: Decoder::default(),
            fresh: Vec::new(),
        }
    }

    /// Places packets until the peer closes the stream between two of them (`Ok`) or something fails.
    /// Whether an end was due is for the conversation to say: an end of file commits nothing.
    pub fn run(&mut self) -> Result<(), StreamError> {
        loop {
            // Between packets silence is no stall: the sender may be scanning, or have nothing to
            // send. Whether it is alive is told by the conversation's heartbeats.
            while !self.wait_readable()? {}
            // A sender that never pauses would never let a wait end.
            if self.wake.is_awake() {
                return Err(StreamError::Ended);
            }
            let mut header = [0; HEADER_BYTES];
            if !self.read(&mut [SpanMut::of_slice(&mut header)])? {
                return Ok(());
            }
            let header = Header::decode(&header).map_err(|source| self.wire_error(source))?;
            self.torn.clear();
            match header {
                Header::Data(header) => self.place(&header)?,
                Header::Mark(header) => self.end_iteration(&header)?,
            }
        }
    }

    fn end_iteration(&mut self, header: &MarkHeader) -> Result<(), StreamError> {
        self.assembly.mark(self.index, header)?;
        self.acknowledge(header.sequence, header.iteration)
    }

    /// Reads a packet straight into its place, and tells the sender what arrived torn.
    fn place(&mut self, header: &DataHeader) -> Result<(), StreamError> {
        let assembly = Arc::clone(&self.assembly);
        let destinations = Arc::clone(&self.destinations);
        let incoming = assembly.data(self.index, header)?;
        let destination = &destinations[header.region as usize];
        if let (Some(packed), false) = (&header.packed, self.compression) {
            let rule = "compression was not offered";
            return Err(self.illegal("packed", packed.bytes.into(), rule));
        }
        self.read_table(header, incoming.bytes())?;
        let region = destination.region();

        // Only what has payload: a hole of the source stays one.
        let fresh = |range: &PageRange| !incoming.was_written(*range);
        self.fresh.clear();
        self.fresh.extend(self.table.data().filter(fresh));
        destination.populate(&self.fresh);
        self.table.data().for_each(|range| incoming.placing(range));
        let placed = match &header.packed {
            None => self.read_plain(region).map(|()| true),
            Some(packed) => self.read_packed(packed, header.payload, region),
        };
        let is_placed = placed.map_err(|error| match error {
            // EFAULT is how the kernel says that the file system has no page to give.
            StreamError::Lost { source, .. }
                if source.raw_os_error() == Some(Errno::EFAULT as i32) =>
            {
                StreamError::NoSpace {
                    origin: region.origin().to_owned(),
                }
            }
            error => error,
        })?;
        self.received.add(header.payload.into());
        match is_placed {
            true => self.check(region, incoming)?,
            false => self
                .table
                .data()
                .flat_map(blocks)
                .for_each(|block| self.torn.push(block)),
        }
        for &Extent { range, kind } in &self.table.extents {
            if kind != ExtentKind::Data {
                clear(destination, incoming, range)?;
            }
        }
        self.acknowledge(header.sequence, header.iteration)
    }

    /// Has the kernel read payload straight into its place.
    fn read_plain(&mut self, region: &Region) -> Result<(), StreamError> {
        let mut spans = Vec::with_capacity(self.table.extents.len());
        spans.extend(self.table.data().map(|range| region.span_mut(range)));
        self.read_all(&mut spans)
    }

    /// Reads compressed payload, and places what it was before. `false`: it was damaged on the way, and
    /// nothing was placed.
    fn read_packed(
        &mut self,
        packed: &Packed,
        payload: u32,
        region: &Region,
    ) -> Result<bool, StreamError> {
        let mut decoder = std::mem::take(&mut self.decoder);
        let placed = self.place_packed(&mut decoder, packed, payload, region);
        self.decoder = decoder;
        placed
    }

    fn place_packed(
        &mut self,
        decoder: &mut Decoder,
        packed: &Packed,
        payload: u32,
        region: &Region,
    ) -> Result<bool, StreamError> {
        let no_memory = |source| StreamError::NoBuffer { source };
        let room = decoder.room(packed).map_err(no_memory)?;
        self.read_all(&mut [SpanMut::of_slice(room)])?;
        if let Err(source) = decoder.check(packed) {
            // As with plain payload: what has checksums is torn, and comes again.
            return match self.integrity {
                true => Ok(false),
                false => Err(self.wire_error(source)),
            };
        }
        let decoded = decoder.decode(packed, payload).map_err(no_memory)?;
        let Some(mut rest) = decoded else {
            let rule = "they do not decompress to the payload";
            return Err(self.illegal("packed", packed.bytes.into(), rule));
        };
        for range in self.table.data() {
            let span = region.span_mut(range);
            let (bytes, behind) = rest.split_at(span.len());
            sys::copy::place(bytes, span).map_err(|error| self.io_error("", error))?;
            rest = behind;
        }
        Ok(true)
    }

    fn read_table(&mut self, header: &DataHeader, region_bytes: u64) -> Result<(), StreamError> {
        let mut bytes = std::mem::take(&mut self.table_bytes);
        bytes.resize(header.table_bytes(), 0);
        self.read_all(&mut [SpanMut::of_slice(&mut bytes)])?;
        let decoded = self
            .table
            .decode(&bytes, header, region_bytes, self.integrity);
        self.table_bytes = bytes;
        decoded.map_err(|source| self.wire_error(source))
    }

    /// Compares what is in place now with the sender's checksums.
    fn check(&mut self, region: &Region, incoming: &Incoming) -> Result<(), StreamError> {
        if !self.integrity {
            self.table.data().for_each(|range| incoming.intact(range));
            return Ok(());
        }
        let mut checksums = self.table.checksums.iter();
        for block in self.table.data().flat_map(blocks) {
            let expected = checksums
                .next()
                .expect("the table was checked to have one per block");
            if checksum(region, block, &mut self.buffer)? == *expected {
                incoming.intact(block);
            } else {
                self.torn.push(block);
            }
        }
        Ok(())
    }

    fn acknowledge(&mut self, sequence: u64, iteration: u32) -> Result<(), StreamError> {
        // Whether or not the sender gets to hear it.
        self.assembly.applied(self.index, sequence);
        let ack = Ack {
            epoch: self.assembly.epoch(),
            sequence,
            iteration,
            torn: self.torn.len(),
            table_crc: self.torn.crc(),
        };
        let bytes = ack.encode();
        let spans = [Span::of_slice(&bytes), Span::of_slice(self.torn.bytes())];
        writev_all(&mut *self.channel, &spans, WriteFlags::NONE)
            .map_err(|error| self.io_error("the sender takes no acknowledgement", error))
    }

    fn wait_readable(&mut self) -> Result<bool, StreamError> {
        self.channel
            .wait_readable(Duration::from_secs(3600))
            .map_err(|error| self.io_error("", error))
    }

    /// `false`: the stream ended before the first byte.
    fn read(&mut self, spans: &mut [SpanMut<'_>]) -> Result<bool, StreamError> {
        read_exact_into(&mut *self.channel, spans, &mut Vec::new())
            .map_err(|error| self.io_error("the rest of a packet does not come", error))
    }

    fn read_all(&mut self, spans: &mut [SpanMut<'_>]) -> Result<(), StreamError> {
        if self.read(spans)? {
            return Ok(());
        }
        let source = io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the stream ended inside a packet",
        );
        Err(StreamError::Lost {
            stream: self.index,
            source,
        })
    }

    fn illegal(&self, field: &'static str, value: u64, rule: &'static str) -> StreamError {
        self.wire_error(WireError::Illegal {
            frame: "packet header",
            field,
            value,
            rule,
        })
    }

    fn wire_error(&self, source: WireError) -> StreamError {
        let stream = self.index;
        StreamError::Wire { stream, source }
    }

    fn io_error(&self, waiting: &'static str, error: io::Error) -> StreamError {
        StreamError::from_io(
            self.index,
            waiting,
            self.stall_timeout,
            &*self.channel,
            error,
        )
    }
}

/// Zero pages and holes.
fn clear<D: Destination>(
    destination: &D,
    incoming: &Incoming,
    range: PageRange,
) -> Result<(), StreamError> {
    if !destination.is_blank() || incoming.was_written(range) {
        let region = destination.region();
        destination
            .clear(range)
            .map_err(|source| crate::region::RegionError::Read {
                name: region.name().clone(),
                origin: region.origin().to_owned(),
                offset: range.offset(),
                source,
            })?;
    }
    incoming.intact(range);
    Ok(())
}
