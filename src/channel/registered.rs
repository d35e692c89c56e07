//! The memory one ring has registered: which span is in which buffer.
//!
//! The kernel finds a registered page by the address it was registered under, and pins only what it may
//! write. So a source, which is mapped for reading, is registered by a second mapping, and spans are
//! translated. Holes are not registered: that would allocate them.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;

use crate::pages::PageRange;
use crate::region::{Mapping, Region, Span};
use crate::sys;
use crate::sys::uring::{BUFFER_BYTES_MAX, BUFFERS_MAX, Ring};

/// A part of a source that is one registered buffer.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// From the start of the Region, in bytes.
    offset: usize,
    len: usize,
    buffer: u16,
}

#[derive(Debug)]
struct Twin {
    source: Arc<Mapping>,
    pinned: Arc<Mapping>,
    /// By offset.
    parts: Vec<Part>,
}

#[derive(Debug, Default)]
pub(super) struct Registered {
    /// What is to be registered at first use.
    wanted: Vec<Arc<Region>>,
    twins: Vec<Twin>,
    /// What is not registered, and why.
    refused: Option<String>,
    /// The kernel takes no vector of registered memory (Linux before 6.15).
    single_spans: bool,
}

impl Registered {
    pub(super) fn of(regions: Vec<Arc<Region>>) -> Self {
        Self {
            wanted: regions,
            ..Self::default()
        }
    }

    /// Registers what is wanted, once. What the kernel refuses is sent unregistered. Says whether this has registered
    /// memory in huge pages.
    pub(super) fn begin(&mut self, ring: &mut Ring) -> bool {
        let wanted = std::mem::take(&mut self.wanted);
        if wanted.is_empty() {
            return false;
        }
        let mut buffers = Vec::new();
        for region in wanted {
            match twin(&region, buffers.len()) {
                Ok(twin) => {
                    let part = |part: &Part| (Arc::clone(&twin.pinned), part.offset, part.len);
                    buffers.extend(twin.parts.iter().map(part));
                    self.twins.push(twin);
                }
                Err(error) => self.refuse(&format!("{}: {error}", region.name())),
            }
        }
        if buffers.is_empty() {
            return false;
        }
        if let Err(error) = ring.register(&buffers) {
            self.twins.clear();
            self.refuse(&match error.raw_os_error() {
                Some(libc::ENOMEM) => {
                    "the memlock limit is smaller than the memory to register".to_owned()
                }
                Some(libc::EFAULT) => {
                    "only memory without a disk behind it can be registered".to_owned()
                }
                _ => error.to_string(),
            });
        }
        let huge =
            |twin: &Twin| sys::pagemap::huge_bytes(&twin.pinned).is_ok_and(|bytes| bytes > 0);
        self.twins.iter().any(huge)
    }

    fn refuse(&mut self, why: &str) {
        self.refused = Some(format!("sent unregistered: {why}"));
    }

    /// Why something is sent unregistered.
    pub(super) fn trouble(&self) -> Option<String> {
        self.refused.clone()
    }

    /// Bytes registered.
    pub(super) fn bytes(&self) -> u64 {
        let parts = self.twins.iter().flat_map(|twin| &twin.parts);
        parts.map(|part| part.len as u64).sum()
    }

    /// From now on only single spans are sent from registered memory; `false` if this send was one, so
    /// that it cannot be the reason of a refusal.
    pub(super) fn gives_up_vectors(&mut self, iov: &[Span<'_>]) -> bool {
        let (run, buffer) = self.first_run(iov, true);
        if buffer.is_none() || run.len() < 2 {
            return false;
        }
        self.single_spans = true;
        true
    }

    /// The first spans of `iov` that can go in one send, and the buffer they are all in, if any. With
    /// `registered` false, all of them as they are.
    pub(super) fn first_run<'a>(
        &'a self,
        iov: &'a [Span<'a>],
        registered: bool,
    ) -> (Cow<'a, [Span<'a>]>, Option<u16>) {
        if !registered || self.twins.is_empty() {
            return (Cow::Borrowed(iov), None);
        }
        let mut run = Vec::with_capacity(iov.len());
        let mut buffer = None;
        for span in iov.iter().filter(|span| !span.is_empty()) {
            let found = self.find(span);
            let index = found.map(|(_, index)| index);
            if !run.is_empty() && (index != buffer || (index.is_some() && self.single_spans)) {
                break;
            }
            buffer = index;
            run.push(found.map_or(*span, |(span, _)| span));
        }
        (Cow::Owned(run), buffer)
    }

    fn find<'a>(&'a self, span: &Span<'a>) -> Option<(Span<'a>, u16)> {
        let owner = span.owner()?;
        let twin = self
            .twins
            .iter()
            .find(|twin| Arc::ptr_eq(&twin.source, owner))?;
        let offset = span.offset()?;
        let at = twin.parts.partition_point(|part| part.offset <= offset);
        let part = twin.parts.get(at.checked_sub(1)?)?;
        if offset + span.len() > part.offset + part.len {
            return None;
        }
        Some((twin.pinned.span(offset, span.len())?, part.buffer))
    }
}

/// The second mapping of `region`, and its data cut into buffers that are numbered from `first` on.
fn twin(region: &Region, first: usize) -> io::Result<Twin> {
    let pinned = region.pinnable()?;
    let mut parts = Vec::new();
    let mut rest = PageRange {
        first: 0,
        count: region.pages(),
    };
    while let Some(data) = region.next_data(rest).map_err(io::Error::other)? {
        let too_many = || io::Error::other("it is in too many pieces");
        let end = data.offset() + data.bytes(region.bytes());
        let mut offset = data.offset();
        while offset < end {
            let len = (end - offset).min(BUFFER_BYTES_MAX as u64);
            let number = first + parts.len();
            if number >= BUFFERS_MAX {
                return Err(too_many());
            }
            let as_usize = |n: u64| usize::try_from(n).map_err(|_| too_many());
            let (start, bytes) = (as_usize(offset)?, as_usize(len)?);
            // Registering would enter it page by page.
            if let Some(span) = pinned.span(start, bytes) {
                let _ = sys::file::populate(&span, pinned.access());
            }
            parts.push(Part {
                offset: start,
                len: bytes,
                buffer: u16::try_from(number).map_err(|_| too_many())?,
            });
            offset += len;
        }
        let next = data.end();
        rest = PageRange {
            first: next,
            count: region.pages() - next,
        };
    }
    Ok(Twin {
        source: Arc::clone(region.mapping()),
        pinned,
        parts,
    })
}
