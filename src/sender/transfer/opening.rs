//! How a transfer begins: what is offered, and a connection per stream.

use std::sync::Arc;
use std::time::Instant;

use crate::config::Integrity;
use crate::peer::{self};
use crate::region::RegionError;
use crate::stream::{Pace, StreamSetup};
use crate::wire::{FromReceiver, FromSender, Offer, OfferedRegion, Preamble, Purpose, Token};

use super::super::debt::Source;
use super::super::error::TransferError;
use super::super::status::Status;
use super::{Talk, Transfer, unexpected};

impl Transfer {
    /// Version, Regions, number of streams: the receiver says yes, or why not.
    pub(super) async fn agree(&mut self, dry_run: bool) -> Result<(Token, u32), TransferError> {
        let patience = self.parameters.stall_timeout;
        let preamble = Preamble::new(Purpose::Conversation, Token::ZERO, 0);
        let connection = peer::connect(&self.order.endpoint, preamble, patience).await?;
        self.reached = peer::reached(&connection, &self.order.endpoint);
        let offer = FromSender::Offer(self.offer(dry_run)?);
        let talk = self.talk.insert(Talk::start(connection, patience));
        talk.say(&offer).await?;
        match talk.hear().await? {
            FromReceiver::Accept {
                token,
                epoch,
                boot_id,
            } => {
                self.receiver_boot_id = boot_id;
                Ok((token, epoch))
            }
            other => Err(unexpected(other)),
        }
    }

    fn offer(&self, dry_run: bool) -> Result<Offer, RegionError> {
        let describe = |(region, _): &Source| {
            Ok(OfferedRegion {
                name: region.name().clone(),
                length: region.bytes(),
                data_bytes: region.allocated_bytes()?,
                page_size: region.page_size(),
            })
        };
        Ok(Offer {
            id: self.attempt.id.clone(),
            nonce: self.nonce,
            boot_id: self.order.boot_id.clone(),
            streams: self.parameters.streams,
            integrity: self.parameters.integrity == Integrity::Crc32c,
            window: self.parameters.window,
            stall_timeout_ms: u64::try_from(self.parameters.stall_timeout.as_millis())
                .unwrap_or(u64::MAX),
            dry_run,
            regions: self
                .debt
                .sources()
                .iter()
                .map(describe)
                .collect::<Result<_, _>>()?,
        })
    }

    /// One connection and one thread per stream.
    pub(super) async fn open_streams(
        &mut self,
        token: Token,
        epoch: u32,
    ) -> Result<(), TransferError> {
        let setup = StreamSetup {
            regions: Arc::clone(self.debt.sources()),
            integrity: self.parameters.integrity == Integrity::Crc32c,
            window: self.parameters.window,
            pace: Arc::new(Pace::new(self.parameters.max_bandwidth, Instant::now())),
            stall_timeout: self.parameters.stall_timeout,
            wake: self.wake.clone(),
            epoch,
        };
        for (stream, stats) in (0..).zip(&self.attempt.streams) {
            let preamble = Preamble::new(Purpose::Stream(stream), token, epoch);
            let connection = peer::connect(&self.reached, preamble, setup.stall_timeout).await?;
            self.crew
                .start(
                    connection,
                    setup.clone(),
                    self.parameters.zero_copy,
                    self.parameters.streams,
                    Arc::clone(stats),
                    self.attempt.tell(),
                )
                .map_err(TransferError::local("start a stream"))?;
        }
        self.attempt.enter(Status::Active);
        Ok(())
    }
}
