//! References of a tree, counted by host cluster.

use std::collections::BTreeMap;
use std::ops::Range;

use qcow2_format::Geometry;

/// Clusters that are counted at once; each takes 4 bytes if it is in use. Tests have more than one window, too.
pub(crate) const WINDOW: u64 = 1 << if cfg!(test) { 9 } else { 24 };

/// Stretches that are noted one by one; a block with more of them has a count for each cluster.
const RUNS_MAX: usize = 128;

/// How often each cluster of a window is referred to, by refcount block.
pub(crate) struct Counts {
    block_bits: u32,
    window: Range<u64>,
    blocks: BTreeMap<u64, Block>,
    /// There are references behind the window.
    more: bool,
}

/// The references to the clusters of one refcount block. Sums stop at `u32::MAX`.
pub(crate) enum Block {
    /// By stretches, which may overlap.
    Runs(Vec<Run>),
    /// By cluster.
    Each(Box<[u32]>),
}

/// Clusters side by side, each with so many references; the first by its place in the block.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    first: u32,
    len: u32,
    times: u32,
}

impl Counts {
    pub(crate) fn new(geometry: Geometry, window: Range<u64>) -> Self {
        Self {
            block_bits: geometry.refcount_block_bits(),
            window,
            blocks: BTreeMap::new(),
            more: false,
        }
    }

    /// Whether a reference lies behind the window.
    pub(crate) fn has_more(&self) -> bool {
        self.more
    }

    /// Counts `times` references to each of `len` clusters.
    pub(crate) fn add(&mut self, first: u64, len: u64, times: u32) {
        let end = first.saturating_add(len);
        self.more |= end > self.window.end;
        let end = end.min(self.window.end);
        let mut at = first.max(self.window.start);
        while at < end {
            let block = at >> self.block_bits;
            let start = block << self.block_bits;
            let stop = end.min(start + (1 << self.block_bits));
            let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
            let run = Run {
                first: small(at - start),
                len: small(stop - at),
                times,
            };
            self.blocks
                .entry(block)
                .or_insert_with(|| Block::Runs(Vec::new()))
                .add(run, 1 << self.block_bits);
            at = stop;
        }
    }

    /// The counts of each refcount block that has any.
    pub(crate) fn blocks(&self) -> Vec<(u64, &Block)> {
        let blocks = self.blocks.iter();
        blocks.map(|(number, block)| (*number, block)).collect()
    }
}

impl Block {
    fn add(&mut self, run: Run, clusters: usize) {
        let runs = match self {
            Self::Each(counts) => return run.add_to(counts),
            Self::Runs(runs) => runs,
        };
        if let Some(last) = runs.last_mut()
            && last.times == run.times
            && last.first + last.len == run.first
        {
            last.len += run.len;
            return;
        }
        runs.push(run);
        if runs.len() > RUNS_MAX {
            let mut counts = vec![0; clusters].into_boxed_slice();
            for run in runs.iter() {
                run.add_to(&mut counts);
            }
            *self = Self::Each(counts);
        }
    }

    /// The count of each cluster; `room` has as many as the block.
    pub(crate) fn spread<'a>(&'a self, room: &'a mut [u32]) -> &'a [u32] {
        match self {
            Self::Each(counts) => counts,
            Self::Runs(runs) => {
                room.fill(0);
                for run in runs {
                    run.add_to(room);
                }
                room
            }
        }
    }
}

impl Run {
    fn add_to(&self, counts: &mut [u32]) {
        let (first, len) = (index(self.first.into()), index(self.len.into()));
        let part = counts.get_mut(first..first.saturating_add(len));
        for count in part.unwrap_or_default() {
            *count = count.saturating_add(self.times);
        }
    }
}

/// Clusters, one bit each.
#[derive(Default)]
pub(crate) struct Set {
    pages: BTreeMap<u64, Box<[u64; 64]>>,
}

impl Set {
    pub(crate) fn insert(&mut self, cluster: u64) {
        let page = self
            .pages
            .entry(cluster >> 12)
            .or_insert_with(|| Box::new([0; 64]));
        if let Some(word) = page.get_mut(index(cluster >> 6 & 63)) {
            *word |= 1 << (cluster & 63);
        }
    }

    /// Inserts, of the 64 clusters from `first` on, a multiple of 64, those whose bit is set.
    pub(crate) fn insert_many(&mut self, first: u64, bits: u64) {
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

    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let page = self.pages.get(&(cluster >> 12));
        page.and_then(|page| page.get(index(cluster >> 6 & 63)))
            .is_some_and(|word| word >> (cluster & 63) & 1 != 0)
    }

    /// How many of the `len` clusters from `first` on are in it.
    pub(crate) fn count(&self, first: u64, len: u64) -> u64 {
        let end = first.saturating_add(len);
        let mut at = first;
        let mut sum = 0;
        while at < end {
            let stop = (((at >> 6) + 1) << 6).min(end);
            let page = self.pages.get(&(at >> 12));
            let word = page.and_then(|page| page.get(index(at >> 6 & 63)));
            let mask = u64::MAX >> (64 - (stop - at)) << (at & 63);
            sum += u64::from((word.unwrap_or(&0) & mask).count_ones());
            at = stop;
        }
        sum
    }

    pub(crate) fn is_empty(&self) -> bool {
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
            .iter()
            .flat_map(|(block, counts)| {
                let mut room = [7; 256];
                let numbered = (block * 256..).zip(counts.spread(&mut room));
                numbered
                    .map(|(number, count)| (number, *count))
                    .collect::<Vec<_>>()
            })
            .filter(|(_, count)| *count > 0)
            .collect();
        let mut expected: Vec<(u64, u32)> = (200..250).map(|cluster| (cluster, 1)).collect();
        expected.extend([(255, 3), (256, 3)]);
        expected.extend((590..600).map(|cluster| (cluster, 1)));
        assert_eq!(all, expected);
    }

    #[test]
    fn many_stretches_are_counted_by_cluster() {
        let geometry = Geometry::new(9, 4, false).unwrap();
        let mut counts = Counts::new(geometry, 0..256);
        for number in 0..256 {
            counts.add(number, 1, u32::try_from(number).unwrap());
        }
        counts.add(3, 2, u32::MAX - 3);
        let [(0, block)] = counts.blocks()[..] else {
            panic!("one block");
        };
        assert!(matches!(block, Block::Each(_)));
        let mut room = [0; 256];
        let mut expected: Vec<u32> = (0..256).collect();
        expected[3..5].fill(u32::MAX);
        assert_eq!(block.spread(&mut room), expected);
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
        assert_eq!(set.count(0, 4097), 5);
        assert_eq!(set.count(63, 2), 2);
        assert_eq!(set.count(64, 4031), 1);
        assert_eq!(set.count(8192 + 65, 2), 1);
    }
}
