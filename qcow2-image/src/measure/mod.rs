//! How long a file will be, before it is written.
//!
//! [`measure`] tells the length of the file of an image with certain [`CreateOptions`], empty or once a disk was
//! [copied](crate::copy) into it; to the byte, as long as what the source calls data is not full of zeros that the copy will leave
//! out. Whether it is can be [looked at](MeasureOptions::look), too. Nothing is written, and unless looking is asked for nothing
//! but metadata is read.
//!
//! ```
//! use qcow2_image::Image;
//! use qcow2_image::copy::{CopyOptions, copy};
//! use qcow2_image::create::CreateOptions;
//! use qcow2_image::measure::{MeasureOptions, measure};
//! use qcow2_io::{Memory, Storage};
//! use std::sync::Arc;
//!
//! let disk = Memory::with_len(1 << 30)?;
//! disk.write_at(&[7; 100], 5 << 20)?;
//! let options = CreateOptions::new(1 << 30).cluster_size(4096);
//! let measured = measure(&options, &MeasureOptions::new().source(&disk))?;
//!
//! let file = Arc::new(Memory::new());
//! Image::create(&file, &options.room_for(measured.required))?;
//! let image = Image::options().open(file.clone())?;
//! copy(&disk, &image, &CopyOptions::new())?;
//! image.close()?;
//! assert_eq!(file.len()?, measured.required);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod census;
mod count;
mod estimate;

use qcow2_format::Geometry;
use qcow2_io::{Extent, Storage, StorageError};
use thiserror::Error;

use self::census::Census;
use self::count::Count;
use crate::copy::{CopyError, CopyOptions, Target, copy};
use crate::create::{CreateError, CreateOptions, Footprint};
use crate::{BitmapInfo, Monitor};

pub use estimate::Estimate;

/// Extents that the source is asked for at a time.
const BATCH: usize = 1024;

/// How long files will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Measure {
    /// Length of the image file with what the source has, in bytes. Without a source: of an image that was just created.
    ///
    /// Exact if the image is created with [room for it](CreateOptions::room_for); else a refcount table that has to move may leave a
    /// gap of its size. For an image with a backing file, when the source's layers are not
    /// [told apart](MeasureOptions::layers): of one that maps every cluster.
    pub required: u64,
    /// Length of the image file once every cluster of the disk was written, in bytes.
    pub fully_allocated: u64,
    /// Length of the external data file in bytes, where there is one.
    pub data_file: Option<u64>,
    /// What `qemu-img measure` says in the same place. It counts all tables that a full image would have, and lets encryption
    /// take no refcounts.
    pub by_qemu: Estimate,
}

/// A bitmap that is to be carried along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapSize {
    /// Bytes of its name.
    pub name_len: u64,
    /// Bytes of the disk for each bit; a power of two.
    pub granularity: u64,
}

impl From<&BitmapInfo> for BitmapSize {
    fn from(bitmap: &BitmapInfo) -> Self {
        Self {
            name_len: bitmap.name.len() as u64,
            granularity: bitmap.granularity,
        }
    }
}

/// What is to be measured.
#[derive(Clone, Copy, Default)]
#[must_use]
pub struct MeasureOptions<'a> {
    source: Option<&'a dyn Storage>,
    look: bool,
    sparse: Option<u64>,
    layers: Option<u32>,
    bitmaps: &'a [BitmapSize],
    monitor: Option<&'a dyn Monitor>,
}

impl<'a> MeasureOptions<'a> {
    /// Of an empty image.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk that will be copied; it is the virtual size, too, unless the options say another. An image opened
    /// [at a snapshot](crate::ImageOptions::snapshot) will do.
    pub fn source(mut self, source: &'a dyn Storage) -> Self {
        self.source = Some(source);
        self
    }

    /// Reads the source's data and leaves out what a copy would leave out: pieces of zeros. Takes as long as a copy without
    /// its writes.
    pub fn look(mut self, on: bool) -> Self {
        self.look = on;
        self
    }

    /// The size of such pieces, as for a [copy](CopyOptions::sparse).
    pub fn sparse(mut self, bytes: u64) -> Self {
        self.sparse = Some(bytes);
        self
    }

    /// Counts only what the uppermost `layers` layers of the source have: the target gets a backing file with the rest.
    pub fn layers(mut self, layers: u32) -> Self {
        self.layers = Some(layers);
        self
    }

    /// The bitmaps that are to be carried along.
    pub fn bitmaps(mut self, bitmaps: &'a [BitmapSize]) -> Self {
        self.bitmaps = bitmaps;
        self
    }

    /// Who watches; of use where much has to be [looked](Self::look) at.
    pub fn monitor(mut self, monitor: &'a dyn Monitor) -> Self {
        self.monitor = Some(monitor);
        self
    }
}

impl std::fmt::Debug for MeasureOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MeasureOptions")
            .field("source", &self.source)
            .field("look", &self.look)
            .field("sparse", &self.sparse)
            .field("layers", &self.layers)
            .field("bitmaps", &self.bitmaps)
            .finish_non_exhaustive()
    }
}

