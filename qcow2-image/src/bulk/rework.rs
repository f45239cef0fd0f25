//! Changes of many refcounts at once: under the dirty bit, in the file, and all or nothing for who looks at it later.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_alloc::{AllocError, Reason};
use qcow2_cache::sync::{Mutex, lock};
use qcow2_cache::{Kinds, Step};
use qcow2_format::{Geometry, HostCluster, HostOffset, L1Entry, RefcountBlock, set_refcount};
use qcow2_io::Storage as _;

use super::counts::{Block, Counts, Set, WINDOW};
use super::tree::Flags;
use crate::buffer::Buffer;
use crate::threads::for_each;
use crate::{Image, ImageError};

/// Refcount blocks that are worth waking other threads.
const SHARED: usize = 8;

/// What becomes of refcounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing: they are only tested for room.
    Test,
    /// References come.
    Add,
    /// References go; what nobody refers to any more is punched out if this reason says so.
    Remove(Reason),
}

impl Image {
    /// Does work that changes references past the caches. The gate must be closed. Whatever goes wrong, all references are
    /// counted anew then, so that the image is sound, before or after the change; if not even that works it takes no more writes.
    pub(crate) fn rework<T>(
        &self,
        work: impl FnOnce() -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        self.settle_closed()?;
        let was_dirty = self.meta.is_dirty();
        self.meta.mark_dirty()?;
        self.meta.write_refcounts()?;
        self.forget_clean();
        let result = work().and_then(|value| {
            self.settle_closed()?;
            if was_dirty {
                return Ok(value);
            }
            // Lazy refcounts may be on by option.
            self.meta.write_refcounts()?;
            self.meta.flush()?;
            self.meta.clear_dirty_bit()?;
            Ok(value)
        });
        self.forget_clean();
        if result.is_err() && self.meta.is_writable() && self.restore().is_err() {
            self.meta.give_up();
        }
        result
    }

    fn forget_clean(&self) {
        self.meta.l2().forget_clean();
        self.meta.refcounts().forget_clean();
    }

    fn restore(&self) -> Result<(), ImageError> {
        self.write_l1()?;
        self.meta.write_refcounts()?;
        self.meta.flush()?;
        self.alloc()?.forget_releases();
        self.recount_references(|| Ok(())).map(drop)
    }

    /// Fails if the refcounts of what an L1 table leads to could not count as many references again.
    pub(crate) fn check_room(&self, l1: &[L1Entry]) -> Result<(), ImageError> {
        self.meta.write_refcounts()?;
        let (_, _, blocks) = self.alloc()?.tables();
        let geometry = self.geometry;
        let highest = AtomicU64::new(0);
        for_each(&blocks, SHARED, |place| {
            let mut bytes = Buffer::unfilled(geometry.cluster_size());
            self.meta.storage().read_at(&mut bytes, place.get())?;
            highest.fetch_max(max_refcount(&bytes, geometry), Ordering::Relaxed);
            Ok::<(), ImageError>(())
        })?;
        // They are counted once now, and would be twice.
        if highest.into_inner() <= geometry.refcount_max() / 2 {
            return Ok(());
        }
        let own = &mut Set::default();
        self.change_references(l1, 0..0, Change::Test, own, None)
    }

    /// Counts the references of one window of clusters: those of an L1 table, and one to each of `more`.
    pub(crate) fn count_window(
        &self,
        l1: &[L1Entry],
        more: Range<u64>,
        start: u64,
        flags: Flags<'_>,
    ) -> Result<Counts, ImageError> {
        let mut counts = Counts::new(self.geometry, start..start + WINDOW);
        counts.add(more.start, more.end.saturating_sub(more.start), 1);
        self.walk(l1, Some(&mut counts), flags)?;
        Ok(counts)
    }

    /// Changes the refcounts of all that an L1 table leads to, and of `more` clusters beside. The clusters that have one
    /// reference left go to `own`. What was counted in the first window need not be counted again.
    pub(crate) fn change_references(
        &self,
        l1: &[L1Entry],
        more: Range<u64>,
        change: Change,
        own: &mut Set,
        counted: Option<Counts>,
    ) -> Result<(), ImageError> {
        // What follows goes past the cache.
        self.meta.write_refcounts()?;
        self.meta.refcounts().forget_clean();
        let mut tables: Vec<u64> = l1.iter().map(|entry| entry.l2_table().get()).collect();
        for table in &mut tables {
            *table >>= self.geometry.cluster_bits();
        }
        tables.sort_unstable();
        let outcome = Mutex::new(Outcome {
            own,
            freed_tables: Vec::new(),
        });
        let mut counted = counted;
        let mut start = 0;
        loop {
            let counts = match counted.take() {
                Some(counts) => counts,
                None => self.count_window(l1, more.clone(), start, Flags::Keep)?,
            };
            for_each(&counts.blocks(), SHARED, |(block, counts)| {
                self.change_block(*block, counts, change, &tables, &outcome)
            })?;
            if !counts.has_more() {
                break;
            }
            start += WINDOW;
        }
        // Until now they were read, for one window after the other.
        if let Change::Remove(reason) = change {
            self.punch(reason, &lock(&outcome).freed_tables)?;
        }
        Ok(())
    }

