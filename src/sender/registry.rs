//! Regions the sender knows, and which attempt has them (rule 12).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::config::{FreezeConfig, TrackerConfig};
use crate::control::CommandError;
use crate::freeze::{Freezer, Process};
use crate::name::Name;
use crate::region::Region;

/// A Region as it was added.
#[derive(Debug, Clone)]
pub(super) struct Registered {
    pub(super) region: Arc<Region>,
    pub(super) tracker: TrackerConfig,
    pub(super) freeze: FreezeConfig,
    pub(super) freezer: Freezer,
    /// The attempt that has it.
    busy: Option<Name>,
}

/// All Regions, by name.
#[derive(Debug, Default)]
pub(super) struct Registry(BTreeMap<Name, Registered>);

impl Registry {
    /// Adds a Region by its path or descriptor; checks now what can be checked now.
    pub(super) fn add(
        &mut self,
        name: Name,
        memory: Memory<'_>,
        tracker: TrackerConfig,
        freeze: FreezeConfig,
    ) -> Result<(), CommandError> {
        if self.0.contains_key(&name) {
            return Err(CommandError::new(
                "region-exists",
                format!("Region '{name}' was added already; remove it first"),
            ));
        }
        let region = match memory {
            Memory::Path(path) => Region::open(name.clone(), path),
            Memory::Descriptor(fd) => Region::from_descriptor(name.clone(), fd),
        };
        let region = region.map_err(|error| CommandError::new(error.code(), error.to_string()))?;
        let freezer = match freeze {
            FreezeConfig::None => Freezer::None,
            FreezeConfig::Pid(pid) => {
                let process = Process::open(pid)
                    .map_err(|error| CommandError::new(error.code(), error.to_string()))?;
                Freezer::Pid(Arc::new(process))
            }
        };
        let registered = Registered {
            region: Arc::new(region),
            tracker,
            freeze,
            freezer,
            busy: None,
        };
        self.0.insert(name, registered);
        Ok(())
    }

    /// That a Region has the page size its owner believes it has.
    pub(super) fn check_page_size(
        &self,
        name: &Name,
        expected: Option<u64>,
    ) -> Result<(), CommandError> {
        let actual = self
            .0
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
    pub(super) fn remove(&mut self, name: &Name) -> Result<(), CommandError> {
        self.idle(name)?;
        self.0.remove(name);
        Ok(())
    }

    fn idle(&self, name: &Name) -> Result<&Registered, CommandError> {
        let Some(registered) = self.0.get(name) else {
            return Err(CommandError::new(
                "region-unknown",
                format!("There is no region '{name}'"),
            ));
        };
        match &registered.busy {
            Some(attempt) => Err(busy(name, attempt)),
            None => Ok(registered),
        }
    }

    /// Names of all Regions.
    pub(super) fn names(&self) -> Vec<Name> {
        self.0.keys().cloned().collect()
    }

    /// Gives the Regions to an attempt; all of them or none.
    pub(super) fn claim(
        &mut self,
        names: &[Name],
        attempt: &Name,
    ) -> Result<Vec<Registered>, CommandError> {
        let claimed = names
            .iter()
            .map(|name| self.idle(name).cloned())
            .collect::<Result<Vec<_>, _>>()?;
        for name in names {
            if let Some(registered) = self.0.get_mut(name) {
                registered.busy = Some(attempt.clone());
            }
        }
        Ok(claimed)
    }

    /// Takes the Regions back from an attempt that has ended.
    pub(super) fn release(&mut self, attempt: &Name) {
        for registered in self
            .0
            .values_mut()
            .filter(|registered| registered.busy.as_ref() == Some(attempt))
        {
            registered.busy = None;
        }
    }

    /// The answer of `query-regions`.
    pub(super) fn to_json(&self) -> Value {
        let show = |(name, registered): (&Name, &Registered)| {
            let region = &registered.region;
            json!({
                "name": name,
                "size": region.bytes(),
                "allocated": region.allocated_bytes().unwrap_or(0),
                "page-size": region.page_size(),
                "path": region.origin(),
                "tracker": registered.tracker,
                "freeze": registered.freeze,
                "transfer": registered.busy,
            })
        };
        self.0.iter().map(show).collect()
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
pub(super) enum Memory<'a> {
    Path(&'a Path),
    Descriptor(OwnedFd),
}
