//! What pages are, looked at after the harvest and before they are lent: fingerprint, zero test and checksum.
//!
//! What is sent afterwards may be newer (the page is live); then the receiver's checksum differs from ours, the
//! block counts as torn, and it stays owed.
//!
//! A page is tested for zeros up to its first byte that is not, and checksums are made where the memory is. Without
//! checksums, where none was zero for long only one page of a block is looked at. If there are fingerprints, or
//! payload is kept, a block is copied into a cache-sized buffer first and everything is computed from that copy. That is
//! also what makes `scan` exact: a value that came and went between two scans arrives torn. Payload that is
//! kept, to be compressed, is sent as it was read, and neither newer nor torn.

use crate::dirty::{Change, Fingerprints};
use crate::iteration::{Look, Piece};
use crate::limits::{BLOCK_LEN, BLOCK_PAGES, PAGE_BYTES, PAGE_LEN};
use crate::pages::PageRange;
use crate::region::{Region, RegionError};
use crate::wire::{ExtentKind, Table, blocks, crc32c};

use super::checksum::checksum;

/// Data in a row, in bytes, after which zero pages are looked for by samples.
const DENSE_BYTES: u64 = 32 * 1024 * 1024;

/// Turns pieces into the tables of packets. One per stream; its buffers are reused.
#[derive(Debug)]
pub(super) struct Inspector {
    integrity: bool,
    buffer: Box<[u8]>,
    /// Whether the payload is copied too.
    keeps: bool,
    /// Bytes looked at since the last zero page; only where nothing but the zero test is wanted.
    dense_bytes: u64,
    /// The payload of the last piece as it was read, if it was kept.
    pub(super) payload: Vec<u8>,
    /// What the last piece turned out to be.
    pub(super) table: Table,
    /// Its pages that were to be compared and are what the receiver has.
    pub(super) unchanged: Vec<PageRange>,
    /// Bytes that were read for it.
    pub(super) read_bytes: u64,
}

/// What happens to a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Unchanged,
    Zero,
    Data,
}

impl Inspector {
    pub(super) fn new(integrity: bool) -> Self {
        let buffer = vec![0; BLOCK_LEN].into_boxed_slice();
        Self {
            integrity,
            buffer,
            keeps: false,
            dense_bytes: 0,
            payload: Vec::new(),
            table: Table::default(),
            unchanged: Vec::new(),
            read_bytes: 0,
        }
    }

    /// Whether payload is to be kept as it is read, to be sent from that copy.
    pub(super) fn keep(&mut self, keeps: bool) {
        self.keeps = keeps;
    }

    /// Reads the pages of `piece` and fills `table` with what has to be sent; it is empty if nothing
    /// has changed.
    pub(super) fn inspect(
        &mut self,
        region: &Region,
        fingerprints: Option<&Fingerprints>,
        piece: &Piece,
    ) -> Result<(), RegionError> {
        self.table.clear();
        self.payload.clear();
        self.unchanged.clear();
        self.read_bytes = 0;
        for &(range, look) in &piece.runs {
            if look == Look::Hole {
                fingerprints.inspect(|table| table.forget(range));
                self.table.push(range, ExtentKind::Hole);
                continue;
            }
            // What is a hole by now is not filled again by looking at it.
            let mapped = is_mapped(region, range)?;
            if mapped && !self.keeps && fingerprints.is_none() {
                self.probe(region, range)?;
                continue;
            }
            let read = match mapped {
                true => Region::read_mapped,
                false => Region::read,
            };
            for block in blocks(range) {
                let bytes = read(region, block, &mut self.buffer)?;
                self.read_bytes += bytes.len() as u64;
                let found = Found {
                    table: &mut self.table,
                    unchanged: &mut self.unchanged,
                    kept: self.keeps.then_some(&mut self.payload),
                };
                add_block(found, block, bytes, look, fingerprints, self.integrity);
            }
        }
        Ok(())
    }

    /// That the data of `table` can still be read; the error says where it cannot, or that the file was resized.
    pub(super) fn check_readable(&mut self, region: &Region) -> Result<(), RegionError> {
        region.check_length()?;
        for block in self.table.data().flat_map(blocks) {
            region.read(block, &mut self.buffer)?;
        }
        Ok(())
    }

