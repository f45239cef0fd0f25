//! What the allocator knows of the free space: as little as will do.

use qcow2_format::{Geometry, HostOffset, RefcountTableEntry};

/// Under the allocator's lock.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) table_offset: HostOffset,
    /// Entries of the refcount table, all of those that fit in its clusters.
    pub(crate) table: Vec<RefcountTableEntry>,
    /// For each block the lowest index whose refcount may be 0, of those that are not passed over; nothing is known of those above.
    first_maybe_free: Vec<u32>,
    /// All blocks below are full, or passed over.
    pub(crate) first_block: usize,
    /// The file has never been longer than this; clusters.
    pub(crate) virgin: u64,
    /// Nothing was handed out from here on; clusters.
    pub(crate) tail: u64,
    /// Clusters from here on are tried when no other free one is known: a table that grew leaves some free before itself.
    pub(crate) next: u64,
    /// The table has been looked at for entries that no sound image has.
    pub(crate) validated: bool,
}

impl State {
    pub(crate) fn new(
        table_offset: HostOffset,
        table: Vec<RefcountTableEntry>,
        file_clusters: u64,
    ) -> Self {
        Self {
            table_offset,
            first_maybe_free: vec![0; table.len()],
            table,
            first_block: 0,
            virgin: file_clusters,
            tail: file_clusters,
            next: file_clusters,
            validated: false,
        }
    }

    /// Puts a longer table in place of the old one.
    pub(crate) fn replace_table(&mut self, offset: HostOffset, table: Vec<RefcountTableEntry>) {
        self.table_offset = offset;
        self.first_maybe_free.resize(table.len(), 0);
        self.table = table;
    }

    /// Bytes of the table.
    pub(crate) fn table_bytes(&self) -> u64 {
        self.table.len() as u64 * 8
    }

    /// Cuts the table behind `entries`, all of which are empty.
    pub(crate) fn truncate_table(&mut self, entries: u64) {
        let entries = usize::try_from(entries).unwrap_or(usize::MAX);
        self.table.truncate(entries);
        self.first_maybe_free.truncate(entries);
        self.first_block = self.first_block.min(entries);
    }

    /// The block that has the refcount of `cluster`, if there is one, and the index in it.
    pub(crate) fn locate(geometry: Geometry, cluster: u64) -> (usize, u64) {
        let block = cluster >> geometry.refcount_block_bits();
        let index = cluster & (geometry.refcounts_per_block() - 1);
        (usize::try_from(block).unwrap_or(usize::MAX), index)
    }

    /// Where the block numbered `block` lies.
    pub(crate) fn block(&self, block: usize) -> Option<HostOffset> {
        let offset = self.table.get(block)?.block();
        (offset.get() != 0).then_some(offset)
    }

    /// The lowest index of a block whose refcount may be 0.
    pub(crate) fn maybe_free_from(&self, block: usize) -> u64 {
        self.first_maybe_free
            .get(block)
            .map_or(0, |index| (*index).into())
    }

    /// All refcounts of the block below `index` are known not to be 0, or are passed over.
    pub(crate) fn set_maybe_free_from(&mut self, block: usize, index: u64) {
        if let Some(known) = self.first_maybe_free.get_mut(block) {
            // At most 2^24 refcounts are in a block.
            *known = u32::try_from(index).unwrap_or(u32::MAX);
        }
    }

    /// `cluster` has been taken.
    pub(crate) fn note_taken(&mut self, geometry: Geometry, first: u64, count: u64) {
        let mut cluster = first;
        let end = first.saturating_add(count);
        while cluster < end {
            let (block, index) = Self::locate(geometry, cluster);
            let taken = (geometry.refcounts_per_block() - index).min(end - cluster);
            if self.maybe_free_from(block) == index {
                self.set_maybe_free_from(block, index + taken);
            }
            cluster += taken;
        }
        self.virgin = self.virgin.max(end);
        self.tail = self.tail.max(end);
        if (first..end).contains(&self.next) {
            self.next = end;
        }
    }

    /// What is free below `cluster` is not looked at until something below becomes free.
    pub(crate) fn pass_over(&mut self, geometry: Geometry, cluster: u64) {
        let (block, index) = Self::locate(geometry, cluster);
        self.first_block = self.first_block.max(block);
        if self.maybe_free_from(block) < index {
            self.set_maybe_free_from(block, index);
        }
    }

    /// `cluster` has become free.
    pub(crate) fn note_free(&mut self, geometry: Geometry, cluster: u64) {
        let (block, index) = Self::locate(geometry, cluster);
        if index < self.maybe_free_from(block) {
            self.set_maybe_free_from(block, index);
        }
        self.first_block = self.first_block.min(block);
    }
}
