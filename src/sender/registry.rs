//! Regions the sender knows, and which attempt has them (rule 12).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::config::{FreezeConfig, TrackerConfig};
use crate::control::{Call, CommandError, FdTable, code};
use crate::dirty::{BitmapTracker, Exact, Memory, PagemapTracker};
use crate::freeze::{Cgroup, FreezeError, Freezer, Process};
use crate::name::Name;
use crate::pages::PageSet;
use crate::populate::{Populated, Populator};
use crate::region::Region;

use super::clients::Registrant;
use super::moved::Moved;

/// A Region as it was added.
#[derive(Debug, Clone)]
pub(super) struct Registered {
    pub(super) region: Arc<Region>,
    pub(super) tracking: Tracking,
    /// As it was asked for, to be shown.
    tracker: TrackerConfig,
    pub(super) freeze: FreezeConfig,
    pub(super) freezer: Freezer,
    populated: Populated,
    /// Who is asked with freeze `client`.
    pub(super) client: Option<Registrant>,
    hold: Hold,
}

impl Registered {
    /// It has another owner now; that is written down first.
    fn hand_over(&mut self, attempt: &Name, moved: &Moved) {
        moved.add(&self.region, attempt);
        self.hold = Hold::Moved(attempt.clone());
    }

    /// Whether stopping the writer of one is stopping that of the other, which has one.
    fn has_writer_of(&self, other: &Self) -> bool {
        let client = |registered: &Self| registered.client.as_ref().map(|client| client.id);
        self.freeze == other.freeze && client(self) == client(other)
    }
}

/// How writes are found. What knows by itself lives as long as the Region is registered; what has to
/// read everything is made anew for each attempt.
#[derive(Debug, Clone)]
pub(super) enum Tracking {
    /// Nothing writes.
    None,
    /// By reading.
    Scan,
    /// By asking the kernel or the writer.
    Exact(Arc<Mutex<Exact>>),
}

impl Tracking {
    fn new(
        tracker: &TrackerConfig,
        region: &Region,
        descriptors: Descriptors<'_>,
    ) -> Result<Self, CommandError> {
        let take = |name: &str| {
            let missing = || {
                let text = format!("File descriptor named '{name}' has not been found");
                CommandError::new(code::NO_DESCRIPTOR, text)
            };
            descriptors
                .and_then(|fds| fds.take(name))
                .ok_or_else(missing)
        };
        let exact = match tracker {
            TrackerConfig::None => return Ok(Self::None),
            TrackerConfig::Scan => return Ok(Self::Scan),
            TrackerConfig::Pagemap {
                pagemap_fdname,
                uffd_fdname,
                address,
            } => {
                let (pagemap, uffd) = (take(pagemap_fdname)?, take(uffd_fdname)?);
                let tracker = PagemapTracker::new(pagemap, uffd, *address, region.bytes());
                tracker.and_then(|tracker| {
                    let tracker = tracker.on_pages_of(region.page_size());
                    if tracker.check_memory(region.file().as_fd())? == Memory::NotVisible {
                        tracing::warn!(region = %region.name(), "that the writer has this region mapped at its address cannot be seen from here, and is taken on trust");
                    }
                    Ok(Exact::Pagemap(tracker, PageSet::empty(region.pages())))
                })
            }
            TrackerConfig::Bitmap { fdname } => {
                BitmapTracker::new(take(fdname)?, region.pages()).map(Exact::Bitmap)
            }
        };
        let exact = exact.map_err(|error| CommandError::new(error.code(), error.to_string()))?;
        Ok(Self::Exact(Arc::new(Mutex::new(exact))))
    }
}

/// Where descriptors come from: a control connection, or nowhere for the configuration's Regions.
pub(super) type Descriptors<'a> = Option<&'a FdTable>;

/// Who may move a Region.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hold {
    /// The next attempt.
    Free,
    /// An attempt has it.
    Claimed(Claim),
    /// Nobody: it has another owner since this attempt.
    Moved(Name),
}

/// An attempt's hold on Regions. The number tells attempts apart that share an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    number: u64,
    id: Name,
}