    /// Tells pages that are zero from others. To touch every page costs more than sending it without a copy, so
    /// where there is no checksum memory that was dense for long is only sampled, until a page is zero: what is
    /// missed is sent as data.
    fn probe(&mut self, region: &Region, range: PageRange) -> Result<(), RegionError> {
        for block in blocks(range) {
            let dense = !self.integrity && self.dense_bytes >= DENSE_BYTES;
            if dense && !self.is_zero(region, sample(block))? {
                self.table.push(block, ExtentKind::Data);
                continue;
            }
            let mut first = block.first;
            while first < block.end() {
                let zero = self.is_zero(region, page(first))?;
                let mut end = first + 1;
                while end < block.end() && self.is_zero(region, page(end))? == zero {
                    end += 1;
                }
                let run = PageRange {
                    first,
                    count: end - first,
                };
                match (zero, self.integrity) {
                    (true, _) => self.table.push(run, ExtentKind::Zero),
                    (false, true) => {
                        let checksum = checksum(region, run, &mut self.buffer)?;
                        self.table.push_block(run, checksum);
                    }
                    (false, false) => self.table.push(run, ExtentKind::Data),
                }
                first = end;
            }
        }
        self.read_bytes += range.bytes(region.bytes());
        Ok(())
    }

    fn is_zero(&mut self, region: &Region, page: PageRange) -> Result<bool, RegionError> {
        let zero = region.is_zero_mapped(page, &mut self.buffer)?;
        self.dense_bytes = match zero {
            true => 0,
            false => self.dense_bytes.saturating_add(PAGE_BYTES),
        };
        Ok(zero)
    }
}

/// A page of `block`: another one in the next block, so that no pattern hides its zero pages.
fn sample(block: PageRange) -> PageRange {
    page(block.first + block.first / BLOCK_PAGES % block.count)
}

fn page(first: u64) -> PageRange {
    PageRange { first, count: 1 }
}

/// Whether all of `range` is in our page tables. What is all data and not there yet is entered at once,
/// instead of by a fault for every page.
fn is_mapped(region: &Region, range: PageRange) -> Result<bool, RegionError> {
    if region.is_mapped(range) {
        return Ok(true);
    }
    if region.next_data(range)? != Some(range) {
        return Ok(false);
    }
    region.populate(range);
    Ok(region.is_mapped(range))
}

/// Where what was found goes.
struct Found<'a> {
    table: &'a mut Table,
    unchanged: &'a mut Vec<PageRange>,
    kept: Option<&'a mut Vec<u8>>,
}

/// Sorts the pages of one block into runs, and adds those to what was found.
fn add_block(
    found: Found<'_>,
    block: PageRange,
    bytes: &[u8],
    look: Look,
    fingerprints: Option<&Fingerprints>,
    integrity: bool,
) {
    let Found {
        table,
        unchanged,
        mut kept,
    } = found;
    let mut verdicts = (block.first..)
        .zip(bytes.chunks(PAGE_LEN))
        .map(|(page, bytes)| judge(page, bytes, look, fingerprints))
        .enumerate();
    let mut next = verdicts.next();
    while let Some((first, verdict)) = next {
        let mut end = first + 1;
        next = verdicts.next();
        while let Some((index, same)) = next
            && same == verdict
        {
            end = index + 1;
            next = verdicts.next();
        }
        let run = PageRange {
            first: block.first + first as u64,
            count: (end - first) as u64,
        };
        let bytes = &bytes[first * PAGE_LEN..(end * PAGE_LEN).min(bytes.len())];
        if let (Verdict::Data, Some(kept)) = (verdict, &mut kept) {
            kept.extend_from_slice(bytes);
        }
        match verdict {
            Verdict::Unchanged if look == Look::Compare => unchanged.push(run),
            Verdict::Unchanged => {}
            Verdict::Zero => table.push(run, ExtentKind::Zero),
            Verdict::Data if integrity => table.push_block(run, crc32c(bytes)),
            Verdict::Data => table.push(run, ExtentKind::Data),
        }
    }
}

fn judge(page: u64, bytes: &[u8], look: Look, fingerprints: Option<&Fingerprints>) -> Verdict {
    let zero = is_zero(bytes);
    let change = match fingerprints {
        None => Change::Changed,
        Some(table) if zero => table.update_zero(page),
        Some(table) => table.update(page, bytes),
    };
    match (look, change) {
        (Look::Inspect | Look::Compare, Change::Same) => Verdict::Unchanged,
        _ if zero => Verdict::Zero,
        _ => Verdict::Data,
    }
}

