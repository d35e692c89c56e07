//! Every bound in one place, and how the bounds relate.
//!
//! A number that arrives from a peer or a client is compared with one of these before it is used to
//! index, to allocate or to compute.

/// Unit in which pages are counted on the wire and in every page set, in bytes. A Region on larger
/// pages keeps its own granularity for tracking; each of its pages is a run of these.
pub const PAGE_BYTES: u64 = PAGE_LEN as u64;

/// [`PAGE_BYTES`] as the length of a slice.
pub const PAGE_LEN: usize = 4096;

/// Payload covered by one checksum, in bytes, aligned in the Region. Small enough to be read, hashed
/// and checksummed inside a core's first-level caches, large enough that a checksum costs no space.
pub const BLOCK_BYTES: u64 = BLOCK_LEN as u64;

/// [`BLOCK_BYTES`] as the length of a slice.
pub const BLOCK_LEN: usize = 64 * 1024;

/// Pages in one checksum block.
pub const BLOCK_PAGES: u64 = BLOCK_BYTES / PAGE_BYTES;

/// A huge page of tmpfs, in bytes: what one entry of the second level of the page tables maps on x86-64,
/// and on arm64 with base pages of 4 KiB.
pub const HUGE_PAGE_BYTES: u64 = 2 * 1024 * 1024;

/// Pages in one of them.
pub const HUGE_PAGE_PAGES: u64 = HUGE_PAGE_BYTES / PAGE_BYTES;

/// Largest span of a Region that one packet may cover, in bytes.
pub const PACKET_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Smallest configurable packet, in bytes.
pub const PACKET_BYTES_MIN: u64 = BLOCK_BYTES;

/// Default packet, in bytes.
pub const PACKET_BYTES_DEFAULT: u64 = 1024 * 1024;

/// Largest number of pages one packet may cover.
pub const PACKET_PAGES_MAX: u64 = PACKET_BYTES_MAX / PAGE_BYTES;

/// Largest number of runs that a sender puts into one packet.
pub const PIECE_RUNS_MAX: u64 = 1024;

/// Largest number of extents in one packet: at worst every page with payload differs in kind from its
/// neighbour, and every run is followed by a hole.
pub const PACKET_EXTENTS_MAX: u64 = PACKET_PAGES_MAX + PIECE_RUNS_MAX;

/// Largest number of checksum blocks in one packet: at worst every page is a block of its own.
pub const PACKET_BLOCKS_MAX: u64 = PACKET_PAGES_MAX;

/// Default bound on bytes sent but not acknowledged as applied, per stream.
pub const WINDOW_BYTES_DEFAULT: u64 = 16 * 1024 * 1024;

/// Largest window a sender may ask for, per stream.
pub const WINDOW_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// CPUs that can be named: as many as a `cpu_set_t` of sched_setaffinity(2) holds.
pub const CPUS_MAX: usize = 1024;

/// NUMA nodes that can be named: as many as a kernel has at most.
pub const NUMA_NODES_MAX: u32 = 1024;

/// Streams per attempt.
pub const STREAMS_MAX: u16 = 256;

/// Packets sent but not acknowledged, per stream. Acknowledgements of this many packets fit a socket's
/// buffers, so that two sides that are both writing never wait for each other.
pub const PACKETS_UNACKNOWLEDGED_MAX: usize = 256;

/// Regions per attempt.
pub const REGIONS_MAX: usize = 4096;

/// Longest Region, in bytes (16 TiB), unless the receiver's configuration says less.
pub const REGION_BYTES_MAX: u64 = 16 << 40;

/// Longest Region name or attempt id, in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// Largest body of one message of the peer conversation, in bytes: an offer of [`REGIONS_MAX`] Regions
/// with the longest names has less than half of it.
pub const MESSAGE_BYTES_MAX: u32 = 2 * 1024 * 1024;

/// Longest final blob of an attempt, in bytes.
pub const BLOB_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Largest piece of a final blob in one frame, in bytes: heartbeats and errors wait behind it.
pub const BLOB_PIECE_BYTES_MAX: usize = 256 * 1024;

/// Longest error code from a peer, in bytes.
pub const CODE_BYTES_MAX: usize = 64;

/// Longest error text from a peer, in bytes.
pub const DESC_BYTES_MAX: usize = 4096;

/// Longest boot id from a peer, in bytes.
pub const BOOT_ID_BYTES_MAX: usize = 128;

/// Checksum blocks sent but not acknowledged, per stream. All of them may be reported torn, and the
/// report must fit a socket's buffers, so that two sides that are both writing never wait for each
/// other. One packet may have more, and then goes alone.
pub const BLOCKS_UNACKNOWLEDGED_MAX: u64 = 2048;

/// Answers "not mine" that a receiver keeps: each is a promise for ever, and a file.
pub const RECORDS_MAX: usize = 65_536;

/// Transfers that `query-history` shows.
pub const HISTORY_SHOWN_MAX: usize = 256;

/// Attempts whose end a daemon remembers.
pub const ATTEMPTS_REMEMBERED_MAX: usize = 256;

/// Largest request on the control socket, in bytes.
pub const CONTROL_REQUEST_BYTES_MAX: usize = 1024 * 1024;

/// Largest answer on the control socket, in bytes: `qemu.qmp` stops reading a line at 10 MiB.
pub const CONTROL_ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Descriptors one control connection may hold by name.
pub const CONTROL_FDS_MAX: usize = 1024;

/// Brackets inside brackets in one request on the control socket.
pub const CONTROL_NESTING_MAX: u32 = 64;

/// In-band commands of one control connection that are begun and not answered; QEMU has the same.
pub const CONTROL_IN_BAND_MAX: usize = 8;

/// Out-of-band commands of one control connection that run at once.
pub const CONTROL_OUT_OF_BAND_MAX: usize = 8;

/// Events waiting for one control client, in bytes. Above it further events are dropped.
pub const CONTROL_EVENT_QUEUE_BYTES_MAX: usize = 256 * 1024;

/// Longest time a receiver keeps an attempt that lost its sender, in seconds, whatever was asked for.
pub const RECOVER_SECONDS_MAX: u64 = 60 * 60;

/// Streams of a transfer that connect at the same time: each connection takes round trips.
pub const STREAMS_CONNECTING_MAX: usize = 8;

/// Callers of a receiver that have not introduced themselves: what 64 transfers, the default of
/// `receive.max-transfers`, may have when they begin at once.
pub const SILENT_CALLERS_MAX: usize = 64 * STREAMS_CONNECTING_MAX;

/// Runs of missing pages that a receiver names when an attempt is resumed. With more of them, those that
/// lie closest are joined.
pub const MISSING_RUNS_MAX: usize = 8192;

/// Spans handed to one system call: the kernel's `UIO_MAXIOV`.
pub const IOV_MAX: usize = 1024;

const _: () = assert!(BLOCK_BYTES.is_multiple_of(PAGE_BYTES)); // a block never splits a page
const _: () = assert!(PACKET_BYTES_MAX.is_multiple_of(BLOCK_BYTES)); // a packet never splits a block
const _: () =
    assert!(PACKET_BYTES_DEFAULT <= PACKET_BYTES_MAX && PACKET_BYTES_DEFAULT >= PACKET_BYTES_MIN);
const _: () = assert!(WINDOW_BYTES_DEFAULT >= PACKET_BYTES_MAX); // one packet always fits the default window
const _: () = assert!(PACKET_BYTES_MAX <= u32::MAX as u64); // the header's payload length is 32 bits
