//! Acknowledgements: the window they open, and what they say is owed.

use std::time::{Duration, Instant};

use crate::channel::read_exact_into;
use crate::pages::PageRange;
use crate::region::SpanMut;
use crate::wire::{ACK_BYTES, Ack, WireError};

use super::super::StreamError;
use super::OutgoingStream;

impl OutgoingStream {
    /// Reads the acknowledgements that are there, and waits for more while the window is full.
    pub(super) fn wait_for_window(&mut self, bytes: u64, blocks: u64) -> Result<(), StreamError> {
        while !self.window.is_empty() {
            let full = !self.window.has_room(bytes, blocks);
            if !full && !self.readable(Duration::ZERO)? {
                return Ok(());
            }
            self.read_ack()?;
        }
        Ok(())
    }

    fn readable(&mut self, timeout: Duration) -> Result<bool, StreamError> {
        self.channel
            .wait_readable(timeout)
            .map_err(|error| self.io_error("the receiver acknowledges nothing", error))
    }

    /// Waits for one acknowledgement. A slow link is not a dead one: as long as the peer's kernel takes
    /// bytes off our queue there is progress.
    pub(super) fn read_ack(&mut self) -> Result<(), StreamError> {
        const WAITING: &str = "the receiver acknowledges nothing";
        let mut queued = self.channel.queued_bytes();
        while !self.readable(self.setup.stall_timeout)? {
            let now = self.channel.queued_bytes();
            if now >= queued {
                return Err(self.io_error(WAITING, std::io::ErrorKind::TimedOut.into()));
            }
            queued = now;
        }
        let mut bytes = [0; ACK_BYTES];
        self.read(&mut bytes)?;
        let ack = Ack::decode(&bytes).map_err(|source| self.wire_error(source))?;
        let packet = self
            .window
            .acknowledged(&ack, self.setup.epoch)
            .map_err(|source| self.wire_error(source))?;
        self.stats.settled_bytes.add(packet.memory_bytes);
        if let Some(carried) = packet.carried
            && let Some(way) = self.packing.arrived(carried, Instant::now())
        {
            self.stats.set_compression(way);
        }
        let Some((region, runs)) = packet.pages else {
            return Ok(());
        };
        let torn = match ack.torn {
            0 => Vec::new(),
            _ => self.read_torn(&ack, region, &runs)?,
        };
        self.setup.owed.pay(region, &runs, &torn);
        Ok(())
    }

    /// Reads which of a packet's pages arrived torn.
    fn read_torn(
        &mut self,
        ack: &Ack,
        region: u32,
        sent: &[PageRange],
    ) -> Result<Vec<PageRange>, StreamError> {
        let mut table = std::mem::take(&mut self.torn_table);
        self.read(table.buffer(ack))?;
        let pages = self.setup.regions[region as usize].0.pages();
        let runs = table
            .decode(ack, pages)
            .map_err(|source| self.wire_error(source))?;
        let mut torn = Vec::new();
        for run in runs {
            if !sent.iter().any(|sent| sent.contains(run)) {
                return Err(self.illegal_ack(
                    "torn",
                    run.first,
                    "the packet does not have these pages",
                ));
            }
            self.stats.torn_pages.add(run.count);
            torn.push(run);
        }
        self.torn_table = table;
        Ok(torn)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        const WAITING: &str = "the receiver acknowledges nothing";
        let mut none = Vec::new();
        match read_exact_into(
            &mut *self.channel,
            &mut [SpanMut::of_slice(bytes)],
            &mut none,
        ) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.io_error(WAITING, std::io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.io_error(WAITING, error)),
        }
    }

    fn illegal_ack(&self, field: &'static str, value: u64, rule: &'static str) -> StreamError {
        self.wire_error(WireError::Illegal {
            frame: "acknowledgement",
            field,
            value,
            rule,
        })
    }
}
