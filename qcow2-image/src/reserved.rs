//! Whether an image maps what its file has no space for, as one does whose metadata was laid out in advance.

use qcow2_format::{Geometry, HostOffset, RefcountBlock, RefcountTableEntry};
use qcow2_io::{Result as StorageResult, Storage};

use crate::Image;

impl Image {
    /// Whether it pays to ask the data file where it has holes: the clusters in use are many more than take up space. QEMU asks
    /// in the same case. Looked at once; an image that can't tell has none.
    pub(crate) fn maps_holes(&self) -> bool {
        if self.crypt.is_some() {
            // What is deciphered from a hole is no zeros.
            return false;
        }
        *self.maps_holes.get_or_init(|| {
            let header = self.meta.header();
            let (table, clusters) = (header.refcount_table_offset, header.refcount_table_clusters);
            drop(header);
            let found = exceeds_space(&**self.meta.storage(), self.geometry, table, clusters);
            found.unwrap_or(false)
        })
    }
}

fn exceeds_space(
    storage: &dyn Storage,
    geometry: Geometry,
    table: HostOffset,
    table_clusters: u32,
) -> StorageResult<bool> {
    let Some(allocated) = storage.allocated()? else {
        return Ok(false);
    };
    let size = geometry.cluster_size();
    let real = allocated / size;
    let threshold = (real + 2).max(real.saturating_mul(10) / 9);
    let end = geometry.clusters_for(storage.len()?);
    if threshold > end {
        return Ok(false);
    }
    let per_block = geometry.refcounts_per_block();
    let entries = end
        .div_ceil(per_block)
        .min(u64::from(table_clusters) * (size / 8));
    let mut table_bytes = vec![0; usize::try_from(entries * 8).unwrap_or_default()];
    storage.read_at(&mut table_bytes, table.get())?;
    let mut block = vec![0; geometry.cluster_len()];
    let mut used = 0;
    for (entry, first) in table_bytes.as_chunks::<8>().0.iter().zip(0..) {
        let place = RefcountTableEntry::from_be_bytes(*entry).block();
        if place.get() == 0 || !geometry.is_cluster_aligned(place) {
            continue;
        }
        storage.read_at(&mut block, place.get())?;
        let counts = end.saturating_sub(first * per_block).min(per_block);
        used += in_use(RefcountBlock::new(&block, geometry), counts);
        if used >= threshold {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How many of the first `counts` refcounts are not 0.
fn in_use(block: RefcountBlock<'_>, counts: u64) -> u64 {
    let counts = usize::try_from(counts).unwrap_or(usize::MAX);
    let whole = counts / 64 * 64;
    let mut used = if block.all_equal(0, whole, 1) {
        whole as u64
    } else {
        (0..whole)
            .step_by(64)
            .map(|start| {
                let (ones, others) = block.ones_and_others(start);
                u64::from((ones | others).count_ones())
            })
            .sum()
    };
    for index in whole..counts {
        used += u64::from(block.get(index).is_some_and(|count| count > 0));
    }
    used
}