/// How a writer is stopped by us; checks that it can be.
fn freezer(freeze: &FreezeConfig) -> Result<Freezer, FreezeError> {
    Ok(match freeze {
        FreezeConfig::None | FreezeConfig::Client => Freezer::None,
        FreezeConfig::Pid(pid) => Freezer::Pid(Arc::new(Process::open(*pid)?)),
        FreezeConfig::Cgroup(path) => Freezer::Cgroup(Arc::new(Cgroup::open(path)?)),
        FreezeConfig::Command(commands) => Freezer::Command(Arc::new(commands.clone())),
    })
}

/// All Regions, by name.
#[derive(Debug)]
pub(super) struct Registry {
    regions: BTreeMap<Name, Registered>,
    populator: Populator,
    claims: u64,
    /// What was handed over, also by earlier runs of the daemon.
    moved: Moved,
}

impl Registry {
    /// No Regions yet.
    pub(super) fn new(moved: Moved) -> Self {
        Self {
            populator: Populator::default(),
            regions: BTreeMap::new(),
            claims: 0,
            moved,
        }
    }

    /// Adds a Region by its path or descriptor; checks now what can be checked now.
    pub(super) fn add(
        &mut self,
        name: Name,
        memory: Source<'_>,
        tracker: TrackerConfig,
        freeze: FreezeConfig,
        by: Option<&Call>,
    ) -> Result<(), CommandError> {
        if self.regions.contains_key(&name) {
            return Err(CommandError::new(
                "region-exists",
                format!("Region '{name}' was added already; remove it first"),
            ));
        }
        let region = match memory {
            Source::Path(path) => Region::open(name.clone(), path),
            Source::Descriptor(fd) => Region::from_descriptor(name.clone(), fd),
        };
        let region = region.map_err(|error| CommandError::new(error.code(), error.to_string()))?;
        if matches!(
            (&tracker, &freeze),
            (
                TrackerConfig::Bitmap { .. },
                FreezeConfig::Pid(_) | FreezeConfig::Cgroup(_)
            )
        ) {
            // Stopped between a write and its mark, the writer would lose that write.
            let text = "tracker bitmap needs a writer that publishes its marks before it stands still, which freeze pid and cgroup do not wait for: use freeze client or command, or tracker pagemap";
            return Err(CommandError::new(code::INVALID_ARGUMENT, text));
        }
        let tracking = Tracking::new(&tracker, &region, by.map(|call| &call.fds))?;
        let client = match (&freeze, by) {
            (FreezeConfig::Client, Some(call)) => Some(Registrant {
                id: call.client,
                gone: call.gone.clone(),
            }),
            _ => None,
        };
        let freezer =
            freezer(&freeze).map_err(|error| CommandError::new(error.code(), error.to_string()))?;
        let region = Arc::new(region);
        let moved = self.moved.find(&region);
        let registered = Registered {
            populated: self.populator.add(&region),
            region,
            tracking,
            tracker,
            freeze,
            freezer,
            client,
            hold: moved.map_or(Hold::Free, Hold::Moved),
        };
        self.regions.insert(name, registered);
        Ok(())
    }

    /// That a Region has the page size its owner believes it has.
    pub(super) fn check_page_size(
        &self,
        name: &Name,
        expected: Option<u64>,
    ) -> Result<(), CommandError> {
        let actual = self
            .regions
            .get(name)
            .map(|registered| registered.region.page_size());
        match (expected, actual) {
            (Some(expected), Some(actual)) if expected != actual => Err(CommandError::new(
                "page-size",
                format!("Region '{name}' is on pages of {actual} bytes, not {expected}"),
            )),
            _ => Ok(()),
        }
    }

    /// Forgets a Region that no attempt has.
    pub(super) fn remove(&mut self, name: &Name) -> Result<Option<Registered>, CommandError> {
        match &self.known(name)?.hold {
            Hold::Claimed(claim) => Err(busy(name, &claim.id)),
            Hold::Free | Hold::Moved(_) => Ok(self
                .regions
                .remove(name)
                .inspect(|gone| self.moved.forget(&gone.region))),
        }
    }

    fn known(&self, name: &Name) -> Result<&Registered, CommandError> {
        let unknown =
            || CommandError::new("region-unknown", format!("There is no region '{name}'"));
        self.regions.get(name).ok_or_else(unknown)
    }

    /// Names of all Regions.
    pub(super) fn names(&self) -> Vec<Name> {
        self.regions.keys().cloned().collect()
    }

