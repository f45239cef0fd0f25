//! References of a tree, counted by host cluster.

use std::collections::BTreeMap;
use std::ops::Range;

use qcow2_format::{Geometry, HostCluster};

/// Clusters that are counted at once; each takes 4 bytes if it is in use.
pub(super) const WINDOW: u64 = 1 << 24;

/// How often each cluster of a window is referred to, by refcount block.
pub(super) struct Counts {
    block_bits: u32,
    window: Range<u64>,
    blocks: BTreeMap<u64, Box<[u32]>>,
    /// There are references behind the window.
    more: bool,
    full: Option<HostCluster>,
}

impl Counts {
    pub(super) fn new(geometry: Geometry, window: Range<u64>) -> Self {
        Self {
            block_bits: geometry.refcount_block_bits(),
            window,
            blocks: BTreeMap::new(),
            more: false,
            full: None,
        }
    }

    /// Whether a reference lies behind the window.
    pub(super) fn has_more(&self) -> bool {
        self.more
    }

    /// A cluster with more references than can be counted.
    pub(super) fn full(&self) -> Option<HostCluster> {
        self.full
    }

    /// Counts `times` references to each of `len` clusters.
    pub(super) fn add(&mut self, first: u64, len: u64, times: u32) {
        let end = first.saturating_add(len);
        self.more |= end > self.window.end;
        let end = end.min(self.window.end);
        let mut at = first.max(self.window.start);
        while at < end {
            let block = at >> self.block_bits;
            let start = block << self.block_bits;
            let stop = end.min(start + (1 << self.block_bits));
            let counts = self
                .blocks
                .entry(block)
                .or_insert_with(|| vec![0; 1 << self.block_bits].into());
            let part = counts.get_mut(index(at - start)..index(stop - start));
            for (number, count) in part.unwrap_or_default().iter_mut().enumerate() {
                match count.checked_add(times) {
                    Some(sum) => *count = sum,
                    None => self.full = Some(HostCluster::new(at + number as u64)),
                }
            }
            at = stop;
        }
    }

    /// The counts of each refcount block that has any.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (u64, &[u32])> {
        self.blocks
            .iter()
            .map(|(block, counts)| (*block, &**counts))
    }
}

/// Clusters, one bit each.
#[derive(Default)]
pub(super) struct Set {
    pages: BTreeMap<u64, Box<[u64; 64]>>,
}

impl Set {
    pub(super) fn insert(&mut self, cluster: u64) {
        let page = self
            .pages
            .entry(cluster >> 12)
            .or_insert_with(|| Box::new([0; 64]));
        if let Some(word) = page.get_mut(index(cluster >> 6 & 63)) {
            *word |= 1 << (cluster & 63);
        }
    }

    /// Inserts, of the 64 clusters from `first` on, a multiple of 64, those whose bit is set.
    pub(super) fn insert_many(&mut self, first: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        let page = self
            .pages
            .entry(first >> 12)
            .or_insert_with(|| Box::new([0; 64]));
        if let Some(word) = page.get_mut(index(first >> 6 & 63)) {
            *word |= bits;
        }
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        let page = self.pages.get(&(cluster >> 12));
        page.and_then(|page| page.get(index(cluster >> 6 & 63)))
            .is_some_and(|word| word >> (cluster & 63) & 1 != 0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_counted_within_the_window() {
        // 512-byte clusters and 16 bits: 256 refcounts in a block.
        let geometry = Geometry::new(9, 4, false).unwrap();
        let mut counts = Counts::new(geometry, 200..600);
        counts.add(100, 150, 1);
        assert!(!counts.has_more());
        counts.add(255, 2, 3);
        counts.add(590, 20, 1);
        assert!(counts.has_more());
        counts.add(700, 1, 1);
        let all: Vec<(u64, u32)> = counts
            .blocks()
            .flat_map(|(block, counts)| {
                let numbered = counts.iter().enumerate();
                numbered.map(move |(number, count)| (block * 256 + number as u64, *count))
            })
            .filter(|(_, count)| *count > 0)
            .collect();
        let mut expected: Vec<(u64, u32)> = (200..250).map(|cluster| (cluster, 1)).collect();
        expected.extend([(255, 3), (256, 3)]);
        expected.extend((590..600).map(|cluster| (cluster, 1)));
        assert_eq!(all, expected);
    }

    #[test]
    fn a_set_has_what_was_put_in() {
        let mut set = Set::default();
        assert!(set.is_empty());
        for cluster in [0, 63, 64, 4095, 4096, 1 << 40] {
            assert!(!set.contains(cluster));
            set.insert(cluster);
            assert!(set.contains(cluster));
        }
        assert!(!set.contains(1) && !set.contains(4097));
        set.insert_many(8192 + 64, 5);
        set.insert_many(1 << 20, 0);
        let found = [0, 1, 2, 3].map(|bit| set.contains(8192 + 64 + bit));
        assert_eq!(found, [true, false, true, false]);
        assert!(!set.contains(1 << 20));
    }
}
