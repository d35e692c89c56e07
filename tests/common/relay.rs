//! A TCP relay that reads the protocol: it stands between a sender and a receiver, knows every frame, and
//! does to a chosen one what a broken network would.
//!
//! A test names the frame it wants ([`Relay::hold_next`]), waits until it is there ([`Relay::wait_held`]), does
//! what it came for, and says what becomes of the frame ([`Relay::release`]). So a fault meets exactly that
//! moment of the exchange, however fast or slow the machine is.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memferry::sys::errqueue::disconnect;
use memferry::wire::{
    ACK_BYTES, Ack, FRAME_BYTES, FrameHeader, HEADER_BYTES, Header, PREAMBLE_BYTES, Preamble,
    Purpose, TORN_BYTES,
};
use serde_json::Value;

/// Who sent a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Sender,
    Receiver,
}

/// What a frame is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Preamble,
    /// A message of the conversation, by its type.
    Message(String),
    Packet {
        iteration: u32,
    },
    Mark {
        iteration: u32,
    },
    Ack,
}

/// A frame on its way.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    /// The stream it travels on; `None` is a conversation.
    pub(crate) stream: Option<u16>,
    pub(crate) from: Side,
    pub(crate) kind: Kind,
    /// All of it.
    pub(crate) bytes: usize,
    /// The part at its end that is content of Regions.
    pub(crate) payload: usize,
}

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Pass,
    /// One bit of this byte arrives wrong.
    Flip(usize),
    /// It arrives twice.
    Twice,
    /// Its first half arrives, and then the end of the connection.
    Cut,
    /// It arrives late, and what is behind it too.
    Late(Duration),
}

/// Which connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    Stream(u16),
    Streams,
    Conversation,
    All,
}

impl Which {
    fn covers(self, stream: Option<u16>) -> bool {
        match self {
            Self::Stream(number) => stream == Some(number),
            Self::Streams => stream.is_some(),
            Self::Conversation => stream.is_none(),
            Self::All => true,
        }
    }
}

/// What does not get through now. Connections stay up, and later everything arrives in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silence {
    Nothing,
    /// Nothing reaches the receiver, which can still be heard.
    TowardsReceiver,
    Everything,
}

type Wanted = Box<dyn FnMut(&Frame) -> bool + Send>;

struct State {
    target: String,
    wanted: Option<Wanted>,
    held: Option<Frame>,
    verdict: Option<Act>,
    silence: Silence,
    mark_delay: Duration,
    payloads_to_flip: u64,
    links: Vec<Arc<Link>>,
    over: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// One connection, both halves of it.
struct Link {
    sender: TcpStream,
    receiver: TcpStream,
    /// Set by the caller's preamble.
    purpose: Mutex<Option<Purpose>>,
}

impl Link {
    fn stream(&self) -> Option<u16> {
        match *self.purpose.lock().unwrap() {
            Some(Purpose::Stream(number)) => Some(number),
            _ => None,
        }
    }

