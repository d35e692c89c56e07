//! What a receiver takes, from whom, and where it puts it: the `[receive]` table.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::cpus::CpuList;
use super::keys::{Choice, Key, Refusal};
use crate::endpoint::Endpoint;
use crate::limits::{NUMA_NODES_MAX, REGION_BYTES_MAX};
use crate::name::Name;
use crate::sys;

/// The `[receive]` table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveConfig {
    /// Where to listen. Never empty.
    pub listen: Vec<Endpoint>,
    /// Where committed Regions appear, as `<directory>/<name>`.
    pub directory: PathBuf,
    /// Whether to ask for huge pages.
    pub huge_pages: HugePages,
    /// Where new memory comes from, as long as there is some.
    pub numa_node: Option<u32>,
    /// On which CPUs the streams' threads run.
    pub cpus: CpuList,
    /// Longest Region, in bytes.
    pub max_region: u64,
    /// All Regions of all attempts under way, in bytes.
    pub max_total: u64,
    /// Attempts at a time.
    pub max_transfers: usize,
    /// Names a Region may have: any of these patterns.
    pub allow_names: Vec<NamePattern>,
    /// Addresses a TCP peer may have: any of these ranges.
    pub allow_peers: Vec<PeerRange>,
    /// Whether plain TCP may be served to other hosts.
    pub insecure_plaintext: bool,
}

/// Whether to ask for huge pages at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HugePages {
    /// Where the file system gives them.
    Auto,
    /// Never.
    Off,
}

/// A pattern for names, in which `*` stands for any characters, also none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern(String);

/// An address, or a range of them such as `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerRange {
    /// Its bits after the first `prefix` are zero.
    network: IpAddr,
    prefix: u8,
}

/// Why a text is no pattern for names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} matches no Region name: use letters, digits, '.', '_', '-', and '*' for any characters"
)]
pub struct NamePatternError(String);

/// Why a text is no range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRangeError {
    /// Not an address with an optional prefix length.
    #[error("{0:?} is no address or range: write 192.0.2.7, 10.0.0.0/8 or fd00::/8")]
    Syntax(String),
    /// Bits are set that the prefix length says do not count.
    #[error("{read:?} has bits set after its first {prefix}: write {network}/{prefix}")]
    HostBits {
        /// What was read.
        read: String,
        /// The address with those bits cleared.
        network: IpAddr,
        /// Bits that count.
        prefix: u8,
    },
}

impl Choice for HugePages {
    const ALL: &'static [(&'static str, Self)] = &[("auto", Self::Auto), ("off", Self::Off)];
}

impl HugePages {
    /// The word for it in TOML.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.word()
    }
}

