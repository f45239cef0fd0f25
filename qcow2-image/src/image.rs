//! The virtual disk.

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use qcow2_alloc::Allocator;
use qcow2_cache::Metadata;
use qcow2_cache::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use qcow2_cache::sync::{Mutex, lock};
use qcow2_format::header::CompressionType;
use qcow2_format::{EntryRules, Geometry, GuestOffset, Header, HostOffset};
use qcow2_io::{
    Extent, FileIdentity, Limits, MAX_LEN, Op, Operation, Result as StorageResult, Storage,
    StorageError, StorageErrorKind, ZeroFlags,
};

use crate::bitmap::Bitmaps;
use crate::chain::Below;
use crate::compressed::Unpacked;
use crate::create::{CreateError, CreateOptions, write_image};
use crate::crypt::Crypt;
use crate::gate::Gate;
use crate::l1::L1Table;
use crate::mapping::Shape;
use crate::pack::Packer;
use crate::stripes::Stripes;
use crate::{ImageError, ImageOptions, Kinds, ResizeOptions};

/// Clusters that may wait for their release before a request sees to it by itself.
const WAITING_MAX: u64 = 4096;

/// A qcow2 image, seen as the disk that a guest sees.
///
/// It is a [`Storage`] of fixed length, so it can be read, written, discarded and flushed by any number of threads, can
/// be the backing file of another image, and lie in another image itself. [`resize`](Self::resize) changes its length.
///
/// Dropping it closes it; [`close`](Self::close) also tells whether that worked.
///
/// # Locking
///
/// Reads and in-place writes take no lock and wait for nothing but the storage. A request that maps clusters waits for
/// others that do the same to the same clusters. A resize waits until no request is in flight.
///
/// # Durability
///
/// That of [`Storage`]: what a [`flush`](Storage::flush) covers survives a crash. Without one, anything since the last may be
/// lost, but the image is always consistent.
pub struct Image {
    pub(crate) geometry: Geometry,
    pub(crate) rules: EntryRules,
    pub(crate) shape: Shape,
    /// The external data file is to be a valid raw image.
    pub(crate) raw_data: bool,
    pub(crate) compression: CompressionType,
    /// Bytes of the virtual disk.
    pub(crate) size: AtomicU64,
    pub(crate) meta: Arc<Metadata>,
    /// `None` in an image that is open for reading.
    pub(crate) alloc: Option<Allocator>,
    pub(crate) l1: L1Table,
    pub(crate) backing: Option<Arc<dyn Storage>>,
    /// What else is known of the backing file.
    pub(crate) below: Option<Below>,
    /// The name that it was opened by.
    pub(crate) path: Option<PathBuf>,
    /// The name that the external data file was opened by.
    pub(crate) data_path: Option<PathBuf>,
    /// Which file it is, if it is one.
    pub(crate) identity: Option<FileIdentity>,
    pub(crate) gate: Gate,
    /// By guest cluster: who may change its mapping.
    pub(crate) stripes: Stripes,
    /// By L1 index: who may change the L1 entry. Taken after `stripes`.
    pub(crate) tables: Stripes,
    pub(crate) unpacked: Unpacked,
    /// Whether much of what is mapped takes no space in the file; looked at when it is first asked for.
    pub(crate) maps_holes: OnceLock<bool>,
    /// `None` if guest data is in clear text.
    pub(crate) crypt: Option<Crypt>,
    pub(crate) packer: Packer,
    pub(crate) bitmaps: Bitmaps,
    /// The file may end within a sector.
    pub(crate) ends_in_sector: AtomicBool,
    pub(crate) discard: bool,
    pub(crate) discard_no_unref: bool,
    /// Snapshots whose tables can't be found are no reason not to write.
    pub(crate) pass_over_snapshots: bool,
    /// Discards reach the file.
    pub(crate) pass_request: bool,
    pub(crate) clean_interval: Option<Duration>,
    /// When slices were last given up.
    pub(crate) cleaned: Mutex<Option<Instant>>,
    /// The map of metadata is complete, so writes can be tested.
    pub(crate) ready: AtomicBool,
    pub(crate) getting_ready: Mutex<()>,
    pub(crate) closed: AtomicBool,
}

impl Image {
    /// How to open an image.
    pub fn options() -> ImageOptions {
        ImageOptions::default()
    }

    /// Writes a new image into a storage; what was there is lost. Its external data file, if it has one, comes with the
    /// options.
    ///
    /// # Errors
    ///
    /// Options that contradict each other or the format, and what the storage reports.
    pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<(), CreateError> {
        let data_file = options.chosen_data_storage().map(|data| &**data);
        write_image(storage, data_file, options)
    }