    /// Gives the Regions to an attempt; all of them or none.
    ///
    /// A writer can be frozen by one attempt only: the failure of another would let it go on.
    pub(super) fn claim(
        &mut self,
        names: &[Name],
        id: &Name,
    ) -> Result<(Claim, Vec<Registered>), CommandError> {
        let (mut regions, mut named) = (Vec::with_capacity(names.len()), BTreeSet::new());
        for name in names {
            if !named.insert(name) {
                return Err(CommandError::new(
                    "invalid-argument",
                    format!("Region '{name}' is named twice"),
                ));
            }
            let registered = self.known(name)?;
            match &registered.hold {
                Hold::Free => regions.push(registered.clone()),
                Hold::Claimed(claim) => return Err(busy(name, &claim.id)),
                Hold::Moved(attempt) => {
                    let text = format!(
                        "Region '{name}' was handed over by '{attempt}' and has another owner; remove it"
                    );
                    return Err(CommandError::new("region-moved", text));
                }
            }
            if let Some(claim) = self.claim_of_writer(registered) {
                let text = format!(
                    "The writer of region '{name}' (freeze {}) is to be frozen by '{}'",
                    registered.freeze, claim.id
                );
                return Err(CommandError::new("region-busy", text));
            }
            if let Some(client) = &registered.client
                && client.gone.is_cancelled()
            {
                let text = format!(
                    "The client that registered region '{name}' has closed its connection and cannot be asked to stop: remove the region, and let it register again"
                );
                return Err(CommandError::new("writer-gone", text));
            }
        }
        self.claims += 1;
        let claim = Claim {
            number: self.claims,
            id: id.clone(),
        };
        for name in names {
            if let Some(registered) = self.regions.get_mut(name) {
                registered.hold = Hold::Claimed(claim.clone());
            }
        }
        Ok((claim, regions))
    }

    fn claim_of_writer(&self, of: &Registered) -> Option<&Claim> {
        if of.freeze == FreezeConfig::None {
            return None;
        }
        let mut others = self.regions.values();
        others.find_map(|registered| match &registered.hold {
            Hold::Claimed(claim) if registered.has_writer_of(of) => Some(claim),
            _ => None,
        })
    }

    /// Takes the Regions back from an attempt that has ended: to be moved again, unless they `moved`.
    pub(super) fn release(&mut self, claim: &Claim, moved: bool) {
        for registered in self.regions.values_mut() {
            if registered.hold == Hold::Claimed(claim.clone()) {
                if moved {
                    registered.hand_over(&claim.id, &self.moved);
                } else {
                    registered.hold = Hold::Free;
                }
            }
        }
    }

    /// A commit of an earlier run turned out to have handed these over.
    pub(super) fn set_moved(&mut self, names: &[Name], attempt: &Name) {
        for name in names {
            if let Some(registered) = self.regions.get_mut(name) {
                registered.hand_over(attempt, &self.moved);
            }
        }
    }

    /// The answer of `query-regions`.
    pub(super) fn to_json(&self) -> Value {
        let show = |(name, registered): (&Name, &Registered)| {
            let region = &registered.region;
            let (attempt, moved) = match &registered.hold {
                Hold::Free => (None, false),
                Hold::Claimed(claim) => (Some(&claim.id), false),
                Hold::Moved(attempt) => (Some(attempt), true),
            };
            json!({
                "name": name,
                "size": region.bytes(),
                "allocated": region.allocated_bytes().unwrap_or(0),
                "populated": registered.populated.load(Ordering::Relaxed),
                "page-size": region.page_size(),
                "path": region.origin(),
                "tracker": registered.tracker,
                "freeze": registered.freeze,
                "transfer": attempt,
                "moved": moved,
            })
        };
        self.regions.iter().map(show).collect()
    }
}

/// Why a Region cannot be had now.
pub(super) fn busy(name: &Name, attempt: &Name) -> CommandError {
    CommandError::new(
        "region-busy",
        format!("Region '{name}' is being moved by '{attempt}'"),
    )
}

/// Where a Region's memory is.
#[derive(Debug)]
pub(super) enum Source<'a> {
    Path(&'a Path),
    Descriptor(OwnedFd),
}
