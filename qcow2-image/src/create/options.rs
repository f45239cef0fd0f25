//! What a new image is to be like.

use std::fmt;
use std::sync::Arc;

use qcow2_format::header::{CompressionType, Version};
use qcow2_io::Storage;

use super::encryption::Encryption;

/// How much of a new or grown disk is laid out at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Preallocation {
    /// Nothing: clusters are allocated as they are written.
    #[default]
    Off,
    /// All tables; the data clusters have their place, but take no space.
    Metadata,
    /// All tables, and space is reserved for the data.
    Falloc,
    /// All tables, and zeros are written to all data clusters.
    Full,
}

impl Preallocation {
    /// The name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

impl fmt::Display for Preallocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Everything that can be chosen about a new image. The defaults are those of `qemu-img create`.
///
/// Nothing is judged here, only when the image is [written](super::write_image). Names are bytes, stored as they are: what
/// they mean is a matter of who opens the image.
///
/// ```
/// use qcow2_image::create::{CreateOptions, write_image};
///
/// let disk = qcow2_io::Memory::new();
/// let options = CreateOptions::new(10 << 30).cluster_size(131072).extended_l2(true);
/// write_image(&disk, None, &options)?;
/// # Ok::<(), qcow2_image::create::CreateError>(())
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct CreateOptions {
    pub(super) size: Option<u64>,
    pub(super) version: Version,
    pub(super) cluster_size: u64,
    pub(super) refcount_bits: u64,
    pub(super) preallocation: Preallocation,
    pub(super) lazy_refcounts: bool,
    pub(super) extended_l2: bool,
    pub(super) compression_type: CompressionType,
    pub(super) backing_file: Option<Vec<u8>>,
    pub(super) backing_format: Option<Vec<u8>>,
    pub(super) data_file: Option<Vec<u8>>,
    pub(super) data_file_storage: Option<Arc<dyn Storage>>,
    pub(super) data_file_raw: bool,
    pub(super) encryption: Encryption,
    pub(super) room: u64,
}

impl Default for CreateOptions {
    /// All defaults; the size must still be set.
    fn default() -> Self {
        Self {
            size: None,
            version: Version::V3,
            cluster_size: 65536,
            refcount_bits: 16,
            preallocation: Preallocation::Off,
            lazy_refcounts: false,
            extended_l2: false,
            compression_type: CompressionType::Zlib,
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_storage: None,
            data_file_raw: false,
            encryption: Encryption::default(),
            room: 0,
        }
    }
}

impl CreateOptions {
    /// All defaults for a disk of `size` bytes, see [`size`](Self::size).
    pub fn new(size: u64) -> Self {
        Self::default().size(size)
    }

    /// Judges the options: that an image with them can be [written](super::write_image).
    ///
    /// # Errors
    ///
    /// A rule that they break.
    pub fn check(&self) -> Result<(), super::CreateError> {
        super::plan::Plan::new(self).map(drop)
    }

    /// Virtual size in bytes; rounded up to sectors of 512 bytes. 0 is allowed.
    pub fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// Version of the format; 3 by default. Version 2 knows no features, 16-bit refcounts only, and no zero clusters.
    pub fn version(mut self, version: Version) -> Self {
        self.version = version;
        self
    }

    /// Bytes in a cluster, 65536 by default: a power of two from 512 to 2 MiB, with extended L2 entries from 16 KiB.
    pub fn cluster_size(mut self, bytes: u64) -> Self {
        self.cluster_size = bytes;
        self
    }

    /// Bits in a refcount: 1, 2, 4, 8, 16 (the default), 32 or 64. Snapshots need more than 1.
    pub fn refcount_bits(mut self, bits: u64) -> Self {
        self.refcount_bits = bits;
        self
    }

    /// How much is laid out at once; nothing by default. With a backing file only together with extended L2 entries. A
    /// [raw data file](Self::data_file_raw) makes it `Metadata` at least.
    pub fn preallocation(mut self, preallocation: Preallocation) -> Self {
        self.preallocation = preallocation;
        self
    }

    /// Whether writers may postpone refcount updates; needs version 3.
    pub fn lazy_refcounts(mut self, on: bool) -> Self {
        self.lazy_refcounts = on;
        self
    }

    /// Whether clusters are divided into 32 subclusters; needs version 3.
    pub fn extended_l2(mut self, on: bool) -> Self {
        self.extended_l2 = on;
        self
    }

    /// How compressed clusters will be compressed; another type than deflate needs version 3.
    pub fn compression_type(mut self, compression_type: CompressionType) -> Self {
        self.compression_type = compression_type;
        self
    }

    /// Name of the backing file, at most 1023 bytes, and of its format, such as `raw`, at most 15. The file is not looked at.
    pub fn backing_file(mut self, name: impl Into<Vec<u8>>, format: impl Into<Vec<u8>>) -> Self {
        self.backing_file = Some(name.into());
        self.backing_format = Some(format.into());
        self
    }

    /// Name of an external data file, as it is stored in the header; needs version 3. Its storage is given with
    /// [`data_file_storage`](Self::data_file_storage) or to [`write_image`](super::write_image).
    pub fn data_file(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.data_file = Some(name.into());
        self
    }

    /// The external data file itself. What is in it is lost when the image is written.
    pub fn data_file_storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.data_file_storage = Some(storage);
        self
    }

    /// Whether the external data file on its own is to be a raw image of the disk.
    pub fn data_file_raw(mut self, on: bool) -> Self {
        self.data_file_raw = on;
        self
    }

    /// Makes the refcount table so long that the file can grow to this length, in bytes, before the table has to move: what
    /// [`measure`](crate::measure::measure) tells of an image that is about to be filled. Matters where clusters are small: with the
    /// default ones the shortest table is enough for 16 TiB.
    pub fn room_for(mut self, file_bytes: u64) -> Self {
        self.room = file_bytes;
        self
    }

    /// The size that was set, in bytes, not rounded.
    pub fn chosen_size(&self) -> Option<u64> {
        self.size
    }

    /// Name and format of the backing file, as far as they were set.
    pub fn chosen_backing(&self) -> (Option<&[u8]>, Option<&[u8]>) {
        (self.backing_file.as_deref(), self.backing_format.as_deref())
    }

    /// Name of the external data file, if one was set.
    pub fn chosen_data_file(&self) -> Option<&[u8]> {
        self.data_file.as_deref()
    }

    /// The external data file, if it was given.
    pub fn chosen_data_storage(&self) -> Option<&Arc<dyn Storage>> {
        self.data_file_storage.as_ref()
    }

    /// What is laid out in the end: a raw data file needs metadata at least.
    pub(super) fn effective_preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            other => other,
        }
    }
}
