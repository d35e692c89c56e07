//! Peers that do what a real one never would, on plain blocking sockets.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use memferry::wire::{
    ACK_BYTES, Ack, BootId, FRAME_BYTES, FrameHeader, FromReceiver, FromSender, HEADER_BYTES,
    Header, Hex128, MarkHeader, Offer, OfferedRegion, Owner, PREAMBLE_BYTES, Preamble, Purpose,
    Status, TornTable,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::DEADLINE;

/// Connects to a `tcp:` address as `query-status` shows it.
pub(crate) fn connect(uri: &str) -> TcpStream {
    let stream = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream
}

fn read<const N: usize>(stream: &mut TcpStream) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).ok().map(|()| bytes)
}

/// The other side's preamble; `None` if it hung up instead.
pub(crate) fn read_preamble(stream: &mut TcpStream) -> Option<Preamble> {
    Some(Preamble::decode(&read::<PREAMBLE_BYTES>(stream)?).unwrap())
}

/// Writes a message; that nobody reads it any more does no harm.
pub(crate) fn say(stream: &mut TcpStream, message: &impl Serialize) {
    let _ = stream.write_all(&FrameHeader::frame(message));
}

/// The next message, a heartbeat maybe; `None` at the end of the conversation.
pub(crate) fn hear<T: DeserializeOwned>(stream: &mut TcpStream) -> Option<T> {
    let header = FrameHeader::decode(&read::<FRAME_BYTES>(stream)?).unwrap();
    let mut body = vec![0; header.length];
    stream.read_exact(&mut body).ok()?;
    Some(header.body(&body).unwrap())
}

/// The next message of a receiver that is not a heartbeat.
pub(crate) fn hear_receiver(stream: &mut TcpStream) -> Option<FromReceiver> {
    loop {
        match hear(stream)? {
            FromReceiver::Alive {} => {}
            message => return Some(message),
        }
    }
}

/// How far a [`FakeReceiver`] goes along.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Manners {
    /// Takes connections, and says nothing.
    Silent,
    /// Turns connections away with this status.
    TurnsAway(Status),
    /// Applies packets, and acknowledges marks of Iterations up to this one.
    Acknowledges(u32),
    /// Acknowledges everything, and never says *prepared*. Speaks version 2, so that it is asked for that only when
    /// the writers stand still.
    NeverPrepared,
    /// Says *prepared*, and does not answer the commit.
    NeverCommitted,
    /// Answers the first packet with bytes that are no acknowledgement.
    Garbage,
    /// Acknowledges a packet that was never sent.
    IllegalAck,
}

/// What a [`FakeReceiver`] has heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Heard {
    Connection,
    Mark { stream: u16, iteration: u32 },
    Said(FromSender),
}

/// A receiver that stops going along at a chosen place. Answers inquiries with `owner` once it is set,
/// and hangs up on them before.
pub(crate) struct FakeReceiver {
    pub(crate) uri: String,
    heard: Receiver<Heard>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    manners: Manners,
    boot_id: BootId,
    owner: Mutex<Option<Owner>>,
    connections: Mutex<Vec<TcpStream>>,
    over: AtomicBool,
    report: Mutex<Sender<Heard>>,
}

