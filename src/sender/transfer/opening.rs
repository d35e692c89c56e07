//! How a transfer begins: what is offered, and a connection per stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;

use crate::config::{Compression, Integrity};
use crate::limits::STREAMS_CONNECTING_MAX;
use crate::peer::{self, Connection, PeerError};
use crate::region::RegionError;
use crate::stream::{Pace, StreamSetup};
use crate::wire::{
    FromReceiver, FromSender, Offer, OfferedRegion, Preamble, Purpose, StreamTotals, Token,
};

use super::super::crew::choose;
use super::super::debt::Source;
use super::super::error::TransferError;
use super::{Talk, Transfer, unexpected};

impl Transfer {
    /// Begins a conversation.
    pub(super) async fn call(&mut self) -> Result<&mut Talk, TransferError> {
        let patience = self.parameters.stall_timeout;
        let preamble = Preamble::new(Purpose::Conversation, Token::ZERO, 0);
        let connected = peer::connect(&self.order.endpoint, preamble, patience).await?;
        let (connection, version) = connected;
        self.version = version;
        self.reached = peer::reached(&connection, &self.order.endpoint);
        self.round_trip = peer::round_trip(&connection);
        Ok(self.talk.insert(Talk::start(connection, patience)))
    }

    /// Version, Regions, number of streams: the receiver says yes, or why not.
    pub(super) async fn agree(&mut self, dry_run: bool) -> Result<(), TransferError> {
        let offer = FromSender::Offer(self.offer(dry_run)?);
        let talk = self.call().await?;
        talk.say(&offer).await?;
        match talk.hear().await? {
            FromReceiver::Accept {
                token,
                epoch,
                boot_id,
            } => {
                (self.token, self.epoch) = (token, epoch);
                self.receiver_boot_id = boot_id;
                self.totals.fill(StreamTotals::default());
                Ok(())
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
            boot_id: self.order.identity.clone(),
            streams: self.parameters.streams,
            integrity: self.parameters.integrity == Integrity::Crc32c,
            compression: self.parameters.compression != Compression::Off,
            window: self.parameters.window,
            stall_timeout_ms: milliseconds(self.parameters.stall_timeout),
            recover_timeout_ms: milliseconds(self.parameters.recover_timeout),
            dry_run,
            regions: self
                .debt
                .sources()
                .iter()
                .map(describe)
                .collect::<Result<_, _>>()?,
        })
    }

    /// One connection and one thread per stream. If only some come up, those have to do: that is a slower
    /// transfer and not a failed one.
    pub(super) async fn open_streams(&mut self) -> Result<(), TransferError> {
        let setup = StreamSetup {
            regions: Arc::clone(self.debt.sources()),
            integrity: self.parameters.integrity == Integrity::Crc32c,
            compression: self.parameters.compression.algorithms(),
            window: self.parameters.window,
            pace: Arc::new(Pace::new(self.parameters.max_bandwidth, Instant::now())),
            first_sends: Arc::default(),
            stall_timeout: self.parameters.stall_timeout,
            owed: Arc::clone(self.debt.owed()),
            wake: self.crew.wake(),
            epoch: self.epoch,
        };
        let choice = choose(self.parameters.zero_copy)
            .await
            .map_err(TransferError::local("try ways to send without a copy"))?;
        let connections = self.connect_streams().await;
        for ((stream, stats), connection) in (0..).zip(&self.attempt.streams).zip(connections) {
            let connection = match connection {
                Ok(connection) => connection,
                Err(error) if self.crew.len() > 0 => {
                    tracing::warn!(id = %self.attempt.id, stream, %error, "going on without the streams from this one on");
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            let streams = self.parameters.streams;
            let opened = self.crew.open(connection, &setup, choice.as_ref(), streams);
            let opened = opened.map_err(TransferError::local("open a stream"))?;
            let (stats, tell) = (Arc::clone(stats), self.attempt.tell());
            self.crew
                .start(stream, opened, setup.clone(), stats, tell)
                .map_err(TransferError::local("start a stream"))?;
        }
        self.attempt.streams_opened(self.crew.len());
        Ok(())
    }

    /// A connection for every stream, or why there is none. Some at a time: each takes round trips.
    async fn connect_streams(&self) -> Vec<Result<Connection, PeerError>> {
        let (token, epoch) = (self.token, self.epoch);
        let patience = self.parameters.stall_timeout;
        let mut connections = Vec::new();
        let streams: Vec<u16> = (0..self.parameters.streams).collect();
        for some in streams.chunks(STREAMS_CONNECTING_MAX) {
            // Begins them all before it waits for the first.
            let connecting: Vec<_> = some
                .iter()
                .map(|&stream| {
                    let preamble = Preamble::new(Purpose::Stream(stream), token, epoch);
                    let to = self.reached.clone();
                    let connect = async move {
                        let connected = peer::connect(&to, preamble, patience).await;
                        connected.map(|(connection, _)| connection)
                    };
                    AbortOnDropHandle::new(tokio::spawn(connect))
                })
                .collect();
            for connecting in connecting {
                let panicked = |error: tokio::task::JoinError| PeerError::Lost(error.into());
                connections.push(
                    connecting
                        .await
                        .unwrap_or_else(|error| Err(panicked(error))),
                );
            }
            if connections.iter().any(Result::is_err) {
                break;
            }
        }
        connections
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
