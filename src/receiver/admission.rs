//! Whether an offer can be taken, before anything is created for it.
//!
//! Every number of the offer is compared with its limit here; what passes is what the rest of the
//! receiver works with.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::config::ReceiveConfig;
use crate::limits::{
    HUGE_PAGE_BYTES, REGION_BYTES_MAX, REGIONS_MAX, STREAMS_MAX, WINDOW_BYTES_MAX,
};
use crate::name::Name;
use crate::wire::{Hex128, Offer};

use super::holdings::Prepared;

/// Why an offer is turned down. The code and the text go to the sender.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub(super) struct Refusal {
    pub(super) code: &'static str,
    pub(super) desc: String,
}

impl Refusal {
    pub(super) fn new(code: &'static str, desc: impl Into<String>) -> Self {
        Self {
            code,
            desc: desc.into(),
        }
    }
}

/// What the receiver has taken on already.
#[derive(Debug, Default)]
pub(super) struct Obligations {
    /// Attempts under way.
    pub(super) attempts: usize,
    /// Their ids.
    pub(super) ids: HashSet<Name>,
    /// Their nonces.
    pub(super) nonces: HashSet<Hex128>,
    /// Names they will use.
    pub(super) names: HashSet<Name>,
    /// Memory that was prepared, by name.
    pub(super) prepared: HashMap<Name, Prepared>,
    /// Length of their Regions together.
    pub(super) total_bytes: u64,
    /// Bytes they may still allocate.
    pub(super) owed_bytes: u64,
}

/// What an offer that was admitted takes of the directory's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Bytes it needs: the data of Regions that arrive in files.
    pub(super) needed_bytes: u64,
    /// Bytes it may need where data comes in huge pages, of each of which it fills at least half.
    pub(super) huge_bytes: u64,
    /// Bytes there are.
    left: u64,
    /// Regions arrive in files, and not all in memory that was prepared.
    has_files: bool,
}

impl Room {
    /// Whether there are files for huge pages, and these fit, whatever they leave unused.
    pub(super) fn fits_huge_pages(self) -> bool {
        self.has_files && self.huge_bytes <= self.left
    }
}

/// Checks an offer. `free_bytes` is what the directory's memory has left.
pub(super) fn admit(
    offer: &Offer,
    config: &ReceiveConfig,
    obligations: &Obligations,
    free_bytes: u64,
) -> Result<Room, Refusal> {
    let refuse = |code, desc: String| Err(Refusal::new(code, desc));
    if offer.streams == 0 || offer.streams > STREAMS_MAX {
        return refuse(
            "protocol",
            format!(
                "{} streams were offered, 1 to {STREAMS_MAX} are allowed",
                offer.streams
            ),
        );
    }
    if offer.window == 0 || offer.window > WINDOW_BYTES_MAX {
        return refuse(
            "protocol",
            format!(
                "a window of {} bytes was offered, 1 to {WINDOW_BYTES_MAX} are allowed",
                offer.window
            ),
        );
    }
    if offer.regions.is_empty() || offer.regions.len() > REGIONS_MAX {
        return refuse(
            "protocol",
            format!(
                "{} regions were offered, 1 to {REGIONS_MAX} are allowed",
                offer.regions.len()
            ),
        );
    }
    if obligations.attempts >= config.max_transfers {
        let max = config.max_transfers;
        return refuse(
            "busy",
            format!("{max} transfers are under way, as many as receive.max-transfers allows"),
        );
    }
    if obligations.nonces.contains(&offer.nonce) {
        return refuse(
            "refused",
            "this very attempt is under way here already".to_owned(),
        );
    }
    if obligations.ids.contains(&offer.id) {
        let id = &offer.id;
        return refuse(
            "id-in-use",
            format!("a transfer with id {id} is under way here: choose another id"),
        );
    }
    let (mut total, mut data, mut huge): (u64, u64, u64) = (obligations.total_bytes, 0, 0);
    let (mut names, mut has_files) = (HashSet::new(), false);
    for region in &offer.regions {
        let name = &region.name;
        if !names.insert(name) {
            return refuse("protocol", format!("region {name} was offered twice"));
        }
        if !config.allows_name(name) {
            return refuse(
                "not-allowed",
                format!("region {name} is not among receive.allow-names"),
            );
        }
        let max = config.max_region.min(REGION_BYTES_MAX);
        if region.length > max {
            return refuse(
                "too-large",
                format!(
                    "region {name} has {} bytes, receive.max-region allows {max}",
                    region.length
                ),
            );
        }
        if obligations.names.contains(name) {
            return refuse(
                "busy",
                format!("region {name} is just arriving in another transfer"),
            );
        }
        total += region.length; // 4096 regions of 16 TiB are 2^56 bytes
        match obligations.prepared.get(name) {
            None => {}
            Some(Prepared::Used) => {
                return refuse(
                    "exists",
                    format!("the memory prepared for region {name} has had its commit"),
                );
            }
            Some(Prepared::Open(bytes)) if *bytes != region.length => {
                return refuse(
                    "region-length",
                    format!(
                        "region {name} has {} bytes, the memory prepared for it {bytes}",
                        region.length
                    ),
                );
            }
            // Its memory is there already.
            Some(Prepared::Open(_)) => continue,
        }
        // A symbolic link that leads nowhere is in the way too.
        if fs::symlink_metadata(config.directory.join(name.as_str())).is_ok() {
            let path = config.directory.join(name.as_str());
            return refuse(
                "exists",
                format!(
                    "{} exists already; an existing region is never replaced",
                    path.display()
                ),
            );
        }
        has_files = true;
        let needed = region.data_bytes.min(region.length);
        data += needed;
        huge += (needed * 2).min(region.length.next_multiple_of(HUGE_PAGE_BYTES));
    }
    if total > config.max_total {
        return refuse(
            "too-large",
            format!(
                "the regions, with those of transfers under way, have {total} bytes, receive.max-total allows {}",
                config.max_total
            ),
        );
    }
    let left = free_bytes.saturating_sub(obligations.owed_bytes);
    if data > left {
        let (directory, owed) = (config.directory.display(), obligations.owed_bytes);
        return refuse(
            "no-space",
            format!(
                "the regions hold {data} bytes of data, {directory} has room for {left} ({free_bytes} free, {owed} promised to other transfers)"
            ),
        );
    }
    Ok(Room {
        needed_bytes: data,
        huge_bytes: huge.max(data),
        left,
        has_files,
    })
}