    /// Resets both halves, whoever reads or writes them now.
    fn reset(&self) {
        // What is gone already is as it should be.
        let _ = disconnect(self.sender.as_fd());
        let _ = disconnect(self.receiver.as_fd());
    }
}

/// A relay to one receiver.
pub(crate) struct Relay {
    port: u16,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Relay {
    /// Relays to `target`, a `tcp:` address.
    pub(crate) fn start(target: &str) -> Self {
        // On every address: a sender may be in another network namespace.
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                target: address(target),
                wanted: None,
                held: None,
                verdict: None,
                silence: Silence::Nothing,
                mark_delay: Duration::ZERO,
                payloads_to_flip: 0,
                links: Vec::new(),
                over: false,
            }),
            changed: Condvar::new(),
        });
        Self {
            port: listener.local_addr().unwrap().port(),
            accepting: Some({
                let shared = Arc::clone(&shared);
                thread::spawn(move || accept(&listener, &shared))
            }),
            shared,
        }
    }

    /// Where senders that reach this host as `host` connect.
    pub(crate) fn uri(&self, host: IpAddr) -> String {
        format!("tcp:{host}:{}", self.port)
    }

    /// From now on new connections go to `target`.
    pub(crate) fn retarget(&self, target: &str) {
        self.shared.lock().target = address(target);
    }

    /// Holds the first frame that `wanted` accepts, and what is behind it on its connection.
    pub(crate) fn hold_next(&self, wanted: impl FnMut(&Frame) -> bool + Send + 'static) {
        self.shared.lock().wanted = Some(Box::new(wanted));
    }

    /// No frame is to be held any more.
    pub(crate) fn hold_none(&self) {
        self.shared.lock().wanted = None;
    }

    /// The frame that is held, waiting for it until `deadline`.
    pub(crate) fn wait_held(&self, deadline: Instant) -> Option<Frame> {
        let left = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), left, |state| state.held.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        state.held.clone()
    }

    /// Lets the held frame go on its way, or what is left of it.
    pub(crate) fn release(&self, act: Act) {
        let mut state = self.shared.lock();
        if state.held.take().is_some() {
            state.verdict = Some(act);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    pub(crate) fn silence(&self, silence: Silence) {
        self.shared.lock().silence = silence;
        self.shared.changed.notify_all();
    }

    /// Every mark takes this long, so that an Iteration never is too short for its writer to write.
    pub(crate) fn delay_marks(&self, delay: Duration) {
        self.shared.lock().mark_delay = delay;
    }

    /// In the payload of each of the next `count` packets that have one a bit arrives wrong.
    pub(crate) fn flip_payloads(&self, count: u64) {
        self.shared.lock().payloads_to_flip = count;
    }

    /// Resets connections in both directions. What is held or queued on them is lost.
    pub(crate) fn reset(&self, which: Which) {
        let links = self.shared.lock().links.clone();
        for link in links.iter().filter(|link| which.covers(link.stream())) {
            link.reset();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let links = {
            let mut state = self.shared.lock();
            state.over = true;
            std::mem::take(&mut state.links)
        };
        self.shared.changed.notify_all();
        for link in links {
            link.reset();
        }
        // Wakes the thread that accepts.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.accepting.take() {
            let _ = thread.join();
        }
    }
}

fn address(uri: &str) -> String {
    uri.strip_prefix("tcp:").unwrap().to_owned()
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut pumps = Vec::new();
    for sender in listener.incoming() {
        let (over, target) = {
            let state = shared.lock();
            (state.over, state.target.clone())
        };
        if over {
            break;
        }
        let Ok(sender) = sender else { continue };
        let Ok(receiver) = TcpStream::connect(&target) else {
            // As if nobody listened.
            let _ = disconnect(sender.as_fd());
            continue;
        };
        for end in [&sender, &receiver] {
            let _ = end.set_nodelay(true);
        }
        let link = Arc::new(Link {
            sender,
            receiver,
            purpose: Mutex::default(),
        });
        shared.lock().links.push(Arc::clone(&link));
        for from in [Side::Sender, Side::Receiver] {
            let (shared, link) = (Arc::clone(shared), Arc::clone(&link));
            pumps.push(thread::spawn(move || pump(&shared, &link, from)));
        }
    }
    for pump in pumps {
        let _ = pump.join();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a frame may go on, and says how.
    fn judge(&self, frame: &Frame) -> Act {
        let mut state = self.lock();
        let mut act = Act::Pass;
        if matches!(frame.kind, Kind::Mark { .. }) && !state.mark_delay.is_zero() {
            act = Act::Late(state.mark_delay);
        }
        if frame.payload > 0 && state.payloads_to_flip > 0 {
            state.payloads_to_flip -= 1;
            act = Act::Flip(frame.bytes - frame.payload / 2);
        }
        if state.held.is_none() && state.wanted.as_mut().is_some_and(|wanted| wanted(frame)) {
            state.wanted = None;
            state.verdict = None;
            state.held = Some(frame.clone());
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.verdict.is_none() && !state.over)
                .unwrap_or_else(PoisonError::into_inner);
            act = state.verdict.take().unwrap_or(Act::Pass);
        }
        let silent = |state: &State| match state.silence {
            Silence::Nothing => false,
            Silence::TowardsReceiver => frame.from == Side::Sender,
            Silence::Everything => true,
        };
        let state = self
            .changed
            .wait_while(state, |state| silent(state) && !state.over)
            .unwrap_or_else(PoisonError::into_inner);
        if let Act::Late(delay) = act {
            // A condition that never comes: the wait for the end of the relay, bounded by the delay.
            let _ = self
                .changed
                .wait_timeout_while(state, delay, |state| !state.over);
        }
        act
    }
}

/// Carries frames of one direction to the end of the connection.
fn pump(shared: &Shared, link: &Link, from: Side) {
    let (reader, writer) = match from {
        Side::Sender => (&link.sender, &link.receiver),
        Side::Receiver => (&link.receiver, &link.sender),
    };
    let mut wire = Wire {
        link,
        from,
        reader,
        bytes: Vec::new(),
        first: true,
    };
    loop {
        let read = wire.next();
        let passed = match &read {
            Ok(Some(frame)) => pass(shared.judge(frame), &mut wire.bytes, writer),
            // A frame that broke off arrives as far as it came.
            _ => write_all(writer, &wire.bytes).map(|()| false),
        };
        match (read, passed) {
            (Ok(Some(_)), Ok(true)) => {}
            (Ok(None), Ok(_)) => {
                let _ = writer.shutdown(Shutdown::Write);
                return;
            }
            (Ok(Some(_)), Ok(false)) => {
                // The end of the connection, in order, as far as the one who reads can see.
                let _ = writer.shutdown(Shutdown::Write);
                let _ = reader.shutdown(Shutdown::Both);
                return;
            }
            _ => {
                link.reset();
                return;
            }
        }
    }
}

/// Writes a frame as it was judged; `false`: nothing may follow it.
fn pass(act: Act, bytes: &mut [u8], writer: &TcpStream) -> io::Result<bool> {
    match act {
        Act::Pass | Act::Late(_) => write_all(writer, bytes)?,
        Act::Flip(at) => {
            bytes[at] ^= 0x10;
            write_all(writer, bytes)?;
        }
        Act::Twice => {
            write_all(writer, bytes)?;
            write_all(writer, bytes)?;
        }
        Act::Cut => write_all(writer, &bytes[..bytes.len() / 2])?,
    }
    Ok(act != Act::Cut)
}

fn write_all(mut writer: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    writer.write_all(bytes)
}

/// Reads frames of one direction.
struct Wire<'a> {
    link: &'a Link,
    from: Side,
    reader: &'a TcpStream,
    /// The last frame, or the part of it that came.
    bytes: Vec<u8>,
    first: bool,
}

