//! Feature bits that say how the image is, and what happens when it is not well.

use std::ops::Range;
use std::sync::Arc;

use qcow2_format::header::{Header, Version};
use qcow2_format::{HostCluster, HostOffset};
use qcow2_io::Storage;

use super::Metadata;
use crate::sync::atomic::Ordering;
use crate::sync::lock;
use crate::{Kinds, MetadataError, PointerKind, Purpose};

/// Fields of the header that change while an image is in use, each within one sector; bytes.
pub mod field {
    use std::ops::Range;

    /// The virtual size.
    pub const SIZE: Range<usize> = 24..32;
    /// Entries and place of the L1 table.
    pub const L1_TABLE: Range<usize> = 36..48;
    /// Place and length of the refcount table.
    pub const REFCOUNT_TABLE: Range<usize> = 48..60;
    /// Place and length of the refcount table, and the width of refcounts; with the features between them.
    pub const REFCOUNTS: Range<usize> = 48..100;
    /// Virtual size, and entries and place of the L1 table.
    pub const SIZE_AND_L1_TABLE: Range<usize> = 24..48;
    /// Number of snapshots, and place of their table.
    pub const SNAPSHOTS: Range<usize> = 60..72;
    /// Features that a reader must know.
    pub const INCOMPATIBLE: Range<usize> = 72..80;
    /// Features that a writer must know or clear.
    pub const AUTOCLEAR: Range<usize> = 88..96;
}

impl Metadata {
    /// Changes the header: `change` makes the new one, of which `range` is written, a part of the first sector. It counts once
    /// it is durable: the file is synced before, so that what it points at is there, and after.
    ///
    /// # Errors
    ///
    /// What the storage reports. The old fields have been written back then, so that the file says what memory does; if
    /// not even that worked, the image takes no more writes.
    pub fn switch_header(
        &self,
        range: Range<usize>,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), MetadataError> {
        self.check_writable()?;
        if self.rules.root_last {
            self.sync()?;
        }
        let mut header = lock(&self.header);
        let old = header.clone();
        let switched = self
            .write_fields(&mut header, range.clone(), change)
            .and_then(|()| self.sync());
        let Err(error) = switched else {
            return Ok(());
        };
        let restored = self
            .write_fields(&mut header, range, |header| *header = old.clone())
            .and_then(|()| self.sync());
        if restored.is_err() {
            *header = old;
            self.poisoned.store(true, Ordering::Release);
        }
        Err(error)
    }

    /// Makes all writes to the image file durable.
    ///
    /// # Errors
    ///
    /// What the storage reports. Nobody can tell then which of the writes since the last sync are there, so the image takes
    /// no more: what follows could rest on what is lost.
    pub(super) fn sync(&self) -> Result<(), MetadataError> {
        self.sync_file(&self.storage)
    }

    /// As [`sync`](Self::sync), for the image file or the data file.
    pub(super) fn sync_file(&self, file: &Arc<dyn Storage>) -> Result<(), MetadataError> {
        file.flush().map_err(|error| {
            self.poisoned.store(true, Ordering::Release);
            error.into()
        })
    }

    /// Writes a part of the first sector of a changed header, and keeps the change if that works.
    fn write_fields(
        &self,
        header: &mut Header,
        range: Range<usize>,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), MetadataError> {
        let mut changed = header.clone();
        change(&mut changed);
        let bytes = changed.encode()?;
        if let Some(part) = bytes.get(range.clone()) {
            let offset = HostOffset::new(range.start as u64);
            let len = part.len() as u64;
            if let Some(hit) = self.overlap.hit(offset, len, Kinds::MAIN_HEADER) {
                return Err(self.poison_by_overlap(offset, len, hit));
            }
            self.storage.write_at(part, range.start as u64)?;
        }
        *header = changed;
        Ok(())
    }

    /// Clears autoclear bits, durably, before anything else is written.
    ///
    /// # Errors
    ///
    /// What the storage reports.
    pub fn clear_autoclear(&self, keep: u64) -> Result<(), MetadataError> {
        let bits = self.header().autoclear.bits();
        if bits & !keep == 0 {
            return Ok(());
        }
        self.switch_header(field::AUTOCLEAR, |header| {
            header.autoclear = qcow2_format::header::AutoclearFeatures::from_bits(bits & keep);
        })
    }

    /// Whether the dirty bit is set on disk.
    pub fn is_dirty(&self) -> bool {
        self.dirty_bit.load(Ordering::Acquire)
    }

