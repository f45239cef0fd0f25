//! Changing what guest clusters are mapped to.

use qcow2_alloc::{Allocator, Reason};
use qcow2_cache::{Kinds, Purpose, Room, Step};
use qcow2_format::{ClusterKind, HostOffset, L1Entry, L2Entry};

use crate::mapping::Found;
use crate::{Image, ImageError};

impl Image {
    /// The L2 table for `guest`, writable: made if there is none, copied if others share it. The caller holds the lock of
    /// its L1 entry.
    fn writable_table(&self, guest: u64) -> Result<HostOffset, ImageError> {
        let index = self.l1_index(guest);
        let entry = self.l1.get(index);
        let old = entry.l2_table();
        if !self.geometry.is_cluster_aligned(old) {
            return Err(self.unaligned_table(guest, old));
        }
        if old.get() != 0 && entry.is_copied() {
            return Ok(old);
        }
        let alloc = self.alloc()?;
        let allocation = alloc.allocate_for(Purpose::L2Table, None)?;
        let table = allocation.offset();
        let size = self.cluster_size();
        if self.meta.has_lazy_refcounts() {
            // Tables are few; of one that isn't closed, an image then lacks the refcounts of data only.
            self.meta.write_refcounts()?;
        }
        self.meta.l2().forget(table, size);
        self.meta.before(Step::WriteL2)?;
        if old.get() == 0 {
            self.meta.write_zeroes(Kinds::ACTIVE_L2, table, size)?;
        } else {
            self.copy_table(old, table)?;
        }
        self.meta.before(Step::ChangeL1)?;
        self.meta
            .overlap()
            .add(table, size, Kinds::ACTIVE_L2)
            .map_err(qcow2_cache::MetadataError::from)?;
        allocation.keep();
        let entry = L1Entry::new(table, true);
        self.l1.set(index, entry);
        self.meta.change_l1(index, entry.bits());
        if old.get() == 0 {
            // What it holds is known without a look. If there is no room for that now, it is read later.
            let at = HostOffset::new(table.get() + self.in_table(guest));
            let _ = self.meta.l2().ensure(at, |_, bytes| {
                bytes.fill(0);
                Ok::<_, ImageError>(())
            });
        } else {
            // A snapshot may still have it; then it is known as its table, too.
            self.meta.overlap().remove(old, size, Kinds::ACTIVE_L2);
            alloc.release(self.geometry.host_cluster(old), 1, Reason::Replaced);
        }
        Ok(table)
    }

    /// Copies a table as it is in the cache, where it may be newer than on disk.
    fn copy_table(&self, from: HostOffset, to: HostOffset) -> Result<(), ImageError> {
        let mut bytes = Vec::with_capacity(self.geometry.cluster_len());
        let end = from.get() + self.cluster_size();
        let mut at = from;
        while at.get() < end {
            match self.meta.l2().get(at) {
                Some(word) => {
                    bytes.extend_from_slice(&word.to_be_bytes());
                    at = HostOffset::new(at.get() + 8);
                }
                None => self.load_slice(at)?,
            }
        }
        Ok(self.meta.write(Kinds::ACTIVE_L2, to, &bytes)?)
    }

    /// Makes the slice at `at` resident, with a commit if only that makes room.
    pub(crate) fn load_slice(&self, at: HostOffset) -> Result<(), ImageError> {
        while self.meta.load_l2(at)? == Room::Full {
            self.meta.commit(self.alloc()?)?;
        }
        Ok(())
    }

    /// Makes sure that the L2 table for `guest` is there and writable.
    pub(crate) fn prepare_table(&self, guest: u64) -> Result<(), ImageError> {
        let entry = self.l1.get(self.l1_index(guest));
        if entry.is_copied() && entry.l2_table().get() != 0 {
            return Ok(());
        }
        let index = self.l1_index(guest);
        let _table = self.tables.lock(index, index);
        self.writable_table(guest).map(drop)
    }

