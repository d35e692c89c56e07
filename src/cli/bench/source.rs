//! Memory to move: files in the stage's directory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::cli::stage::{Stage, StageError, local};
use crate::name::Name;
use crate::pages::PageRange;
use crate::region::{Access, Region};

/// Makes a file of `bytes` bytes with random data in `extents` (offset and length), holes elsewhere.
pub(super) fn fill(
    stage: &Stage<'_>,
    name: &str,
    bytes: u64,
    extents: &[(u64, u64)],
) -> Result<(), StageError> {
    let path = stage.path(name);
    let doing = format!("write {}", path.display());
    let write = || -> io::Result<()> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        file.set_len(bytes)?;
        let region = Region::new(
            Name::new(name).expect("a legal name"),
            doing.clone(),
            file.try_clone()?,
            Access::Write,
        )
        .map_err(io::Error::other)?;
        // Both sides of a comparison have it on the pages that the directory gives; islands would each be
        // rounded up to a huge page, and there would be eight times the data.
        if extents.len() == 1 {
            crate::sys::file::advise_huge_pages(region.mapping());
        }
        let mut noise = Box::<[u8]>::from(vec![0; 1 << 18]);
        for &(offset, length) in extents {
            region.populate(PageRange::covering(offset, length));
            let mut at = offset;
            while at < offset + length {
                stage.check_interrupted().map_err(io::Error::other)?;
                getrandom::fill(&mut noise).map_err(io::Error::other)?;
                let step = noise
                    .len()
                    .min(usize::try_from(offset + length - at).unwrap_or(usize::MAX));
                file.write_all_at(&noise[..step], at)?;
                at += step as u64;
            }
        }
        Ok(())
    };
    write().map_err(local(doing.clone()))
}

/// Forgets files again; those that are not there are forgotten already.
pub(super) fn remove<'a>(stage: &Stage<'_>, names: impl IntoIterator<Item = &'a String>) {
    for name in names {
        let _ = std::fs::remove_file(stage.path(name));
    }
}