impl NamePattern {
    /// Whether the whole of `name` fits the pattern.
    #[must_use]
    pub fn matches(&self, name: &Name) -> bool {
        let mut pieces = self.0.split('*');
        let first = pieces.next().unwrap_or("");
        let Some(mut rest) = name.as_str().strip_prefix(first) else {
            return false;
        };
        let mut pieces: Vec<_> = pieces.collect();
        // Without a star, the first piece is all there is.
        let Some(last) = pieces.pop() else {
            return rest.is_empty();
        };
        // The leftmost place for each piece leaves the most room for those after it.
        for piece in pieces {
            match rest.find(piece) {
                Some(at) => rest = &rest[at + piece.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl FromStr for NamePattern {
    type Err = NamePatternError;

    fn from_str(read: &str) -> Result<Self, NamePatternError> {
        // With letters in place of the stars it must be the beginning of some name, so that a pattern
        // that can never match (a path, say) is a mistake seen at the start.
        let name = read.replace('*', "x");
        if Name::new(name).is_ok() {
            Ok(Self(read.to_owned()))
        } else {
            Err(NamePatternError(read.chars().take(128).collect()))
        }
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl PeerRange {
    /// Whether `address` is in the range. An IPv4 address that arrived over an IPv6 socket counts as IPv4.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        masked(address.to_canonical(), self.prefix) == Some(self.network)
    }
}

/// The address with only its first `prefix` bits left. `None` if it has fewer bits.
fn masked(address: IpAddr, prefix: u8) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => {
            let drop = 32u32.checked_sub(prefix.into())?;
            let mask = u32::MAX.checked_shl(drop).unwrap_or(0);
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let drop = 128u32.checked_sub(prefix.into())?;
            let mask = u128::MAX.checked_shl(drop).unwrap_or(0);
            IpAddr::V6((address.to_bits() & mask).into())
        }
    })
}

impl FromStr for PeerRange {
    type Err = PeerRangeError;

    fn from_str(read: &str) -> Result<Self, PeerRangeError> {
        let quoted = || read.chars().take(64).collect::<String>();
        let syntax = || PeerRangeError::Syntax(quoted());
        let (address, prefix) = match read.split_once('/') {
            Some((address, prefix)) if prefix.bytes().all(|b| b.is_ascii_digit()) => {
                (address, Some(prefix.parse().map_err(|_| syntax())?))
            }
            Some(_) => return Err(syntax()),
            None => (read, None),
        };
        let address: IpAddr = address.parse().map_err(|_| syntax())?;
        let prefix = prefix.unwrap_or_else(|| if address.is_ipv4() { 32 } else { 128 });
        let network = masked(address, prefix).ok_or_else(syntax)?;
        if network == address {
            Ok(Self { network, prefix })
        } else {
            Err(PeerRangeError::HostBits {
                read: quoted(),
                network,
                prefix,
            })
        }
    }
}

impl fmt::Display for PeerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl ReceiveConfig {
    /// Whether a Region may have this name here.
    #[must_use]
    pub fn allows_name(&self, name: &Name) -> bool {
        self.allow_names.iter().any(|pattern| pattern.matches(name))
    }

    /// Whether a TCP peer may connect from this address.
    #[must_use]
    pub fn allows_peer(&self, address: IpAddr) -> bool {
        self.allow_peers.iter().any(|range| range.contains(address))
    }

    /// That there is such a node, and memory may come from it. The receiver does not start otherwise.
    pub fn check_numa_node(&self) -> io::Result<()> {
        let Some(node) = self.numa_node else {
            return Ok(());
        };
        let allowed = sys::numa::allowed()?;
        match allowed.contains(&node) {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "this process may have memory on no node {node}: it may on {allowed:?}"
            ))),
        }
    }

    /// Values that do not fit together: the key to look at, and why.
    pub(super) fn disagreement(&self) -> Option<(&'static str, String)> {
        if self.listen.is_empty() {
            let reason = "is empty: a receiver listens somewhere, such as \"tcp:127.0.0.1:4440\"";
            return Some(("listen", reason.to_owned()));
        }
        if self.max_total < self.max_region {
            let reason = "is less than max-region: the longest Region allowed could never arrive";
            return Some(("max-total", reason.to_owned()));
        }
        let open = self.listen.iter().find(|endpoint| !endpoint.is_loopback());
        if let (Some(endpoint), false) = (open, self.insecure_plaintext) {
            let reason = format!(
                "{endpoint} can be reached from other hosts, and plain TCP protects nothing: anyone on \
                 the way reads and changes the memory that is moved. Listen on a loopback address, or set \
                 insecure-plaintext = true if the network itself is protected (WireGuard, IPsec, a \
                 dedicated link)"
            );
            return Some(("listen", reason));
        }
        None
    }
}

impl Default for ReceiveConfig {
    fn default() -> Self {
        let any = |network: IpAddr| PeerRange { network, prefix: 0 };
        Self {
            listen: vec![Endpoint::Tcp {
                host: "127.0.0.1".to_owned(),
                port: crate::endpoint::PORT_DEFAULT,
            }],
            directory: PathBuf::from("/dev/shm/memferry"),
            huge_pages: HugePages::Auto,
            numa_node: None,
            cpus: CpuList::default(),
            // Memory is checked when an attempt starts; these two only keep nonsense out, so they are
            // the longest Region there can be, and a few of them.
            max_region: REGION_BYTES_MAX,
            max_total: 4 * REGION_BYTES_MAX,
            max_transfers: 64,
            allow_names: vec![NamePattern("*".to_owned())],
            allow_peers: vec![
                any(std::net::Ipv4Addr::UNSPECIFIED.into()),
                any(std::net::Ipv6Addr::UNSPECIFIED.into()),
            ],
            insecure_plaintext: false,
        }
    }
}

/// Largest `max-total`: far beyond any host, and far from overflowing a sum.
const TOTAL_BYTES_MAX: u64 = 1 << 60;