impl FakeReceiver {
    pub(crate) fn start(manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let (report, heard) = channel();
        let shared = Arc::new(Shared {
            manners,
            boot_id: memferry::journal::boot_id().unwrap(),
            owner: Mutex::default(),
            connections: Mutex::default(),
            over: AtomicBool::new(false),
            report: Mutex::new(report),
        });
        let accepting = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            for connection in listener.incoming() {
                if accepting.over.load(Ordering::Relaxed) {
                    return;
                }
                let mut connection = connection.unwrap();
                let kept = connection.try_clone().unwrap();
                accepting.connections.lock().unwrap().push(kept);
                let shared = Arc::clone(&accepting);
                thread::spawn(move || {
                    shared.serve(&mut connection);
                    // The clone that is kept must not hold the connection open.
                    if !matches!(shared.manners, Manners::Silent) {
                        let _ = connection.shutdown(Shutdown::Both);
                    }
                });
            }
        });
        Self {
            uri,
            heard,
            shared,
            thread: Some(thread),
        }
    }

    /// Waits until it has heard what `wanted` accepts.
    pub(crate) fn wait(&self, wanted: impl Fn(&Heard) -> bool) {
        loop {
            match self.heard.recv_timeout(DEADLINE) {
                Ok(heard) if wanted(&heard) => return,
                Ok(_) => {}
                Err(error) => panic!("not heard: {error}"),
            }
        }
    }

    pub(crate) fn wait_said(&self, wanted: impl Fn(&FromSender) -> bool) {
        self.wait(|heard| matches!(heard, Heard::Said(message) if wanted(message)));
    }

    /// From now on inquiries are answered.
    pub(crate) fn decide(&self, owner: Owner) {
        *self.shared.owner.lock().unwrap() = Some(owner);
    }

    /// Breaks every connection there is.
    pub(crate) fn hang_up(&self) {
        for connection in self.shared.connections.lock().unwrap().drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for FakeReceiver {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.uri.strip_prefix("tcp:").unwrap());
        self.hang_up();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn report(&self, heard: Heard) {
        let _ = self.report.lock().unwrap().send(heard);
    }

    fn serve(&self, connection: &mut TcpStream) {
        self.report(Heard::Connection);
        if matches!(self.manners, Manners::Silent) {
            return;
        }
        let Some(caller) = read_preamble(connection) else {
            return;
        };
        let mut status = Status::Ok;
        let mut answer = caller.answer(Status::Ok);
        if let Manners::TurnsAway(other) = self.manners {
            status = other;
            answer.status = status;
            if status == Status::Version {
                // What a receiver of a later version would say of itself.
                (answer.version, answer.version_oldest) = (9, 8);
            }
        }
        if matches!(self.manners, Manners::NeverPrepared) {
            (answer.version, answer.version_oldest) = (2, 2);
        }
        connection.write_all(&answer.encode()).unwrap();
        match caller.purpose {
            _ if status != Status::Ok => {}
            Purpose::Conversation => self.converse(connection),
            Purpose::Stream(stream) => {
                self.receive(connection, stream);
            }
        }
    }

    fn converse(&self, connection: &mut TcpStream) {
        while let Some(message) = hear::<FromSender>(connection) {
            self.report(Heard::Said(message.clone()));
            match message {
                FromSender::Offer(_) => {
                    let boot_id = self.boot_id.clone();
                    let token = Hex128([7; 16]);
                    let epoch = 0;
                    let accept = FromReceiver::Accept {
                        token,
                        epoch,
                        boot_id,
                    };
                    say(connection, &accept);
                }
                FromSender::Prepare { .. } if matches!(self.manners, Manners::NeverCommitted) => {
                    say(connection, &FromReceiver::Prepared {});
                }
                FromSender::Inquire { .. } => {
                    if let Some(owner) = *self.owner.lock().unwrap() {
                        say(connection, &FromReceiver::Owner { owner });
                    }
                    return;
                }
                _ => {}
            }
        }
    }

    /// Reads packets and acknowledges them; `None` at their end.
    fn receive(&self, connection: &mut TcpStream, stream: u16) -> Option<()> {
        loop {
            let header = Header::decode(&read::<HEADER_BYTES>(connection)?).unwrap();
            let (sequence, iteration) = match header {
                Header::Data(header) => {
                    let mut rest = vec![0; header.table_bytes() + header.payload as usize];
                    connection.read_exact(&mut rest).ok()?;
                    (header.sequence, header.iteration)
                }
                Header::Mark(header) => {
                    let iteration = header.iteration;
                    self.report(Heard::Mark { stream, iteration });
                    match self.manners {
                        Manners::Acknowledges(last) if iteration > last => continue,
                        _ => (header.sequence, iteration),
                    }
                }
            };
            let ack = match self.manners {
                Manners::Garbage => [0x55; ACK_BYTES],
                Manners::IllegalAck => acknowledge(sequence + 5, iteration),
                _ => acknowledge(sequence, iteration),
            };
            connection.write_all(&ack).ok()?;
        }
    }
}

