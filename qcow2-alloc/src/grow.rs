//! Growth of the refcount structures, which count themselves.

use qcow2_cache::{Kinds, Purpose, Step, field};
use qcow2_format::geometry::{HOST_OFFSET_LIMIT, MAX_REFCOUNT_TABLE_BYTES};
use qcow2_format::{HostCluster, HostOffset, RefcountTableEntry, set_refcount};

use crate::state::State;
use crate::{AllocError, Allocator, Reason};

impl Allocator {
    /// Sees to it that blocks for these clusters, which are free, exist. `false` if the table had to be moved for that: the
    /// clusters may be in use then. Blocks that are made lie behind the clusters, so that these stay in one piece and follow
    /// what was handed out before.
    pub(crate) fn make_blocks(
        &self,
        state: &mut State,
        first: u64,
        count: u64,
    ) -> Result<bool, AllocError> {
        let geometry = self.meta.geometry();
        let (first_block, _) = State::locate(geometry, first);
        let (last_block, _) = State::locate(geometry, first + (count - 1));
        if last_block >= state.table.len() {
            self.move_table_for(state, last_block)?;
            return Ok(false);
        }
        let mut behind = first + count;
        for block in first_block..=last_block {
            self.meta.before(Step::FindBlock)?;
            while state.block(block).is_none() {
                let at = self.first_free(state, behind)?;
                let (own, _) = State::locate(geometry, at);
                if own >= state.table.len() {
                    self.move_table_for(state, own)?;
                    return Ok(false);
                }
                // The block's own cluster must be described, too, and be it by itself.
                let next = match state.block(own) {
                    None => own,
                    Some(_) => block,
                };
                self.make_block(state, next, at)?;
                behind = at + 1;
            }
        }
        Ok(true)
    }

    /// The first free cluster from `from` on, whatever the file's length.
    fn first_free(&self, state: &State, mut from: u64) -> Result<u64, AllocError> {
        let geometry = self.meta.geometry();
        loop {
            self.in_reach(from)?;
            let (_, index) = State::locate(geometry, from);
            let end = from - index + geometry.refcounts_per_block();
            match self.next_free(state, from, end)? {
                Some(found) => return Ok(found),
                None => from = end,
            }
        }
    }

    /// Makes the block numbered `block` in the free cluster `at`, which it or another block describes.
    fn make_block(&self, state: &mut State, block: usize, at: u64) -> Result<(), AllocError> {
        self.install_block(state, block, at)?;
        let stored = self.store(state, at, 1);
        if let Err(error) = stored.and_then(|()| Ok(self.meta.before(Step::LinkBlock)?)) {
            self.remove_block(state, block, at);
            return Err(error);
        }
        state.note_taken(self.meta.geometry(), at, 1);
        self.link_block(state, block);
        Ok(())
    }

    /// Writes an empty block and enters it in the table in memory.
    fn install_block(&self, state: &mut State, block: usize, at: u64) -> Result<(), AllocError> {
        let geometry = self.meta.geometry();
        let offset = HostOffset::new(at << geometry.cluster_bits());
        self.check_unused(at, 1, Purpose::RefcountBlock)?;
        let size = geometry.cluster_size();
        self.meta.before(Step::WriteBlock)?;
        self.meta
            .write_zeroes(Kinds::REFCOUNT_BLOCK, offset, size)?;
        self.meta.refcounts().forget(offset, size);
        self.meta
            .overlap()
            .add(offset, size, Kinds::REFCOUNT_BLOCK)?;
        let entry = RefcountTableEntry::from_bits(offset.get());
        if let Some(slot) = state.table.get_mut(block) {
            *slot = entry;
        }
        Ok(())
    }

    /// Enters a block in the table on disk, from the next commit on: now that its own refcount is in the cache.
    fn link_block(&self, state: &State, block: usize) {
        if let Some(offset) = state.block(block) {
            self.meta.change_refcount_table(block as u64, offset.get());
        }
    }

    /// Takes back what [`install_block`](Self::install_block) did.
    fn remove_block(&self, state: &mut State, block: usize, at: u64) {
        let geometry = self.meta.geometry();
        let offset = HostOffset::new(at << geometry.cluster_bits());
        if let Some(slot) = state.table.get_mut(block) {
            *slot = RefcountTableEntry::default();
        }
        let size = geometry.cluster_size();
        self.meta
            .overlap()
            .remove(offset, size, Kinds::REFCOUNT_BLOCK);
    }

    /// Makes room for a block numbered `block` in the table, and frees where the table was.
    fn move_table_for(&self, state: &mut State, block: usize) -> Result<(), AllocError> {
        let (old, count) = self.grow_table(state, block)?;
        if self.pass_discard().passes(Reason::Other) {
            // It is punched before it is used again.
            self.release(old, count, Reason::Other);
            return Ok(());
        }
        // No header on disk points at it, and a commit that was about to write there has ended.
        self.meta.await_table_writer();
        for number in old.get()..old.get() + count {
            if self.lower(state, number).is_err() {
                // Who frees it later will tell why that can't be.
                self.release(HostCluster::new(number), 1, Reason::Other);
            }
        }
        Ok(())
    }

    /// As [`move_table_for`](Self::move_table_for), where refcounts are about to be set: the old place is given back later.
    fn move_table_uncounted(&self, state: &mut State, block: usize) -> Result<(), AllocError> {
        let (old, count) = self.grow_table(state, block)?;
        self.release(old, count, Reason::Other);
        Ok(())
    }

