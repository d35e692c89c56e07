//! Checksums of memory that is mapped.

use crate::pages::PageRange;
use crate::region::{Region, RegionError};
use crate::wire::crc32c;

/// The checksum of `range` as it is now, for pages that [`Region::read_mapped`] may read: where they are, or of a
/// copy in `buffer`, which has room for them.
pub(super) fn checksum(
    region: &Region,
    range: PageRange,
    buffer: &mut [u8],
) -> Result<u32, RegionError> {
    match region.crc32c_mapped(range) {
        Some(checksum) => Ok(checksum),
        None => Ok(crc32c(region.read_mapped(range, buffer)?)),
    }
}
