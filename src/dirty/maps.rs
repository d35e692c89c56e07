//! What a process has mapped where, from `/proc/<pid>/maps`: asked where the kernel answers, else read.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Seek};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use nix::sys::stat::{fstat, major, minor};

use crate::sys::procmap::{Mapped, mapped_at};

/// A file, as the kernel tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    /// Major and minor number.
    device: (u64, u64),
    inode: u64,
}

impl FileId {
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let stat = fstat(fd)?;
        Ok(Self {
            device: (major(stat.st_dev), minor(stat.st_dev)),
            inode: stat.st_ino,
        })
    }

    /// Whether a mapping has the file's byte `offset` at `address`, and what is written there is the file's.
    fn is_at(self, offset: u64, address: u64, mapped: &Mapped) -> bool {
        let found = mapped.offset + (address - mapped.start);
        mapped.shared
            && (mapped.device, mapped.inode) == (self.device, self.inode)
            && found == offset
    }
}

/// The list of mappings of the process that an open page map is of; `None` if it is not for us to see: the
/// process is another user's, or lives where our /proc does not show it.
pub(super) fn of_pagemap(pagemap: BorrowedFd<'_>) -> Option<File> {
    let path: PathBuf = fs::read_link(format!("/proc/self/fd/{}", pagemap.as_raw_fd())).ok()?;
    // The number in the path may mean another process to us. The inode is made once for each process
    // and stays while it is open.
    let (shown, open) = (fs::metadata(&path).ok()?, fstat(pagemap).ok()?);
    if (shown.dev(), shown.ino()) != (open.st_dev, open.st_ino) {
        return None;
    }
    File::open(path.with_file_name("maps")).ok()
}

/// What such a list says now. What is not for us may also be refused, or shown empty, only when it is read.
pub(super) fn read(list: &File) -> Option<impl BufRead + '_> {
    let mut list = list;
    list.rewind().ok()?;
    let mut maps = BufReader::new(list);
    let shown = !maps.fill_buf().ok()?.is_empty();
    shown.then_some(maps)
}

/// Whether `start..end` is a shared mapping of `file`, counted so that the file's first byte is at `start`. Who
/// wants to know what is there instead, or has a kernel that cannot be asked, has to [`read`].
pub(super) fn is_all(list: &File, start: u64, end: u64, file: FileId) -> bool {
    let mut reached = start;
    while reached < end {
        match mapped_at(list.as_fd(), reached) {
            Ok(mapped) if file.is_at(reached - start, reached, &mapped) => reached = mapped.end,
            _ => return false,
        }
    }
    true
}

/// The first address in `start..end` that is not a shared mapping of `file`, counted so that the file's
/// first byte is at `start`; with the line that says what is there instead, empty if nothing is.
pub(super) fn first_other(
    maps: impl BufRead,
    start: u64,
    end: u64,
    file: FileId,
) -> io::Result<Option<(u64, String)>> {
    let mut reached = start;
    for line in maps.split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        let Some(mapped) = parse(&line) else {
            return Err(io::Error::other(format!(
                "{line:?} is no line of a maps file"
            )));
        };
        if mapped.end <= reached {
            continue;
        }
        if reached >= end {
            break;
        }
        if mapped.start > reached {
            return Ok(Some((reached, String::new())));
        }
        if !file.is_at(reached - start, reached, &mapped) {
            return Ok(Some((reached, line)));
        }
        reached = mapped.end;
    }
    Ok((reached < end).then_some((reached, String::new())))
}

/// One line: `7f58929e9000-7f58929eb000 rw-s 00000000 00:01 952813   /memfd:x (deleted)`.
fn parse(line: &str) -> Option<Mapped> {
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?;
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    Some(Mapped {
        start: hex(start)?,
        end: hex(end)?,
        shared: permissions.ends_with('s'),
        offset,
        device: (hex(major)?, hex(minor)?),
        inode: words.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: FileId = FileId {
        device: (0, 0x1a),
        inode: 7,
    };

    fn first(maps: &str, start: u64, end: u64) -> Option<(u64, String)> {
        first_other(maps.as_bytes(), start, end, RAM).unwrap()
    }

    const MAPS: &str = "\
00400000-00500000 r-xp 00000000 08:01 12                  /bin/vm
10000000-10004000 rw-s 00000000 00:1a 7                   /memfd:ram (deleted)
10004000-10008000 r--s 00004000 00:1a 7                   /memfd:ram (deleted)
10008000-1000c000 rw-s 00000000 00:1a 7                   /memfd:ram (deleted)
20000000-20004000 rw-p 00000000 00:1a 7                   /memfd:ram (deleted)
7ffc00000000-7ffc00001000 rw-p 00000000 00:00 0           [stack]
";

    #[test]
    fn memory_mapped_in_pieces_is_the_same_memory() {
        assert_eq!(first(MAPS, 0x1000_0000, 0x1000_8000), None);
        assert_eq!(first(MAPS, 0x1000_8000, 0x1000_c000), None);
    }

    #[test]
    fn what_is_not_the_file_from_its_start_is_found() {
        let at = |start, end| first(MAPS, start, end).map(|(at, _)| at);
        assert_eq!(at(0x1000_0000, 0x1000_c000), Some(0x1000_8000), "offset");
        assert_eq!(at(0x1000_1000, 0x1000_2000), Some(0x1000_1000), "offset");
        assert_eq!(at(0x1000_8000, 0x1000_d000), Some(0x1000_c000), "a gap");
        assert_eq!(at(0x2000_0000, 0x2000_4000), Some(0x2000_0000), "private");
        assert_eq!(at(0x0040_0000, 0x0040_1000), Some(0x0040_0000), "file");
        assert_eq!(
            at(0x7fff_0000_0000, 0x7fff_0000_1000),
            Some(0x7fff_0000_0000)
        );
    }

    #[test]
    fn what_is_no_maps_file_is_an_error() {
        assert!(first_other(&b"hello\n"[..], 0, 4096, RAM).is_err());
    }
}
