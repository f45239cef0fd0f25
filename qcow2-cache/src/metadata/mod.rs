//! The image file as a place for metadata: what is in memory of it, and the order in which changes reach the disk.
//!
//! A commit makes all that was done before it durable, in this order:
//!
//! 1. Releases that are scheduled, copies of the dirty L2 slices, and changed roots are taken, in this order. What a
//!    release lets go of is gone from the copies or the roots; what those point at has its refcount in the cache, and a new
//!    refcount block its own.
//! 2. Refcounts are written. One sync covers them, guest data, and the content of new tables. With lazy refcounts, the dirty
//!    bit is written instead of them.
//! 3. Entries of new refcount blocks, if there are any, go to the refcount table; another sync.
//! 4. The copies of the L2 slices and the changed L1 entries are written; a sync.
//! 5. What is released may now have its refcount lowered.
//!
//! Work goes on meanwhile: a change made after step 1 is for the next commit. A refcount block never holds a decrease that
//! is not safe, so its slices may be written at any time.

mod health;
mod order;
mod probe;
mod rewrite;
mod watcher;

use std::fmt;
use std::sync::Arc;

use qcow2_format::header::Header;
use qcow2_format::{Geometry, HostOffset};
use qcow2_io::{Storage, ZeroFlags};

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};
use crate::{
    GroupCommit, Kinds, MetadataError, OverlapChecks, OverlapMap, Room, Rules, TableCache,
};

pub use health::field;
use order::Roots;
pub use probe::{Probe, Step};
pub use watcher::Watcher;

/// How a [`Metadata`] is set up.
#[derive(Clone, Copy, Debug)]
pub struct MetadataOptions {
    /// No writes at all.
    pub read_only: bool,
    /// Refcounts are written at the end only, under the dirty bit.
    pub lazy_refcounts: bool,
    /// What writes are tested against.
    pub overlap_checks: OverlapChecks,
    /// Bytes in an L2 slice.
    pub l2_slice_bytes: usize,
    /// L2 slices that are kept.
    pub l2_slices: usize,
    /// Bytes in a slice of a refcount block.
    pub refcount_slice_bytes: usize,
    /// Slices of refcount blocks that are kept.
    pub refcount_slices: usize,
    /// Which rules of crash safety are kept; all, but for tests that show what each is good for.
    pub rules: Rules,
}

/// Metadata of one image: its file, the caches, the map of what lies where, and the commits.
pub struct Metadata {
    storage: Arc<dyn Storage>,
    /// The external data file.
    data: Option<Arc<dyn Storage>>,
    geometry: Geometry,
    options: MetadataOptions,
    read_only: bool,
    lazy_refcounts: bool,
    rules: Rules,
    header: Mutex<Header>,
    poisoned: AtomicBool,
    watcher: Option<Watcher>,
    probe: Option<Probe>,
    /// The watcher knows.
    told: AtomicBool,
    /// The dirty bit is set on disk.
    dirty_bit: AtomicBool,
    l2: TableCache,
    refcounts: TableCache,
    overlap: OverlapMap,
    roots: Mutex<Roots>,
    /// One writer of refcount slices at a time, so that an old copy never follows a new one.
    refcount_writer: Mutex<()>,
    /// Held while entries of the refcount table are written to where the header says that it is.
    table_writer: Mutex<()>,
    commits: GroupCommit<MetadataError>,
}

/// What a commit lets happen once it is durable that nothing points to some clusters any more.
pub trait Releases {
    /// What is taken along by one commit.
    type Batch;

    /// The releases scheduled so far: no pointer to their clusters is in the caches.
    fn take(&self) -> Self::Batch;

    /// The pointers are gone from the disk, too.
    ///
    /// # Errors
    ///
    /// When the refcounts can't be lowered; nothing but space is lost then.
    fn apply(&self, batch: Self::Batch) -> Result<(), MetadataError>;

    /// The commit failed: as if not taken.
    fn put_back(&self, batch: Self::Batch);
}

impl Metadata {
    /// Metadata of the image in `storage`, whose header is `header`. Nothing is read or written.
    pub fn new(
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        header: Header,
        options: &MetadataOptions,
    ) -> Self {
        // Extended entries have a second word, which is the same in each.
        let distance = if header.geometry.extended_l2() {
            0
        } else {
            header.geometry.cluster_size()
        };
        Self {
            storage,
            data,
            geometry: header.geometry,
            options: *options,
            read_only: options.read_only,
            lazy_refcounts: options.lazy_refcounts,
            rules: options.rules,
            poisoned: AtomicBool::new(false),
            watcher: None,
            probe: None,
            told: AtomicBool::new(false),
            dirty_bit: AtomicBool::new(header.incompatible.dirty()),
            l2: TableCache::new(options.l2_slice_bytes, options.l2_slices).with_distance(distance),
            refcounts: TableCache::new(options.refcount_slice_bytes, options.refcount_slices),
            overlap: OverlapMap::new(header.geometry, options.overlap_checks),
            roots: Mutex::default(),
            refcount_writer: Mutex::default(),
            table_writer: Mutex::default(),
            commits: GroupCommit::default(),
            header: Mutex::new(header),
        }
    }

