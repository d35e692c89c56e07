//! Pages that the receiver has and that were written since: what they held when they were sent tells
//! whether sending them again is of any use.
//!
//! What the receiver has of a page is known exactly while that page is not owed: its fingerprint is of the
//! read whose checksum the receiver found in place. So only pages that come to be owed by a harvest are
//! compared, and only in the next Iteration. What is owed for any other reason (torn, not acknowledged,
//! lost with a connection, not looked at in the Iteration that was to compare it) is sent whatever it holds.
//! A page that is written after it was compared is reported by the next harvest, since the harvest comes
//! before the read.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Fingerprints;
use crate::pages::PageSet;

/// What was sent, and which pages are to be compared with it.
#[derive(Debug)]
pub struct Comparison {
    pub(super) fingerprints: Fingerprints,
    again: Mutex<PageSet>,
}

impl Comparison {
    /// Nothing was sent of a Region with so many pages.
    pub(super) fn new(pages: u64) -> io::Result<Self> {
        Ok(Self {
            fingerprints: Fingerprints::new(pages)?,
            again: Mutex::new(PageSet::empty(pages)),
        })
    }

    /// `owed` was `before`; what was added since was written, and is to be compared.
    pub(super) fn harvested(&self, before: &PageSet, owed: &PageSet) {
        let mut fresh = owed.clone();
        fresh.subtract(before);
        self.lock().union(&fresh);
    }

    /// What the next Iteration is to compare. Nothing of it is compared by a later one.
    pub(super) fn take(&self) -> PageSet {
        let mut again = self.lock();
        let none = PageSet::empty(again.pages());
        std::mem::replace(&mut *again, none)
    }

    /// How many pages the next Iteration is to compare.
    pub(super) fn pages(&self) -> u64 {
        self.lock().count()
    }

    fn lock(&self) -> MutexGuard<'_, PageSet> {
        // Whoever panicked with it added whole words: the set is one it could have been.
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
