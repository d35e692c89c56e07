//! Whether this machine runs us at all. Where others take all of it for half a second, a peer that is well looks
//! hung to the other one, and what a scene shows then is true of the machine and not of the daemons.

use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// How often it looks, and how late it may be.
const LOOK: Duration = Duration::from_millis(50);
const LATE: Duration = Duration::from_millis(500);

/// Knows when we were not run.
pub(crate) struct Watchdog {
    gaps: Arc<Mutex<Vec<Instant>>>,
}

impl Watchdog {
    pub(crate) fn start() -> Self {
        let gaps = Arc::default();
        let weak = Arc::downgrade(&gaps);
        thread::spawn(move || watch(&weak));
        Self { gaps }
    }

    /// Whether we were not run for a while since then.
    pub(crate) fn was_disturbed(&self, since: Instant) -> bool {
        let gaps = self.gaps.lock().unwrap();
        gaps.iter().any(|&gap| gap >= since)
    }
}

/// Looks until the watchdog is gone.
fn watch(gaps: &Weak<Mutex<Vec<Instant>>>) {
    let mut last = Instant::now();
    while let Some(gaps) = gaps.upgrade() {
        let now = Instant::now();
        if now - last > LATE {
            gaps.lock().unwrap().push(now);
        }
        last = now;
        drop(gaps);
        thread::sleep(LOOK);
    }
}
