//! Refcount structures that change their places, or get smaller.
//!
//! For all of this no request may be in flight, and everything must be in the file. A copy of what a pointer is about to lead to
//! is durable first, with its refcount; the refcount of the old place falls when the pointer has been changed durably.

use qcow2_cache::{Kinds, Purpose, field};
use qcow2_format::{HostCluster, HostOffset, RefcountBlock, RefcountTableEntry};
use qcow2_io::Storage as _;

use crate::state::State;
use crate::{AllocError, Allocator};

impl Allocator {
    fn offset_of(&self, cluster: u64) -> HostOffset {
        HostOffset::new(cluster << self.meta.geometry().cluster_bits())
    }

    /// Takes `count` free clusters for a structure, durably.
    fn take_for(&self, to: u64, count: u64) -> Result<(), AllocError> {
        self.meta.check_writable()?;
        self.cover(HostCluster::new(to + count))?;
        {
            let mut state = self.lock();
            for cluster in to..to + count {
                let value = self.refcount_at(&state, cluster)?;
                if value != 0 {
                    return Err(AllocError::InUse {
                        cluster: HostCluster::new(cluster),
                        value,
                    });
                }
            }
            self.check_unused(to, count, Purpose::Other)?;
            self.raise(&mut state, to, count)?;
            state.note_taken(self.meta.geometry(), to, count);
        }
        self.meta.commit(self)?;
        self.meta.write_refcounts()?;
        Ok(self.meta.flush()?)
    }

    /// Changes an entry of the refcount table, durably; if that fails, back again.
    fn write_entry(
        &self,
        state: &State,
        number: usize,
        entry: RefcountTableEntry,
    ) -> Result<(), AllocError> {
        let place = HostOffset::new(state.table_offset.get() + number as u64 * 8);
        let write = |entry: RefcountTableEntry| {
            self.meta
                .write(Kinds::REFCOUNT_TABLE, place, &entry.to_be_bytes())
                .and_then(|()| self.meta.flush())
        };
        let Err(error) = write(entry) else {
            return Ok(());
        };
        let old = state.table.get(number).copied().unwrap_or_default();
        if write(old).is_err() {
            self.meta.give_up();
        }
        Err(error.into())
    }

    /// Moves the refcount block numbered `number` to a free cluster.
    ///
    /// # Errors
    ///
    /// A cluster that is in use, and what the storage reports. The block is where it was then, or the image takes no more
    /// writes.
    pub fn move_block(&self, number: u64, to: HostCluster) -> Result<(), AllocError> {
        let number = usize::try_from(number).unwrap_or(usize::MAX);
        self.take_for(to.get(), 1)?;
        let geometry = self.meta.geometry();
        let size = geometry.cluster_size();
        let mut state = self.lock();
        let Some(old) = self.block_at(&state, number)? else {
            return Ok(());
        };
        let new = self.offset_of(to.get());
        let mut bytes = vec![0; geometry.cluster_len()];
        self.meta.storage().read_at(&mut bytes, old.get())?;
        self.meta.write(Kinds::REFCOUNT_BLOCK, new, &bytes)?;
        self.meta.flush()?;
        let map = self.meta.overlap();
        map.add(new, size, Kinds::REFCOUNT_BLOCK)?;
        let entry = RefcountTableEntry::from_bits(new.get());
        self.write_entry(&state, number, entry)?;
        if let Some(slot) = state.table.get_mut(number) {
            *slot = entry;
        }
        self.meta.refcounts().forget(old, size);
        self.meta.refcounts().forget(new, size);
        map.remove(old, size, Kinds::REFCOUNT_BLOCK);
        self.free_structure(&mut state, old, 1)
    }