/// Bytes that can be allocated in `directory`: what its file system has free, and for memory file
/// systems at most what the machine has available.
pub(super) fn free_bytes(directory: &Path) -> io::Result<u64> {
    let fs = statfs(directory)?;
    let block = u64::try_from(fs.block_size()).unwrap_or(0);
    let free = fs.blocks_available().saturating_mul(block);
    if fs.filesystem_type() != TMPFS_MAGIC {
        return Ok(free);
    }
    let memory = available_memory(&fs::read_to_string("/proc/meminfo")?).unwrap_or(u64::MAX);
    // A tmpfs mounted without a size limit has no blocks at all.
    Ok(if fs.blocks() == 0 {
        memory
    } else {
        free.min(memory)
    })
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn available_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{BootId, OfferedRegion};

    fn offer(regions: &[(&str, u64)]) -> Offer {
        let region = |&(name, length): &(&str, u64)| OfferedRegion {
            name: Name::new(name).unwrap(),
            length,
            data_bytes: length,
            page_size: 4096,
        };
        Offer {
            id: Name::new("a").unwrap(),
            nonce: Hex128([1; 16]),
            boot_id: BootId("boot".into()),
            streams: 2,
            integrity: true,
            compression: false,
            window: 1 << 20,
            stall_timeout_ms: 1000,
            recover_timeout_ms: 0,
            dry_run: false,
            regions: regions.iter().map(region).collect(),
        }
    }

    fn refused(
        change: impl FnOnce(&mut Offer, &mut ReceiveConfig, &mut Obligations),
    ) -> &'static str {
        let directory = tempfile::tempdir().unwrap();
        let mut config = ReceiveConfig {
            directory: directory.path().to_owned(),
            ..ReceiveConfig::default()
        };
        let (mut offer, mut obligations) = (
            offer(&[("vm1", 1000), ("vm2", 1000)]),
            Obligations::default(),
        );
        assert!(admit(&offer, &config, &obligations, 2000).is_ok());
        change(&mut offer, &mut config, &mut obligations);
        admit(&offer, &config, &obligations, 2000).unwrap_err().code
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_reason() {
        assert_eq!(refused(|offer, _, _| offer.streams = 0), "protocol");
        assert_eq!(refused(|offer, _, _| offer.window = u64::MAX), "protocol");
        assert_eq!(refused(|offer, _, _| offer.regions.clear()), "protocol");
        assert_eq!(
            refused(|offer, _, _| offer.regions[1].name = Name::new("vm1").unwrap()),
            "protocol"
        );
        assert_eq!(
            refused(|offer, _, _| offer.regions[0].length = u64::MAX),
            "too-large"
        );
        assert_eq!(refused(|_, config, _| config.max_region = 999), "too-large");
        assert_eq!(refused(|_, config, _| config.max_total = 1999), "too-large");
        assert_eq!(refused(|_, config, _| config.max_transfers = 0), "busy");
        assert_eq!(
            refused(|_, config, _| config.allow_names.clear()),
            "not-allowed"
        );
        assert_eq!(refused(|_, _, taken| taken.owed_bytes = 1), "no-space");
        assert_eq!(
            refused(|_, config, taken| taken.total_bytes = config.max_total),
            "too-large"
        );
        assert_eq!(
            refused(|offer, _, taken| _ = taken.ids.insert(offer.id.clone())),
            "id-in-use"
        );
        assert_eq!(
            refused(|offer, _, taken| _ = taken.nonces.insert(offer.nonce)),
            "refused"
        );
        assert_eq!(
            refused(|_, _, taken| _ = taken.names.insert(Name::new("vm2").unwrap())),
            "busy"
        );
        assert_eq!(
            refused(|_, config, _| fs::write(config.directory.join("vm2"), "").unwrap()),
            "exists"
        );
    }

    #[test]
    fn huge_pages_are_for_where_there_is_room_for_what_they_leave_unused() {
        let directory = tempfile::tempdir().unwrap();
        let config = ReceiveConfig {
            directory: directory.path().to_owned(),
            ..ReceiveConfig::default()
        };
        let mut offer = offer(&[("vm1", 64 << 30)]);
        offer.regions[0].data_bytes = 256 << 20;
        let room = |free| admit(&offer, &config, &Obligations::default(), free).unwrap();
        assert!(!room(256 << 20).fits_huge_pages());
        assert!(room(512 << 20).fits_huge_pages());
        assert_eq!(room(512 << 20).needed_bytes, 256 << 20);
    }

    #[test]
    fn memory_available_is_read_from_meminfo() {
        assert_eq!(
            available_memory("MemTotal: 10 kB\nMemAvailable:   2048 kB\n"),
            Some(2048 * 1024)
        );
        assert_eq!(available_memory("nothing"), None);
        assert!(free_bytes(Path::new("/dev/shm")).unwrap() > 0);
    }
}