/// Why something can't be measured.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MeasureError {
    /// There can be no such image.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The source does not tell its length or where its data is.
    #[error("the source fails at offset {offset:#x}")]
    Source {
        /// Where it was asked; bytes.
        offset: u64,
        /// Why.
        source: StorageError,
    },
    /// The source does not fit.
    #[error("the source has {source_len} bytes, the image will have {size}")]
    TooSmall {
        /// Bytes of the source.
        source_len: u64,
        /// Bytes of the image's disk.
        size: u64,
    },
    /// The source's data can't be read, or the monitor has ended it.
    #[error(transparent)]
    Look(#[from] CopyError),
}

/// Tells how long the file of an image with these options will be.
///
/// # Errors
///
/// Options that contradict each other or the format, and what the source reports.
pub fn measure(
    create: &CreateOptions,
    options: &MeasureOptions<'_>,
) -> Result<Measure, MeasureError> {
    let (footprint, found) = find(create, options)?;
    let all = Count::all(footprint.geometry(), footprint.size);
    let data = found.unwrap_or(Count::none(footprint.geometry()));
    Ok(Measure {
        required: footprint.len_with(data.tables(), data.data())?,
        fully_allocated: footprint.len_with(all.tables(), all.data())?,
        data_file: footprint.is_external.then_some(footprint.size),
        by_qemu: Estimate::new(&footprint, found, options.bitmaps),
    })
}

/// Tells what `qemu-img measure` says of an image with these options: upper bounds, also of images that could not be filled, for
/// want of refcounts.
///
/// # Errors
///
/// Options that contradict each other or the format, and what the source reports.
pub fn estimate(
    create: &CreateOptions,
    options: &MeasureOptions<'_>,
) -> Result<Estimate, MeasureError> {
    let (footprint, found) = find(create, options)?;
    Ok(Estimate::new(&footprint, found, options.bitmaps))
}

/// What the image would have, and what the source has, if there is one.
fn find(
    create: &CreateOptions,
    options: &MeasureOptions<'_>,
) -> Result<(Footprint, Option<Count>), MeasureError> {
    let asked = |offset| move |source| MeasureError::Source { offset, source };
    let source_len = match options.source {
        Some(source) => Some(source.len().map_err(asked(0))?),
        None => None,
    };
    let footprint = match (create.chosen_size(), source_len) {
        (None, Some(len)) => Footprint::new(&create.clone().size(len))?,
        _ => Footprint::new(create)?,
    };
    if let Some(source_len) = source_len.filter(|len| *len > footprint.size) {
        let size = footprint.size;
        return Err(MeasureError::TooSmall { source_len, size });
    }
    let geometry = footprint.geometry();
    let found = match (options.source, source_len) {
        (Some(_), _) if footprint.has_backing && options.layers.is_none() => {
            Some(Count::all(geometry, footprint.size))
        }
        (Some(source), Some(len)) if options.look && options.layers.is_none() => {
            Some(look(source, len, geometry, options)?)
        }
        (Some(source), Some(len)) => Some(count(source, len, geometry, options.layers)?),
        _ => None,
    };
    Ok((footprint, found))
}

/// Counts what the source knows to be data, and nothing else.
fn count(
    source: &dyn Storage,
    len: u64,
    geometry: Geometry,
    layers: Option<u32>,
) -> Result<Count, MeasureError> {
    let mut count = Count::none(geometry);
    let mut at = 0;
    while at < len {
        let found = source.extents(at..len, BATCH);
        let found = found.map_err(|source| MeasureError::Source { offset: at, source })?;
        for extent in &found {
            let range = extent.offset..extent.end().min(len);
            let is_ours = layers.is_none_or(|layers| extent.depth < layers);
            match extent.kind {
                _ if !is_ours => {}
                kind if !kind.reads_as_zeros() => count.add_data(range),
                // Where the backing file has something, an entry has to say that there are zeros.
                _ if layers.is_some() => count.add_entries(range),
                _ => {}
            }
        }
        match found.last().map(Extent::end) {
            Some(end) if end > at => at = end,
            _ => {
                // One that says nothing has data.
                count.add_data(at..len);
                at = len;
            }
        }
    }
    Ok(count)
}

/// Counts what a copy would store.
fn look(
    source: &dyn Storage,
    len: u64,
    geometry: Geometry,
    options: &MeasureOptions<'_>,
) -> Result<Count, MeasureError> {
    let census = Census::new(len, geometry.cluster_bits());
    let mut copying = CopyOptions::new().target_is_zero(true);
    if let Some(bytes) = options.sparse {
        copying = copying.sparse(bytes);
    }
    if let Some(monitor) = options.monitor {
        copying = copying.monitor(monitor);
    }
    copy(source, Target::Storage(&census), &copying)?;
    let mut count = Count::none(geometry);
    census.for_each(|range| count.add_data(range));
    Ok(count)
}

/// Tells how long a raw file with the disk of `source` will be; bytes.
///
/// # Errors
///
/// What the source reports.
pub fn measure_raw(source: &dyn Storage) -> Result<Measure, MeasureError> {
    let len = source
        .len()
        .map_err(|source| MeasureError::Source { offset: 0, source })?;
    let whole = len.next_multiple_of(512);
    Ok(Measure {
        required: len,
        fully_allocated: len,
        data_file: None,
        by_qemu: Estimate {
            required: whole,
            fully_allocated: whole,
            bitmaps: None,
        },
    })
}
