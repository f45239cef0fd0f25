//! L1 and L2 tables read, and changed, in bulk: past the cache, in the order of the file.
//!
//! `trees.rs` goes through tables, too. There a single thread sees each entry, with its table and its index, and may end the
//! work; here all processors count and flag the entries of one L1 table, sixty-four at a time where they are alike.

use std::collections::BTreeSet;

use qcow2_cache::Kinds;
use qcow2_cache::sync::{Mutex, lock};
use qcow2_format::geometry::MAX_REFCOUNT_TABLE_BYTES;
use qcow2_format::{ClusterKind, HostOffset, L1Entry, L2Entry};
use qcow2_io::Storage as _;

use super::counts::{Counts, Set};
use crate::buffer::Buffer;
use crate::ready::snapshot_l1_len;
use crate::threads::for_each;
use crate::{Image, ImageError};

/// Tables that lie side by side are read together, up to so many bytes.
const PIECE: u64 = 1 << 20;

/// Bit 63 of entries.
const COPIED: u64 = 1 << 63;

/// Runs of tables that are worth waking other threads.
const SHARED: usize = 4;

/// Entries that are looked at together; the smallest table has as many.
const GROUP: usize = 64;

/// What becomes of COPIED flags.
#[derive(Clone, Copy)]
pub(crate) enum Flags<'a> {
    /// Nothing.
    Keep,
    /// They are cleared.
    Clear,
    /// Those of the clusters that have become the only ones' own are set.
    Set(&'a Set),
}

/// Stretches of clusters that entries refer to.
struct Found(Vec<(u64, u64)>);

impl Found {
    #[inline]
    fn add(&mut self, first: u64, count: u64) {
        match self.0.last_mut() {
            Some((start, len)) if *start + *len == first => *len += count,
            _ => self.0.push((first, count)),
        }
    }
}

/// L2 tables that lie side by side.
struct Run {
    offset: u64,
    tables: u64,
    /// How many L1 entries lead to each.
    times: u32,
}

impl Image {
    /// The active L1 table.
    pub(crate) fn active_l1(&self) -> Vec<L1Entry> {
        (0..self.l1.len()).map(|index| self.l1.get(index)).collect()
    }

    /// Reads the L1 table of a snapshot.
    pub(crate) fn read_l1(
        &self,
        offset: HostOffset,
        entries: u32,
    ) -> Result<Vec<L1Entry>, ImageError> {
        let len = snapshot_l1_len(self.geometry, offset, entries)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.meta.storage().read_at(&mut bytes, offset.get())?;
        let (entries, _) = bytes.as_chunks::<8>();
        Ok(entries
            .iter()
            .map(|entry| L1Entry::from_be_bytes(*entry))
            .collect())
    }

    /// The L2 tables of an L1 table, in the order of the file.
    fn runs(&self, l1: &[L1Entry]) -> Result<Vec<Run>, ImageError> {
        let size = self.cluster_size();
        let mut tables: Vec<u64> = Vec::new();
        for entry in l1 {
            tables.extend(self.table_place(*entry)?);
        }
        tables.sort_unstable();
        let mut runs: Vec<Run> = Vec::new();
        for same in tables.chunk_by(|a, b| a == b) {
            let (Some(offset), Ok(times)) = (same.first().copied(), u32::try_from(same.len()))
            else {
                continue;
            };
            match runs.last_mut() {
                Some(run)
                    if run.times == times
                        && run.offset + run.tables * size == offset
                        && (run.tables + 1) * size <= PIECE.max(size) =>
                {
                    run.tables += 1;
                }
                _ => runs.push(Run {
                    offset,
                    tables: 1,
                    times,
                }),
            }
        }
        Ok(runs)
    }