    /// Moves the refcount table to free clusters.
    ///
    /// # Errors
    ///
    /// Clusters that are in use, and what the storage reports. The table is where it was then, or the image takes no more
    /// writes.
    pub fn move_table(&self, to: HostCluster) -> Result<(), AllocError> {
        let clusters = u64::from(self.meta.header().refcount_table_clusters);
        self.take_for(to.get(), clusters)?;
        let new = self.offset_of(to.get());
        let mut state = self.lock();
        let bytes: Vec<u8> = state
            .table
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        let (old, len) = (state.table_offset, bytes.len() as u64);
        self.meta.write(Kinds::REFCOUNT_TABLE, new, &bytes)?;
        let map = self.meta.overlap();
        map.add(new, len, Kinds::REFCOUNT_TABLE)?;
        self.meta.switch_header(field::REFCOUNT_TABLE, |header| {
            header.refcount_table_offset = new;
        })?;
        state.table_offset = new;
        map.remove(old, len, Kinds::REFCOUNT_TABLE);
        self.free_structure(&mut state, old, clusters)
    }

    fn free_structure(
        &self,
        state: &mut State,
        first: HostOffset,
        count: u64,
    ) -> Result<(), AllocError> {
        let geometry = self.meta.geometry();
        let first = geometry.host_cluster(first).get();
        for cluster in first..first + count {
            self.store(state, cluster, 0)?;
            state.note_free(geometry, cluster);
        }
        Ok(())
    }

    /// Blocks that count nothing but perhaps themselves, and how many clusters of the table are needed without them.
    fn needless(&self, state: &State) -> Result<(Vec<usize>, u64), AllocError> {
        let geometry = self.meta.geometry();
        let mut bytes = vec![0; geometry.cluster_len()];
        let (mut empty, mut entries) = (Vec::new(), 1);
        for number in 0..state.table.len() {
            let Some(place) = self.block_at(state, number)? else {
                continue;
            };
            self.meta.storage().read_at(&mut bytes, place.get())?;
            let own = geometry.host_cluster(place).get();
            let first = (number as u64) << geometry.refcount_block_bits();
            let mut others = (first..)
                .zip(RefcountBlock::new(&bytes, geometry).iter())
                .filter(|(cluster, count)| *count > 0 && *cluster != own);
            if others.next().is_none() {
                empty.push(number);
            } else {
                entries = number as u64 + 1;
            }
        }
        Ok((empty, geometry.clusters_for(entries * 8)))
    }

    /// Whether some blocks count nothing, or the table is longer than it must be.
    ///
    /// # Errors
    ///
    /// When a block can't be read.
    pub fn can_shrink(&self) -> Result<bool, AllocError> {
        let state = self.lock();
        let (empty, clusters) = self.needless(&state)?;
        Ok(!empty.is_empty() || clusters < self.meta.geometry().clusters_for(state.table_bytes()))
    }

    /// Gives up the blocks that count nothing but perhaps themselves, and the end of the table if no entry is in it.
    ///
    /// # Errors
    ///
    /// What the storage reports; the image takes no more writes if nobody knows what is in the file then.
    pub fn shrink_tables(&self) -> Result<(), AllocError> {
        let geometry = self.meta.geometry();
        let size = geometry.cluster_size();
        let map = self.meta.overlap();
        let mut state = self.lock();
        let (empty, clusters) = self.needless(&state)?;
        for number in empty {
            let Some(place) = self.block_at(&state, number)? else {
                continue;
            };
            self.write_entry(&state, number, RefcountTableEntry::default())?;
            if let Some(slot) = state.table.get_mut(number) {
                *slot = RefcountTableEntry::default();
            }
            self.meta.refcounts().forget(place, size);
            map.remove(place, size, Kinds::REFCOUNT_BLOCK);
            // If it counted itself, that is gone with it.
            self.free_structure(&mut state, place, 1)?;
            state.note_free(geometry, (number as u64) << geometry.refcount_block_bits());
        }
        let old = geometry.clusters_for(state.table_bytes());
        if clusters < old {
            self.meta.switch_header(field::REFCOUNT_TABLE, |header| {
                header.refcount_table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
            })?;
            state.truncate_table(clusters * size / 8);
            let rest = HostOffset::new(state.table_offset.get() + clusters * size);
            map.remove(rest, (old - clusters) * size, Kinds::REFCOUNT_TABLE);
            self.free_structure(&mut state, rest, old - clusters)?;
        }
        Ok(())
    }
}
