//! Where metadata lies, so that no write hits it by accident.
//!
//! Metadata is few clusters among many, so what is kept is a hash table of those that hold some, with the kinds of each. A
//! question takes no lock and mostly one look. When the table gets full, a larger one takes its place; the old one stays
//! until the end, for someone may be reading it.

mod kinds;

use std::fmt;
use std::sync::OnceLock;

use qcow2_format::{Geometry, HostCluster, HostOffset};

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use crate::sync::{Mutex, lock, yield_now};

pub use kinds::{Kinds, OverlapChecks, Template};

/// Clusters in the first table, as a power of two.
const FIRST_BITS: u32 = 10;
/// Most clusters of metadata that are kept: what an image needs that is far larger than the format allows in practice.
const MAX_CLUSTERS: usize = 1 << 24;
/// Tables of doubling size, the largest with twice as many cells as clusters.
const GENERATIONS: usize = 16;
/// Low bits of a cell that hold kinds; the cluster's number plus one is above.
const KIND_BITS: u32 = 12;

/// The clusters that hold metadata, by kind.
pub struct OverlapMap {
    geometry: Geometry,
    enabled: Kinds,
    generations: [OnceLock<Box<[AtomicU64]>>; GENERATIONS],
    current: AtomicUsize,
    /// Odd while a table is being tidied up.
    version: AtomicU64,
    /// Cells in use in the current generation; held while cells change.
    used: Mutex<usize>,
}

/// There is so much metadata that the map would need absurd memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the image has metadata in more than {MAX_CLUSTERS} clusters")]
pub struct TooMuchMetadata;

impl OverlapMap {
    /// An empty map that tests for `checks`.
    pub fn new(geometry: Geometry, checks: OverlapChecks) -> Self {
        let map = Self {
            geometry,
            enabled: checks.kinds(),
            generations: [const { OnceLock::new() }; GENERATIONS],
            current: AtomicUsize::new(0),
            version: AtomicU64::new(0),
            used: Mutex::default(),
        };
        if let Some(first) = map.generations.first() {
            first.get_or_init(|| cells(FIRST_BITS));
        }
        map
    }

    /// The kinds that are tested for.
    pub fn enabled(&self) -> Kinds {
        self.enabled
    }

    #[inline]
    fn table(&self) -> &[AtomicU64] {
        self.generations
            .get(self.current.load(Ordering::Acquire))
            .and_then(OnceLock::get)
            .map_or(&[], |table| table)
    }

    /// The kinds of metadata in one cluster, tested for or not.
    #[inline]
    pub fn kinds(&self, cluster: HostCluster) -> Kinds {
        loop {
            let version = self.version.load(Ordering::Acquire);
            let kinds = self.look(cluster);
            // The cells were read before the version is looked at again.
            fence(Ordering::Acquire);
            if version & 1 == 0 && self.version.load(Ordering::Relaxed) == version {
                return kinds;
            }
            yield_now();
        }
    }

    #[inline]
    fn look(&self, cluster: HostCluster) -> Kinds {
        let table = self.table();
        let mut index = hash(cluster, table.len());
        loop {
            match table.get(index) {
                None => return Kinds::NONE,
                Some(cell) => {
                    let value = cell.load(Ordering::Acquire);
                    if value == 0 {
                        return Kinds::NONE;
                    }
                    if value >> KIND_BITS == cluster.get() + 1 {
                        return kinds_of(value);
                    }
                }
            }
            index = (index + 1) & (table.len() - 1);
        }
    }

    /// A cluster with metadata among `count` from `first` on, and what it holds, tested for or not.
    pub fn first_within(&self, first: HostCluster, count: u64) -> Option<(HostCluster, Kinds)> {
        let end = first.get().saturating_add(count);
        if count < self.table().len() as u64 {
            return (first.get()..end)
                .map(HostCluster::new)
                .find_map(|cluster| {
                    let kinds = self.kinds(cluster);
                    (!kinds.is_empty()).then_some((cluster, kinds))
                });
        }
        // Metadata is less than that. No cell changes its cluster while this is held.
        let _used = lock(&self.used);
        let cells = self.table().iter().map(|cell| cell.load(Ordering::Acquire));
        let hits = cells.filter(|value| !kinds_of(*value).is_empty());
        let hits = hits.map(|value| ((value >> KIND_BITS) - 1, kinds_of(value)));
        hits.filter(|(number, _)| (first.get()..end).contains(number))
            .min_by_key(|(number, _)| *number)
            .map(|(number, kinds)| (HostCluster::new(number), kinds))
    }