    /// The same files and settings with another header, as if opened anew: all is to be durable, and this one not to be used
    /// any more. Geometry and version may differ.
    #[must_use]
    pub fn renewed(&self, header: Header) -> Self {
        let options = MetadataOptions {
            lazy_refcounts: header.compatible.lazy_refcounts(),
            ..self.options
        };
        let data = self.data.clone();
        let renewed = Self::new(Arc::clone(&self.storage), data, header, &options);
        renewed
            .watched(self.watcher.clone())
            .probed(self.probe.clone())
    }

    /// With someone who is told when the image is found corrupt.
    #[must_use]
    pub fn watched(mut self, watcher: Option<Watcher>) -> Self {
        self.watcher = watcher;
        self
    }

    /// The image file.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Where guest data lies: the external data file, or the image file.
    pub fn data(&self) -> &Arc<dyn Storage> {
        self.data.as_ref().unwrap_or(&self.storage)
    }

    /// Whether refcounts are written at the end only, under the dirty bit.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.lazy_refcounts
    }

    /// Whether guest data lies in a file of its own.
    pub fn has_external_data(&self) -> bool {
        self.data.is_some()
    }

    /// The image's geometry.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The slices of L2 tables.
    pub fn l2(&self) -> &TableCache {
        &self.l2
    }

    /// The slices of refcount blocks.
    pub fn refcounts(&self) -> &TableCache {
        &self.refcounts
    }

    /// Where metadata lies.
    pub fn overlap(&self) -> &OverlapMap {
        &self.overlap
    }

    /// Whether there are no writes.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Which rules are kept.
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// The header as it is now.
    pub fn header(&self) -> MutexGuard<'_, Header> {
        lock(&self.header)
    }

    /// Makes the L2 slice that holds `at` resident, if there is room.
    ///
    /// # Errors
    ///
    /// When the file can't be read.
    pub fn load_l2(&self, at: HostOffset) -> Result<Room, MetadataError> {
        Ok(self.l2.ensure(at, |offset, bytes| {
            self.storage.read_at(bytes, offset.get())
        })?)
    }

    /// Makes the slice of a refcount block that holds `at` resident. If dirty ones leave no room, they are written: the
    /// order allows that at any time.
    ///
    /// # Errors
    ///
    /// When the file can't be read or written.
    pub fn load_refcounts(&self, at: HostOffset) -> Result<(), MetadataError> {
        loop {
            let room = self.refcounts.ensure(at, |offset, bytes| {
                self.storage.read_at(bytes, offset.get())
            })?;
            match room {
                Room::Resident => return Ok(()),
                Room::Full => self.write_refcounts()?,
            }
        }
    }

    /// Whether writes are welcome.
    #[inline]
    pub fn is_writable(&self) -> bool {
        !self.read_only && !self.poisoned.load(Ordering::Relaxed)
    }

    /// As [`is_writable`](Self::is_writable), with the reason.
    ///
    /// # Errors
    ///
    /// [`MetadataError::ReadOnly`] or [`MetadataError::Poisoned`].
    #[inline]
    pub fn check_writable(&self) -> Result<(), MetadataError> {
        if self.read_only {
            return Err(MetadataError::ReadOnly);
        }
        if self.poisoned.load(Ordering::Relaxed) {
            return Err(MetadataError::Poisoned);
        }
        Ok(())
    }

    /// Tests a write of guest data in the image file against the map.
    ///
    /// # Errors
    ///
    /// [`MetadataError::Overlap`]; the image is marked as corrupt then.
    #[inline]
    pub fn check_data(&self, offset: HostOffset, len: u64) -> Result<(), MetadataError> {
        match self.overlap.hit(offset, len, Kinds::NONE) {
            None => Ok(()),
            Some(hit) => Err(self.overlap_found(offset, len, hit)),
        }
    }

    /// Writes metadata of some kind, if nothing of another kind lies there.
    ///
    /// # Errors
    ///
    /// [`MetadataError::Overlap`], and what the storage reports.
    pub fn write(
        &self,
        kind: Kinds,
        offset: HostOffset,
        bytes: &[u8],
    ) -> Result<(), MetadataError> {
        self.check(kind, offset, bytes.len() as u64)?;
        Ok(self.storage.write_at(bytes, offset.get())?)
    }

    /// Writes zeros where metadata of some kind will be, if nothing of another kind lies there.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub fn write_zeroes(
        &self,
        kind: Kinds,
        offset: HostOffset,
        len: u64,
    ) -> Result<(), MetadataError> {
        self.check(kind, offset, len)?;
        let range = offset.get()..offset.get().saturating_add(len);
        Ok(self.storage.write_zeroes(range, ZeroFlags::NONE)?)
    }

    fn check(&self, kind: Kinds, offset: HostOffset, len: u64) -> Result<(), MetadataError> {
        self.check_writable()?;
        match self.overlap.hit(offset, len, kind) {
            None => Ok(()),
            Some(hit) => Err(self.overlap_found(offset, len, hit)),
        }
    }
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata")
            .field("storage", &self.storage)
            .field("l2", &self.l2)
            .field("refcounts", &self.refcounts)
            .finish_non_exhaustive()
    }
}