    fn no_room(&self, cluster: HostCluster, value: u64) -> ImageError {
        ImageError::Alloc(AllocError::RefcountOverflow {
            cluster,
            value,
            bits: self.geometry.refcount_bits(),
        })
    }

    fn change_block(
        &self,
        block: u64,
        counts: &Block,
        change: Change,
        tables: &[u64],
        outcome: &Mutex<Outcome<'_>>,
    ) -> Result<(), ImageError> {
        let alloc = self.alloc()?;
        let geometry = self.geometry;
        let mut room = vec![0; 1 << geometry.refcount_block_bits()];
        let counts = counts.spread(&mut room);
        let first = block << geometry.refcount_block_bits();
        let unknown = |number: u64| -> ImageError {
            let offset = HostOffset::new(number << geometry.cluster_bits());
            let detail = "it is 0 although something points at the cluster";
            self.meta
                .corrupt("the refcount of the cluster", offset, detail)
                .into()
        };
        let Some(place) = alloc.block(block)? else {
            let used = counts.iter().position(|count| *count > 0).unwrap_or(0);
            return Err(unknown(first + used as u64));
        };
        let mut bytes = Buffer::unfilled(geometry.cluster_size());
        self.meta.storage().read_at(&mut bytes, place.get())?;
        let mut freed: Vec<Range<u64>> = Vec::new();
        let quick = quick_changes(&mut bytes, geometry, counts, change);
        let mut outcome = lock(outcome);
        for (ones, group) in quick.iter().zip((first..).step_by(QUICK)) {
            outcome.own.insert_many(group, ones.unwrap_or(0));
        }
        let slow = counts.iter().enumerate().filter(|(index, count)| {
            **count > 0 && quick.get(index / QUICK).is_none_or(Option::is_none)
        });
        for (index, count) in slow {
            let number = first + index as u64;
            if *count == u32::MAX {
                return Err(self.no_room(HostCluster::new(number), u64::from(*count)));
            }
            let count = u64::from(*count);
            let value = RefcountBlock::new(&bytes, geometry).get(index).unwrap_or(0);
            if value == 0 {
                return Err(unknown(number));
            }
            let new = match change {
                Change::Test | Change::Add => value.checked_add(count),
                Change::Remove(_) => Some(value.checked_sub(count).ok_or_else(|| unknown(number))?),
            };
            let new = new.filter(|new| *new <= geometry.refcount_max());
            let new = new.ok_or_else(|| self.no_room(HostCluster::new(number), value))?;
            if change == Change::Test {
                continue;
            }
            // It fits, and the index is within the block.
            let _ = set_refcount(&mut bytes, geometry, index, new);
            match (new, freed.last_mut()) {
                (0, Some(run)) if run.end == number => run.end += 1,
                (0, _) => freed.push(number..number + 1),
                (1, _) => outcome.own.insert(number),
                _ => {}
            }
        }
        let mut data = Vec::new();
        for run in &freed {
            split(run.clone(), tables, &mut data, &mut outcome.freed_tables);
        }
        drop(outcome);
        let Change::Remove(reason) = change else {
            if change == Change::Add {
                self.meta.write(Kinds::REFCOUNT_BLOCK, place, &bytes)?;
            }
            return Ok(());
        };
        for run in &freed {
            alloc.check_unowned(HostCluster::new(run.start), run.end - run.start)?;
        }
        self.meta.before(Step::Free)?;
        self.punch(reason, &data)?;
        self.meta.write(Kinds::REFCOUNT_BLOCK, place, &bytes)?;
        for run in freed {
            alloc.freed(HostCluster::new(run.start), run.end - run.start);
        }
        Ok(())
    }

    /// Gives the space of free clusters back to the host, if that is wanted.
    fn punch(&self, reason: Reason, runs: &[Range<u64>]) -> Result<(), ImageError> {
        if self.alloc()?.passes(reason) {
            let bits = self.geometry.cluster_bits();
            for run in runs {
                // The host keeps the space if this fails.
                let _ = self
                    .meta
                    .storage()
                    .discard(run.start << bits..run.end << bits);
            }
        }
        Ok(())
    }
}

/// What a change of refcounts leads to.
struct Outcome<'a> {
    /// Clusters with one reference left.
    own: &'a mut Set,
    /// Tables of the tree that are free now.
    freed_tables: Vec<Range<u64>>,
}

