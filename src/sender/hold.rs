//! What an operator wants of a transfer under way: that it stands still, or goes on.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, watch};

use crate::endpoint::Endpoint;

/// The wishes of the operator. The control socket sets them, the transfer looks.
#[derive(Debug)]
pub(super) struct Hold {
    held: watch::Sender<bool>,
    go_on: Notify,
    /// Where to go on, if not where it was.
    endpoint: Mutex<Option<Endpoint>>,
}

impl Hold {
    /// Nothing is wanted.
    pub(super) fn new() -> Self {
        Self {
            held: watch::Sender::new(false),
            go_on: Notify::new(),
            endpoint: Mutex::default(),
        }
    }

    /// The sending is to stop at the next barrier.
    pub(super) fn set(&self) {
        self.held.send_replace(true);
    }

    /// It is to go on; says whether it was to stand still.
    pub(super) fn release(&self) -> bool {
        self.held.send_replace(false)
    }

    /// It is to go on now, at this address maybe.
    pub(super) fn go_on(&self, endpoint: Option<Endpoint>) {
        *self.endpoint.lock().unwrap_or_else(PoisonError::into_inner) = endpoint;
        self.go_on.notify_one();
    }

    /// Whether a pause is wanted.
    pub(super) fn is_set(&self) -> bool {
        *self.held.borrow()
    }

    /// Waits until a pause is wanted, or is not wanted any more.
    pub(super) async fn wait(&self, wanted: bool) {
        // `self` holds the sending end, so it is there as long as anybody waits.
        let _ = self.held.subscribe().wait_for(|held| *held == wanted).await;
    }

    /// Waits until it is to go on now.
    pub(super) async fn asked_to_go_on(&self) {
        self.go_on.notified().await;
    }

    /// The address that was named, if that is news.
    pub(super) fn take_endpoint(&self) -> Option<Endpoint> {
        self.endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}
