//! A shared mapping, and raw spans of it.
//!
//! Another process writes these pages while we hold them, so no `&[u8]` over a mapping ever exists
//! (rule 10): a [`Span`] is an address, a length and the owner that keeps the mapping alive.
#![allow(unsafe_code)] // The one place that maps and unmaps memory.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// What the mapping is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// A source: the kernel reads it, we never write it.
    Read,
    /// A source that is to be pinned for longer than a call. The kernel pins only what it may write, so
    /// it is mapped writable; nobody writes it.
    Pin,
    /// A destination: the kernel places payload into it.
    Write,
}

/// A `MAP_SHARED` mapping of a file from its start. Unmapped when the last `Arc` goes.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<c_void>,
    len: usize,
    access: Access,
}

// SAFETY: a Mapping is an address range with no thread affinity; everything that reads or writes
// through it goes by raw pointers and the kernel, which never assume exclusive access.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out addresses, never references to the bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`. A length of 0 maps nothing and is allowed.
    pub fn new(file: impl AsFd, len: usize, access: Access) -> io::Result<Arc<Self>> {
        let Some(nonzero) = NonZeroUsize::new(len) else {
            return Ok(Arc::new(Self {
                base: NonNull::dangling(),
                len: 0,
                access,
            }));
        };
        let prot = match access {
            Access::Read => ProtFlags::PROT_READ,
            Access::Pin | Access::Write => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced; the result is
        // owned by the returned value alone.
        let base = unsafe { mmap(None, nonzero, prot, MapFlags::MAP_SHARED, file, 0)? };
        Ok(Arc::new(Self { base, len, access }))
    }

    /// What it is for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Mapped bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the mapping starts; `None` if nothing is mapped.
    #[must_use]
    pub fn address(&self) -> Option<NonNull<c_void>> {
        (self.len > 0).then_some(self.base)
    }

    /// The bytes `offset..offset + len`, to be read by the kernel. `None` if that is not all inside.
    #[must_use]
    pub fn span(self: &Arc<Self>, offset: usize, len: usize) -> Option<Span<'_>> {
        let end = offset.checked_add(len)?;
        if end > self.len {
            return None;
        }
        // SAFETY: `offset <= self.len`, checked above, so the address stays inside the mapping or one
        // past its end.
        let base = unsafe { self.base.cast::<u8>().as_ptr().add(offset) };
        Some(Span {
            base,
            len,
            owner: Some(self),
            slice: PhantomData,
        })
    }

    /// All of it, to be read by the kernel.
    #[must_use]
    pub fn whole(self: &Arc<Self>) -> Span<'_> {
        self.span(0, self.len).expect("all of it is inside of it")
    }

    /// The bytes `offset..offset + len`, to be written by the kernel. `None` if that is not all inside,
    /// or if the mapping is only for reading.
    #[must_use]
    pub fn span_mut(self: &Arc<Self>, offset: usize, len: usize) -> Option<SpanMut<'_>> {
        if self.access != Access::Write {
            return None;
        }
        let span = self.span(offset, len)?;
        Some(SpanMut {
            base: span.base.cast_mut(),
            len,
            slice: PhantomData,
        })
    }
}

impl Mapping {
    /// The whole words of 8 bytes, for memory that several processes use as words; none if the mapping
    /// is only for reading.
    ///
    /// Reading a word of a file that has become shorter is a SIGBUS, so this is for files that are
    /// sealed against it.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        if self.access != Access::Write || self.len == 0 {
            return &[];
        }
        // SAFETY: `new` mapped `len` bytes at a page boundary, readable and writable, and they stay
        // mapped while `self` is borrowed. Every bit pattern is a valid `AtomicU64`, and atomics may be
        // changed by others, another process included, while a shared reference exists.
        unsafe { std::slice::from_raw_parts(self.base.cast().as_ptr(), self.len / 8) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: `base` and `len` are what `mmap` returned in `new`, and this is the last owner:
            // whoever lends a Span to the kernel holds an `Arc` until the kernel has released it.
            // An error could only mean a wrong range, which `new` excludes.
            let _ = unsafe { munmap(self.base, self.len) };
        }
    }
}

/// A run of bytes that a channel may read: part of a [`Mapping`], or a borrowed slice.
///
/// Only a Span of a mapping can be lent (`WriteFlags::ZERO_COPY`), since only it names an owner that
/// can outlive the call.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    base: *const u8,
    len: usize,
    owner: Option<&'a Arc<Mapping>>,
    slice: PhantomData<&'a [u8]>,
}

