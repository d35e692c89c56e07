//! A TCP relay that reads the protocol: it stands between a sender and a receiver, knows every frame, and
//! does to a chosen one what a broken network would.
//!
//! A test names the frame it wants ([`Relay::hold_next`]), waits until it is there ([`Relay::wait_held`]), does
//! what it came for, and says what becomes of the frame ([`Relay::release`]). So a fault meets exactly that
//! moment of the exchange, however fast or slow the machine is. What needs nobody to wait for it is
//! [`Relay::damage`].

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

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
    /// A bit arrives wrong, before the payload.
    FlipHead,
    /// A bit of the payload arrives wrong.
    FlipPayload,
    /// It arrives twice.
    Twice,
    /// Its first half arrives, and then the end of the connection.
    Cut,
    /// It does not arrive, and what is behind it does: as if it had not been sent yet.
    Swallow,
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
    pub(crate) fn covers(self, stream: Option<u16>) -> bool {
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

/// What happens to frames without further notice.
struct Damage {
    wanted: Wanted,
    /// To so many of them.
    left: u64,
    act: Act,
}

struct State {
    target: String,
    wanted: Option<Wanted>,
    /// The frame that is held, and how many were before it.
    held: Option<(u64, Frame)>,
    holds: u64,
    /// Of frames that are to go on.
    verdicts: Vec<(u64, Act)>,
    damages: Vec<Damage>,
    silence: Silence,
    links: Vec<Arc<Link>>,
    connections: u64,
    /// Bytes passed on to the receiver.
    forwarded: u64,
    /// When connections were seen to end, and whose end that was.
    hung_up: Vec<(Side, SystemTime)>,
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
                holds: 0,
                verdicts: Vec::new(),
                damages: Vec::new(),
                silence: Silence::Nothing,
                links: Vec::new(),
                connections: 0,
                forwarded: 0,
                hung_up: Vec::new(),
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

    /// Where senders on this host connect.
    pub(crate) fn local_uri(&self) -> String {
        self.uri(Ipv4Addr::LOCALHOST.into())
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
        state.held.as_ref().map(|(_, frame)| frame.clone())
    }

    /// Lets the held frame go on its way, or what is left of it.
    pub(crate) fn release(&self, act: Act) {
        let mut state = self.shared.lock();
        if let Some((number, _)) = state.held.take() {
            state.verdicts.push((number, act));
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    pub(crate) fn silence(&self, silence: Silence) {
        self.shared.lock().silence = silence;
        self.shared.changed.notify_all();
    }

    /// Does this to the next `times` frames that `wanted` accepts.
    pub(crate) fn damage(
        &self,
        act: Act,
        times: u64,
        wanted: impl FnMut(&Frame) -> bool + Send + 'static,
    ) {
        let wanted = Box::new(wanted);
        let left = times;
        let mut state = self.shared.lock();
        state.damages.push(Damage { wanted, left, act });
    }

    /// Whether all damage that was asked for is done.
    pub(crate) fn is_spent(&self) -> bool {
        self.shared
            .lock()
            .damages
            .iter()
            .all(|damage| damage.left == 0)
    }

    /// No more damage is done.
    pub(crate) fn heal(&self) {
        self.shared.lock().damages.clear();
    }

    /// Connections so far.
    pub(crate) fn connections(&self) -> u64 {
        self.shared.lock().connections
    }

    /// Bytes passed on to the receiver so far.
    pub(crate) fn forwarded(&self) -> u64 {
        self.shared.lock().forwarded
    }

    /// When the first connection ended, since then, at its end on this side.
    pub(crate) fn hung_up_since(&self, side: Side, since: SystemTime) -> Option<SystemTime> {
        let state = self.shared.lock();
        let mut ends = state.hung_up.iter();
        ends.find(|(of, at)| *of == side && *at >= since)
            .map(|(_, at)| *at)
    }

    /// Resets connections in both directions. What is held or queued on them is lost.
    pub(crate) fn reset(&self, which: Which) {
        let links = &mut self.shared.lock().links;
        for link in links.extract_if(.., |link| which.covers(link.stream())) {
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
        {
            let mut state = shared.lock();
            state.links.push(Arc::clone(&link));
            state.connections += 1;
        }
        pumps.retain(|pump: &JoinHandle<()>| !pump.is_finished());
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
        for damage in &mut state.damages {
            if damage.left > 0 && (damage.wanted)(frame) {
                damage.left -= 1;
                act = damage.act;
            }
        }
        if state.held.is_none() && state.wanted.as_mut().is_some_and(|wanted| wanted(frame)) {
            state.wanted = None;
            let mine = state.holds;
            state.holds += 1;
            state.held = Some((mine, frame.clone()));
            self.changed.notify_all();
            let judged = |state: &State| state.verdicts.iter().position(|(at, _)| *at == mine);
            state = self
                .changed
                .wait_while(state, |state| judged(state).is_none() && !state.over)
                .unwrap_or_else(PoisonError::into_inner);
            act = judged(&state).map_or(Act::Pass, |at| state.verdicts.swap_remove(at).1);
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
        if !matches!(read, Ok(Some(_))) {
            shared.lock().hung_up.push((from, SystemTime::now()));
        }
        let passed = match &read {
            Ok(Some(frame)) => {
                let passed = pass(shared.judge(frame), frame, &mut wire.bytes, writer);
                if from == Side::Sender {
                    shared.lock().forwarded += frame.bytes as u64;
                }
                passed
            }
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
fn pass(act: Act, frame: &Frame, bytes: &mut [u8], writer: &TcpStream) -> io::Result<bool> {
    match act {
        Act::Pass | Act::Late(_) => write_all(writer, bytes)?,
        Act::FlipHead | Act::FlipPayload => {
            let at = match act {
                Act::FlipHead => (frame.bytes - frame.payload) / 2,
                _ => frame.bytes - frame.payload.div_ceil(2),
            };
            bytes[at] ^= 0x10;
            write_all(writer, bytes)?;
        }
        Act::Twice => {
            write_all(writer, bytes)?;
            write_all(writer, bytes)?;
        }
        Act::Cut => write_all(writer, &bytes[..bytes.len() / 2])?,
        Act::Swallow => {}
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
                            let payload = data.payload_on_wire() as usize;
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