/// Every key of `[receive]`.
pub(super) const KEYS: &[Key<ReceiveConfig>] = &[
    Key {
        name: "listen",
        set: |to, given| {
            let endpoint = |text: &str| text.parse().map_err(Refusal::new);
            to.listen = given.list(|given| endpoint(given.text()?))?;
            Ok(())
        },
    },
    Key {
        name: "directory",
        set: |to, given| given.path().map(|path| to.directory = path),
    },
    Key {
        name: "huge-pages",
        set: |to, given| given.choice().map(|choice| to.huge_pages = choice),
    },
    Key {
        name: "numa-node",
        set: |to, given| {
            let node = given.optional_count(0..=u64::from(NUMA_NODES_MAX) - 1)?;
            to.numa_node = node.map(u32::try_from).transpose().map_err(Refusal::new)?;
            Ok(())
        },
    },
    Key {
        name: "cpus",
        set: |to, given| {
            to.cpus = given.text()?.parse().map_err(Refusal::new)?;
            Ok(())
        },
    },
    Key {
        name: "max-region",
        set: |to, given| {
            let bytes = given.size(crate::limits::PAGE_BYTES..=REGION_BYTES_MAX);
            bytes.map(|bytes| to.max_region = bytes)
        },
    },
    Key {
        name: "max-total",
        set: |to, given| {
            let bytes = given.size(crate::limits::PAGE_BYTES..=TOTAL_BYTES_MAX);
            bytes.map(|bytes| to.max_total = bytes)
        },
    },
    Key {
        name: "max-transfers",
        set: |to, given| {
            let transfers = given.count(1..=1024)?;
            to.max_transfers = usize::try_from(transfers).map_err(Refusal::new)?;
            Ok(())
        },
    },
    Key {
        name: "allow-names",
        set: |to, given| {
            let pattern = |text: &str| text.parse().map_err(Refusal::new);
            to.allow_names = given.list(|given| pattern(given.text()?))?;
            Ok(())
        },
    },
    Key {
        name: "allow-peers",
        set: |to, given| {
            let range = |text: &str| text.parse().map_err(Refusal::new);
            to.allow_peers = given.list(|given| range(given.text()?))?;
            Ok(())
        },
    },
    Key {
        name: "insecure-plaintext",
        set: |to, given| given.flag().map(|flag| to.insecure_plaintext = flag),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let pattern: NamePattern = pattern.parse().unwrap();
        pattern.matches(&Name::new(name).unwrap())
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name) in [
            ("*", "vm1"),
            ("vm1", "vm1"),
            ("vm*", "vm"),
            ("vm*", "vm1"),
            ("*.ram", "vm1.ram"),
            ("vm*.ram*", "vm1.ram.0"),
            ("a*b*b", "abb"),
            ("a**b", "ab"),
            ("*a*a", "xaxaxa"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("vm1", "vm10"),
            ("vm1", "xvm1"),
            ("vm*", "xvm"),
            ("a*b*b", "ab"),
            ("*.ram", "ram"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
        for pattern in ["", "/x*", "../*", "a?b", ".x"] {
            assert!(pattern.parse::<NamePattern>().is_err(), "{pattern}");
        }
    }

    #[test]
    fn a_range_contains_its_addresses() {
        let contains = |range: &str, address: &str| {
            let range: PeerRange = range.parse().unwrap();
            range.contains(address.parse().unwrap())
        };
        assert!(contains("10.0.0.0/8", "10.255.0.1"));
        assert!(contains("10.0.0.0/8", "::ffff:10.1.1.1"));
        assert!(contains("192.0.2.7", "192.0.2.7"));
        assert!(contains("fd00::/8", "fd12::1"));
        assert!(contains("0.0.0.0/0", "8.8.8.8"));
        assert!(contains("::/0", "2001:db8::1"));
        assert!(!contains("10.0.0.0/8", "11.0.0.1"));
        assert!(!contains("192.0.2.7", "192.0.2.8"));
        assert!(!contains("0.0.0.0/0", "::1"));
        assert!(!contains("::/0", "127.0.0.1"));
    }

    #[test]
    fn refuses_what_is_no_range() {
        for text in [
            "",
            "host",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.0/",
            "10/8",
            "1.2.3.4/+8",
        ] {
            assert!(text.parse::<PeerRange>().is_err(), "{text}");
        }
        let text = "10.1.0.0/8".parse::<PeerRange>().unwrap_err().to_string();
        assert!(text.contains("write 10.0.0.0/8"), "{text}");
    }
}
