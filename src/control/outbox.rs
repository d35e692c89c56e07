//! What waits to be written to one client.
//!
//! Answers are owed: they are never dropped, and a client that does not take them is given up. Events
//! are a service: above a bound the newest is dropped and counted. So the queue is bounded without
//! anyone ever waiting for the client.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::encode::Line;
use crate::limits::{CONTROL_ANSWER_BYTES_MAX, CONTROL_EVENT_QUEUE_BYTES_MAX};

#[derive(Debug, Default)]
pub(super) struct Outbox {
    queue: Mutex<Queue>,
    changed: Notify,
}

/// A line, and the descriptors that go with its first byte.
#[derive(Debug, Clone)]
pub(super) struct Parcel {
    pub(super) line: Line,
    pub(super) fds: Arc<[OwnedFd]>,
}

impl From<Line> for Parcel {
    fn from(line: Line) -> Self {
        Self {
            line,
            fds: Arc::new([]),
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    parcels: VecDeque<(Parcel, Kind)>,
    owed_bytes: usize,
    event_bytes: usize,
    events_dropped: u64,
    /// Events are for clients that have negotiated.
    events_wanted: bool,
    closed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Owed,
    Event,
}

impl Outbox {
    /// Queues an answer, or anything else that must arrive.
    pub(super) fn owe(&self, parcel: impl Into<Parcel>) {
        self.lock().push(parcel, Kind::Owed);
        self.changed.notify_waiters();
    }

    /// Queues the answer to the negotiation; events may follow it, and none comes before it.
    pub(super) fn owe_and_open(&self, line: Line) {
        let mut queue = self.lock();
        queue.push(line, Kind::Owed);
        queue.events_wanted = true;
        drop(queue);
        self.changed.notify_waiters();
    }

    /// Queues an event that must arrive; false when the client cannot get it.
    pub(super) fn owe_event(&self, line: Line) -> bool {
        let mut queue = self.lock();
        if queue.closed || !queue.events_wanted {
            return false;
        }
        queue.push(line, Kind::Owed);
        drop(queue);
        self.changed.notify_waiters();
        true
    }

    /// Queues an event if the client wants events and has room.
    pub(super) fn offer(&self, line: Line) {
        let mut queue = self.lock();
        if queue.closed || !queue.events_wanted {
            return;
        }
        if queue.event_bytes + line.len() > CONTROL_EVENT_QUEUE_BYTES_MAX {
            queue.events_dropped += 1;
            return;
        }
        queue.push(line, Kind::Event);
        drop(queue);
        self.changed.notify_waiters();
    }

    /// What to write now; `None` once closed and empty. It stays queued until `written`, so that what
    /// is half written still counts.
    pub(super) async fn first(&self) -> Option<Parcel> {
        self.when(|queue| match queue.parcels.front() {
            Some((parcel, _)) => Some(Some(parcel.clone())),
            None if queue.closed => Some(None),
            None => None,
        })
        .await
    }

    /// The first parcel has been written.
    pub(super) fn written(&self) {
        let mut queue = self.lock();
        match queue.parcels.pop_front() {
            Some((parcel, Kind::Owed)) => queue.owed_bytes -= parcel.line.len(),
            Some((parcel, Kind::Event)) => queue.event_bytes -= parcel.line.len(),
            None => {}
        }
        drop(queue);
        self.changed.notify_waiters();
    }

    /// Returns once the client owes us reading: an answer waits, or the session only waits to end.
    pub(super) async fn owing(&self) {
        self.when(|queue| (queue.owed_bytes > 0 || queue.closed).then_some(()))
            .await;
    }

    /// Returns once there is room for the answer to another request.
    pub(super) async fn room(&self) {
        self.when(|queue| {
            (queue.owed_bytes < CONTROL_ANSWER_BYTES_MAX || queue.closed).then_some(())
        })
        .await;
    }

    /// Nothing more will be queued.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_waiters();
    }

    /// Events this client missed.
    pub(super) fn events_dropped(&self) -> u64 {
        self.lock().events_dropped
    }

    async fn when<T>(&self, check: impl Fn(&Queue) -> Option<T>) -> T {
        loop {
            // Asked for before looking, so that a change in between wakes it.
            let changed = self.changed.notified();
            if let Some(found) = check(&self.lock()) {
                return found;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn push(&mut self, parcel: impl Into<Parcel>, kind: Kind) {
        if self.closed {
            return;
        }
        let parcel = parcel.into();
        match kind {
            Kind::Owed => self.owed_bytes += parcel.line.len(),
            Kind::Event => self.event_bytes += parcel.line.len(),
        }
        self.parcels.push_back((parcel, kind));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_above_the_bound_are_dropped_and_answers_never() {
        let outbox = Outbox::default();
        let line: Line = vec![b'x'; 64 * 1024].into();
        outbox.offer(line.clone());
        assert!(
            outbox.lock().parcels.is_empty(),
            "nobody has negotiated yet"
        );
        outbox.owe_and_open(line.clone());
        for _ in 0..10 {
            outbox.offer(line.clone());
            outbox.owe(line.clone());
        }
        assert_eq!(outbox.events_dropped(), 6);
        outbox.close();
        let mut left = 0;
        while outbox.first().await.is_some() {
            outbox.written();
            left += 1;
        }
        assert_eq!(left, 1 + 10 + 4);
    }
}