fn acknowledge(sequence: u64, iteration: u32) -> [u8; ACK_BYTES] {
    let ack = Ack {
        epoch: 0,
        sequence,
        iteration,
        torn: 0,
        table_crc: TornTable::default().crc(),
    };
    ack.encode()
}

/// An offer of one Region that is all hole.
pub(crate) fn offer(id: &str, length: u64, streams: u16) -> Offer {
    let name: memferry::name::Name = id.parse().unwrap();
    Offer {
        id: name.clone(),
        nonce: Hex128::random().unwrap(),
        boot_id: memferry::journal::boot_id().unwrap(),
        streams,
        integrity: true,
        compression: false,
        window: 16 << 20,
        stall_timeout_ms: 60_000,
        recover_timeout_ms: 0,
        dry_run: false,
        regions: vec![OfferedRegion {
            name,
            length,
            data_bytes: 0,
            page_size: 4096,
        }],
    }
}

/// A sender as far as its streams.
pub(crate) struct FakeSender {
    pub(crate) uri: String,
    pub(crate) conversation: TcpStream,
    pub(crate) token: Hex128,
    pub(crate) epoch: u32,
}

impl FakeSender {
    /// Offers, and must be accepted.
    pub(crate) fn offer(uri: &str, offer: Offer) -> Self {
        let (conversation, answer) = Self::try_offer(uri, offer);
        match answer {
            Some(FromReceiver::Accept { token, epoch, .. }) => Self {
                uri: uri.to_owned(),
                conversation,
                token,
                epoch,
            },
            other => panic!("not accepted: {other:?}"),
        }
    }

    /// Offers, and gives the answer.
    pub(crate) fn try_offer(uri: &str, offer: Offer) -> (TcpStream, Option<FromReceiver>) {
        let preamble = Preamble::new(Purpose::Conversation, Hex128::ZERO, 0);
        let (mut stream, answer) = call(uri, preamble);
        assert_eq!(answer.map(|answer| answer.status), Some(Status::Ok));
        say(&mut stream, &FromSender::Offer(offer));
        let answer = hear_receiver(&mut stream);
        (stream, answer)
    }

    /// Connects a stream with another token and epoch than its own, maybe; gives the answer to it.
    pub(crate) fn stream_as(
        &self,
        stream: u16,
        token: Hex128,
        epoch: u32,
    ) -> (TcpStream, Option<Status>) {
        let (connection, answer) = call(
            &self.uri,
            Preamble::new(Purpose::Stream(stream), token, epoch),
        );
        (connection, answer.map(|answer| answer.status))
    }

    /// Connects a stream as it should be.
    pub(crate) fn stream(&self, stream: u16) -> TcpStream {
        let (connection, status) = self.stream_as(stream, self.token, self.epoch);
        assert_eq!(status, Some(Status::Ok));
        connection
    }

    /// Why the receiver ended the attempt.
    pub(crate) fn refusal(&mut self) -> String {
        match hear_receiver(&mut self.conversation) {
            Some(FromReceiver::Refuse { code, .. }) => code.to_string(),
            other => panic!("not refused: {other:?}"),
        }
    }
}

/// Connects and exchanges preambles; `None` if the other side hung up instead.
pub(crate) fn call(uri: &str, preamble: Preamble) -> (TcpStream, Option<Preamble>) {
    let mut stream = connect(uri);
    stream.write_all(&preamble.encode()).unwrap();
    let answer = read_preamble(&mut stream);
    (stream, answer)
}

/// The end of Iteration `iteration` as the `sequence`th frame of a stream that carried no payload.
pub(crate) fn mark(iteration: u32, sequence: u64) -> [u8; HEADER_BYTES] {
    let mark = MarkHeader {
        epoch: 0,
        iteration,
        sequence,
        bytes: 0,
        streams: 1,
    };
    Header::Mark(mark).encode()
}
