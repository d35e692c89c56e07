//! What the kernel says of the memory behind a mapping: in which pages it is, and on which nodes.
//!
//! Only what the mapping's page tables have is seen. The kernel walks all page tables of the process for it,
//! at a millisecond or so per GiB in small pages: not for a thread that others wait for.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use crate::region::Mapping;

/// What the page tables of this process were when it was asked.
#[derive(Debug)]
pub struct Seen {
    smaps: String,
    numa_maps: String,
}

impl Seen {
    /// Asks the kernel.
    pub fn now() -> io::Result<Self> {
        Ok(Self {
            smaps: fs::read_to_string("/proc/self/smaps")?,
            // A kernel without NUMA has none.
            numa_maps: fs::read_to_string("/proc/self/numa_maps").unwrap_or_default(),
        })
    }

    /// Bytes of `mapping` that huge pages map: those of hugetlbfs, or transparent ones.
    #[must_use]
    pub fn huge_bytes(&self, mapping: &Mapping) -> u64 {
        huge_bytes_at(&self.smaps, start(mapping))
    }

    /// Bytes of `mapping` on each node that has some.
    #[must_use]
    pub fn node_bytes(&self, mapping: &Mapping) -> BTreeMap<u32, u64> {
        node_bytes_at(&self.numa_maps, start(mapping))
    }
}

fn start(mapping: &Mapping) -> usize {
    mapping.address().map_or(0, |base| base.addr().get())
}

/// According to `smaps`, of the mapping that begins at `start`.
fn huge_bytes_at(smaps: &str, start: usize) -> u64 {
    let first = format!("{start:x}-");
    let mut lines = smaps.lines().skip_while(|line| {
        // The kernel writes at least eight digits.
        !line.trim_start_matches('0').starts_with(&first)
    });
    lines.next();
    let fields = lines.map_while(|line| line.split_once(':').filter(|(key, _)| !key.contains('-')));
    let huge = fields.filter(|(key, _)| {
        matches!(
            *key,
            "ShmemPmdMapped" | "FilePmdMapped" | "Shared_Hugetlb" | "Private_Hugetlb"
        )
    });
    let kib = huge.filter_map(|(_, value)| value.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.sum::<u64>() * 1024
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
    use super::*;

    #[test]
    fn huge_pages_are_counted_in_the_right_mapping() {
        let smaps = "\
00400000-00600000 rw-s 00000000 00:01 12  /memfd:x (deleted)
Size:               2048 kB
ShmemPmdMapped:     2048 kB
VmFlags: rd wr sh
7f0000000000-7f0000400000 rw-s 00000000 00:01 13  /a: b-c
Size:               4096 kB
FilePmdMapped:         0 kB
ShmemPmdMapped:        0 kB
Private_Hugetlb:    4096 kB
7f0000400000-7f0000800000 rw-s 00000000 00:01 14
ShmemPmdMapped:     8192 kB
";
        assert_eq!(huge_bytes_at(smaps, 0x0040_0000), 2 << 20);
        assert_eq!(huge_bytes_at(smaps, 0x7f00_0000_0000), 4 << 20);
        assert_eq!(huge_bytes_at(smaps, 0x7f00_0000_1000), 0);
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