    /// The first cluster among those that hold `len` bytes at `offset` with metadata that is tested for and is not in
    /// `except`, and what it holds.
    #[inline]
    pub fn hit(&self, offset: HostOffset, len: u64, except: Kinds) -> Option<(HostCluster, Kinds)> {
        let watched = self.enabled.without(except);
        if watched.is_empty() || len == 0 {
            return None;
        }
        let first = self.geometry.host_cluster(offset).get();
        let last = offset.get().saturating_add(len - 1) >> self.geometry.cluster_bits();
        let mut number = first;
        loop {
            let cluster = HostCluster::new(number);
            let found = self.kinds(cluster).intersection(watched);
            if !found.is_empty() {
                return Some((cluster, found));
            }
            if number >= last {
                return None;
            }
            number += 1;
        }
    }

    /// Notes that the clusters which hold `len` bytes at `offset` hold `kinds`.
    ///
    /// # Errors
    ///
    /// When memory would go out of bounds.
    pub fn add(&self, offset: HostOffset, len: u64, kinds: Kinds) -> Result<(), TooMuchMetadata> {
        let mut used = lock(&self.used);
        for number in self.numbers(offset, len) {
            self.make_room(&mut used)?;
            let (cell, value) = self.cell(number);
            if value == 0 {
                *used += 1;
            }
            if let Some(cell) = cell {
                let value = (number + 1) << KIND_BITS | value | u64::from(kinds.bits());
                cell.store(value, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Notes that the clusters which hold `len` bytes at `offset` no longer hold `kinds`.
    pub fn remove(&self, offset: HostOffset, len: u64, kinds: Kinds) {
        let _used = lock(&self.used);
        for number in self.numbers(offset, len) {
            if let (Some(cell), value @ 1..) = self.cell(number) {
                // The cell stays: a search for another cluster may lead past it.
                cell.store(value & !u64::from(kinds.bits()), Ordering::Release);
            }
        }
    }

    fn numbers(&self, offset: HostOffset, len: u64) -> std::ops::Range<u64> {
        let first = self.geometry.host_cluster(offset).get();
        let end = offset.get().saturating_add(len);
        first..end.div_ceil(self.geometry.cluster_size()).max(first)
    }

    /// The cell of a cluster, or the one where it would go, and its value.
    fn cell(&self, number: u64) -> (Option<&AtomicU64>, u64) {
        let table = self.table();
        let mut index = hash(HostCluster::new(number), table.len());
        while let Some(cell) = table.get(index) {
            let value = cell.load(Ordering::Relaxed);
            if value == 0 || value >> KIND_BITS == number + 1 {
                return (Some(cell), value);
            }
            index = (index + 1) & (table.len() - 1);
        }
        (None, 0)
    }

    /// Keeps half of the cells free.
    fn make_room(&self, used: &mut usize) -> Result<(), TooMuchMetadata> {
        let table = self.table();
        if *used < table.len() / 2 {
            return Ok(());
        }
        let live: Vec<u64> = table
            .iter()
            .map(|cell| cell.load(Ordering::Relaxed))
            .filter(|value| !kinds_of(*value).is_empty())
            .collect();
        if live.len() >= MAX_CLUSTERS {
            return Err(TooMuchMetadata);
        }
        *used = live.len();
        if live.len() < table.len() / 4 {
            // Mostly what was removed: clean up in place. Readers wait for this rare moment.
            self.version.fetch_add(1, Ordering::AcqRel);
            fence(Ordering::Release);
            for cell in table {
                cell.store(0, Ordering::Relaxed);
            }
            place(&live, table);
            self.version.fetch_add(1, Ordering::Release);
            return Ok(());
        }
        let next = self.current.load(Ordering::Relaxed) + 1;
        let bits = table.len().trailing_zeros() + 1;
        let larger = self.generations.get(next).ok_or(TooMuchMetadata)?;
        place(&live, larger.get_or_init(|| cells(bits)));
        self.current.store(next, Ordering::Release);
        Ok(())
    }
}

/// Stores cells in an empty table.
fn place(live: &[u64], table: &[AtomicU64]) {
    for value in live {
        let mut index = hash(HostCluster::new((value >> KIND_BITS) - 1), table.len());
        while let Some(cell) = table.get(index) {
            if cell.load(Ordering::Relaxed) == 0 {
                cell.store(*value, Ordering::Relaxed);
                break;
            }
            index = (index + 1) & (table.len() - 1);
        }
    }
}

fn cells(bits: u32) -> Box<[AtomicU64]> {
    (0..1_usize << bits).map(|_| AtomicU64::new(0)).collect()
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "only some bits are wanted")]
fn kinds_of(value: u64) -> Kinds {
    Kinds::from_bits(value as u16)
}

#[inline]
fn hash(cluster: HostCluster, len: usize) -> usize {
    let product = cluster.get().wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (product >> 32) as usize & len.wrapping_sub(1)
}

impl fmt::Debug for OverlapMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OverlapMap")
            .field("enabled", &self.enabled)
            .field("cells", &self.table().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests {
    use super::*;

    fn map() -> OverlapMap {
        OverlapMap::new(
            Geometry::new(16, 4, false).unwrap(),
            OverlapChecks::default(),
        )
    }

    #[test]
    fn a_write_that_touches_a_table_is_a_hit_and_its_own_kind_is_none() {
        let map = map();
        map.add(HostOffset::new(0x30000), 0x10010, Kinds::ACTIVE_L1)
            .unwrap();
        let at = |offset, len| map.hit(HostOffset::new(offset), len, Kinds::NONE);
        assert_eq!(at(0x20000, 0x10000), None);
        let hit = Some((HostCluster::new(3), Kinds::ACTIVE_L1));
        assert_eq!(at(0x20000, 0x10001), hit);
        assert_eq!(at(0x3ffff, 1), hit);
        assert_eq!(at(0x4ffff, 1).unwrap().0, HostCluster::new(4));
        assert_eq!(at(0x50000, 1), None);
        assert_eq!(map.hit(HostOffset::new(0x30000), 8, Kinds::ACTIVE_L1), None);
        map.remove(HostOffset::new(0x30000), 1, Kinds::ACTIVE_L1);
        assert_eq!(at(0x30000, 1), None);
        assert!(at(0x40000, 1).is_some());
    }

    #[test]
    fn many_clusters_are_all_found_again() {
        let map = map();
        let place = |n: u64| HostOffset::new((n * 8191) << 16);
        for n in 0..50_000 {
            map.add(place(n), 1, Kinds::ACTIVE_L2).unwrap();
        }
        for n in 0..50_000 {
            assert!(map.hit(place(n), 1, Kinds::NONE).is_some());
            assert!(map.hit(place(n), 1, Kinds::ACTIVE_L2).is_none());
            assert!(
                map.hit(HostOffset::new(place(n).get() + 0x10000), 1, Kinds::NONE)
                    .is_none()
            );
        }
    }

    #[test]
    fn the_first_of_many_clusters_with_metadata_is_found() {
        let map = map();
        for cluster in [70_000_u64, 9, 30] {
            map.add(HostOffset::new(cluster << 16), 1, Kinds::ACTIVE_L2)
                .unwrap();
        }
        map.remove(HostOffset::new(9 << 16), 1, Kinds::ACTIVE_L2);
        let found = |first, count| {
            map.first_within(HostCluster::new(first), count)
                .map(|(cluster, _)| cluster.get())
        };
        assert_eq!(found(0, 20), None);
        assert_eq!(found(0, 31), Some(30));
        assert_eq!(found(0, 1 << 20), Some(30));
        assert_eq!(found(31, 1 << 20), Some(70_000));
        assert_eq!(found(31, 69_969), None);
        assert_eq!(found(70_001, u64::MAX), None);
    }

    #[test]
    fn adding_and_removing_for_ever_needs_no_more_memory() {
        let map = map();
        for n in 0..100_000_u64 {
            map.add(HostOffset::new(n << 16), 1, Kinds::ACTIVE_L2)
                .unwrap();
            map.remove(HostOffset::new(n << 16), 1, Kinds::ACTIVE_L2);
        }
        assert!(map.table().len() <= 4096, "{}", map.table().len());
    }

    #[test]
    fn templates_and_switches_say_what_is_tested() {
        let checks = OverlapChecks::template(Template::None)
            .switch("active-l2", true)
            .unwrap();
        assert_eq!(checks.kinds(), Kinds::ACTIVE_L2);
        let checks = OverlapChecks::template(Template::Cached)
            .switch("inactive-l2", true)
            .unwrap()
            .switch("main-header", false)
            .unwrap();
        assert_eq!(checks.kinds(), Kinds::ALL.without(Kinds::MAIN_HEADER));
        assert!(OverlapChecks::default().switch("l3", true).is_none());
        assert_eq!(OverlapChecks::default().kinds(), Kinds::ALL);
    }
}
