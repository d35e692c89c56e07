//! What the receiver of an attempt does not have for certain (rule 3).
//!
//! Dirty bits are a debt: what trackers report is added, what the receiver has applied intact is paid,
//! by the streams as acknowledgements come and here when an attempt is resumed. Everything that walks
//! memory or asks the kernel does so on a thread of its own, away from the control plane.

use std::sync::Arc;

use tokio::task::spawn_blocking;

use crate::dirty::{Tracker, TrackerError};
use crate::iteration::{Plan, Run};
use crate::pages::PageSet;
use crate::region::{Region, RegionError};
use crate::stream::Owed;

use super::error::TransferError;
use super::habits::Habits;

/// A Region and how its writes are found.
pub(super) type Source = (Arc<Region>, Tracker);

/// How many pages were written, as far as trackers know.
pub(super) type Looked = Result<u64, TrackerError>;

/// What a tracker is asked about its Region, whose debt may grow by it.
trait Ask: Fn(&Region, &Tracker, &mut PageSet) -> Looked + Send + 'static {}
impl<A: Fn(&Region, &Tracker, &mut PageSet) -> Looked + Send + 'static> Ask for A {}

/// The debt of one attempt, Region by Region.
#[derive(Debug)]
pub(super) struct Debt {
    sources: Arc<[Source]>,
    owed: Arc<Owed>,
    habits: Habits,
}

impl Debt {
    /// Everything is owed.
    pub(super) fn of_all(sources: Arc<[Source]>) -> Self {
        let pages = sources.iter().map(|(region, _)| region.pages());
        Self {
            owed: Arc::new(Owed::all_of(pages)),
            sources,
            habits: Habits::default(),
        }
    }

    /// The Regions and their trackers, in the order of the offer.
    pub(super) fn sources(&self) -> &Arc<[Source]> {
        &self.sources
    }

    /// The account that streams share.
    pub(super) fn owed(&self) -> &Arc<Owed> {
        &self.owed
    }

    /// Pages owed, over all Regions.
    pub(super) fn pages(&self) -> u64 {
        self.owed.count()
    }

    /// Tells the trackers that everything is owed, before the first page is read: from here on no
    /// write is missed.
    pub(super) async fn arm(&self) -> Result<(), TransferError> {
        self.on_a_thread(|region, tracker, _| tracker.begin(region).map(|()| 0))
            .await
            .map(drop)
    }

    /// Adds what was written since the last time; gives how many pages that were.
    pub(super) async fn harvest(&self) -> Result<u64, TransferError> {
        self.on_a_thread(|region, tracker, owed| {
            let pages = tracker.harvest(owed)?;
            tracker.check_sight(region)?;
            Ok(pages)
        })
        .await
    }

    /// The same for writers that stand still, and what trackers are blind to and can be seen now. Whether
    /// they saw everything is asked only if it is the `last` look; otherwise there is time for that while
    /// the rest is sent ([`Self::check_sight`]). Blocks.
    pub(super) fn harvest_frozen(&self, last: bool) -> impl FnOnce() -> Looked + Send + use<> {
        self.look(move |region, tracker, owed| {
            let pages = tracker.harvest(owed)?;
            tracker.look_again(region, owed)?;
            if last {
                tracker.check_sight(region)?;
            }
            Ok(pages)
        })
    }

    /// That the trackers saw everything up to the last harvest.
    pub(super) async fn check_sight(&self) -> Result<u64, TransferError> {
        self.on_a_thread(|region, tracker, _| tracker.check_sight(region).map(|()| 0))
            .await
    }

    /// Whether to ask the trackers takes next to no time.
    pub(super) fn answers_at_once(&self) -> bool {
        let mut trackers = self.sources.iter().map(|(_, tracker)| tracker);
        trackers.all(Tracker::answers_at_once)
    }

    async fn on_a_thread(&self, ask: impl Ask) -> Result<u64, TransferError> {
        if !self.sources.iter().any(|(_, tracker)| tracker.is_exact()) {
            return Ok(0);
        }
        let asked = spawn_blocking(self.look(ask)).await;
        Ok(asked.map_err(|error| TransferError::local("ask the trackers")(error.into()))??)
    }

    /// Asks about every Region; gives the sum.
    fn look<A: Ask>(&self, ask: A) -> impl FnOnce() -> Looked + Send + use<A> {
        let (sources, owed) = (Arc::clone(&self.sources), Arc::clone(&self.owed));
        move || {
            let mut pages = 0;
            for (index, (region, tracker)) in (0..).zip(&*sources) {
                pages += ask(region, tracker, &mut owed.of(index))?;
            }
            Ok(pages)
        }
    }

    /// What an Iteration has to look at to pay the debt, and how many pages it leaves, if it may `leave` those
    /// that are written in every pass. `first`: no Iteration has carried all yet. `leave` is `None` when writers
    /// stand still: then nothing is learned of their habits either.
    pub(super) async fn plan(
        &mut self,
        iteration: u32,
        first: bool,
        leave: Option<bool>,
        packet_size: u64,
        streams: u16,
    ) -> Result<(Arc<Plan>, u64), TransferError> {
        let (sources, owed) = (Arc::clone(&self.sources), Arc::clone(&self.owed));
        let mut habits = std::mem::take(&mut self.habits);
        let plan = spawn_blocking(move || {
            let regions = || (0..).zip(&*sources);
            let mut runs: Vec<Run> = Vec::new();
            let mut left = 0;
            if let Some(leave) = leave {
                let all = regions().map(|(index, _)| owed.of(index).clone());
                let sent;
                (sent, left) = habits.worth_sending(all.collect(), leave);
                for ((index, (region, tracker)), sent) in regions().zip(&sent) {
                    tracker.plan(index, region, sent, first, &mut runs)?;
                }
            } else {
                for (index, (region, tracker)) in regions() {
                    tracker.plan(index, region, &owed.of(index), first, &mut runs)?;
                }
            }
            let plan = Arc::new(Plan::new(iteration, packet_size, streams, runs));
            Ok::<_, RegionError>((plan, left, habits))
        });
        let planned = plan
            .await
            .map_err(|error| TransferError::local("plan an iteration")(error.into()))?;
        let (plan, left);
        (plan, left, self.habits) = planned?;
        Ok((plan, left))
    }

    /// The attempt has failed: what trackers reported for it is dirty again.
    pub(super) fn restore(&self) {
        self.sources
            .iter()
            .for_each(|(_, tracker)| tracker.restore());
    }
}
