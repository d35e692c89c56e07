//! Source memory of all shapes, and comparing it with what arrived.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const MIB: u64 = 1 << 20;

/// Bytes that look random, the same for the same seed; no page of them is all zeros.
pub(crate) fn noise(length: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    let length = usize::try_from(length).unwrap();
    let mut bytes: Vec<u8> = words
        .take(length.div_ceil(8))
        .flat_map(u64::to_le_bytes)
        .collect();
    bytes.truncate(length);
    bytes
}

/// A file of `length` bytes without a hole.
pub(crate) fn dense(path: &Path, length: u64, seed: u64) {
    std::fs::write(path, noise(length, seed)).unwrap();
}

/// A file of `length` bytes that is a hole but for `islands` (offset, length).
pub(crate) fn sparse(path: &Path, length: u64, islands: &[(u64, u64)]) -> File {
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    file.set_len(length).unwrap();
    for &(offset, length) in islands {
        file.write_all_at(&noise(length, offset + 1), offset)
            .unwrap();
    }
    file
}

/// Makes a hole.
pub(crate) fn punch(file: &File, offset: u64, length: u64) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let signed = |n: u64| i64::try_from(n).unwrap();
    fallocate(file, flags, signed(offset), signed(length)).unwrap();
}

/// Blocks of 512 bytes that a file holds.
pub(crate) fn blocks(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks()
}

/// Compares every byte.
#[track_caller]
pub(crate) fn assert_same(source: &Path, destination: &Path) {
    let (a, b) = (
        File::open(source).unwrap(),
        File::open(destination).unwrap(),
    );
    let length = a.metadata().unwrap().len();
    assert_eq!(length, b.metadata().unwrap().len(), "lengths differ");
    let mut differing = Vec::new();
    // A piece at a time: there may be little memory left beside the two of them.
    let (mut of_a, mut of_b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let page = usize::try_from(PAGE).unwrap();
    for offset in (0..length).step_by(of_a.len()) {
        let count = usize::try_from(length - offset).unwrap().min(of_a.len());
        a.read_exact_at(&mut of_a[..count], offset).unwrap();
        b.read_exact_at(&mut of_b[..count], offset).unwrap();
        let pages = of_a[..count].chunks(page).zip(of_b[..count].chunks(page));
        let differ = pages.enumerate().filter(|(_, (a, b))| a != b);
        differing.extend(differ.map(|(index, _)| offset / PAGE + index as u64));
    }
    assert!(differing.is_empty(), "pages that differ: {differing:?}");
}