    /// Changes the entries of `count` clusters from the one at `guest` on, all of one L2 table: `change` gets the number
    /// of a cluster among them and its entry, and gives the new one, or none to leave it. What the old entries held and the new ones
    /// don't is released for `reason`. The caller holds the stripes of the clusters.
    ///
    /// # Errors
    ///
    /// When tables can't be read or made; the number of clusters that were changed is told beside the error.
    pub(crate) fn change(
        &self,
        guest: u64,
        count: u64,
        reason: Reason,
        mut change: impl FnMut(u64, L2Entry) -> Option<L2Entry>,
    ) -> Result<(), (u64, ImageError)> {
        let index = self.l1_index(guest);
        let _table = self.tables.lock(index, index);
        let table = self.writable_table(guest).map_err(|error| (0, error))?;
        self.meta
            .before(Step::ChangeL2)
            .map_err(|error| (0, error.into()))?;
        let alloc = self.alloc().map_err(|error| (0, error))?;
        let mut done = 0;
        while done < count {
            let first = guest + (done << self.geometry.cluster_bits());
            let changed = self
                .change_in_slice(
                    alloc,
                    table,
                    first,
                    count - done,
                    reason,
                    |number, entry| change(done + number, entry),
                )
                .map_err(|error| (done, error))?;
            done += changed;
        }
        Ok(())
    }

    /// Changes entries up to the end of one slice; tells how many.
    fn change_in_slice(
        &self,
        alloc: &Allocator,
        table: HostOffset,
        guest: u64,
        count: u64,
        reason: Reason,
        mut change: impl FnMut(u64, L2Entry) -> Option<L2Entry>,
    ) -> Result<u64, ImageError> {
        let cache = self.meta.l2();
        let entry_size = self.geometry.l2_entry_size();
        let at = HostOffset::new(table.get() + self.in_table(guest));
        let slice = cache.slice_bytes() as u64;
        let in_slice = at.get() & (slice - 1);
        let count = count.min((slice - in_slice) / entry_size);
        let step = usize::try_from(entry_size / 8).unwrap_or(1);
        let first = usize::try_from(in_slice / 8).unwrap_or(usize::MAX);
        let mut old = Vec::new();
        loop {
            let done = cache.update(at, |slice| {
                for (number, index) in (0..count).zip((first..).step_by(step)) {
                    let bitmap = if step == 2 { slice.get(index + 1) } else { 0 };
                    let before = L2Entry::from_bits(slice.get(index), bitmap);
                    let Some(after) = change(number, before) else {
                        continue;
                    };
                    if step == 2 {
                        slice.set_pair(index, after.word(), after.bitmap());
                    } else {
                        slice.set(index, after.word());
                    }
                    old.push((before, after));
                }
            });
            if done.is_some() {
                break;
            }
            self.load_slice(at)?;
        }
        for (before, after) in old {
            self.release_entry(alloc, before, after, reason);
        }
        Ok(count)
    }

    /// Releases what `before` held, unless `after` holds it, too.
    fn release_entry(&self, alloc: &Allocator, before: L2Entry, after: L2Entry, reason: Reason) {
        if self.rules.external_data {
            return;
        }
        let place = |entry: L2Entry| match entry.kind(self.rules) {
            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset) => Some(offset),
            _ => None,
        };
        match before.kind(self.rules) {
            ClusterKind::Normal(offset) | ClusterKind::ZeroAllocated(offset) => {
                if place(after) != Some(offset) {
                    alloc.release(self.geometry.host_cluster(offset), 1, reason);
                }
            }
            ClusterKind::Compressed(extent) => {
                let first = self.geometry.host_cluster(extent.offset);
                let last = extent.offset.get().saturating_add(extent.len_bytes - 1);
                let last = last >> self.geometry.cluster_bits();
                alloc.release(first, last - first.get() + 1, reason);
            }
            ClusterKind::Unallocated | ClusterKind::ZeroPlain => {}
        }
    }

    /// Whether the cluster found may be written where it is.
    #[inline]
    pub(crate) fn is_own(&self, found: Found) -> bool {
        // Clusters of a data file are never shared.
        found.table.is_copied() && (found.entry.is_copied() || self.rules.external_data)
    }
}
