//! Commits: what is written in which order.

use std::collections::BTreeMap;

use qcow2_format::HostOffset;

use super::{Metadata, Releases};
use crate::sync::lock;
use crate::table::DirtySlice;
use crate::{Kinds, MetadataError};

/// Entries of root tables that changed in memory, by their index: a table may move before they are written.
#[derive(Debug, Default)]
pub(super) struct Roots {
    l1: BTreeMap<u64, u64>,
    refcount_table: BTreeMap<u64, u64>,
}

impl Roots {
    /// Puts older changes back; newer ones count.
    fn put_back(&mut self, older: Self) {
        for (index, bits) in older.l1 {
            self.l1.entry(index).or_insert(bits);
        }
        for (index, bits) in older.refcount_table {
            self.refcount_table.entry(index).or_insert(bits);
        }
    }
}

impl Metadata {
    /// Notes that the L1 entry numbered `index` is `bits` from the next commit on. The table it points at must have its
    /// refcount in the cache and its content in the file.
    pub fn change_l1(&self, index: u64, bits: u64) {
        lock(&self.roots).l1.insert(index, bits);
    }

    /// Notes that the refcount table entry numbered `index` is `bits` from the next commit on. The block it points at must
    /// have its content in the file, and its own refcount in the cache.
    pub fn change_refcount_table(&self, index: u64, bits: u64) {
        lock(&self.roots).refcount_table.insert(index, bits);
    }

    /// Forgets changes of refcount table entries: the table has been written as a whole.
    pub fn forget_refcount_table_changes(&self) {
        lock(&self.roots).refcount_table.clear();
    }

    /// Waits until nobody writes to where the refcount table was before the header led elsewhere. From then on its old place is
    /// written by nobody.
    ///
    /// # Locking
    ///
    /// Those who write hold no lock of the allocator.
    pub fn await_table_writer(&self) {
        drop(lock(&self.table_writer));
    }

    /// Makes everything that was done before the call durable; shares the work with other callers.
    ///
    /// # Errors
    ///
    /// What the storage reports. Changes that did not get to disk are kept for the next commit.
    ///
    /// # Durability
    ///
    /// See the module: at each moment, and with any of the writes since the last sync lost, what is on disk is consistent.
    pub fn commit<R: Releases>(&self, releases: &R) -> Result<(), MetadataError> {
        if self.read_only {
            return Ok(());
        }
        self.commits
            .run(|| self.commit_now(releases), MetadataError::share)
    }

    fn commit_now<R: Releases>(&self, releases: &R) -> Result<(), MetadataError> {
        // In a poisoned image guest data in place may still be worth a sync, but no metadata is written.
        if self.is_poisoned() {
            self.sync_all()?;
            return Err(MetadataError::Poisoned);
        }
        let batch = releases.take();
        let batch = if self.rules.release_after_pointer {
            batch
        } else {
            releases.apply(batch)?;
            releases.take()
        };
        let copies = self.l2.take_dirty();
        let roots = std::mem::take(&mut *lock(&self.roots));
        let result = self.write_in_order(&copies, &roots);
        for copy in &copies {
            match result {
                Ok(()) => self.l2.written(copy),
                Err(_) => self.l2.not_written(copy),
            }
        }
        if let Err(error) = result {
            lock(&self.roots).put_back(roots);
            releases.put_back(batch);
            return Err(error);
        }
        releases.apply(batch)
    }

    fn write_in_order(&self, copies: &[DirtySlice], roots: &Roots) -> Result<(), MetadataError> {
        let pointers = !copies.is_empty() || !roots.l1.is_empty();
        let blocks = !roots.refcount_table.is_empty();
        if !self.rules.refcount_before_pointer {
            self.write_pointers(copies, &roots.l1)?;
            self.sync()?;
        }
        if self.lazy_refcounts {
            if (pointers || blocks) && self.rules.dirty_bit_first {
                self.set_dirty_bit()?;
            }
        } else {
            self.write_refcounts()?;
        }
        if self.rules.data_before_pointer || !pointers || blocks {
            self.sync_all()?;
        }
        if blocks {
            self.write_entries(Kinds::REFCOUNT_TABLE, &roots.refcount_table)?;
            self.sync()?;
        }
        if pointers {
            self.write_pointers(copies, &roots.l1)?;
            if self.rules.flush_is_complete {
                self.sync()?;
            }
            if !self.rules.data_before_pointer {
                self.sync_all()?;
            }
        }
        Ok(())
    }