    /// Size of the virtual disk in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.meta.header().clone()
    }

    /// The geometry of the image.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether it is open for reading only.
    pub fn is_read_only(&self) -> bool {
        self.meta.is_read_only()
    }

    /// Whether it was found corrupt while it was open, and so takes no more writes.
    pub fn is_poisoned(&self) -> bool {
        self.meta.is_poisoned()
    }

    /// Which structures lie in the cluster of the file that holds the byte at `offset`, as far as this is known: all of them once the
    /// image was written to, before that the active tables. For tools that watch what an image does to its file.
    pub fn kinds_at(&self, offset: u64) -> Kinds {
        let cluster = self.geometry.host_cluster(HostOffset::new(offset));
        let known = self.meta.overlap().kinds(cluster);
        if !known.is_empty() {
            return known;
        }
        let header = self.meta.header();
        let size = self.geometry.cluster_size();
        let start = offset - offset % size;
        let l1 = header.l1_table_offset.get();
        if (l1..l1.saturating_add(self.l1.len() * 8)).contains(&offset) {
            return Kinds::ACTIVE_L1;
        }
        let tables = (0..self.l1.len()).map(|index| self.l1.get(index).l2_table().get());
        if start != 0 && tables.into_iter().any(|table| table == start) {
            return Kinds::ACTIVE_L2;
        }
        Kinds::NONE
    }

    /// Flushes, writes what lazy refcounts left over, and clears the dirty bit.
    ///
    /// # Errors
    ///
    /// What the storage reports. The image is consistent then; one with lazy refcounts will be recovered when it is next
    /// opened.
    pub fn close(self) -> Result<(), ImageError> {
        self.shut_down()
    }

    fn shut_down(&self) -> Result<(), ImageError> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let Some(alloc) = &self.alloc else {
            return Ok(());
        };
        self.fill_last_sector()?;
        self.flush_all()?;
        let stored = self.finish_bitmaps();
        let settled = self.meta.settle(alloc);
        stored?;
        Ok(settled?)
    }

    /// Makes everything durable and the refcounts on disk complete; the image stays open, and its bitmaps in use.
    pub(crate) fn settle(&self) -> Result<(), ImageError> {
        let Some(alloc) = &self.alloc else {
            return Ok(());
        };
        self.fill_last_sector()?;
        self.flush_all()?;
        Ok(self.meta.settle(alloc)?)
    }

    pub(crate) fn alloc(&self) -> Result<&Allocator, ImageError> {
        self.alloc
            .as_ref()
            .ok_or_else(|| qcow2_cache::MetadataError::ReadOnly.into())
    }

    /// Makes everything before the call durable, and what was released meanwhile free.
    pub(crate) fn flush_all(&self) -> Result<(), ImageError> {
        let Some(alloc) = &self.alloc else {
            return Ok(());
        };
        let refined = self.begin_refining()?;
        self.meta.commit(alloc)?;
        self.finish_refining(refined);
        self.reclaim()?;
        self.clean();
        Ok(())
    }

    /// Frees clusters whose release is durable, unless a request that may know them is in flight; then later. Must not be
    /// called with a pass.
    fn reclaim(&self) -> Result<(), ImageError> {
        let Some(alloc) = &self.alloc else {
            return Ok(());
        };
        if !alloc.has_ripe() {
            return Ok(());
        }
        let batch = alloc.take_ripe();
        if self.gate.drain() {
            self.forget_places();
            alloc.reclaim(batch)?;
        } else {
            alloc.keep_ripe(batch);
        }
        Ok(())
    }

    /// Released clusters are about to be free: what refers to them by their place must not any more.
    pub(crate) fn forget_places(&self) {
        self.unpacked.forget();
        self.packer.forget();
    }

    /// What a request owes the others once it is through: the caches must not fill up with what only a commit can remove.
    pub(crate) fn tidy(&self) -> Result<(), ImageError> {
        let Some(alloc) = &self.alloc else {
            return Ok(());
        };
        let l2 = self.meta.l2();
        if alloc.waiting() > WAITING_MAX || l2.dirty_count() * 2 > l2.capacity() {
            self.flush_all()?;
        }
        Ok(())
    }

    /// Gives up slices that were not used for a while.
    fn clean(&self) {
        let Some(interval) = self.clean_interval else {
            return;
        };
        let mut cleaned = lock(&self.cleaned);
        let now = Instant::now();
        match *cleaned {
            Some(last) if now.duration_since(last) < interval => {}
            None => *cleaned = Some(now),
            Some(_) => {
                *cleaned = Some(now);
                drop(cleaned);
                self.trim_caches();
            }
        }
    }

    /// Gives up the metadata in memory that was not used since this was last called. A flush does it by itself in the
    /// interval that the [cache options](crate::CacheOptions::clean_interval) say.
    pub fn trim_caches(&self) {
        self.meta.l2().trim();
        self.meta.refcounts().trim();
    }

    /// Whether a request lies within the disk.
    #[inline]
    pub(crate) fn is_inside(&self, offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end <= self.size.load(Ordering::Acquire))
    }

    /// The end of a request that lies within the disk.
    pub(crate) fn check_range(&self, offset: u64, len: u64) -> Result<u64, ImageError> {
        if len == 0 {
            // Nothing is nowhere too far.
            return Ok(offset);
        }
        let size = self.virtual_size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(end),
            _ => Err(ImageError::OutOfRange {
                offset: GuestOffset::new(offset),
                len,
                size,
            }),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Who wants to know closes it.
        let _ = self.shut_down();
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("virtual_size", &self.virtual_size())
            .field("geometry", &self.geometry)
            .field("storage", self.meta.storage())
            .finish_non_exhaustive()
    }
}

