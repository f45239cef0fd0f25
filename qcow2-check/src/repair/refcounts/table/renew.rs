//! All refcount structures in new places.
//!
//! Until the header names the new ones the old ones stay as they are: their clusters count as used while places are searched, and are
//! free afterwards.

use qcow2_format::geometry::MAX_REFCOUNT_TABLE_BYTES;

use super::super::super::PlanError;
use super::super::super::plan::Planner;
use super::Table;
use crate::image::Image;
use crate::refmap::RefMap;

impl Table {
    /// Whether the table, or a block of it, has no place of its own.
    pub(in super::super) fn is_damaged(&self) -> bool {
        let lost = |(found, entry): (&u64, &u64)| *found != 0 && *entry == 0;
        self.place.is_none() || self.found.iter().zip(&self.entries).any(lost)
    }

    /// Gives all places up that could stay.
    pub(in super::super) fn renew(&mut self, image: &Image<'_>) {
        let bits = image.cluster_bits();
        let table = self.place.take();
        let table = table.map(|(offset, clusters)| (offset >> bits, clusters));
        let blocks = self.entries.drain(..).filter(|offset| *offset != 0);
        self.old = Some(
            blocks
                .map(|offset| (offset >> bits, 1))
                .chain(table)
                .collect(),
        );
    }

    /// Takes the clusters of what was made anew from the map.
    pub(in super::super) fn leave_old(&self, map: &mut RefMap, released: &mut RefMap) {
        for (first, count) in self.old.iter().flatten() {
            map.remove_run(*first, *count);
            for cluster in *first..first + count {
                released.insert(cluster);
            }
        }
    }

    /// A place for a block that counts the clusters from `first` on.
    pub(super) fn block_place(
        &mut self,
        planner: &mut Planner<'_, '_>,
        map: &RefMap,
        first: u64,
        size: u64,
    ) -> Result<u64, PlanError> {
        if self.old.is_none() {
            return planner.allocate(1, size);
        }
        // Each block takes the first place it can have, so the next one finds none before it.
        let place = free_run(map, first.max(self.no_room_before), 1);
        self.no_room_before = place + 1;
        planner.occupy(place.saturating_mul(size), 1, size)?;
        Ok(place * size)
    }

    /// A place for the table, which needs that many clusters: offset, and clusters.
    pub(super) fn table_place(
        &self,
        planner: &mut Planner<'_, '_>,
        map: &RefMap,
        needed: u64,
        size: u64,
    ) -> Result<(u64, u64), PlanError> {
        if self.old.is_some() {
            let place = free_run(map, 0, needed);
            planner.occupy(place.saturating_mul(size), needed, size)?;
            return Ok((place * size, needed));
        }
        // Some room, since the table itself may call for another block.
        let clusters = (needed + needed / 8).min(MAX_REFCOUNT_TABLE_BYTES / size);
        Ok((planner.allocate(clusters, size)?, clusters))
    }
}

/// The lowest `count` clusters in a row, from `from` on, that nothing refers to.
fn free_run(map: &RefMap, from: u64, count: u64) -> u64 {
    let (mut start, mut cluster) = (from, from);
    while cluster - start < count {
        let seen = map.word(cluster & !63) >> (cluster % 64);
        let used = u64::from(seen.trailing_ones());
        if used > 0 {
            // Behind a word's end the next one is looked at.
            cluster += used;
            start = cluster;
        } else {
            let free = u64::from(seen.trailing_zeros()).min(64 - cluster % 64);
            cluster += free;
        }
    }
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_run_is_found_across_words_and_pages() {
        let mut map = RefMap::new(10_000);
        map.add_run(0, 60, 1);
        map.add_run(62, 1, 1);
        map.add_run(70, 5000, 1);
        assert_eq!(free_run(&map, 0, 1), 60);
        assert_eq!(free_run(&map, 0, 2), 60);
        assert_eq!(free_run(&map, 0, 3), 63, "across the end of a word");
        assert_eq!(free_run(&map, 61, 2), 63);
        assert_eq!(free_run(&map, 0, 8), 5070);
        assert_eq!(free_run(&map, 100_000, 1000), 100_000);
    }
}
