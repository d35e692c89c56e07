//! Entering the memory of Regions into our page tables, before a transfer reads or fills it.
//!
//! One thread in the background does it for all Regions, in the order in which they were added, a piece
//! at a time. Only data: a hole stays one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread;

use crate::pages::PageRange;
use crate::region::{Region, RegionError};

/// Pages entered by one call (64 MiB), which the kernel does not let be interrupted.
const STEP_PAGES: u64 = 16384;

/// How far it has come with one Region, in bytes.
pub type Populated = Arc<AtomicU64>;

/// Hands Regions to the thread; that ends with this value.
#[derive(Debug, Default)]
pub struct Populator(Option<mpsc::Sender<(Weak<Region>, Populated)>>);

impl Populator {
    /// Has `region` populated some time soon. Without a thread it is populated as it is sent or placed.
    pub fn add(&mut self, region: &Arc<Region>) -> Populated {
        let populated = Populated::default();
        let order = (Arc::downgrade(region), Arc::clone(&populated));
        if self.0.is_none() {
            let (orders, ordered) = mpsc::channel();
            let started = thread::Builder::new()
                .name("mf-populate".into())
                .spawn(move || populate_all(&ordered));
            match started {
                Ok(_) => self.0 = Some(orders),
                Err(error) => tracing::warn!(%error, "cannot start a thread to populate regions"),
            }
        }
        if let Some(orders) = &self.0 {
            // Its thread ends after us, so the order arrives.
            let _ = orders.send(order);
        }
        populated
    }
}

fn populate_all(ordered: &mpsc::Receiver<(Weak<Region>, Populated)>) {
    while let Ok((region, populated)) = ordered.recv() {
        let mut from = 0;
        let mut known = Known::default();
        // A Region that was removed meanwhile is let go of between two steps.
        while let Some(region) = region.upgrade() {
            match step(&region, from, &mut known) {
                Ok(Some(done)) => {
                    populated.fetch_add(done.bytes(region.bytes()), Ordering::Relaxed);
                    from = done.end();
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(region = %region.name(), %error, "not populated any further");
                    break;
                }
            }
        }
    }
}

/// An extent that was found, and how much was allocated in all when it was.
#[derive(Debug, Default)]
struct Known {
    data: PageRange,
    allocated_bytes: u64,
}

/// Populates the first data from the page `from` on; `None` if there is no more.
fn step(region: &Region, from: u64, known: &mut Known) -> Result<Option<PageRange>, RegionError> {
    let Some(count) = region.pages().checked_sub(from).filter(|count| *count > 0) else {
        return Ok(None);
    };
    let rest = PageRange { first: from, count };
    // The end of an extent is found by walking it: not at every step. Where memory was given back since, the
    // extent may have a hole.
    let allocated_bytes = region.allocated_bytes()?;
    if from >= known.data.end() || allocated_bytes < known.allocated_bytes {
        let Some(data) = region.next_data(rest)? else {
            return Ok(None);
        };
        *known = Known {
            data,
            allocated_bytes,
        };
    }
    let first = known.data.first.max(from);
    let piece = PageRange {
        first,
        count: (known.data.end() - first).min(STEP_PAGES),
    };
    region.populate(piece);
    Ok(Some(piece))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::time::{Duration, Instant};

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::limits::PAGE_BYTES;
    use crate::name::Name;

    #[test]
    fn data_is_populated_and_holes_stay_holes() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(40_000 * PAGE_BYTES).unwrap();
        for page in [7, 30_000] {
            file.write_all_at(&[1; 2 * 4096], page * PAGE_BYTES)
                .unwrap();
        }
        let region = Region::from_descriptor(Name::new("r").unwrap(), file.into()).unwrap();
        let region = Arc::new(region);
        let mut populator = Populator::default();
        let populated = populator.add(&region);
        let deadline = Instant::now() + Duration::from_secs(60);
        while populated.load(Ordering::Relaxed) < 4 * PAGE_BYTES {
            assert!(Instant::now() < deadline, "{populated:?}");
            thread::yield_now();
        }
        assert_eq!(region.allocated_bytes().unwrap(), 4 * PAGE_BYTES);
    }
}
