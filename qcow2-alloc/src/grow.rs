//! Growth of the refcount structures, which count themselves.

use qcow2_cache::{Kinds, field};
use qcow2_format::geometry::{HOST_OFFSET_LIMIT, MAX_REFCOUNT_TABLE_BYTES};
use qcow2_format::{HostCluster, HostOffset, RefcountTableEntry, set_refcount};

use crate::state::State;
use crate::{AllocError, Allocator};

impl Allocator {
    /// Sees to it that blocks for these clusters exist. `false` if one had to be made: it may lie on them.
    pub(crate) fn make_blocks(
        &self,
        state: &mut State,
        first: u64,
        count: u64,
    ) -> Result<bool, AllocError> {
        let geometry = self.meta.geometry();
        let last = first + (count - 1);
        let (first_block, _) = State::locate(geometry, first);
        let (last_block, _) = State::locate(geometry, last);
        let mut complete = true;
        for block in first_block..=last_block {
            if block >= state.table.len() {
                self.grow_table(state, block)?;
                complete = false;
            }
            if state.block(block).is_none() {
                let start = block as u64 * geometry.refcounts_per_block();
                self.make_block(state, block, start.max(first))?;
                complete = false;
            }
        }
        Ok(complete)
    }

    /// Makes the block numbered `block` in the cluster `at`, which it describes itself. All clusters it describes are free.
    fn make_block(&self, state: &mut State, block: usize, at: u64) -> Result<(), AllocError> {
        let geometry = self.meta.geometry();
        let offset = HostOffset::new(at << geometry.cluster_bits());
        let kinds = self.meta.overlap().kinds(HostCluster::new(at));
        if at == 0 || !kinds.is_empty() {
            let what = if at == 0 { Kinds::MAIN_HEADER } else { kinds };
            let detail = format!("there is none, but cluster {at} holds {what}");
            return Err(self
                .meta
                .corrupt("the refcount block of a cluster", offset, detail)
                .into());
        }
        let size = geometry.cluster_size();
        self.meta
            .write_zeroes(Kinds::REFCOUNT_BLOCK, offset, size)?;
        self.meta.refcounts().forget(offset, size);
        self.meta
            .overlap()
            .add(offset, size, Kinds::REFCOUNT_BLOCK)?;
        let entry = RefcountTableEntry::from_bits(offset.get());
        let Some(slot) = state.table.get_mut(block) else {
            return Ok(());
        };
        *slot = entry;
        if let Err(error) = self.store(state, at, 1) {
            if let Some(slot) = state.table.get_mut(block) {
                *slot = RefcountTableEntry::default();
            }
            self.meta
                .overlap()
                .remove(offset, size, Kinds::REFCOUNT_BLOCK);
            return Err(error);
        }
        state.note_taken(geometry, at, 1);
        self.meta.change_refcount_table(block as u64, entry.bits());
        Ok(())
    }

    /// Moves the refcount table to where it has room for an entry numbered `block` and more. The new one lies, with the
    /// blocks that describe it, behind all that the old one describes.
    fn grow_table(&self, state: &mut State, block: usize) -> Result<(), AllocError> {
        let geometry = self.meta.geometry();
        let per_block = geometry.refcounts_per_block();
        let cluster_size = geometry.cluster_size();
        let first_new = state.table.len();
        let start = first_new as u64 * per_block;

        // As many blocks as it takes to describe themselves and the table that lists them; each round needs at least as many.
        let wanted = (block as u64 + 1).max(first_new as u64 * 3 / 2);
        let mut blocks = 1;
        let (entries, table_clusters) = loop {
            let entries = wanted.max(first_new as u64 + blocks);
            let table_clusters = (entries * 8).div_ceil(cluster_size);
            let needed = (blocks + table_clusters).div_ceil(per_block);
            if needed <= blocks {
                break (table_clusters * cluster_size / 8, table_clusters);
            }
            blocks = needed;
        };
        let bytes = table_clusters * cluster_size;
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(AllocError::RefcountTableTooLarge {
                needed: bytes,
                limit: MAX_REFCOUNT_TABLE_BYTES,
            });
        }
        let end = start + blocks + table_clusters;
        if end > HOST_OFFSET_LIMIT >> geometry.cluster_bits() {
            return Err(AllocError::FileTooLarge {
                limit: HOST_OFFSET_LIMIT,
            });
        }
        self.check_free_of_metadata(start, end)?;

        let at = |cluster: u64| HostOffset::new(cluster << geometry.cluster_bits());
        // The new table holds what the old one in memory does, so the blocks listed there must be on disk.
        self.meta.write_refcounts()?;
        let mut table = state.table.clone();
        table.resize(
            usize::try_from(entries).unwrap_or(first_new),
            RefcountTableEntry::default(),
        );
        for number in 0..blocks {
            let mut content = vec![0; geometry.cluster_len()];
            let described = start + number * per_block;
            for index in 0..per_block.min(end.saturating_sub(described)) {
                let index = usize::try_from(index).unwrap_or(usize::MAX);
                set_refcount(&mut content, geometry, index, 1);
            }
            let place = at(start + number);
            self.meta.refcounts().forget(place, cluster_size);
            self.meta.write(Kinds::REFCOUNT_BLOCK, place, &content)?;
            let index = usize::try_from(number)
                .unwrap_or(usize::MAX)
                .saturating_add(first_new);
            if let Some(entry) = table.get_mut(index) {
                *entry = RefcountTableEntry::from_bits(place.get());
            }
        }
        let new_offset = at(start + blocks);
        let content: Vec<u8> = table
            .iter()
            .flat_map(|entry| entry.bits().to_be_bytes())
            .collect();
        self.meta
            .write(Kinds::REFCOUNT_TABLE, new_offset, &content)?;

        let overlap = self.meta.overlap();
        overlap.add(at(start), blocks * cluster_size, Kinds::REFCOUNT_BLOCK)?;
        overlap.add(new_offset, bytes, Kinds::REFCOUNT_TABLE)?;
        // Syncs before and after.
        self.meta.switch_header(field::REFCOUNT_TABLE, |header| {
            header.refcount_table_offset = new_offset;
            header.refcount_table_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        })?;
        let (old_offset, old_len) = (state.table_offset, state.table.len() as u64 * 8);
        state.replace_table(new_offset, table);
        state.note_taken(geometry, start, end - start);
        self.meta.forget_refcount_table_changes();
        overlap.remove(old_offset, old_len, Kinds::REFCOUNT_TABLE);
        // The header that pointed at it is gone from disk already.
        self.release(
            geometry.host_cluster(old_offset),
            old_len.div_ceil(cluster_size),
            crate::Reason::Other,
        );
        Ok(())
    }

    fn check_free_of_metadata(&self, start: u64, end: u64) -> Result<(), AllocError> {
        let geometry = self.meta.geometry();
        for number in start..end {
            let kinds = self.meta.overlap().kinds(HostCluster::new(number));
            if !kinds.is_empty() {
                let offset = HostOffset::new(number << geometry.cluster_bits());
                let detail = format!("no refcount block describes it, but it holds {kinds}");
                return Err(self.meta.corrupt("a cluster", offset, detail).into());
            }
        }
        Ok(())
    }

    /// Bytes of the image file in use, for a look from outside.
    pub fn file_clusters(&self) -> u64 {
        self.lock().tail
    }
}