fn total(lens: impl Iterator<Item = usize>) -> u64 {
    lens.fold(0, |sum, len| sum.saturating_add(len as u64))
}

impl Storage for Image {
    fn len(&self) -> StorageResult<u64> {
        Ok(self.virtual_size())
    }

    fn read_vectored_at(&self, bufs: &mut [IoSliceMut<'_>], offset: u64) -> StorageResult<()> {
        let len = total(bufs.iter().map(|buf| buf.len()));
        self.read(bufs, offset, len)
            .map_err(|error| error.into_storage_error(Operation::Read, offset, len))
    }

    fn write_vectored_at(&self, bufs: &[IoSlice<'_>], offset: u64) -> StorageResult<()> {
        let len = total(bufs.iter().map(|buf| buf.len()));
        self.write(bufs, offset, len)
            .map_err(|error| error.into_storage_error(Operation::Write, offset, len))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> StorageResult<()> {
        let len = buf.len() as u64;
        self.read_one(buf, offset)
            .map_err(|error| error.into_storage_error(Operation::Read, offset, len))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> StorageResult<()> {
        let len = buf.len() as u64;
        self.write_one(buf, offset)
            .map_err(|error| error.into_storage_error(Operation::Write, offset, len))
    }

    fn write_zeroes(&self, range: Range<u64>, flags: ZeroFlags) -> StorageResult<()> {
        let len = check_order(Operation::WriteZeroes, &range)?;
        self.zero(range.clone(), flags)
            .map_err(|error| error.into_storage_error(Operation::WriteZeroes, range.start, len))
    }

    fn discard(&self, range: Range<u64>) -> StorageResult<()> {
        let len = check_order(Operation::Discard, &range)?;
        self.discard_all(range.clone())
            .map_err(|error| error.into_storage_error(Operation::Discard, range.start, len))
    }

    fn flush(&self) -> StorageResult<()> {
        self.flush_all()
            .map_err(|error| error.into_storage_error(Operation::Flush, 0, 0))
    }

    fn set_len(&self, len: u64) -> StorageResult<()> {
        let options = ResizeOptions {
            shrink: true,
            ..ResizeOptions::default()
        };
        self.resize(len, options)
            .map_err(|error| error.into_storage_error(Operation::SetLen, 0, len))
    }

    fn extents(&self, range: Range<u64>, max: usize) -> StorageResult<Vec<Extent>> {
        let len = check_order(Operation::Extents, &range)?;
        self.map_extents(range.clone(), max)
            .map_err(|error| error.into_storage_error(Operation::Extents, range.start, len))
    }

    fn allocated(&self) -> StorageResult<Option<u64>> {
        self.meta.storage().allocated()
    }

    fn limits(&self) -> Limits {
        Limits {
            optimal: self.geometry.cluster_size(),
            ..self.meta.data().limits()
        }
    }

    fn submit(&self, ops: &mut [Op<'_>]) {
        self.run_batch(ops);
    }
}

fn check_order(operation: Operation, range: &Range<u64>) -> StorageResult<u64> {
    let refuse = |kind| StorageError::new(operation, kind).at(range.start, 0);
    let Some(len) = range.end.checked_sub(range.start) else {
        return Err(
            refuse(StorageErrorKind::Invalid).with_detail("the range ends before it starts")
        );
    };
    if range.end > MAX_LEN {
        return Err(refuse(StorageErrorKind::OutOfRange).at(range.start, len));
    }
    Ok(len)
}
