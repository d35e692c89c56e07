//! Events from anywhere in the daemon to every client that has negotiated.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use super::outbox::Outbox;
use super::{ClientId, encode};

/// Announces events. Clones announce to the same clients. Never waits.
#[derive(Debug, Clone, Default)]
pub struct EventBus(Arc<Bus>);

#[derive(Debug, Default)]
struct Bus {
    clients: Mutex<HashMap<ClientId, Arc<Outbox>>>,
    next: AtomicU64,
    dropped: AtomicU64,
}

impl EventBus {
    /// A bus nobody listens to yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells every client, stamped with the time of this call. A client that does not keep up misses it.
    pub fn publish(&self, name: &str, data: Value) {
        self.publish_to_others(&[], name, data);
    }

    /// The same for every client but these.
    pub fn publish_to_others(&self, but: &[ClientId], name: &str, data: Value) {
        let Some(line) = encode::event(name, data) else {
            tracing::warn!(
                event = name,
                "event is too large for a client and was dropped"
            );
            return;
        };
        for (client, outbox) in self.clients().iter() {
            if !but.contains(client) {
                outbox.offer(line.clone());
            }
        }
    }

    /// Tells one client something it must not miss; false when it is not there any more. Such an event
    /// is never dropped: a client that does not read it within the reply deadline loses its connection.
    #[must_use]
    pub fn publish_to(&self, client: ClientId, name: &str, data: Value) -> bool {
        let Some(line) = encode::event(name, data) else {
            return false;
        };
        match self.clients().get(&client) {
            Some(outbox) => outbox.owe_event(line),
            None => false,
        }
    }

    /// Events that clients have missed since the start because they did not keep up.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        let now: u64 = self
            .clients()
            .values()
            .map(|outbox| outbox.events_dropped())
            .sum();
        self.0.dropped.load(Ordering::Relaxed) + now
    }

    /// A new client. It leaves when the returned value is dropped.
    pub(super) fn join(&self, outbox: Arc<Outbox>) -> Member {
        let id = ClientId(self.0.next.fetch_add(1, Ordering::Relaxed));
        self.clients().insert(id, outbox);
        Member {
            bus: self.clone(),
            id,
        }
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<ClientId, Arc<Outbox>>> {
        self.0
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A client's place on the bus.
#[derive(Debug)]
pub(super) struct Member {
    bus: EventBus,
    pub(super) id: ClientId,
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut clients = self.bus.clients();
        if let Some(outbox) = clients.remove(&self.id) {
            let dropped = outbox.events_dropped();
            self.bus.0.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
    }
}