    /// Writes the dirty bit; the caller syncs.
    pub(super) fn set_dirty_bit(&self) -> Result<(), MetadataError> {
        if self.dirty_bit.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut header = lock(&self.header);
        self.write_fields(&mut header, field::INCOMPATIBLE, |header| {
            header.incompatible.set_dirty(true);
        })?;
        self.dirty_bit.store(true, Ordering::Release);
        Ok(())
    }

    /// Sets the dirty bit, durably: what follows can't be done in one write, and whoever finds it half done counts references.
    /// Version 2 has no such bit.
    ///
    /// # Errors
    ///
    /// What the storage reports.
    pub fn mark_dirty(&self) -> Result<(), MetadataError> {
        self.check_writable()?;
        if self.header().version == Version::V2 || self.is_dirty() {
            return Ok(());
        }
        self.set_dirty_bit()?;
        self.sync()
    }

    /// Makes all writes to the image file durable.
    ///
    /// # Errors
    ///
    /// What the storage reports; the image then takes no more writes.
    pub fn flush(&self) -> Result<(), MetadataError> {
        self.sync()
    }

    /// Takes no more writes: what is in memory and what is in the file can't be brought together again.
    pub fn give_up(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    /// Clears the dirty bit, durably; everything else must be durable before.
    ///
    /// # Errors
    ///
    /// What the storage reports.
    pub fn clear_dirty_bit(&self) -> Result<(), MetadataError> {
        if !self.dirty_bit.load(Ordering::Acquire) {
            return Ok(());
        }
        self.switch_header(field::INCOMPATIBLE, |header| {
            header.incompatible.set_dirty(false);
        })?;
        self.dirty_bit.store(false, Ordering::Release);
        Ok(())
    }

    /// Reports an entry that makes no sense. A writable image is marked as corrupt and takes no more writes.
    #[cold]
    pub fn corrupt(
        &self,
        what: &'static str,
        offset: HostOffset,
        detail: impl Into<String>,
    ) -> MetadataError {
        self.poison();
        self.told(MetadataError::Corrupt {
            what,
            offset,
            detail: detail.into(),
        })
    }

    /// A cluster that looked free holds metadata: as [`corrupt`](Self::corrupt).
    #[cold]
    pub fn in_use(&self, cluster: HostCluster, kinds: Kinds, wanted: Purpose) -> MetadataError {
        self.poison();
        self.told(MetadataError::InUse {
            offset: HostOffset::new(cluster.get() << self.geometry().cluster_bits()),
            cluster,
            kinds,
            wanted,
        })
    }

    /// An entry of a table points at where nothing of its kind can lie: as [`corrupt`](Self::corrupt).
    #[cold]
    pub fn bad_pointer(
        &self,
        what: PointerKind,
        index: u64,
        offset: HostOffset,
        found: HostOffset,
    ) -> MetadataError {
        self.poison();
        self.told(MetadataError::BadPointer {
            what,
            index,
            offset,
            found,
        })
    }

    /// Tells the watcher, once.
    fn told(&self, error: MetadataError) -> MetadataError {
        if let Some(watcher) = &self.watcher
            && !self.told.swap(true, Ordering::AcqRel)
        {
            watcher.tell(&error);
        }
        error
    }

    #[cold]
    pub(super) fn overlap_found(
        &self,
        offset: HostOffset,
        len: u64,
        (cluster, kinds): (HostCluster, Kinds),
    ) -> MetadataError {
        self.poison();
        self.told(MetadataError::Overlap {
            offset,
            len,
            cluster,
            kinds,
        })
    }

    /// The header itself would be overwritten by the header: nothing can be marked.
    #[cold]
    fn poison_by_overlap(
        &self,
        offset: HostOffset,
        len: u64,
        (cluster, kinds): (HostCluster, Kinds),
    ) -> MetadataError {
        self.poisoned.store(true, Ordering::Release);
        MetadataError::Overlap {
            offset,
            len,
            cluster,
            kinds,
        }
    }

    /// Takes no more writes, and says so in the header, once.
    fn poison(&self) {
        if self.read_only || self.poisoned.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut header = lock(&self.header);
        if header.version == Version::V2 || header.incompatible.corrupt() {
            return;
        }
        let marked = self.write_fields(&mut header, field::INCOMPATIBLE, |header| {
            header.incompatible.set_corrupt(true);
        });
        drop(header);
        if marked.is_ok() {
            // The error that led here is what the caller learns; this one would only hide it.
            let _ = self.storage.flush();
        }
    }

    /// Whether the image takes no more writes because it was found corrupt.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }
}