    /// Moves the refcount table to where it has room for an entry numbered `block` and more. The new one lies, with the
    /// blocks that describe it, behind all that the old one and that block describe, so that what is being handed out
    /// can stay where it was to be. Gives the clusters of the old one: durably, nothing points at them any more.
    fn grow_table(
        &self,
        state: &mut State,
        block: usize,
    ) -> Result<(HostCluster, u64), AllocError> {
        let geometry = self.meta.geometry();
        let per_block = geometry.refcounts_per_block();
        let cluster_size = geometry.cluster_size();
        let old_entries = state.table.len() as u64;
        // Behind all that the file has, too: what no block describes is not always free in an image that is being recovered.
        let first_new = old_entries
            .max(state.tail.div_ceil(per_block))
            .max(block as u64 + 1);
        let start = first_new * per_block;

        // As many blocks as it takes to describe themselves, the table that lists them, and all other blocks once more: room for
        // what comes next, as QEMU leaves it. Each round needs at least as many.
        let most = MAX_REFCOUNT_TABLE_BYTES / 8;
        let known = state.table.iter().filter(|entry| entry.block().get() != 0);
        let known = known.count() as u64;
        let mut blocks = 1;
        let (entries, table_clusters) = loop {
            let end = first_new + blocks;
            let entries = end.max((end + end / 2).min(most));
            let table_clusters = (entries * 8).div_ceil(cluster_size);
            let needed = (known + blocks + table_clusters).div_ceil(per_block);
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
            usize::try_from(entries).unwrap_or(usize::MAX),
            RefcountTableEntry::default(),
        );
        self.meta.before(Step::WriteTableBlocks)?;
        let len = usize::try_from(blocks * cluster_size).unwrap_or(0);
        let mut content = vec![0; len];
        for (number, bytes) in (0..).zip(content.chunks_exact_mut(geometry.cluster_len())) {
            let described = start + number * per_block;
            for index in 0..per_block.min(end.saturating_sub(described)) {
                let index = usize::try_from(index).unwrap_or(usize::MAX);
                set_refcount(bytes, geometry, index, 1);
            }
            let index = usize::try_from(first_new + number).unwrap_or(usize::MAX);
            if let Some(entry) = table.get_mut(index) {
                *entry = RefcountTableEntry::from_bits(at(start + number).get());
            }
        }
        let first = at(start);
        self.meta.refcounts().forget(first, blocks * cluster_size);
        self.meta.write(Kinds::REFCOUNT_BLOCK, first, &content)?;
        let new_offset = at(start + blocks);
        let content: Vec<u8> = table
            .iter()
            .flat_map(|entry| entry.bits().to_be_bytes())
            .collect();
        self.meta.before(Step::WriteTable)?;
        self.meta
            .write(Kinds::REFCOUNT_TABLE, new_offset, &content)?;
        self.meta.before(Step::SwitchTable)?;

        let overlap = self.meta.overlap();
        overlap.add(at(start), blocks * cluster_size, Kinds::REFCOUNT_BLOCK)?;
        overlap.add(new_offset, bytes, Kinds::REFCOUNT_TABLE)?;
        // Syncs before and after.
        let switched = self.meta.switch_header(field::REFCOUNT_TABLE, |header| {
            header.refcount_table_offset = new_offset;
            header.refcount_table_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        });
        if let Err(error) = switched {
            overlap.remove(at(start), blocks * cluster_size, Kinds::REFCOUNT_BLOCK);
            overlap.remove(new_offset, bytes, Kinds::REFCOUNT_TABLE);
            return Err(error.into());
        }
        let (old_offset, old_len) = (state.table_offset, state.table.len() as u64 * 8);
        state.replace_table(new_offset, table);
        state.note_taken(geometry, start, end - start);
        self.meta.forget_refcount_table_changes();
        overlap.remove(old_offset, old_len, Kinds::REFCOUNT_TABLE);
        let old = geometry.host_cluster(old_offset);
        Ok((old, old_len.div_ceil(cluster_size)))
    }

    /// Makes the refcount blocks that are missing for the clusters below `end`, in clusters from `end` on, where nothing is.
    /// For an image whose refcounts are about to be set: that a cluster has no refcount does not mean that it is free.
    ///
    /// # Errors
    ///
    /// When the file can't grow or be written.
    pub fn cover(&self, end: HostCluster) -> Result<(), AllocError> {
        self.meta.check_writable()?;
        self.cover_below(&mut self.lock(), end.get())
    }

    /// As [`cover`](Self::cover), for who has the lock.
    pub(crate) fn cover_below(&self, state: &mut State, end: u64) -> Result<(), AllocError> {
        let geometry = self.meta.geometry();
        state.tail = state.tail.max(end);
        state.virgin = state.virgin.max(end);
        state.next = state.next.max(end);
        let Some(last) = end.checked_sub(1) else {
            return Ok(());
        };
        let (last_block, _) = State::locate(geometry, last);
        if last_block >= state.table.len() {
            self.move_table_uncounted(state, last_block)?;
        }
        for block in 0..=last_block {
            self.meta.before(Step::FindBlock)?;
            while state.block(block).is_none() {
                let at = state.tail;
                let (own, _) = State::locate(geometry, at);
                if own >= state.table.len() {
                    self.move_table_uncounted(state, own)?;
                    continue;
                }
                // The block's own cluster must be described, too, and be it by itself.
                let first = match state.block(own) {
                    None => own,
                    Some(_) => block,
                };
                self.make_block(state, first, at)?;
            }
        }
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

    /// The clusters of the file, up to the last one that it had when it was opened or that was handed out since.
    pub fn file_clusters(&self) -> u64 {
        self.lock().tail
    }
}
