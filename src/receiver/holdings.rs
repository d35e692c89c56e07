//! Regions that clients of the receiver can ask for: what was committed to it, and memory that was
//! prepared for a Region to come.
//!
//! A prepared Region serves one commit. Until then its content is undefined from the moment an attempt
//! has it; a failed attempt leaves it so, and the next one may have it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::control::{ClientId, CommandError};
use crate::name::Name;
use crate::populate::{Populated, Populator};
use crate::region::{Access, Region, RegionError};

use super::memory::Observed;

/// A connection that registered memory.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) id: ClientId,
    /// Cancelled once it has ended.
    pub(super) gone: CancellationToken,
}

/// What is to be prepared.
#[derive(Debug)]
pub(super) struct Preparation {
    pub(super) name: Name,
    pub(super) memory: Memory,
    pub(super) page_size: Option<u64>,
    pub(super) client: Client,
    /// Whether the client is asked before *prepared*.
    pub(super) confirm: bool,
}

/// Where prepared memory is.
#[derive(Debug)]
pub(super) enum Memory {
    Path(PathBuf),
    Descriptor(OwnedFd),
}

/// What an offer finds under the name of one of its Regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prepared {
    /// Memory of this many bytes.
    Open(u64),
    /// Memory that has had its commit.
    Used,
}

#[derive(Debug)]
pub(super) struct Holding {
    bytes: u64,
    source: Source,
    stage: Stage,
    /// The last attempt that had it.
    attempt: Option<Name>,
    taken: bool,
    /// What its memory was when it was looked at last.
    memory: Value,
}

#[derive(Debug)]
enum Source {
    /// A file that was received into, under its final name.
    File(PathBuf),
    Prepared {
        region: Arc<Region>,
        populated: Populated,
        client: Client,
        confirm: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits for an attempt.
    Ready,
    /// An attempt writes it.
    Arriving,
    /// An attempt wrote to it and failed.
    Undefined,
    Committed,
}

/// All of them, by name.
#[derive(Debug, Default)]
pub(super) struct Holdings {
    known: BTreeMap<Name, Holding>,
    populator: Populator,
}

impl Holdings {
    /// Makes memory known that a Region is to arrive in.
    pub(super) fn prepare(&mut self, preparation: Preparation) -> Result<(), CommandError> {
        let Preparation {
            name,
            memory,
            page_size,
            client,
            confirm,
        } = preparation;
        if self.known.contains_key(&name) {
            return Err(CommandError::new(
                "region-exists",
                format!("Region '{name}' is here already; remove it first"),
            ));
        }
        let region = open(name.clone(), memory)
            .map_err(|error| CommandError::new(error.code(), error.to_string()))?;
        let actual = region.page_size();
        if let Some(expected) = page_size.filter(|expected| *expected != actual) {
            return Err(CommandError::new(
                "page-size",
                format!("Region '{name}' is on pages of {actual} bytes, not {expected}"),
            ));
        }
        let region = Arc::new(region);
        let holding = Holding {
            bytes: region.bytes(),
            source: Source::Prepared {
                populated: self.populator.add(&region),
                region,
                client,
                confirm,
            },
            stage: Stage::Ready,
            attempt: None,
            taken: false,
            memory: json!({}),
        };
        self.known.insert(name, holding);
        Ok(())
    }

    /// Forgets a Region; its memory stays as it is. What is given is to be dropped where that may take a
    /// while.
    pub(super) fn remove(&mut self, name: &Name) -> Result<Option<Holding>, CommandError> {
        if self.known(name)?.stage == Stage::Arriving {
            return Err(busy(name));
        }
        Ok(self.known.remove(name))
    }

    /// Hands the memory of a committed Region out, once.
    pub(super) fn take(&mut self, name: &Name) -> Result<(Value, OwnedFd), CommandError> {
        let holding = self.known.get_mut(name).ok_or_else(|| unknown(name))?;
        match holding.stage {
            Stage::Committed => {}
            Stage::Arriving => return Err(busy(name)),
            Stage::Ready | Stage::Undefined => {
                let text = format!("Region '{name}' was prepared, and has not been committed");
                return Err(CommandError::new("not-committed", text));
            }
        }
        if holding.taken {
            let text = format!("Region '{name}' was taken already: it is its taker's");
            return Err(CommandError::new("region-taken", text));
        }
        let opened = match &holding.source {
            Source::File(path) => OpenOptions::new().read(true).write(true).open(path),
            Source::Prepared { region, .. } => region.file().try_clone(),
        };
        let file =
            opened.map_err(|error| CommandError::new("region-open", format!("{name}: {error}")))?;
        holding.taken = true;
        Ok((json!({"name": name, "size": holding.bytes}), file.into()))
    }

    /// What is prepared, for the judgement of an offer.
    pub(super) fn prepared(&self) -> impl Iterator<Item = (Name, Prepared)> {
        self.known.iter().filter_map(|(name, holding)| {
            let prepared = match (&holding.source, &holding.stage) {
                (Source::File(_), _) => return None,
                (_, Stage::Committed) => Prepared::Used,
                _ => Prepared::Open(holding.bytes),
            };
            Some((name.clone(), prepared))
        })
    }

