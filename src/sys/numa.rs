//! On which NUMA nodes memory may be, and is to be.
#![allow(unsafe_code)] // `mbind` has no wrapper in nix or libc.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::LazyLock;

use nix::errno::Errno;

use crate::limits::NUMA_NODES_MAX;
use crate::region::Mapping;

/// The nodes that this process may have memory on.
pub fn allowed() -> io::Result<Vec<u32>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    // A kernel without NUMA has no such line, and one node.
    Ok(list.map_or_else(|| vec![0], |list| nodes(list.trim())))
}

/// `0-1,3`.
fn nodes(list: &str) -> Vec<u32> {
    let parts = list.split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    parts.flatten().collect()
}

/// Has all memory that is allocated for the mapping from now on come from `node` as long as that has some,
/// and then from others. Of a file on tmpfs or hugetlbfs, or a memfd, it is the file that keeps this: it
/// holds for every mapping of it. `EINVAL`: there is no such node, or it is not allowed.
pub fn prefer(mapping: &Mapping, node: u32) -> io::Result<()> {
    let Some(base) = mapping.address() else {
        return Ok(());
    };
    let mut mask = [0_u64; NUMA_NODES_MAX as usize / 64];
    let word = mask.get_mut(node as usize / 64).ok_or(Errno::EINVAL)?;
    *word |= 1 << (node % 64);
    // The kernel takes one off.
    let bits = u64::from(NUMA_NODES_MAX) + 1;
    let no_flags = 0;
    // SAFETY: the kernel reads the mask, which has as many bits as is said, and no memory of the mapping is
    // touched. The range is exactly the mapping's own, alive while it is borrowed.
    let bound = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            base.as_ptr(),
            mapping.len(),
            libc::MPOL_PREFERRED,
            mask.as_ptr(),
            bits,
            no_flags,
        )
    };
    Errno::result(bound)?;
    Ok(())
}

/// Where the memory of this process is, as the kernel said when it was asked. Only what page tables have is seen.
#[derive(Debug)]
pub enum Whereabouts {
    /// There is one node for us: all of it is there.
    OneNode(u32),
    /// What `numa_maps` says.
    Many(String),
}

impl Whereabouts {
    /// Asks. With several nodes the kernel walks all page tables of the process for it, at a millisecond or so per
    /// GiB in small pages: not for a thread that others wait for.
    pub fn now() -> io::Result<Self> {
        // A machine cannot get more than are possible, and one node is what most have.
        static POSSIBLE: LazyLock<String> = LazyLock::new(|| {
            fs::read_to_string("/sys/devices/system/node/possible").unwrap_or_default()
        });
        if let [node] = nodes(POSSIBLE.trim())[..] {
            return Ok(Self::OneNode(node));
        }
        match allowed()?.as_slice() {
            [node] => Ok(Self::OneNode(*node)),
            _ => Ok(Self::Many(fs::read_to_string("/proc/self/numa_maps")?)),
        }
    }

    /// Bytes of `mapping`, of which `allocated` are there at all, on each node that has some.
    #[must_use]
    pub fn of(&self, mapping: &Mapping, allocated: u64) -> BTreeMap<u32, u64> {
        match self {
            Self::OneNode(_) if allocated == 0 => BTreeMap::new(),
            Self::OneNode(node) => BTreeMap::from([(*node, allocated)]),
            Self::Many(numa_maps) => {
                let start = mapping.address().map_or(0, |base| base.addr().get());
                node_bytes_at(numa_maps, start)
            }
        }
    }
}

/// According to `numa_maps`: `start policy … N0=pages N1=pages kernelpagesize_kB=4`.
fn node_bytes_at(numa_maps: &str, start: usize) -> BTreeMap<u32, u64> {
    let first = format!("{start:x} ");
    let line = numa_maps
        .lines()
        .find(|line| line.trim_start_matches('0').starts_with(&first));
    let mut fields: Vec<_> = line
        .unwrap_or_default()
        .split(' ')
        .filter_map(|field| field.split_once('='))
        .collect();
    let page_kib = fields
        .pop_if(|(key, _)| *key == "kernelpagesize_kB")
        .and_then(|(_, kib)| kib.parse::<u64>().ok())
        .unwrap_or(4);
    let on_node = |(key, pages): &(&str, &str)| {
        let node = key.strip_prefix('N')?.parse::<u32>().ok()?;
        Some((node, pages.parse::<u64>().ok()? * page_kib * 1024))
    };
    fields.iter().filter_map(on_node).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::region::Access;
    use crate::sys::file::populate;

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(nodes("0"), [0]);
        assert_eq!(nodes("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(nodes(""), [0; 0]);
        assert!(allowed().unwrap().contains(&0));
    }

    #[test]
    fn memory_comes_from_the_node_that_is_preferred_and_there_is_no_seventh() {
        const BYTES: usize = 64 * 4096;
        let file = File::from(memfd_create(c"numa", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(BYTES as u64).unwrap();
        let mapping = Mapping::new(&file, BYTES, Access::Write).unwrap();
        let error = prefer(&mapping, 7).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert!(prefer(&mapping, NUMA_NODES_MAX).is_err());
        prefer(&mapping, 0).unwrap();
        // Another mapping: the policy is the file's.
        let other = Mapping::new(&file, BYTES, Access::Write).unwrap();
        populate(&other.whole(), Access::Write).unwrap();
        let start = format!("{:x} ", other.address().unwrap().addr());
        let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(
            line.contains("prefer:0") && line.contains("N0=64"),
            "{line}"
        );
    }

    #[test]
    fn pages_are_counted_by_node_in_the_right_mapping() {
        let maps = "\
00400000 default file=/bin/N0=7 mapped=3 N0=3 kernelpagesize_kB=4
7f0000000000 prefer:1 file=/memfd:x\\040(deleted) dirty=9 N0=1 N1=8 kernelpagesize_kB=2048
";
        let found = node_bytes_at(maps, 0x7f00_0000_0000);
        assert_eq!(found, BTreeMap::from([(0, 2 << 20), (1, 16 << 20)]));
        assert_eq!(node_bytes_at(maps, 0x40_0000), BTreeMap::from([(0, 12288)]));
        assert_eq!(node_bytes_at(maps, 0x50_0000), BTreeMap::new());
    }
}
