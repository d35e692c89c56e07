//! The memory one socket has lent to the kernel, and the notices that bring it back.
//!
//! The rule this file keeps (rule 1): a mapping stays until everything lent from it was released. If
//! that does not happen, it stays until the process ends: a leak is harmless, a page that the kernel
//! sends after it was reused is not.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::Flush;
use super::ledger::Ledger;
use crate::region::{Mapping, Span};
use crate::sys::errqueue::{self, Queued};

/// Sends between two looks at the error queue. Notices of contiguous sends merge; a look per send was
/// measured to cost 17 % of the throughput, one per 32 almost nothing. Looking more rarely would let
/// notices that do not merge use up `net.core.optmem_max`.
const REAP_BATCH: u32 = 32;

/// The first look comes after this many, and each further one after twice as many, so that a path on which
/// everything is copied is soon found out.
const REAP_BATCH_FIRST: u32 = 4;

#[derive(Debug, Default)]
pub(super) struct Loans {
    ledger: Ledger,
    /// Keeps everything on loan mapped. Each mapping once.
    owners: Vec<Arc<Mapping>>,
    lent_since_reap: u32,
    /// Looks by batches so far.
    looks: u32,
    /// A notice was lost or made no sense: what is on loan is no longer known.
    broken: bool,
}

impl Loans {
    /// Keeps the owners of `spans` until the next [`Loans::settle`]. Called before the memory is lent,
    /// so that nothing can go wrong in between.
    pub(super) fn hold(&mut self, spans: &[Span<'_>]) {
        for owner in spans.iter().filter_map(Span::owner) {
            // Neighbours mostly share a mapping, so the first comparison mostly hits.
            if !self
                .owners
                .iter()
                .rev()
                .any(|held| Arc::ptr_eq(held, owner))
            {
                self.owners.push(Arc::clone(owner));
            }
        }
    }

    /// One zero-copy call took bytes, or is about to; gives its number.
    pub(super) fn lend(&mut self) -> u32 {
        self.lent_since_reap += 1;
        self.ledger.lend()
    }

    /// Call `id` is back; `copied` unless it went without a copy. A call that `failed` is not counted.
    pub(super) fn released(&mut self, id: u32, copied: bool, failed: bool) -> io::Result<()> {
        let known = if failed {
            self.ledger.forgiven(id)
        } else {
            self.ledger.released(id, id, copied)
        };
        known.map_err(|error| {
            self.broken = true;
            io::Error::new(io::ErrorKind::InvalidData, error)
        })
    }

    /// A call that asked for zero copy was made as a plain one.
    pub(super) fn copied_at_once(&mut self) {
        self.ledger.copied_at_once();
    }

    /// Whether it is time for [`Loans::reap`].
    pub(super) fn reap_is_due(&self) -> bool {
        self.lent_since_reap >= (REAP_BATCH_FIRST << self.looks.min(3)).min(REAP_BATCH)
    }

    /// Empties the socket's error queue; says whether something came back.
    pub(super) fn reap(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        self.lent_since_reap = 0;
        self.looks = self.looks.saturating_add(1);
        let mut progress = false;
        loop {
            match errqueue::receive_notice(socket) {
                Ok(Queued::Nothing) => return Ok(progress),
                Ok(Queued::Foreign) => {}
                Ok(Queued::Released(notice)) => {
                    if let Err(error) = self.ledger.released(notice.lo, notice.hi, notice.copied) {
                        self.broken = true;
                        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                    }
                    progress = true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.broken = true;
                    return Err(error);
                }
            }
        }
    }

    /// Sends that are not back.
    pub(super) fn outstanding(&self) -> u64 {
        self.ledger.outstanding()
    }

    /// Whether what is on loan can no longer be known.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the next flush has something to report.
    pub(super) fn is_owed(&self) -> bool {
        self.outstanding() > 0 || self.ledger.since_flush() != Flush::NOTHING_OWED
    }

    /// Lets go of the owners once everything is back, and returns the counts since the last time.
    ///
    /// # Panics
    /// If something is on loan: the caller waits for it first.
    pub(super) fn settle(&mut self) -> Flush {
        assert!(self.outstanding() == 0 && !self.broken, "memory is on loan");
        self.owners.clear();
        self.ledger.take_flush()
    }

    /// Counts since the socket was made.
    pub(super) fn totals(&self) -> Flush {
        self.ledger.totals()
    }
}

impl Drop for Loans {
    fn drop(&mut self) {
        if self.outstanding() > 0 || self.broken {
            tracing::warn!(
                sends = self.outstanding(),
                mappings = self.owners.len(),
                "memory lent to the kernel did not come back; its mapping stays until the process ends"
            );
            std::mem::forget(std::mem::take(&mut self.owners));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::suite::Memory;

    #[test]
    fn a_loan_that_never_comes_back_keeps_its_mapping() {
        let memory = Memory::filled(4096, 1);
        let mut loans = Loans::default();
        loans.hold(&[memory.all(), memory.all()]);
        loans.lend();
        assert_eq!(Arc::strong_count(&memory.mapping), 2);
        drop(loans);
        assert_eq!(Arc::strong_count(&memory.mapping), 2);
    }

    #[test]
    fn settled_loans_let_go_of_their_mapping() {
        let memory = Memory::filled(4096, 1);
        let mut loans = Loans::default();
        loans.hold(&[memory.all()]);
        loans.copied_at_once();
        assert!(loans.settle().all_copied());
        assert_eq!(Arc::strong_count(&memory.mapping), 1);
    }
}