impl<'a> Span<'a> {
    /// A span over ordinary memory, for headers and tests.
    #[must_use]
    pub fn of_slice(bytes: &'a [u8]) -> Self {
        Self {
            base: bytes.as_ptr(),
            len: bytes.len(),
            owner: None,
            slice: PhantomData,
        }
    }

    /// First byte. Valid for reads of `len` bytes as long as the owner lives.
    #[must_use]
    pub fn base(&self) -> *const u8 {
        self.base
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What keeps the bytes mapped, if they are part of a mapping.
    #[must_use]
    pub fn owner(&self) -> Option<&'a Arc<Mapping>> {
        self.owner
    }

    /// Where it starts in its owner, in bytes.
    #[must_use]
    pub fn offset(&self) -> Option<usize> {
        let start = self.owner?.address()?.as_ptr() as usize;
        Some(self.base as usize - start)
    }

    /// The same span without its first `n` bytes; empty if `n` is more than there are.
    #[must_use]
    pub fn skip(self, n: usize) -> Self {
        let n = n.min(self.len);
        // SAFETY: `n <= self.len`, so the address stays inside the span or one past its end.
        let base = unsafe { self.base.add(n) };
        Self {
            base,
            len: self.len - n,
            ..self
        }
    }

    /// The same span cut to at most its first `n` bytes.
    #[must_use]
    pub fn take(self, n: usize) -> Self {
        Self {
            len: self.len.min(n),
            ..self
        }
    }
}

/// A run of bytes that a channel may fill: part of a writable [`Mapping`], or a borrowed slice.
#[derive(Debug)]
pub struct SpanMut<'a> {
    base: *mut u8,
    len: usize,
    slice: PhantomData<&'a mut [u8]>,
}

impl<'a> SpanMut<'a> {
    /// A span over ordinary memory, for headers and tests.
    #[must_use]
    pub fn of_slice(bytes: &'a mut [u8]) -> Self {
        Self {
            base: bytes.as_mut_ptr(),
            len: bytes.len(),
            slice: PhantomData,
        }
    }

    /// First byte. Valid for writes of `len` bytes as long as the borrow lives.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops the first `n` bytes from the span; all of it if `n` is more than there are.
    pub fn advance(&mut self, n: usize) {
        let n = n.min(self.len);
        // SAFETY: `n <= self.len`, so the address stays inside the span or one past its end.
        self.base = unsafe { self.base.add(n) };
        self.len -= n;
    }

    /// Copies `bytes` to the front of the span; what does not fit is left out.
    pub fn fill_from(&mut self, bytes: &[u8]) {
        let n = bytes.len().min(self.len);
        // SAFETY: `n <= self.len`, and whoever made the span established that its bytes are valid for
        // writes while the borrow lives. `bytes` cannot overlap them: no `&[u8]` over a mapping exists
        // (rule 10), and a borrowed slice is borrowed exclusively.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base, n) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(len: usize, access: Access) -> Arc<Mapping> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len as u64).unwrap();
        Mapping::new(&file, len, access).unwrap()
    }

    #[test]
    fn spans_never_leave_the_mapping() {
        let mapping = mapping(8192, Access::Read);
        assert!(mapping.span(0, 8192).is_some());
        assert!(mapping.span(8192, 0).is_some());
        assert!(mapping.span(1, 8192).is_none());
        assert!(mapping.span(usize::MAX, 2).is_none());
    }

    #[test]
    fn a_source_gives_no_writable_span() {
        assert!(mapping(4096, Access::Read).span_mut(0, 1).is_none());
        assert!(mapping(4096, Access::Write).span_mut(0, 1).is_some());
    }

    #[test]
    fn words_are_whole_and_shared() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let one = Mapping::new(&file, 4095, Access::Write).unwrap();
        let two = Mapping::new(&file, 4096, Access::Write).unwrap();
        assert_eq!(one.words().len(), 511);
        one.words()[3].store(7, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(two.words()[3].load(std::sync::atomic::Ordering::Relaxed), 7);
        assert!(mapping(4096, Access::Read).words().is_empty());
    }

    #[test]
    fn filling_stays_inside_the_span() {
        let mut bytes = *b"------";
        let mut span = SpanMut::of_slice(&mut bytes[1..4]);
        span.fill_from(b"a");
        span.advance(1);
        span.fill_from(b"bcdef");
        assert_eq!(&bytes, b"-abc--");
    }

    #[test]
    fn an_empty_mapping_is_allowed() {
        let mapping = mapping(0, Access::Read);
        assert!(mapping.is_empty());
        assert!(mapping.span(0, 0).is_some_and(|span| span.is_empty()));
    }
}
