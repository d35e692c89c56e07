//! In which memory Regions arrive: how large its pages are, and on which NUMA nodes they lie. As the kernel shows
//! it when it is asked, and not as it was wanted.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::limits::{HUGE_PAGE_BYTES, PAGE_BYTES};
use crate::name::Name;
use crate::region::{Mapping, Region};
use crate::stream::Destination;
use crate::sys::numa::Whereabouts;
use crate::sys::pagemap;

use super::prepared::Place;

/// What is known of the memory of Regions, by name.
pub(super) type Observed = Vec<(Name, Value)>;

/// Looks at where Regions arrive.
pub(super) async fn of_places(places: Arc<[Place]>) -> Observed {
    let look = move || {
        let places = places
            .iter()
            .map(|place| (place.region(), place.in_huge_pages()));
        observe(places)
    };
    // It walks page tables. A panic was reported where it happened.
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

/// Looks at memory that was prepared.
pub(super) async fn of_regions(regions: Vec<Arc<Region>>) -> Observed {
    let look = move || observe(regions.iter().map(|region| (&**region, region.mapping())));
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

/// Each Region with the mapping that has its huge pages. Nothing where the kernel does not say.
fn observe<'a>(regions: impl Iterator<Item = (&'a Region, &'a Arc<Mapping>)>) -> Observed {
    let Ok(whereabouts) = Whereabouts::now() else {
        return Vec::new();
    };
    let look = |(region, huge): (&Region, &Arc<Mapping>)| {
        let allocated = region.allocated_bytes().unwrap_or(0);
        let in_huge = pagemap::huge_bytes(huge).ok()?.min(allocated);
        let sizes = match region.page_size() {
            PAGE_BYTES => [
                (PAGE_BYTES, allocated - in_huge),
                (HUGE_PAGE_BYTES, in_huge),
            ],
            fixed => [(fixed, allocated), (PAGE_BYTES, 0)],
        };
        let sizes: BTreeMap<_, _> = sizes.into_iter().filter(|(_, bytes)| *bytes > 0).collect();
        let shown = json!({
            "allocated": allocated,
            "page-sizes": sizes,
            "numa-nodes": whereabouts.of(region.mapping(), allocated),
        });
        Some((region.name().clone(), shown))
    };
    regions.filter_map(look).collect()
}

/// As `query-migrate` shows it.
pub(super) fn to_json(observed: &Observed) -> Value {
    let members = observed.iter().map(|(name, shown)| {
        let mut shown = shown.clone();
        shown["name"] = json!(name);
        shown
    });
    members.collect()
}
