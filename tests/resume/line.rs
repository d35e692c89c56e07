//! A bad line: forwards TCP connections to a receiver, and breaks them when it is told to.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

use memferry::wire::{PREAMBLE_BYTES, Preamble, Purpose};

/// Which connections a fault is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    All,
    Conversation,
    Stream(u16),
}

/// What happens to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Damage {
    /// One bit is turned over.
    Flip,
    /// The rest is not forwarded, and the connection ends.
    Cut,
}

impl Which {
    fn is(self, purpose: Purpose) -> bool {
        match self {
            Self::All => true,
            Self::Conversation => purpose == Purpose::Conversation,
            Self::Stream(stream) => purpose == Purpose::Stream(stream),
        }
    }
}

/// When it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// So many bytes from now, sender to receiver.
    Bytes(u64),
    /// When the sender says this.
    Sent(&'static str),
    /// When the receiver says this.
    Answered(&'static str),
}

/// A fault that waits for its moment.
#[derive(Debug)]
struct Trap {
    which: Which,
    damage: Damage,
    moment: Moment,
}

#[derive(Debug, Default)]
struct Shared {
    links: Mutex<Vec<(Purpose, [TcpStream; 2])>>,
    trap: Mutex<Option<Trap>>,
    /// Nothing is forwarded, and nothing closed.
    silent: Mutex<bool>,
    changed: Condvar,
    over: AtomicBool,
    /// Nobody can connect.
    closed: AtomicBool,
    /// A trap for every new connection.
    every: Mutex<Option<(Which, Moment)>>,
    /// Only streams below this number can.
    streams_max: Mutex<Option<u16>>,
    connections: AtomicU64,
    forwarded: AtomicU64,
}

/// The line. Dropping it breaks everything.
pub(crate) struct Line {
    pub(crate) uri: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// A line to a `tcp:` address.
    pub(crate) fn to(uri: &str) -> Self {
        let to = uri.strip_prefix("tcp:").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared::default());
        let accepting = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            for connection in listener.incoming() {
                if accepting.over.load(Ordering::Relaxed) {
                    return;
                }
                if accepting.closed.load(Ordering::Relaxed) {
                    continue;
                }
                accepting.connections.fetch_add(1, Ordering::Relaxed);
                let (shared, to) = (Arc::clone(&accepting), to.clone());
                thread::spawn(move || shared.link(connection.unwrap(), &to));
            }
        });
        Self {
            uri,
            shared,
            thread: Some(thread),
        }
    }

    /// Breaks connections now.
    pub(crate) fn cut(&self, which: Which) {
        self.shared.cut(which);
    }

    /// Damages what passes on a connection at that moment; once.
    pub(crate) fn set_trap(&self, which: Which, damage: Damage, moment: Moment) {
        *self.shared.trap.lock().unwrap() = Some(Trap {
            which,
            damage,
            moment,
        });
    }

    /// Cuts every connection of that kind at that moment of its life.
    pub(crate) fn set_every(&self, which: Which, moment: Moment) {
        *self.shared.every.lock().unwrap() = Some((which, moment));
    }

    /// Hangs up on streams from this number on.
    pub(crate) fn set_streams_max(&self, streams: u16) {
        *self.shared.streams_max.lock().unwrap() = Some(streams);
    }

    /// Whether the trap has done its work.
    pub(crate) fn has_sprung(&self) -> bool {
        self.shared.trap.lock().unwrap().is_none()
    }

    /// Whether bytes stay where they are, as in a network that swallows them.
    pub(crate) fn set_silent(&self, silent: bool) {
        *self.shared.silent.lock().unwrap() = silent;
        self.shared.changed.notify_all();
    }

    /// Whether new connections are hung up on.
    pub(crate) fn set_closed(&self, closed: bool) {
        self.shared.closed.store(closed, Ordering::Relaxed);
    }

    /// Connections so far.
    pub(crate) fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Bytes forwarded to the receiver so far.
    pub(crate) fn forwarded(&self) -> u64 {
        self.shared.forwarded.load(Ordering::Relaxed)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.set_silent(false);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.uri.strip_prefix("tcp:").unwrap());
        self.cut(Which::All);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn cut(&self, which: Which) {
        let mut links = self.links.lock().unwrap();
        links.retain(|(purpose, ends)| {
            let cut = which.is(*purpose);
            if cut {
                ends.iter().for_each(|end| {
                    let _ = end.shutdown(Shutdown::Both);
                });
            }
            !cut
        });
    }

    /// Forwards both ways until one side ends.
    fn link(self: Arc<Self>, mut caller: TcpStream, to: &str) {
        let Ok(mut called) = TcpStream::connect(to) else {
            return;
        };
        let mut preamble = [0; PREAMBLE_BYTES];
        if caller.read_exact(&mut preamble).is_err() || called.write_all(&preamble).is_err() {
            return;
        }
        let Ok(Preamble { purpose, .. }) = Preamble::decode(&preamble) else {
            return;
        };
        if let Some((which, moment)) = *self.every.lock().unwrap()
            && which.is(purpose)
        {
            *self.trap.lock().unwrap() = Some(Trap {
                which,
                damage: Damage::Cut,
                moment,
            });
        }
        let streams_max = *self.streams_max.lock().unwrap();
        if let (Purpose::Stream(stream), Some(max)) = (purpose, streams_max)
            && stream >= max
        {
            return;
        }
        caller.set_nodelay(true).unwrap();
        called.set_nodelay(true).unwrap();
        let ends = || [caller.try_clone().unwrap(), called.try_clone().unwrap()];
        let ([back_to, back_from], kept) = (ends(), ends());
        self.links.lock().unwrap().push((purpose, kept));
        let shared = Arc::clone(&self);
        let back = thread::spawn(move || shared.forward(back_from, back_to, purpose, true));
        let [from, into] = ends();
        self.forward(from, into, purpose, false);
        let _ = back.join();
    }

    fn forward(&self, mut from: TcpStream, mut into: TcpStream, purpose: Purpose, back: bool) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            {
                let silent = self.silent.lock().unwrap();
                drop(self.changed.wait_while(silent, |silent| *silent).unwrap());
            }
            let bytes = &mut buffer[..count];
            let keep = self.damaged(purpose, back, bytes);
            if into.write_all(&bytes[..keep]).is_err() || keep < count {
                break;
            }
            if !back {
                self.forwarded.fetch_add(count as u64, Ordering::Relaxed);
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = into.shutdown(Shutdown::Both);
    }

    /// Does to `bytes` what the trap says; gives how many of them go on.
    fn damaged(&self, purpose: Purpose, back: bool, bytes: &mut [u8]) -> usize {
        let mut trap = self.trap.lock().unwrap();
        let Some(set) = trap.as_mut().filter(|trap| trap.which.is(purpose)) else {
            return bytes.len();
        };
        let find = |text: &str| {
            let mut windows = bytes.windows(text.len());
            windows.position(|window| window == text.as_bytes())
        };
        let at = match &mut set.moment {
            Moment::Bytes(left) if !back => {
                let at = usize::try_from(*left).ok().filter(|at| *at < bytes.len());
                *left = left.saturating_sub(bytes.len() as u64);
                at
            }
            Moment::Sent(text) if !back => find(text),
            Moment::Answered(text) if back => find(text),
            _ => None,
        };
        let Some(at) = at else {
            return bytes.len();
        };
        let damage = set.damage;
        *trap = None;
        match damage {
            Damage::Cut => at,
            Damage::Flip => {
                bytes[at] ^= 0x10;
                bytes.len()
            }
        }
    }
}