/// Tells data from tables: of clusters side by side, those that are among `tables`, which are in order, and the others.
fn split(
    run: Range<u64>,
    tables: &[u64],
    data: &mut Vec<Range<u64>>,
    freed_tables: &mut Vec<Range<u64>>,
) {
    let mut at = run.start;
    let first = tables.partition_point(|table| *table < run.start);
    for table in tables
        .iter()
        .skip(first)
        .take_while(|table| **table < run.end)
    {
        if at < *table {
            data.push(at..*table);
        }
        if at <= *table {
            freed_tables.push(*table..table + 1);
        }
        at = table + 1;
    }
    if at < run.end {
        data.push(at..run.end);
    }
}

/// The highest refcount of a block.
fn max_refcount(bytes: &[u8], geometry: Geometry) -> u64 {
    if geometry.refcount_order() == 4 {
        let words = bytes.as_chunks::<2>().0.iter();
        return words
            .fold(0, |max, word| max.max(u16::from_be_bytes(*word)))
            .into();
    }
    let block = RefcountBlock::new(bytes, geometry);
    let all = (0..1 << geometry.refcount_block_bits()).filter_map(|index| block.get(index));
    all.max().unwrap_or(0)
}

/// Refcounts that are changed at once if nothing is special about any of them.
const QUICK: usize = 64;

/// Changes refcounts of 16 bits, in groups. Of each group that is done it tells which of those that were changed are 1 now. In
/// the others are some that are too low or too high, or would be 0.
fn quick_changes(
    bytes: &mut [u8],
    geometry: Geometry,
    counts: &[u32],
    change: Change,
) -> Vec<Option<u64>> {
    if geometry.refcount_order() != 4 {
        return Vec::new();
    }
    let groups = bytes.as_chunks_mut::<{ 2 * QUICK }>().0.iter_mut();
    groups
        .zip(counts.as_chunks::<QUICK>().0)
        .map(|(bytes, counts)| {
            let words = bytes.as_chunks_mut::<2>().0;
            let mut values = [0_u32; QUICK];
            for (value, word) in values.iter_mut().zip(&*words) {
                *value = u16::from_be_bytes(*word).into();
            }
            let mut special = false;
            let mut ones = 0_u64;
            if let Change::Remove(_) = change {
                for (bit, (value, count)) in values.iter_mut().zip(counts).enumerate() {
                    special |= *count > 0 && *value <= *count;
                    *value = value.wrapping_sub(*count);
                    ones |= u64::from(*count > 0 && *value == 1) << bit;
                }
            } else {
                for (value, count) in values.iter_mut().zip(counts) {
                    special |= *count > 0 && *value == 0;
                    *value = value.saturating_add(*count);
                    special |= *value > u32::from(u16::MAX);
                }
            }
            if special {
                return None;
            }
            if change != Change::Test {
                for (value, word) in values.iter().zip(words) {
                    let value = u16::try_from(*value).unwrap_or(u16::MAX);
                    *word = value.to_be_bytes();
                }
            }
            Some(ones)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_told_from_data() {
        let (mut data, mut freed) = (Vec::new(), Vec::new());
        for run in [0..3, 5..6, 8..20] {
            split(run, &[0, 2, 4, 8, 8, 9, 15, 20], &mut data, &mut freed);
        }
        assert_eq!(data, [1..2, 5..6, 10..15, 16..20]);
        assert_eq!(freed, [0..1, 2..3, 8..9, 9..10, 15..16]);
    }

    #[test]
    fn groups_without_anything_special_are_done_at_once() {
        let geometry = Geometry::new(9, 4, false).unwrap();
        let mut counts = vec![0; 256];
        let mut bytes = vec![0; 512];
        for index in 0..256 {
            set_refcount(&mut bytes, geometry, index, 5).unwrap();
        }
        counts[..64].fill(2);
        counts[70] = 5;
        counts[130] = u32::MAX;
        let value = |bytes: &[u8], index| RefcountBlock::new(bytes, geometry).get(index);
        let remove = Change::Remove(Reason::Snapshot);
        let none = Some(0);
        for (change, done, values) in [
            (Change::Test, [none, none, None, none], [5, 5, 5, 5]),
            (Change::Add, [none, none, None, none], [7, 10, 5, 5]),
            (remove, [none, none, None, none], [5, 5, 5, 5]),
            // None would be left in the second group.
            (remove, [none, None, None, none], [3, 5, 5, 5]),
            (remove, [Some(u64::MAX), None, None, none], [1, 5, 5, 5]),
            (remove, [None, None, None, none], [1, 5, 5, 5]),
        ] {
            assert_eq!(quick_changes(&mut bytes, geometry, &counts, change), done);
            let found = [0, 70, 130, 200].map(|index| value(&bytes, index).unwrap());
            assert_eq!(found, values, "{change:?}");
        }
        let wide = Geometry::new(9, 5, false).unwrap();
        assert!(quick_changes(&mut bytes, wide, &counts, Change::Add).is_empty());
    }
}
