//! Counting clusters and the tables that map them.

use std::ops::Range;

use qcow2_format::Geometry;

/// Clusters of a disk that have data, and L2 tables that have entries. Fed from front to back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Count {
    geometry: Geometry,
    data: u64,
    tables: u64,
    /// The first cluster, and the first table, that is not counted yet.
    next_cluster: u64,
    next_table: u64,
}

impl Count {
    pub(super) fn none(geometry: Geometry) -> Self {
        Self {
            geometry,
            data: 0,
            tables: 0,
            next_cluster: 0,
            next_table: 0,
        }
    }

    /// All of a disk of `size` bytes.
    pub(super) fn all(geometry: Geometry, size: u64) -> Self {
        let mut count = Self::none(geometry);
        count.add_data(0..size);
        count
    }

    pub(super) fn data(&self) -> u64 {
        self.data
    }

    pub(super) fn tables(&self) -> u64 {
        self.tables
    }

    /// These bytes of the disk have data; they lie behind all that was told before.
    pub(super) fn add_data(&mut self, range: Range<u64>) {
        let (first, end) = units(&range, self.geometry.cluster_size());
        self.data += end.saturating_sub(first.max(self.next_cluster));
        self.next_cluster = self.next_cluster.max(end);
        self.add_entries(range);
    }

    /// These bytes of the disk have entries; they lie behind all that was told before.
    pub(super) fn add_entries(&mut self, range: Range<u64>) {
        let (first, end) = units(&range, self.geometry.l2_coverage());
        self.tables += end.saturating_sub(first.max(self.next_table));
        self.next_table = self.next_table.max(end);
    }
}

/// The first unit that a range touches, and the one behind the last.
fn units(range: &Range<u64>, size: u64) -> (u64, u64) {
    if range.is_empty() {
        return (0, 0);
    }
    (range.start / size, range.end.div_ceil(size))
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_that_is_touched_twice_counts_once() {
        let geometry = Geometry::new(9, 4, false).unwrap();
        let mut count = Count::none(geometry);
        for range in [0..1, 1..2, 5..5, 511..513, 1024..2048, 40_000..40_001] {
            count.add_data(range);
        }
        // Tables of 64 entries, 32 KiB of the disk each.
        assert_eq!((count.data(), count.tables()), (5, 2));
        count.add_entries(50_000..70_000);
        assert_eq!((count.data(), count.tables()), (5, 3));
        assert_eq!(Count::all(geometry, 32_769).tables(), 2);
        assert_eq!(Count::all(geometry, 0).data(), 0);
    }
}