    /// Gives prepared memory to an attempt, if there is some of that name.
    pub(super) fn claim(&mut self, name: &Name, attempt: &Name) -> Option<Arc<Region>> {
        let holding = self.known.get_mut(name)?;
        let Source::Prepared { region, .. } = &holding.source else {
            return None;
        };
        holding.stage = Stage::Arriving;
        holding.attempt = Some(attempt.clone());
        Some(Arc::clone(region))
    }

    /// An attempt has ended.
    pub(super) fn ended(&mut self, attempt: &Name, committed: bool) {
        for holding in self.known.values_mut() {
            if holding.stage == Stage::Arriving && holding.attempt.as_ref() == Some(attempt) {
                holding.stage = if committed {
                    Stage::Committed
                } else {
                    Stage::Undefined
                };
            }
        }
    }

    /// A file was committed under its final name.
    pub(super) fn committed_file(&mut self, name: Name, path: PathBuf, bytes: u64) {
        let holding = Holding {
            bytes,
            source: Source::File(path),
            stage: Stage::Committed,
            attempt: None,
            taken: false,
            memory: json!({}),
        };
        self.known.insert(name, holding);
    }

    /// Clients whose memory an attempt has written: news of it are not to be missed by them.
    pub(super) fn clients(&self, attempt: &Name) -> Vec<ClientId> {
        let clients = self.prepared_for(attempt);
        let mut ids: Vec<_> = clients.map(|(_, client, _)| client.id).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Clients to be asked before *prepared*, and about which Regions.
    pub(super) fn to_confirm(&self, attempt: &Name) -> Vec<(Client, Vec<Name>)> {
        let mut asked: Vec<(Client, Vec<Name>)> = Vec::new();
        for (name, client, _) in self
            .prepared_for(attempt)
            .filter(|(_, _, confirm)| *confirm)
        {
            match asked.iter_mut().find(|(known, _)| known.id == client.id) {
                Some((_, names)) => names.push(name.clone()),
                None => asked.push((client.clone(), vec![name.clone()])),
            }
        }
        asked
    }

    /// The memory that was prepared, to be looked at.
    pub(super) fn prepared_memory(&self) -> Vec<Arc<Region>> {
        let memory = |holding: &Holding| match &holding.source {
            Source::File(_) => None,
            Source::Prepared { region, .. } => Some(Arc::clone(region)),
        };
        self.known.values().filter_map(memory).collect()
    }

    /// What memory turned out to be.
    pub(super) fn observed(&mut self, observed: Observed) {
        for (name, memory) in observed {
            if let Some(holding) = self.known.get_mut(&name) {
                holding.memory = memory;
            }
        }
    }

    /// The answer of `query-regions`.
    pub(super) fn to_json(&self) -> Value {
        let show = |(name, holding): (&Name, &Holding)| {
            let content = match holding.stage {
                Stage::Ready => "own",
                Stage::Arriving | Stage::Undefined => "undefined",
                Stage::Committed => "committed",
            };
            let mut shown = json!({
                "name": name,
                "size": holding.bytes,
                "content": content,
                "transfer": holding.attempt,
                "taken": holding.taken,
            });
            match &holding.source {
                Source::File(path) => shown["path"] = json!(path),
                Source::Prepared {
                    region,
                    populated,
                    confirm,
                    ..
                } => {
                    shown["allocated"] = json!(region.allocated_bytes().unwrap_or(0));
                    shown["populated"] = json!(populated.load(Ordering::Relaxed));
                    shown["path"] = json!(region.origin());
                    shown["page-size"] = json!(region.page_size());
                    shown["confirm"] = json!(confirm);
                }
            }
            for key in ["page-sizes", "numa-nodes"] {
                shown[key] = holding.memory[key].clone();
            }
            shown["prepared"] = json!(matches!(holding.source, Source::Prepared { .. }));
            shown
        };
        self.known.iter().map(show).collect()
    }

    fn known(&self, name: &Name) -> Result<&Holding, CommandError> {
        self.known.get(name).ok_or_else(|| unknown(name))
    }

    fn prepared_for(&self, attempt: &Name) -> impl Iterator<Item = (&Name, &Client, bool)> {
        self.known
            .iter()
            .filter_map(move |(name, holding)| match &holding.source {
                Source::Prepared {
                    client, confirm, ..
                } if holding.attempt.as_ref() == Some(attempt) => Some((name, client, *confirm)),
                _ => None,
            })
    }
}

fn open(name: Name, memory: Memory) -> Result<Region, RegionError> {
    let (origin, file) = match memory {
        Memory::Path(path) => (path.display().to_string(), open_file(&path)),
        Memory::Descriptor(fd) => (format!("the descriptor of {name}"), Ok(File::from(fd))),
    };
    match file {
        Ok(file) => Region::new(name, origin, file, Access::Write),
        Err(source) => Err(RegionError::Open { origin, source }),
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn unknown(name: &Name) -> CommandError {
    CommandError::new("region-unknown", format!("There is no region '{name}'"))
}

fn busy(name: &Name) -> CommandError {
    CommandError::new("region-busy", format!("Region '{name}' is just arriving"))
}
