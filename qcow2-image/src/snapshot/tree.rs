//! L1 and L2 tables read, and changed, in bulk: past the cache, in the order of the file.

use qcow2_cache::Kinds;
use qcow2_format::{ClusterKind, HostOffset, L1Entry, L2Entry};
use qcow2_io::Storage as _;

use super::counts::{Counts, Set};
use crate::{Image, ImageError};

/// Tables that lie side by side are read together, up to so many bytes.
const PIECE: u64 = 1 << 20;

/// Bit 63 of entries.
const COPIED: u64 = 1 << 63;

/// L2 tables that lie side by side.
struct Run {
    offset: u64,
    tables: u64,
    /// How many L1 entries lead to each.
    times: u32,
}

impl Image {
    /// The active L1 table.
    pub(super) fn active_l1(&self) -> Vec<L1Entry> {
        (0..self.l1.len()).map(|index| self.l1.get(index)).collect()
    }

    /// Reads the L1 table of a snapshot.
    pub(super) fn read_l1(
        &self,
        offset: HostOffset,
        entries: u32,
    ) -> Result<Vec<L1Entry>, ImageError> {
        let len = u64::from(entries) * 8;
        if len > qcow2_format::geometry::MAX_L1_BYTES || !self.geometry.is_cluster_aligned(offset) {
            return Err(ImageError::Refused {
                what: "the L1 table of a snapshot",
                offset,
                detail: format!("{entries} entries, or the place, are not allowed"),
            });
        }
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
            let table = entry.l2_table();
            if table.get() == 0 {
                continue;
            }
            if !self.geometry.is_cluster_aligned(table) {
                return Err(ImageError::Refused {
                    what: "an L2 table",
                    offset: table,
                    detail: "it does not start at a cluster".to_owned(),
                });
            }
            tables.push(table.get());
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

    /// Counts what an L1 table leads to: L2 tables, and all that they refer to.
    pub(super) fn count_tree(&self, l1: &[L1Entry], counts: &mut Counts) -> Result<(), ImageError> {
        let size = self.cluster_size();
        let bits = self.geometry.cluster_bits();
        let step = if self.geometry.extended_l2() { 2 } else { 1 };
        let mut bytes = Vec::new();
        for run in self.runs(l1)? {
            counts.add(run.offset >> bits, run.tables, run.times);
            let len = run.tables << bits;
            bytes.resize(usize::try_from(len).unwrap_or(0), 0);
            self.meta.storage().read_at(&mut bytes, run.offset)?;
            // What lies side by side is counted together.
            let (mut first, mut count) = (0, 0);
            // The entry that goes on where the last one ended.
            let mut next = 0;
            for entry in bytes.as_chunks::<8>().0.iter().step_by(step) {
                let word = u64::from_be_bytes(*entry);
                if word & !COPIED == next && next != 0 {
                    count += 1;
                    next += size;
                    continue;
                }
                let entry = L2Entry::from_bits(word, 0);
                let Some((cluster, clusters)) = self.referred(entry, run.offset)? else {
                    continue;
                };
                if cluster == first + count {
                    count += clusters;
                } else {
                    counts.add(first, count, run.times);
                    (first, count) = (cluster, clusters);
                }
                next = (first + count) << bits;
            }
            counts.add(first, count, run.times);
        }
        Ok(())
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

    /// Changes COPIED flags in the L2 tables of an L1 table: clears them all, or sets those of the clusters that have become
    /// the only ones' own.
    pub(super) fn flag_tables(&self, l1: &[L1Entry], own: Option<&Set>) -> Result<(), ImageError> {
        let bits = self.geometry.cluster_bits();
        let step = if self.geometry.extended_l2() { 2 } else { 1 };
        let table_len = self.geometry.cluster_len();
        let mut bytes = Vec::new();
        for run in self.runs(l1)? {
            bytes.resize(usize::try_from(run.tables << bits).unwrap_or(0), 0);
            self.meta.storage().read_at(&mut bytes, run.offset)?;
            let mut changed: Option<(u64, u64)> = None;
            let write = |changed: &mut Option<(u64, u64)>, bytes: &[u8]| {
                let Some((first, count)) = changed.take() else {
                    return Ok(());
                };
                let at = |table: u64| usize::try_from(table << bits).unwrap_or(usize::MAX);
                let part = bytes.get(at(first)..at(first + count)).unwrap_or_default();
                let offset = HostOffset::new(run.offset + (first << bits));
                self.meta
                    .write(Kinds::ACTIVE_L2 | Kinds::INACTIVE_L2, offset, part)
            };
            for number in 0..run.tables {
                let start = usize::try_from(number << bits).unwrap_or(usize::MAX);
                let table = bytes.get_mut(start..start + table_len).unwrap_or_default();
                let mut any = false;
                for word in table.as_chunks_mut::<8>().0.iter_mut().step_by(step) {
                    let old = u64::from_be_bytes(*word);
                    let entry = L2Entry::from_bits(old, 0);
                    if old == 0 || entry.is_compressed() {
                        continue;
                    }
                    let new = match own {
                        None => old & !COPIED,
                        Some(own) => match entry.kind(self.rules) {
                            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset)
                                if own.contains(offset.get() >> bits) =>
                            {
                                old | COPIED
                            }
                            _ => old,
                        },
                    };
                    if new != old {
                        *word = new.to_be_bytes();
                        any = true;
                    }
                }
                match &mut changed {
                    Some((first, count)) if any && *first + *count == number => *count += 1,
                    _ if any => {
                        write(&mut changed, &bytes)?;
                        changed = Some((number, 1));
                    }
                    _ => {}
                }
            }
            write(&mut changed, &bytes)?;
        }
        Ok(())
    }

    /// Changes the COPIED flags of the active L1 table, and writes all of it.
    pub(super) fn flag_l1(&self, own: Option<&Set>) -> Result<(), ImageError> {
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
    pub(super) fn write_l1(&self) -> Result<(), ImageError> {
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
