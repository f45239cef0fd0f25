//! Which clusters of the file are in use, a bit each.

use std::collections::BTreeMap;

use qcow2_cache::Kinds;
use qcow2_format::{HostCluster, RefcountBlock, RefcountTableEntry};
use qcow2_io::Storage as _;

use super::index;
use crate::{Image, ImageError};

/// Clusters of a page, as a power of two.
const PAGE_BITS: u32 = 12;

/// Clusters with a refcount, in pages: what an image claims of places far away costs no more than what is near.
#[derive(Default)]
pub(super) struct Occupancy {
    pages: BTreeMap<u64, Box<[u64; 64]>>,
    /// How many there are.
    pub(super) used: u64,
    /// One past the last of them.
    pub(super) end: u64,
}

impl Occupancy {
    fn word(&self, cluster: u64) -> u64 {
        let page = self.pages.get(&(cluster >> PAGE_BITS));
        page.and_then(|page| page.get(index(cluster / 64 % 64)))
            .copied()
            .unwrap_or(0)
    }

    pub(super) fn is_used(&self, cluster: u64) -> bool {
        self.word(cluster) >> (cluster % 64) & 1 != 0
    }

    fn set(&mut self, cluster: u64) {
        let page = self
            .pages
            .entry(cluster >> PAGE_BITS)
            .or_insert_with(|| Box::new([0; 64]));
        if let Some(word) = page.get_mut(index(cluster / 64 % 64)) {
            *word |= 1 << (cluster % 64);
        }
        self.used += 1;
        self.end = self.end.max(cluster + 1);
    }

    /// The first cluster in use from `from` on.
    pub(super) fn next_used(&self, from: u64) -> Option<u64> {
        let (first, _) = self.pages.range(from >> PAGE_BITS..).next()?;
        let near = from.max(first << PAGE_BITS);
        let near = (near..(first + 1) << PAGE_BITS).find(|at| self.is_used(*at));
        near.or_else(|| {
            let (second, _) = self.pages.range(first + 1..).next()?;
            (second << PAGE_BITS..(second + 1) << PAGE_BITS).find(|at| self.is_used(*at))
        })
    }

    /// Takes clusters that are about to be used.
    pub(super) fn take(&mut self, cluster: u64) {
        if !self.is_used(cluster) {
            self.set(cluster);
        }
    }

    /// The first free cluster from `from` on; behind the end all are.
    pub(super) fn next_free(&self, from: u64) -> u64 {
        let mut at = from;
        loop {
            let free = !(self.word(at) >> (at % 64));
            let skipped = u64::from(free.trailing_zeros()).min(64 - at % 64);
            at += skipped;
            if !at.is_multiple_of(64) || skipped == 0 {
                return at;
            }
        }
    }

    /// The first run of `count` free clusters within `from..below`.
    pub(super) fn free_run(&self, from: u64, below: u64, count: u64) -> Option<u64> {
        let mut start = self.next_free(from);
        while start + count <= below {
            match (start..start + count).rev().find(|at| self.is_used(*at)) {
                None => return Some(start),
                Some(used) => start = self.next_free(used + 1),
            }
        }
        None
    }

    /// Clusters in use within a range, in order.
    pub(super) fn used_in(&self, range: std::ops::Range<u64>) -> impl Iterator<Item = u64> + '_ {
        range.filter(|at| self.is_used(*at))
    }
}

impl Image {
    /// Reads all refcounts. They are all in the file.
    pub(super) fn occupancy(&self) -> Result<Occupancy, ImageError> {
        let geometry = self.geometry;
        let (table, clusters) = {
            let header = self.meta.header();
            (header.refcount_table_offset, header.refcount_table_clusters)
        };
        let storage = self.meta.storage();
        // The header's limits keep this below 8 MiB.
        let mut entries = vec![0; index(u64::from(clusters) << geometry.cluster_bits())];
        storage.read_at(&mut entries, table.get())?;
        let mut found = Occupancy::default();
        let mut bytes = vec![0; geometry.cluster_len()];
        for (number, entry) in (0_u64..).zip(entries.as_chunks::<8>().0) {
            let place = RefcountTableEntry::from_be_bytes(*entry).block();
            if place.get() == 0 {
                continue;
            }
            storage.read_at(&mut bytes, place.get())?;
            let first = number << geometry.refcount_block_bits();
            let counts = RefcountBlock::new(&bytes, geometry).iter();
            for (cluster, count) in (first..).zip(counts) {
                if count > 0 {
                    found.set(cluster);
                }
            }
        }
        Ok(found)
    }

    /// Whether a cluster holds something that only a pointer of its own kind leads to, or that can't be moved at all: neither
    /// guest data nor an L2 table.
    pub(super) fn is_structure(&self, cluster: u64) -> bool {
        let tables = Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2;
        let kinds = self.meta.overlap().kinds(HostCluster::new(cluster));
        cluster == 0 || !kinds.without(tables).is_empty()
    }

    pub(super) fn is_table(&self, cluster: u64) -> bool {
        let tables = Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2;
        let kinds = self.meta.overlap().kinds(HostCluster::new(cluster));
        !kinds.intersection(tables).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_clusters_are_found() {
        let mut map = Occupancy::default();
        for cluster in (0..64).chain(66..70).chain([128, 300]) {
            map.set(cluster);
        }
        map.take(300);
        assert_eq!((map.used, map.end), (70, 301));
        assert_eq!(map.next_free(0), 64);
        assert_eq!(map.next_free(66), 70);
        assert_eq!(map.next_free(127), 127);
        assert_eq!(map.next_free(128), 129);
        assert_eq!(map.next_free(300), 301);
        assert_eq!(map.next_free(10_000), 10_000);
        assert_eq!(map.free_run(0, 400, 2), Some(64));
        assert_eq!(map.free_run(0, 400, 3), Some(70));
        assert_eq!(map.free_run(0, 400, 100), Some(129));
        assert_eq!(map.free_run(0, 200, 100), None);
        assert_eq!(map.free_run(200, 500, 150), Some(301));
        map.set(1 << 40);
        let next = [0, 64, 70, 129, 301, (1 << 40) + 1].map(|from| map.next_used(from));
        let far = Some(1 << 40);
        assert_eq!(next, [Some(0), Some(66), Some(128), Some(300), far, None]);
        assert_eq!(map.next_free(1 << 40), (1 << 40) + 1);
        let used: Vec<u64> = map.used_in(60..70).collect();
        assert_eq!(used, [60, 61, 62, 63, 66, 67, 68, 69]);
    }
}
