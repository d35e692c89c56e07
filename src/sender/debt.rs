//! What the receiver of an attempt does not have for certain (rule 3).
//!
//! Dirty bits are a debt: what trackers report is added, what an Iteration carried intact is paid, and
//! what arrived torn stays. Everything here that walks memory or asks the kernel does so on a thread
//! of its own, away from the control plane.

use std::sync::Arc;

use tokio::task::spawn_blocking;

use crate::dirty::{Tracker, TrackerError};
use crate::iteration::{Plan, Run};
use crate::limits::PAGE_BYTES;
use crate::pages::{PageRange, PageSet};
use crate::region::{Region, RegionError};

use super::error::TransferError;

/// A Region and how its writes are found.
pub(super) type Source = (Arc<Region>, Tracker);

/// The debt of one attempt, Region by Region.
#[derive(Debug)]
pub(super) struct Debt {
    sources: Arc<[Source]>,
    owed: Vec<PageSet>,
}

impl Debt {
    /// Everything is owed.
    pub(super) fn of_all(sources: Arc<[Source]>) -> Self {
        let owed = sources
            .iter()
            .map(|(region, _)| PageSet::full(region.pages()));
        Self {
            owed: owed.collect(),
            sources,
        }
    }

    /// The Regions and their trackers, in the order of the offer.
    pub(super) fn sources(&self) -> &Arc<[Source]> {
        &self.sources
    }

    /// Pages owed, over all Regions.
    pub(super) fn pages(&self) -> u64 {
        self.owed.iter().map(PageSet::count).sum()
    }

    /// Bytes owed; a Region's last page counts in full.
    pub(super) fn bytes(&self) -> u64 {
        self.pages() * PAGE_BYTES
    }

    /// Tells the trackers that everything is owed, before the first page is read: from here on no
    /// write is missed.
    pub(super) async fn arm(&self) -> Result<(), TransferError> {
        let sources = Arc::clone(&self.sources);
        let arm = move || {
            sources
                .iter()
                .try_for_each(|(region, tracker)| tracker.begin(region))
        };
        let armed = spawn_blocking(arm).await;
        Ok(armed.map_err(|error| TransferError::local("arm the trackers")(error.into()))??)
    }

    /// Adds what was written since the last time; gives how many pages that were.
    pub(super) async fn harvest(&mut self) -> Result<u64, TransferError> {
        self.ask(|region, tracker, owed| tracker.harvest(region, owed))
            .await
    }

    /// The same for writers that stand still; and what trackers are blind to and can be seen now.
    pub(super) async fn harvest_frozen(&mut self) -> Result<u64, TransferError> {
        let ask = |region: &Region, tracker: &Tracker, owed: &mut PageSet| {
            let pages = tracker.harvest(region, owed)?;
            tracker.look_again(region, owed)?;
            Ok(pages)
        };
        self.ask(ask).await
    }

    async fn ask(
        &mut self,
        ask: impl Fn(&Region, &Tracker, &mut PageSet) -> Result<u64, TrackerError> + Send + 'static,
    ) -> Result<u64, TransferError> {
        let (sources, mut owed) = (Arc::clone(&self.sources), std::mem::take(&mut self.owed));
        let all = move || {
            let mut pages = 0;
            for ((region, tracker), owed) in sources.iter().zip(&mut owed) {
                pages += ask(region, tracker, owed)?;
            }
            Ok::<_, TrackerError>((pages, owed))
        };
        let asked = spawn_blocking(all).await;
        let (pages, owed) =
            asked.map_err(|error| TransferError::local("ask the trackers")(error.into()))??;
        self.owed = owed;
        Ok(pages)
    }

    /// What an Iteration has to look at to pay the debt.
    pub(super) async fn plan(
        &self,
        iteration: u32,
        packet_size: u64,
    ) -> Result<Arc<Plan>, TransferError> {
        let (sources, owed) = (Arc::clone(&self.sources), self.owed.clone());
        let plan = spawn_blocking(move || {
            let mut runs: Vec<Run> = Vec::new();
            for ((index, (region, tracker)), owed) in (0..).zip(&*sources).zip(&owed) {
                tracker.plan(index, region, owed, iteration == 1, &mut runs)?;
            }
            Ok::<_, RegionError>(Plan::new(iteration, packet_size, runs))
        });
        let plan = plan
            .await
            .map_err(|error| TransferError::local("plan an iteration")(error.into()))?;
        Ok(Arc::new(plan?))
    }

    /// An Iteration has carried everything; what arrived `torn` is all that is still owed.
    pub(super) fn paid_except<'t>(&mut self, torn: impl Iterator<Item = &'t (u32, PageRange)>) {
        let nothing = self
            .sources
            .iter()
            .map(|(region, _)| PageSet::empty(region.pages()));
        self.owed = nothing.collect();
        for &(region, range) in torn {
            self.owed[region as usize].insert(range);
        }
    }

    /// The attempt has failed: what trackers reported for it is dirty again.
    pub(super) fn restore(&self) {
        self.sources
            .iter()
            .for_each(|(_, tracker)| tracker.restore());
    }
}
