//! Counters, counted where things happen (rule 8), and read at any time.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::wire::Algorithm;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a stream's payload leaves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ActivePath {
    /// The engine's name or `plain`; empty before the first packet.
    pub path: &'static str,
    /// Why it is not what was asked for, or why the kernel copies; empty if there is nothing to say.
    pub reason: String,
}

/// What one sending stream has done.
#[derive(Debug, Default)]
pub struct StreamStats {
    /// Bytes put on the stream: headers, tables and payload, re-sends included.
    pub transferred: Counter,
    /// Pages sent as payload.
    pub normal_pages: Counter,
    /// Payload bytes.
    pub normal_bytes: Counter,
    /// Pages sent as zeros or holes, without payload.
    pub duplicate_pages: Counter,
    /// Pages that were written with what the receiver has of them, and not sent.
    pub unchanged_pages: Counter,
    /// Bytes that the receiver has acknowledged, holes included.
    pub settled_bytes: Counter,
    /// Pages that arrived torn, and are sent again.
    pub torn_pages: Counter,
    /// Zero-copy sends whose memory came back.
    pub zero_copy_sends: Counter,
    /// Those of them that the kernel copied after all.
    pub zero_copy_copied: Counter,
    /// Times it went from lending to plain sends.
    pub fallbacks: Counter,
    /// Iterations in which there were zero-copy sends and the kernel copied every one.
    pub missed_zero_copy: Counter,
    /// Pages whose payload was sent compressed.
    pub compressed_pages: Counter,
    /// Bytes of that payload.
    pub compressed_from: Counter,
    /// What became of them.
    pub compressed_to: Counter,
    /// With what payload is compressed now.
    compression: Mutex<Option<Algorithm>>,
    /// How payload leaves.
    pub path: Mutex<ActivePath>,
}

impl StreamStats {
    /// Sets with what payload is compressed.
    pub fn set_compression(&self, algorithm: Option<Algorithm>) {
        let mut active = self
            .compression
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *active = algorithm;
    }

    /// With what payload is compressed; `None` if it is not.
    #[must_use]
    pub fn compression(&self) -> Option<Algorithm> {
        *self
            .compression
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets how payload leaves.
    pub fn set_path(&self, path: &'static str, reason: impl Into<String>) {
        let mut active = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        *active = ActivePath {
            path,
            reason: reason.into(),
        };
    }

    /// How payload leaves.
    #[must_use]
    pub fn path(&self) -> ActivePath {
        self.path
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}
