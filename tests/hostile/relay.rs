//! Stands between a sender and a receiver: counts what passes, holds it at any byte, and cuts it off.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

#[derive(Debug)]
struct State {
    target: SocketAddr,
    /// Bytes of all connections and both directions that went on.
    passed: u64,
    /// How many may have passed when everything is held.
    hold_at: Option<u64>,
    held: bool,
    /// Both ends of every connection there was since the last `forget`.
    connections: Vec<[TcpStream; 2]>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of `bytes` may go on now; waits while everything is held.
    fn admit(&self, bytes: usize) -> usize {
        let mut state = self.lock();
        loop {
            let left = state.hold_at.map(|at| at.saturating_sub(state.passed));
            if state.held {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            } else if left == Some(0) {
                state.held = true;
                state.hold_at = None;
                self.changed.notify_all();
            } else {
                let left = left.and_then(|left| usize::try_from(left).ok());
                let admitted = bytes.min(left.unwrap_or(bytes));
                state.passed += admitted as u64;
                return admitted;
            }
        }
    }
}

/// Its threads end with their connections, and the last of them with the test.
#[derive(Debug)]
pub(crate) struct Relay {
    shared: Arc<Shared>,
    pub(crate) uri: String,
}

impl Relay {
    /// Passes on to the receiver at `target`, a `tcp:` URI.
    pub(crate) fn new(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                target: address(target),
                passed: 0,
                hold_at: None,
                held: false,
                connections: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for near in listener.incoming() {
                join(&accepting, near.unwrap());
            }
        });
        Self { shared, uri }
    }

    /// The receiver listens somewhere else now.
    pub(crate) fn set_target(&self, uri: &str) {
        self.shared.lock().target = address(uri);
    }

    /// Holds everything once so many more bytes have passed.
    pub(crate) fn hold_after(&self, bytes: u64) {
        let mut state = self.shared.lock();
        state.hold_at = Some(state.passed + bytes);
    }

    /// Whether everything is held; waits for it no longer than `time`.
    pub(crate) fn is_held(&self, time: Duration) -> bool {
        let state = self.shared.lock();
        let waited = self
            .shared
            .changed
            .wait_timeout_while(state, time, |state| !state.held);
        waited.unwrap_or_else(PoisonError::into_inner).0.held
    }

    /// Nothing is held any more, nor will be.
    pub(crate) fn release(&self) {
        let mut state = self.shared.lock();
        state.held = false;
        state.hold_at = None;
        self.shared.changed.notify_all();
    }

    /// Cuts the connections that `chosen` picks by their number, in the order in which they were made.
    pub(crate) fn cut(&self, chosen: impl Fn(u64, u64) -> bool) {
        let state = self.shared.lock();
        let count = state.connections.len() as u64;
        for (number, ends) in (0..count).zip(&state.connections) {
            if chosen(number, count) {
                // One that has ended meanwhile is cut already.
                ends.iter()
                    .for_each(|end| drop(end.shutdown(Shutdown::Both)));
            }
        }
    }

    /// The connections so far have had their time.
    pub(crate) fn forget(&self) {
        self.release();
        self.cut(|_, _| true);
        self.shared.lock().connections.clear();
    }
}

fn address(uri: &str) -> SocketAddr {
    uri.strip_prefix("tcp:").unwrap().parse().unwrap()
}

/// Passes on between `near` and a new connection to the target, until either side ends.
fn join(shared: &Arc<Shared>, near: TcpStream) {
    let target = shared.lock().target;
    // Nobody there: the sender sees its own connection end.
    let Ok(far) = TcpStream::connect(target) else {
        return;
    };
    let copy = |stream: &TcpStream| stream.try_clone().unwrap();
    for end in [&near, &far] {
        end.set_nodelay(true).unwrap();
    }
    shared.lock().connections.push([copy(&near), copy(&far)]);
    for (from, to) in [(copy(&near), copy(&far)), (far, near)] {
        let shared = Arc::clone(shared);
        thread::spawn(move || pass(&shared, from, to));
    }
}

fn pass(shared: &Shared, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 256 << 10];
    'ended: while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(shared.admit(rest.len()));
            if to.write_all(now).is_err() {
                break 'ended;
            }
            rest = later;
        }
    }
    // Whoever has gone may have said goodbye to us already.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
