//! What `qemu-img measure` says.

use super::BitmapSize;
use super::count::Count;
use crate::create::Footprint;

/// Bytes of an entry of the bitmap directory without its name.
const DIRECTORY_ENTRY: u64 = 24;

/// The figures of `qemu-img measure`: upper bounds. In bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Estimate {
    /// "required size".
    pub required: u64,
    /// "fully allocated size".
    pub fully_allocated: u64,
    /// "bitmaps size": of all bits, tables and the directory. Only where there is a source, and never in version 2.
    pub bitmaps: Option<u64>,
}

impl Estimate {
    /// `found` is what a source has, if there is one.
    pub(super) fn new(footprint: &Footprint, found: Option<Count>, bitmaps: &[BitmapSize]) -> Self {
        let geometry = footprint.geometry();
        let size = geometry.cluster_size();
        let disk = footprint.size.next_multiple_of(size);
        let fully_allocated = footprint
            .crypto_bytes()
            .saturating_add(full(footprint, disk));
        let data = match found {
            _ if footprint.reserves_data() => disk,
            Some(_) if footprint.has_backing => disk,
            Some(found) => found.data() * size,
            None => 0,
        };
        Self {
            required: fully_allocated - disk + data,
            fully_allocated,
            bitmaps: (found.is_some() && footprint.is_version3)
                .then(|| bitmaps_len(footprint.size, size, bitmaps)),
        }
    }
}

/// A file with a disk of so many bytes, all tables, and refcounts for these.
fn full(footprint: &Footprint, disk: u64) -> u64 {
    let geometry = footprint.geometry();
    let size = geometry.cluster_size();
    let tables = (disk / size).div_ceil(geometry.l2_entries());
    let l1 = (tables * 8).next_multiple_of(size);
    let others = 1 + tables + (l1 + disk) / size;
    let (mut table, mut blocks) = (0, 0);
    loop {
        let wanted = (others + table + blocks).div_ceil(geometry.refcounts_per_block());
        let found = (wanted.div_ceil(size / 8), wanted);
        if found == (table, blocks) {
            break;
        }
        (table, blocks) = found;
    }
    (others + table + blocks).saturating_mul(size)
}

fn bitmaps_len(disk: u64, cluster_size: u64, bitmaps: &[BitmapSize]) -> u64 {
    if bitmaps.is_empty() {
        return 0;
    }
    let mut directory = 0_u64;
    let mut sum = 0_u64;
    for bitmap in bitmaps {
        let bits = disk.div_ceil(bitmap.granularity.max(1));
        let clusters = bits.div_ceil(8).div_ceil(cluster_size);
        let table = clusters.saturating_mul(8).next_multiple_of(cluster_size);
        sum = sum
            .saturating_add(clusters.saturating_mul(cluster_size))
            .saturating_add(table);
        let entry = DIRECTORY_ENTRY.saturating_add(bitmap.name_len);
        directory = directory.saturating_add(entry.next_multiple_of(8));
    }
    sum.saturating_add(directory.next_multiple_of(cluster_size))
}