    fn write_pointers(
        &self,
        copies: &[DirtySlice],
        l1: &BTreeMap<u64, u64>,
    ) -> Result<(), MetadataError> {
        self.write_slices(Kinds::ACTIVE_L2, copies)?;
        self.write_entries(Kinds::ACTIVE_L1, l1)
    }

    /// Guest data may lie in another file.
    fn sync_all(&self) -> Result<(), MetadataError> {
        if let Some(data) = &self.data {
            self.sync_file(data)?;
        }
        self.sync()
    }

    /// Writes the dirty slices of refcount blocks. They only hold what may be on disk already.
    ///
    /// # Errors
    ///
    /// What the storage reports; the slices stay dirty then.
    pub fn write_refcounts(&self) -> Result<(), MetadataError> {
        let _one = lock(&self.refcount_writer);
        let copies = self.refcounts.take_dirty();
        let result = self.write_slices(Kinds::REFCOUNT_BLOCK, &copies);
        for copy in &copies {
            match result {
                Ok(()) => self.refcounts.written(copy),
                Err(_) => self.refcounts.not_written(copy),
            }
        }
        result
    }

    /// Writes slices, neighbours in one go.
    fn write_slices(&self, kind: Kinds, copies: &[DirtySlice]) -> Result<(), MetadataError> {
        for run in
            copies.chunk_by(|a, b| a.offset.checked_add(a.bytes.len() as u64) == Some(b.offset))
        {
            match run {
                [] => {}
                [one] => self.write(kind, one.offset, &one.bytes)?,
                [first, ..] => {
                    let bytes: Vec<u8> = run
                        .iter()
                        .flat_map(|copy| copy.bytes.iter().copied())
                        .collect();
                    self.write(kind, first.offset, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Writes entries of 8 bytes each, neighbours in one go.
    fn write_entries(
        &self,
        kind: Kinds,
        entries: &BTreeMap<u64, u64>,
    ) -> Result<(), MetadataError> {
        let mut run: Option<(u64, Vec<u8>)> = None;
        let _one = (kind == Kinds::REFCOUNT_TABLE).then(|| lock(&self.table_writer));
        let table = {
            let header = self.header();
            if kind == Kinds::ACTIVE_L1 {
                header.l1_table_offset
            } else {
                header.refcount_table_offset
            }
        };
        for (index, bits) in entries {
            let place = table.get() + index * 8;
            match &mut run {
                Some((start, bytes)) if *start + bytes.len() as u64 == place => {
                    bytes.extend_from_slice(&bits.to_be_bytes());
                }
                _ => {
                    if let Some((start, bytes)) = run.take() {
                        self.write(kind, HostOffset::new(start), &bytes)?;
                    }
                    run = Some((place, bits.to_be_bytes().to_vec()));
                }
            }
        }
        match run {
            Some((start, bytes)) => self.write(kind, HostOffset::new(start), &bytes),
            None => Ok(()),
        }
    }

    /// Writes refcounts that lazy commits left in memory and clears the dirty bit: the last act of an image.
    ///
    /// # Errors
    ///
    /// What the storage reports; the dirty bit stays then.
    pub fn settle<R: Releases>(&self, releases: &R) -> Result<(), MetadataError> {
        if self.read_only {
            return Ok(());
        }
        self.commit(releases)?;
        // Blocks that came since, on behalf of the releases.
        let roots = std::mem::take(&mut *lock(&self.roots));
        self.write_last(&roots)
            .inspect_err(|_| lock(&self.roots).put_back(roots))?;
        self.clear_dirty_bit()
    }

    fn write_last(&self, roots: &Roots) -> Result<(), MetadataError> {
        self.write_refcounts()?;
        self.sync_all()?;
        if !roots.refcount_table.is_empty() {
            self.write_entries(Kinds::REFCOUNT_TABLE, &roots.refcount_table)?;
            self.sync()?;
        }
        Ok(())
    }
}
