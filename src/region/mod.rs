//! Regions: named, fixed-length memory, mapped.

mod mapping;

pub use mapping::{Access, Mapping, Span, SpanMut};