/// Whether all bytes are zero: words ORed in steps of 256 bytes, so that a page that is not zero costs
/// one step and the compiler vectorises the rest.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    const STEP: usize = 256;
    let mut steps = bytes.chunks_exact(STEP);
    steps.all(|step| {
        let words = step.as_chunks::<8>().0;
        words
            .iter()
            .fold(0, |all, word| all | u64::from_ne_bytes(*word))
            == 0
    }) && bytes
        .chunks_exact(STEP)
        .remainder()
        .iter()
        .all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::name::Name;
    use crate::wire::Extent;

    fn region(content: &[u8]) -> (File, Region) {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.write_all_at(content, 0).unwrap();
        let fd = file.try_clone().unwrap().into();
        (
            file,
            Region::from_descriptor(Name::new("r").unwrap(), fd).unwrap(),
        )
    }

    fn piece(count: u64, look: Look) -> Piece {
        Piece {
            region: 0,
            runs: vec![(PageRange { first: 0, count }, look)],
        }
    }

    fn kinds(table: &Table) -> Vec<(u64, u64, ExtentKind)> {
        table
            .extents
            .iter()
            .map(|Extent { range, kind }| (range.first, range.count, *kind))
            .collect()
    }

    #[test]
    fn zero_pages_are_found_inside_a_block_and_checksums_cover_the_rest() {
        let mut content = vec![7; 20 * PAGE_LEN + 10];
        content[2 * PAGE_LEN..4 * PAGE_LEN].fill(0);
        let (_file, region) = region(&content);
        let mut inspector = Inspector::new(true);
        inspector
            .inspect(&region, None, &piece(21, Look::Owed))
            .unwrap();
        assert_eq!(
            kinds(&inspector.table),
            [
                (0, 2, ExtentKind::Data),
                (2, 2, ExtentKind::Zero),
                (4, 17, ExtentKind::Data)
            ]
        );
        let sums = [
            &content[..2 * PAGE_LEN],
            &content[4 * PAGE_LEN..16 * PAGE_LEN],
            &content[16 * PAGE_LEN..],
        ]
        .map(crc32c);
        assert_eq!(inspector.table.checksums, sums);
    }

    /// That what is zero behind dense memory is found, all but what lies before the first sample of it.
    fn finds_zero_pages(is_zero: fn(u64) -> bool) {
        const DENSE: u64 = 10_000;
        let mut content = Vec::new();
        for page in 0..2 * DENSE {
            content.resize(content.len() + PAGE_LEN, 0);
            if page < DENSE || !is_zero(page) {
                *content.last_mut().unwrap() = 1;
            }
        }
        let (_file, region) = region(&content);
        let mut inspector = Inspector::new(false);
        inspector
            .inspect(&region, None, &piece(2 * DENSE, Look::Owed))
            .unwrap();
        let found: Vec<u64> = kinds(&inspector.table)
            .into_iter()
            .filter(|(_, _, kind)| *kind == ExtentKind::Zero)
            .flat_map(|(first, count, _)| first..first + count)
            .collect();
        assert!(found.iter().all(|page| *page >= DENSE && is_zero(*page)));
        // Sixteen blocks at most until a page of them is sampled that is zero.
        let expected = (DENSE + 17 * BLOCK_PAGES..2 * DENSE).filter(|page| is_zero(*page));
        assert!(found.len() >= expected.count(), "{} found", found.len());
    }

    #[test]
    fn zero_pages_are_found_again_in_memory_that_was_dense() {
        finds_zero_pages(|_| true);
        finds_zero_pages(|page| page % 16 != 0);
        finds_zero_pages(|page| page % 16 == 5);
    }

    #[test]
    fn what_one_packet_says_is_what_its_decoder_accepts() {
        let mut content = vec![7; 40 * PAGE_LEN];
        content[5 * PAGE_LEN..6 * PAGE_LEN].fill(0);
        let (_file, region) = region(&content);
        let mut inspector = Inspector::new(true);
        let runs = [(0, 3), (3, 2), (5, 10), (17, 20)]
            .map(|(first, count)| (PageRange { first, count }, Look::Owed));
        inspector
            .inspect(
                &region,
                None,
                &Piece {
                    region: 0,
                    runs: runs.to_vec(),
                },
            )
            .unwrap();
        let mut bytes = Vec::new();
        inspector.table.encode(&mut bytes);
        let header = crate::wire::DataHeader {
            epoch: 0,
            iteration: 1,
            sequence: 1,
            region: 0,
            extents: inspector.table.extents.len().try_into().unwrap(),
            blocks: inspector.table.checksums.len().try_into().unwrap(),
            payload: inspector
                .table
                .data()
                .map(|r| r.bytes(region.bytes()))
                .sum::<u64>()
                .try_into()
                .unwrap(),
            packed: None,
            table_crc: crc32c(&bytes),
        };
        Table::default()
            .decode(&bytes, &header, region.bytes(), true)
            .unwrap();
    }

    #[test]
    fn what_is_kept_is_the_payload_that_the_table_announces() {
        let mut content: Vec<u8> = (0..40 * PAGE_LEN + 10)
            .map(|at| u8::try_from(at / 64 % 251).unwrap() + 1)
            .collect();
        content[5 * PAGE_LEN..6 * PAGE_LEN].fill(0);
        let (_file, region) = region(&content);
        for integrity in [true, false] {
            let mut inspector = Inspector::new(integrity);
            inspector.keep(true);
            for _ in 0..2 {
                inspector
                    .inspect(&region, None, &piece(41, Look::Owed))
                    .unwrap();
                let announced: Vec<u8> = inspector
                    .table
                    .data()
                    .flat_map(|run| {
                        let bounds = [run.offset(), run.offset() + run.bytes(region.bytes())];
                        let [start, end] = bounds.map(|n| usize::try_from(n).unwrap());
                        content[start..end].to_vec()
                    })
                    .collect();
                assert!(inspector.payload == announced);
            }
            inspector.keep(false);
            inspector
                .inspect(&region, None, &piece(41, Look::Owed))
                .unwrap();
            assert!(inspector.payload.is_empty());
        }
    }

    #[test]
    fn an_unchanged_page_is_sent_only_if_it_is_owed() {
        let (file, region) = region(&[7; 3 * PAGE_LEN]);
        let fingerprints = Fingerprints::new(3).unwrap();
        let mut inspector = Inspector::new(true);
        let mut sent = |look| {
            inspector
                .inspect(&region, Some(&fingerprints), &piece(3, look))
                .unwrap();
            kinds(&inspector.table)
        };
        assert_eq!(sent(Look::Inspect), [(0, 3, ExtentKind::Data)]);
        assert_eq!(sent(Look::Inspect), []);
        assert_eq!(sent(Look::Owed), [(0, 3, ExtentKind::Data)]);
        file.write_all_at(b"x", PAGE_LEN as u64).unwrap();
        assert_eq!(sent(Look::Inspect), [(1, 1, ExtentKind::Data)]);
        file.write_all_at(&[0; PAGE_LEN], PAGE_LEN as u64).unwrap();
        assert_eq!(sent(Look::Inspect), [(1, 1, ExtentKind::Zero)]);
        assert_eq!(sent(Look::Inspect), []);
    }

    #[test]
    fn what_was_compared_and_is_the_same_is_named() {
        let (file, region) = region(&[7; 20 * PAGE_LEN]);
        let fingerprints = Fingerprints::new(20).unwrap();
        let mut inspector = Inspector::new(true);
        let mut look = |look| {
            inspector
                .inspect(&region, Some(&fingerprints), &piece(20, look))
                .unwrap();
            let named = inspector.unchanged.iter();
            let named = named.map(|run| (run.first, run.count)).collect::<Vec<_>>();
            (kinds(&inspector.table), named)
        };
        assert_eq!(look(Look::Owed).1, []);
        file.write_all_at(b"x", 2 * PAGE_LEN as u64).unwrap();
        let sent = vec![(2, 1, ExtentKind::Data)];
        assert_eq!(look(Look::Compare), (sent, vec![(0, 2), (3, 13), (16, 4)]));
        assert_eq!(look(Look::Inspect), (vec![], vec![]));
    }

    #[test]
    fn a_single_bit_anywhere_is_not_zero() {
        for length in [1, 255, 256, 4000, PAGE_LEN] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in [0, length / 2, length - 1] {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "byte {at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
