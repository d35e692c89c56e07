//! Events from anywhere in the daemon to every client that has negotiated.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
    /// Events are queued, and nobody is woken for them.
    hushed: AtomicBool,
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
        // Asked behind the queue, and the other way round in `speak_up`: one of the two wakes them.
        if !self.0.hushed.load(Ordering::SeqCst) {
            self.wake_all();
        }
    }

    /// For so long at most, or until [`Self::speak_up`], clients are not woken by events: as a rule they
    /// answer one with a query, and on few CPUs a writer that stands still would wait for it. What they are
    /// owed is not held back. To be called within a runtime.
    pub fn hush(&self, at_most: Duration) {
        self.0.hushed.store(true, Ordering::SeqCst);
        let bus = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(at_most).await;
            bus.speak_up();
        });
    }

    /// Events reach their clients again, and those of the meantime do now.
    pub fn speak_up(&self) {
        if self.0.hushed.swap(false, Ordering::SeqCst) {
            self.wake_all();
        }
    }

    fn wake_all(&self) {
        self.clients().values().for_each(|outbox| outbox.wake());
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A bus, and the session of a client that waits for its next event.
    async fn listening() -> (EventBus, Member, tokio::task::JoinHandle<bool>) {
        let (bus, outbox) = (EventBus::new(), Arc::new(Outbox::default()));
        let member = bus.join(Arc::clone(&outbox));
        outbox.owe_and_open(encode::event("GREETING", json!({})).unwrap());
        outbox.first().await;
        outbox.written();
        let waiting = tokio::spawn(async move { outbox.first().await.is_some() });
        tokio::task::yield_now().await;
        (bus, member, waiting)
    }

    #[tokio::test]
    async fn a_hushed_event_wakes_nobody_until_it_is_over() {
        let (bus, _member, waiting) = listening().await;
        bus.hush(Duration::from_secs(3600));
        bus.publish("QUIET", json!({}));
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!waiting.is_finished());
        bus.speak_up();
        assert!(waiting.await.unwrap());
    }

    #[tokio::test]
    async fn a_hush_ends_by_itself() {
        let (bus, _member, waiting) = listening().await;
        bus.hush(Duration::from_millis(1));
        bus.publish("LATE", json!({}));
        assert!(waiting.await.unwrap());
    }
}