impl Wire<'_> {
    /// The next frame; `None` at the end of the connection. What cannot be understood is an error: a relay
    /// that guesses would hold the wrong frame.
    fn next(&mut self) -> io::Result<Option<Frame>> {
        self.bytes.clear();
        let (kind, payload) = if std::mem::take(&mut self.first) {
            if !self.read(PREAMBLE_BYTES)? {
                return Ok(None);
            }
            if self.from == Side::Sender {
                let preamble = Preamble::decode(self.fixed()).map_err(io::Error::other)?;
                *self.link.purpose.lock().unwrap() = Some(preamble.purpose);
            }
            (Kind::Preamble, 0)
        } else {
            match (self.link.stream(), self.from) {
                (None, _) => {
                    if !self.read(FRAME_BYTES)? {
                        return Ok(None);
                    }
                    let header = FrameHeader::decode(self.fixed()).map_err(io::Error::other)?;
                    if !self.read(header.length)? {
                        return Ok(None);
                    }
                    let body: Value = serde_json::from_slice(&self.bytes[FRAME_BYTES..])?;
                    let name = body["type"].as_str().unwrap_or_default();
                    (Kind::Message(name.to_owned()), 0)
                }
                (Some(_), Side::Sender) => {
                    if !self.read(HEADER_BYTES)? {
                        return Ok(None);
                    }
                    match Header::decode(self.fixed()).map_err(io::Error::other)? {
                        Header::Mark(mark) => (
                            Kind::Mark {
                                iteration: mark.iteration,
                            },
                            0,
                        ),
                        Header::Data(data) => {
                            let payload = data.payload as usize;
                            if !self.read(data.table_bytes() + payload)? {
                                return Ok(None);
                            }
                            let iteration = data.iteration;
                            (Kind::Packet { iteration }, payload)
                        }
                    }
                }
                (Some(_), Side::Receiver) => {
                    if !self.read(ACK_BYTES)? {
                        return Ok(None);
                    }
                    let ack = Ack::decode(self.fixed()).map_err(io::Error::other)?;
                    if !self.read(ack.torn as usize * TORN_BYTES)? {
                        return Ok(None);
                    }
                    (Kind::Ack, 0)
                }
            }
        };
        Ok(Some(Frame {
            stream: self.link.stream(),
            from: self.from,
            kind,
            bytes: self.bytes.len(),
            payload,
        }))
    }

    /// Reads `count` bytes more; `false` if the connection ends before, and then has what came.
    fn read(&mut self, count: usize) -> io::Result<bool> {
        let start = self.bytes.len();
        let got = self.reader.take(count as u64).read_to_end(&mut self.bytes);
        got.map(|_| self.bytes.len() - start == count)
    }

    fn fixed<const N: usize>(&self) -> &[u8; N] {
        self.bytes.first_chunk().expect("as many were read")
    }
}