    /// Goes through what an L1 table leads to. Counts the L2 tables and all that they refer to, if `counts` is there, and changes
    /// flags.
    pub(crate) fn walk(
        &self,
        l1: &[L1Entry],
        counts: Option<&mut Counts>,
        flags: Flags<'_>,
    ) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        let counts = counts.map(Mutex::new);
        for_each(&self.runs(l1)?, SHARED, |run| {
            let mut found = Found(Vec::new());
            self.walk_run(run, flags, &mut found)?;
            if let Some(counts) = &counts {
                let mut counts = lock(counts);
                counts.add(run.offset >> bits, run.tables, run.times);
                for (first, count) in found.0 {
                    counts.add(first, count, run.times);
                }
            }
            Ok(())
        })
    }

    /// Fails if an L1 table leads to a cluster that no refcount block counts.
    pub(crate) fn check_counted(&self, l1: &[L1Entry]) -> Result<(), ImageError> {
        let (bits, in_block) = (
            self.geometry.cluster_bits(),
            self.geometry.refcount_block_bits(),
        );
        let known = Mutex::new(BTreeSet::new());
        for_each(&self.runs(l1)?, SHARED, |run| {
            let mut found = Found(vec![(run.offset >> bits, run.tables)]);
            self.walk_run(run, Flags::Keep, &mut found)?;
            let mut known = lock(&known);
            for (first, count) in found.0 {
                let last = first.saturating_add(count.saturating_sub(1));
                for block in first >> in_block..=last >> in_block {
                    if known.insert(block) && self.alloc()?.block(block)?.is_none() {
                        return Err(self.uncounted(block, first));
                    }
                }
            }
            Ok(())
        })
    }

    /// A cluster whose refcount block is not there.
    fn uncounted(&self, block: u64, first: u64) -> ImageError {
        let cluster = first.max(block << self.geometry.refcount_block_bits());
        ImageError::Uncounted {
            offset: HostOffset::new(cluster << self.geometry.cluster_bits()),
            can_be_counted: block < MAX_REFCOUNT_TABLE_BYTES / 8,
        }
    }

    fn walk_run(&self, run: &Run, flags: Flags<'_>, found: &mut Found) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        let mut bytes = Buffer::unfilled(run.tables << bits);
        self.meta.storage().read_at(&mut bytes, run.offset)?;
        let mut changed: Option<(u64, u64)> = None;
        for number in 0..run.tables {
            let start = usize::try_from(number << bits).unwrap_or(usize::MAX);
            let end = start.saturating_add(self.geometry.cluster_len());
            let table = bytes.get_mut(start..end).unwrap_or_default();
            let any = self.walk_table(table, run.offset, flags, found)?;
            match &mut changed {
                Some((first, count)) if any && *first + *count == number => *count += 1,
                _ if any => {
                    self.write_tables(run, &bytes, changed)?;
                    changed = Some((number, 1));
                }
                _ => {}
            }
        }
        self.write_tables(run, &bytes, changed)
    }

    /// Writes some tables of a run: the first of them, and how many.
    fn write_tables(
        &self,
        run: &Run,
        bytes: &[u8],
        tables: Option<(u64, u64)>,
    ) -> Result<(), ImageError> {
        let Some((first, count)) = tables else {
            return Ok(());
        };
        let bits = self.geometry.cluster_bits();
        let at = |table: u64| usize::try_from(table << bits).unwrap_or(usize::MAX);
        let part = bytes.get(at(first)..at(first + count)).unwrap_or_default();
        let offset = HostOffset::new(run.offset + (first << bits));
        let kinds = Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2;
        Ok(self.meta.write(kinds, offset, part)?)
    }

    /// Goes through one table; tells whether flags in it have changed.
    fn walk_table(
        &self,
        table: &mut [u8],
        place: u64,
        flags: Flags<'_>,
        found: &mut Found,
    ) -> Result<bool, ImageError> {
        let mut any = false;
        if self.geometry.extended_l2() {
            for entry in table.as_chunks_mut::<16>().0 {
                let word = entry.split_first_chunk_mut::<8>().map(|(word, _)| word);
                any |= self.walk_entry(word.unwrap_or(&mut [0; 8]), place, flags, found)?;
            }
            return Ok(any);
        }
        // No table has fewer entries than 64.
        for group in table.as_chunks_mut::<{ 8 * GROUP }>().0 {
            let words = group.as_chunks_mut::<8>().0;
            let Some(first) = self.in_line(words) else {
                for word in words {
                    any |= self.walk_entry(word, place, flags, found)?;
                }
                continue;
            };
            let Some(cluster) = first.plain_data() else {
                // Nothing is there.
                continue;
            };
            let cluster = cluster.get() >> self.geometry.cluster_bits();
            found.add(cluster, GROUP as u64);
            match flags {
                Flags::Clear if first.is_copied() => {
                    for [byte, ..] in words {
                        *byte &= 0x7f;
                    }
                    any = true;
                }
                Flags::Set(own) if !first.is_copied() => {
                    match own.count(cluster, GROUP as u64) {
                        0 => continue,
                        count if count == GROUP as u64 => {
                            for [byte, ..] in words {
                                *byte |= 0x80;
                            }
                        }
                        _ => {
                            for word in words {
                                self.flag_entry(word, flags);
                            }
                        }
                    }
                    any = true;
                }
                _ => {}
            }
        }
        Ok(any)
    }

    /// The first of some entries, if each that follows is of the next cluster and flagged alike, or if all are empty.
    #[inline]
    fn in_line(&self, words: &[[u8; 8]]) -> Option<L2Entry> {
        let first = u64::from_be_bytes(*words.first()?);
        let entry = L2Entry::from_bits(first, 0);
        let step = if first == 0 {
            0
        } else {
            // As plain as the first, or the difference would be in other bits as well.
            let last = L2Entry::from_bits(u64::from_be_bytes(*words.last()?), 0).plain_data()?;
            if !self.geometry.is_cluster_aligned(entry.plain_data()?)
                || last < entry.plain_data()?
            {
                return None;
            }
            self.cluster_size()
        };
        let mut alike = true;
        for (word, index) in words.iter().zip(0_u64..) {
            alike &= u64::from_be_bytes(*word) == first.wrapping_add(index.wrapping_mul(step));
        }
        alike.then_some(entry)
    }

    fn walk_entry(
        &self,
        word: &mut [u8; 8],
        place: u64,
        flags: Flags<'_>,
        found: &mut Found,
    ) -> Result<bool, ImageError> {
        let entry = L2Entry::from_bits(u64::from_be_bytes(*word), 0);
        if let Some((cluster, clusters)) = self.referred(entry, place)? {
            found.add(cluster, clusters);
        }
        Ok(self.flag_entry(word, flags))
    }

    /// Changes the flag of one entry; tells whether it had to.
    fn flag_entry(&self, word: &mut [u8; 8], flags: Flags<'_>) -> bool {
        let old = u64::from_be_bytes(*word);
        let entry = L2Entry::from_bits(old, 0);
        if old == 0 || entry.is_compressed() {
            return false;
        }
        let new = match flags {
            Flags::Keep => old,
            Flags::Clear => old & !COPIED,
            Flags::Set(own) => match entry.kind(self.rules) {
                ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset)
                    if own.contains(offset.get() >> self.geometry.cluster_bits()) =>
                {
                    old | COPIED
                }
                _ => old,
            },
        };
        *word = new.to_be_bytes();
        new != old
    }

    /// The clusters that an L2 entry refers to.
    #[inline]
    fn referred(&self, entry: L2Entry, table: u64) -> Result<Option<(u64, u64)>, ImageError> {
        let bits = self.geometry.cluster_bits();
        match entry.kind(self.rules) {
            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset) => {
                if !self.geometry.is_cluster_aligned(offset) {
                    return Err(ImageError::Refused {
                        what: "an entry of the L2 table",
                        offset: HostOffset::new(table),
                        detail: format!("{offset} does not start at a cluster"),
                    });
                }
                Ok(Some((offset.get() >> bits, 1)))
            }
            ClusterKind::Compressed(extent) => {
                let first = extent.offset.get() >> bits;
                let last = extent.offset.get().saturating_add(extent.len_bytes - 1) >> bits;
                Ok(Some((first, last - first + 1)))
            }
            ClusterKind::Unallocated | ClusterKind::ZeroPlain => Ok(None),
        }
    }

    /// Changes the COPIED flags of the active L1 table, and writes all of it.
    pub(crate) fn flag_l1(&self, own: Option<&Set>) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        for index in 0..self.l1.len() {
            let table = self.l1.get(index).l2_table();
            let is_own = match own {
                None => false,
                Some(own) => self.l1.get(index).is_copied() || own.contains(table.get() >> bits),
            };
            if table.get() != 0 {
                self.l1.set(index, L1Entry::new(table, is_own));
            }
        }
        self.write_l1()
    }

    /// Writes the active L1 table as it is in memory.
    pub(crate) fn write_l1(&self) -> Result<(), ImageError> {
        let bytes: Vec<u8> = (0..self.l1.len())
            .flat_map(|index| self.l1.get(index).to_be_bytes())
            .collect();
        let place = self.meta.header().l1_table_offset;
        if bytes.is_empty() {
            return Ok(());
        }
        Ok(self.meta.write(Kinds::ACTIVE_L1, place, &bytes)?)
    }
}
